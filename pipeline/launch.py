"""Training as processes of its own: torchrun starts them, the stage that asked for them watches them.

``torch.distributed.run`` starts one worker a device, on one machine or on several that meet at a rendezvous.
A worker is a module of this package that is called with the path of a request, a JSON file. What it prints to
standard output as JSON is progress; anything else that the processes say is kept in a log.

The processes end with the one that started them: each reads its standard input, which ends then.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.processes import Finished, tell_log
from pipeline.artifacts import write_json
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.recipe import Launch

SHOWN_LINES = 40
"""Of the processes' log: torchrun's own account of a failure comes last and is long."""
ENDING_SECONDS = 40.0
"""How long torchrun has to end its workers; it kills them itself after 30."""


def torchrun_arguments(launch: Launch, module: str, request: Path) -> list[str]:
    """Arguments of ``python -m torch.distributed.run``."""
    arguments = [f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes}"]
    if launch.rendezvous is None:
        arguments.append("--standalone")
    else:
        arguments += ["--rdzv-backend=c10d", f"--rdzv-endpoint={launch.rendezvous}", "--rdzv-id=martlet"]
    return [*arguments, "-m", module, str(request)]


def launch_training(
    launch: Launch,
    module: str,
    request: dict[str, Any],
    work: Path,
    log: Path,
    report: Callable[[str], None],
    seconds: float | None = None,
) -> None:
    """Runs a worker module on all processes and waits for them.

    Args:
        launch: the recipe's section.
        module: such as ``pipeline.distill``; called with the path of the request.
        request: JSON values. A worker leaves its results in ``work`` and, when the user's input is wrong, one
            sentence in ``work / "error.txt"``.
        work: folder of the request and the results; with several machines, one that all of them see.
        log: file for what the processes say.
        report: receives their progress.
        seconds: how long they may take; None for any time.

    Raises:
        UserError: a worker failed, or time is up.
    """
    path, error_file = work / "request.json", work / "error.txt"
    write_json(path, request)
    error_file.unlink(missing_ok=True)
    arguments = torchrun_arguments(launch, module, path)
    if launch.nodes > 1:
        report(
            f"launch: waiting for {launch.nodes - 1} other machines at {launch.rendezvous}; "
            f"start there: {Path(sys.executable).name} -m torch.distributed.run {' '.join(arguments)}"
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        start = said.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.launch", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            errors="replace",
        )
        assert child.stdout is not None
        time_is_up = threading.Event()

        def give_up() -> None:
            time_is_up.set()
            end(child)

        clock = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, give_up)
        clock.daemon = True
        clock.start()
        try:
            for line in child.stdout:
                forward(line, report)
            status = child.wait()
        finally:
            clock.cancel()
            end(child)
    with log.open("rb") as written:
        written.seek(start)
        finished = Finished(status, written.read().decode(errors="replace"), log)
    tell_log(finished, ["torchrun", *arguments])
    if status == 0:
        return
    if time_is_up.is_set():
        raise UserError(
            f"distill.timeout_s: the training was not done after {seconds:g} s and was ended; "
            "the same command goes on from its last checkpoint."
        )
    if error_file.exists():
        raise UserError(error_file.read_text(encoding="utf-8").strip())
    error = UserError(
        f"launch: a training process failed with status {status}; its output is in {log}. "
        "The same command goes on from the last checkpoint."
    )
    error.add_note(finished.shown(SHOWN_LINES))
    raise error


def forward(line: str, report: Callable[[str], None]) -> None:
    """Passes a worker's line of progress on; other lines are none."""
    try:
        told = json.loads(line)
        text = Progress(**told["progress"]) if "progress" in told else str(told["line"])
    except (ValueError, KeyError, TypeError):
        return
    report(text)


def tell(line: str) -> None:
    """What a worker of rank 0 reports with: one line of JSON on standard output."""
    told: dict[str, Any] = {"line": str(line)}
    if isinstance(line, Progress):
        told["progress"] = {
            "what": line.split(":", 1)[0],
            "done": line.done,
            "total": line.total,
            "unit": "steps",
            "figures": line.figures,
            "seconds_left": line.seconds_left,
        }
    print(json.dumps(told), flush=True)


def end(child: "subprocess.Popen[str]") -> None:
    """Ends torchrun and, through it, its workers."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        child.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def end_with_parent(how: int) -> None:
    """Sends this process a signal when the one that holds its standard input's other end is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), how)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent(signal.SIGTERM)
    main(sys.argv[1:])

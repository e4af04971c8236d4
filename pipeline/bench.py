"""How each exported file runs on a CPU: one runtime, one process, real text as prompt."""

import contextlib
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export.processes import run_logged
from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.recipe import Recipe

STAGE = "device"
VERSION = 2


def run(store: Store, recipe: Recipe, exported: Artifact, text: Artifact) -> Artifact:
    """Measures every file of an export.

    Returns:
        ``device.json``: one entry a file, the keys of ``bench_worker.measure`` with file, format,
        quantization and bytes. ``reliable`` is false where tasks waited for the CPU more than
        ``bench.max_cpu_pressure`` allows, or the kernel cannot tell.

    Raises:
        UserError: a file cannot be run, or the held-out text is shorter than the prompt.
    """
    section = recipe.bench

    def make(output: Path, work: Path) -> None:
        held_out = np.load(text.path / "held_out.npy").reshape(-1)
        if len(held_out) < section.prompt_tokens:
            raise UserError(
                f"bench.prompt_tokens: {section.prompt_tokens} are asked for, but the held-out text has only "
                f"{len(held_out)} tokens; raise data.text.held_out_tokens or ask for fewer."
            )
        prompt = held_out[: section.prompt_tokens].tolist()
        results = []
        entries = json.loads((exported.path / "files.json").read_text(encoding="utf-8"))
        for number, entry in enumerate(entries):
            label = f"{entry['format']} {entry['quantization']}"
            what = f"bench: {label}, {section.repetitions} repetitions"
            store.report(Progress(what, number, len(entries), "files"))
            request = {
                "file": str(exported.path / entry["path"]),
                "prompt": prompt,
                "generated_tokens": section.generated_tokens,
                "repetitions": section.repetitions,
                "threads": section.threads,
            }
            with alone_on_this_machine(store):
                measured = _measure(request, work, store.log_file(f"bench {label}"))
            results.append(
                {
                    "file": Path(entry["path"]).name,
                    **{key: entry[key] for key in ("format", "quantization", "bytes")},
                    **measured,
                    "reliable": is_reliable(measured["cpu_pressure"], section.max_cpu_pressure),
                }
            )
        write_json(output / "device.json", results)

    return store.get_or_make(
        f"{STAGE}_{exported.stage.removeprefix('export_')}",
        VERSION,
        recipe.slice("bench"),
        {"exported": exported, "text": text},
        make,
    )


@contextlib.contextmanager
def alone_on_this_machine(store: Store) -> Iterator[None]:
    """Waits until no other run of this user measures on this machine: two would measure each other."""
    path = Path(tempfile.gettempdir()) / f"martlet-benchmark-{os.getuid()}.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            store.report("waiting: another run is measuring on this machine")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_reliable(cpu_pressure: float | None, max_cpu_pressure: float) -> bool:
    """Whether timings can be trusted: tasks waited for a CPU in at most so many per cent of the time; what
    the kernel does not count (None) cannot be trusted."""
    return cpu_pressure is not None and cpu_pressure <= max_cpu_pressure


def _measure(request: dict[str, Any], work: Path, log: Path) -> dict[str, Any]:
    """Runs ``pipeline.bench_worker``.

    Raises:
        UserError: it failed or was ended by a signal.
    """
    request_file, result_file = work / "request.json", work / "result.json"
    write_json(request_file, request)
    threads = str(request["threads"])
    finished = run_logged(
        [sys.executable, "-m", "pipeline.bench_worker", str(request_file), str(result_file)],
        log,
        {**os.environ, "OMP_NUM_THREADS": threads, "TVM_NUM_THREADS": threads},
    )
    if finished.returncode == 0:
        return json.loads(result_file.read_text(encoding="utf-8"))
    error = UserError(f"{Path(request['file']).name}: cannot be measured ({finished.reason()}).")
    error.add_note(finished.shown())
    raise error

"""What people see in a terminal: the live view, help, completion, and a conversation in a pseudo-terminal."""

import io
import logging
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console

from export.gguf import export_gguf
from flows.command_line import app, warnings_kept
from flows.live_view import LiveView
from pipeline.progress import Progress, readable_seconds

ROOT = Path(__file__).parents[2]
GROUP = typer.main.get_command(app)
COMMANDS: dict[str, typer.core.TyperCommand] = GROUP.commands  # type: ignore[attr-defined]
STORE: dict[str, typer.core.TyperCommand] = COMMANDS["store"].commands  # type: ignore[attr-defined]
MARTLET = ("-m", "flows.command_line")
LEAVES = {name: command for name, command in COMMANDS.items() if name != "store"}
LEAVES |= {f"store {name}": command for name, command in STORE.items()}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def say(view: LiveView, line: str, stage: str = "", state: str | None = None) -> None:
    record = logging.LogRecord("martlet", logging.INFO, "", 0, line, None, None)
    record.stage, record.state = stage, state
    view.handle(record)


def screen(view: LiveView) -> list[str]:
    console = Console(file=io.StringIO(), width=view.console.width, height=view.console.height)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.fixture
def view() -> LiveView:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=12)
    return LiveView(console, "Tiny  (tiny.yaml)", ["teacher", "distill", "export gguf"], ["release: here"])


def test_live_view_tells_what_each_stage_does(view: LiveView) -> None:
    with view:
        say(view, "teacher ...", "teacher", "running")
        say(view, "teacher: done", "teacher", "cached")
        say(view, "distill ...", "distill", "running")
        say(view, Progress("distill", 12, 48, "steps", "loss 3.250, 178 tok/s", 83.0), "distill")
        title, teacher, distill, export, foot = screen(view)
        say(view, "warning: a damaged artifact", "distill")
        say(view, "distill: done", "distill", "done")
    assert title.startswith("Tiny  (tiny.yaml)")
    assert teacher.split() == ["✓", "teacher", "from", "the", "store"]
    assert "distill" in distill
    assert "12/48 steps · 1 min 23 s left · loss 3.250, 178 tok/s" in distill
    assert "━━━━╸ " in distill  # a quarter of 18 cells
    assert export.split() == ["·", "export", "gguf"]
    assert foot == "release: here"
    assert "12/48 steps" not in "\n".join(screen(view))
    said = ESCAPES.sub("", view.console.file.getvalue())  # type: ignore[attr-defined]
    assert "warning: a damaged artifact" in said


def test_live_view_marks_what_failed(view: LiveView) -> None:
    view.__enter__()
    say(view, "distill ...", "distill", "running")
    view.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert re.search(r"✗ distill +failed after 0 s", "\n".join(screen(view)))


def test_live_view_marks_a_stage_whose_file_missed_a_gate(view: LiveView) -> None:
    with view:
        for line, state in (("...", "running"), ("done, 0.0 s", "done"), ("a gate was missed", "failed")):
            say(view, f"export gguf: {line}", "export gguf", state)
    assert re.search(r"✗ export gguf +failed after 0 s", "\n".join(screen(view)))
    assert view.said == []


def test_live_view_fits_a_low_screen_while_it_runs_and_shows_all_in_the_end() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=8)
    names = [f"stage {number}" for number in range(20)]
    view = LiveView(console, "Long", names, ["foot"])
    with view:
        for name in names[:18]:
            say(view, name, name, "running")
            say(view, name, name, "done")
        say(view, names[18], names[18], "running")
        running = screen(view)
    assert len(running) <= 8
    assert any(line.startswith("✓ 16 stages") or "stages" in line for line in running)
    assert any("stage 18" in line for line in running)
    assert all(any(line.split()[1:3] == name.split() for line in screen(view)) for name in names)


def test_live_view_counts_later_stages_on_a_low_screen() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=8)
    names = [f"stage {number}" for number in range(20)]
    view = LiveView(console, "Long", names, ["foot"])
    with view:
        say(view, "", names[0], "running")
        say(view, Progress("stage 0", 1_200, 4_000, "steps", "loss 3.250, 178 tok/s", 7_265.0), names[0])
        running = screen(view)
    assert len(running) == 7
    assert running[-1] == "foot"
    assert running[-2].split() == ["·", "16", "more"]
    assert "1,200/4,000 steps · 2 h 1 min left" in running[1]


def test_at_80_columns_rate_and_time_left_are_in_sight_and_places_in_whole() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    names = ["hidden states", "distill", *(f"stage {number}" for number in range(18)), "importance matrix"]
    places = [
        "release: /home/someone/releases/tiny",
        "stages: /home/someone/store",
        "logs: /home/someone/store/logs",
    ]
    view = LiveView(console, "Tiny", names, places)
    with view:
        assert screen(view)[0].endswith("starting, 0 s")
        say(view, "", "distill", "running")
        line = Progress("distill", 1_200, 4_000, "steps", "178 tok/s, loss 3.250, t 0.40", 725.0)
        say(view, line, "distill")
        running = screen(view)
        assert "1,200/4,000 steps · 12 min 5 s left · 178 tok/s" in running[2]
        assert [place for place in places if any(place in row for row in running[-2:])] == places
        assert len(running) < 24
        say(view, "waiting: logits are being made by another stage or run", "distill")
        assert "waiting: logits are being made" in screen(view)[2]
        assert not screen(view)[0].endswith("starting, 0 s")
        assert view.said == []


def test_warnings_of_libraries_go_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_kept(tmp_path / "warnings.log"):
        warnings.warn("`old` is deprecated", UserWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "")
    assert "UserWarning: `old` is deprecated" in (tmp_path / "warnings.log").read_text(encoding="utf-8")


def test_a_row_does_not_name_its_stage_twice(view: LiveView) -> None:
    with view:
        for line, shown in (
            ("export gguf: writing tiny-q8_0.gguf", "writing tiny-q8_0.gguf"),
            ("gguf: quantizing", "quantizing"),
            ("distill (cross_entropy): evaluating: the end", "evaluating: the end"),
            ("note: kept as it is", "note: kept as it is"),
        ):
            say(view, "", "export gguf", "running")
            say(view, line, "export gguf")
            assert [row for row in screen(view) if f"export gguf {shown} · 0 s" in row]


def test_a_narrower_screen_is_cleared_and_keeps_what_was_said(view: LiveView) -> None:
    with view:
        say(view, "warning: a damaged artifact", "distill")
        before = view.console.file.tell()  # type: ignore[attr-defined]
        view.live.refresh()
        unchanged = view.console.file.getvalue()[before:]  # type: ignore[attr-defined]
        view.console.width = 60
        view.live.refresh()
        said = view.console.file.getvalue()[before + len(unchanged) :]  # type: ignore[attr-defined]
    assert "\x1b[2J" not in unchanged
    assert said.startswith("\x1b[H\x1b[2J")
    assert "warning: a damaged artifact" in said


def test_progress_is_its_line() -> None:
    line = Progress("hidden states: train", 1_000, 4_000, "tokens", "210 tok/s", 7.4)
    assert line == "hidden states: train: 1,000 of 4,000 tokens, 210 tok/s, 7 s left"
    assert [readable_seconds(s) for s in (0.4, 59.4, 60, 3_599, 7_265)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 1 min",
    ]


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_command_has_an_example_that_it_understands(name: str) -> None:
    command = LEAVES[name]
    found = re.search(rf"Example: martlet {name}\b(.*)", command.help or "")
    assert found, f"martlet {name} --help shows no example"
    arguments = shlex.split(found[1].strip().rstrip("."))
    command.make_context(name, arguments)  # raises where an option or a value does not exist
    assert all((ROOT / word).exists() for word in arguments if word.startswith("recipes/"))


def test_without_arguments_it_says_what_to_do(martlet: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = martlet()
    assert (code, err) == (0, "")
    lines = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  martlet")]
    assert [line[0] for line in lines] == ["check", "ship", "chat"]
    for first, *arguments in lines:
        COMMANDS[first].make_context(first, arguments)
    assert (ROOT / lines[0][1]).is_file()


def test_the_shell_completes_commands_and_values() -> None:
    def completions(words: str, place: int) -> set[str]:
        program = "import sys; sys.argv = ['martlet']; from flows.command_line import main; main()"
        environment = {"_MARTLET_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        finished = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        return set(finished.stdout.split())

    assert {"check", "chat"} <= completions("martlet ch", 1)
    assert completions("martlet export model --format ", 4) == {"gguf", "mlc", "onnx"}


def test_bars_of_libraries_stay_away() -> None:
    program = """if True:
        import sys
        from flows.command_line import main
        sys.argv = ["martlet"]
        try:
            main()
        except SystemExit:
            from tqdm.auto import tqdm
            assert list(tqdm(range(3))) == [0, 1, 2]
    """
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "files"
    return export_gguf(tiny_model_dir, folder, "tiny", ["f16"], pre_tokenizer="smollm")[0]


class Terminal:
    """Python with these arguments in a pseudo-terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        main, other = pty.openpty()
        self.descriptor = main
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(other)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Reads until what was not matched before matches; that is taken away then."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, ESCAPES.sub("", self.seen), flags=re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, ESCAPES.sub("", self.seen), flags=re.DOTALL), self.seen
        self.seen = ESCAPES.sub("", self.seen)[found.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())


def take_terminal() -> None:
    """Makes standard input the controlling terminal, so that Ctrl-C typed there is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_in_a_terminal(tiny_gguf: Path) -> None:
    terminal = Terminal(*MARTLET, "chat", str(tiny_gguf.parent), "--max-tokens", "12", "--threads", "1")
    try:
        terminal.until(re.escape(tiny_gguf.name) + r".*/new starts over.*> ")
        terminal.type("What is rain?\r")
        first = terminal.until(
            r"\[(\d+) tokens read, [\d.]+ s to the first; (\d+) written, [\d.]+ tok/s\].*> "
        )
        terminal.type("And snow?\r")
        terminal.until(r"\[(\d+) tokens read.*?\].*> ")
        terminal.type("/new\r")
        terminal.until(r"A new conversation\..*> ")
        terminal.type("What is rain?\r")
        assert terminal.until(r"\[(\d+) tokens read.*?\].*> ")[1] == first[1]
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.descriptor)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(tiny_gguf: Path) -> None:
    terminal = Terminal(
        *MARTLET, "chat", str(tiny_gguf), "--max-tokens", "100000", "--threads", "1", "--temperature", "2"
    )
    try:
        terminal.until(r"> ")
        terminal.type("Talk for ever.\r")
        terminal.until(r"Talk for ever\.\r\n.{20}")
        terminal.type("\x03")
        terminal.until(r"tok/s\].*> ")
        terminal.type("/exit\r")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.descriptor)


@pytest.mark.parametrize("drawing", [False, True])
def test_ctrl_c_leaves_a_screen_that_has_ended(drawing: bool) -> None:
    """The view says what was stopped, and the sentence stands below it, also where Ctrl-C comes while it is
    being drawn, as by a thread that never ends."""
    program = """if True:
        import logging, sys, threading, time
        from rich.console import Console
        from flows.interrupts import closed_before_ending, ending_at_once
        from flows.live_view import LiveView
        view = LiveView(Console(stderr=True), "Tiny", ["teacher", "distill"], ["release: here"])
        record = logging.LogRecord("martlet", logging.INFO, "", 0, "distill ...", None, None)
        record.stage, record.state = "distill", "running"
        with ending_at_once(), view, closed_before_ending(view.interrupted):
            view.handle(record)
            if sys.argv[1] == "True":
                view.live._lock.acquire()
            print("ready", flush=True)
            time.sleep(60)
    """
    terminal = Terminal("-c", program, str(drawing))
    try:
        terminal.until("ready")
        terminal.type("\x03")
        assert terminal.process.wait(20) == 130
        sentence = re.escape("martlet: interrupted; the same command goes on where this one stopped.")
        shown = r".*■ distill +stopped after 0 s\s+release: here\s*\n" if not drawing else ".*"
        terminal.until(rf"{shown}{sentence}\r\n$")
    finally:
        terminal.process.kill()
        os.close(terminal.descriptor)

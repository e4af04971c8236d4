"""Why a child process failed, in the words of the sentence that ends a command."""

import logging
import sys
import time
from pathlib import Path

import pytest

from export.errors import ExportError
from export.processes import at_most, logger, run_logged

KILLED = (
    "the process was ended by {}, from outside or by the kernel where memory is short; start the same "
    "command again"
)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('loading'); print('no such tensor.'); sys.exit(3)", "no such tensor"),
        ("sys.exit(3)", "it ended with status 3 and said nothing"),
        (
            "print('assertion failed', flush=True); print('stack', flush=True); os.abort()",
            "the process was ended by SIGABRT: assertion failed",
        ),
        ("os.abort()", "the process was ended by SIGABRT: it said nothing"),
        ("print('half', flush=True); os.kill(os.getpid(), signal.SIGKILL)", KILLED.format("SIGKILL")),
        ("os.kill(os.getpid(), signal.SIGTERM)", KILLED.format("SIGTERM")),
    ],
)
def test_the_reason(program: str, reason: str) -> None:
    finished = run_logged([sys.executable, "-c", f"import os, signal, sys; {program}"])
    assert finished.reason() == reason


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    program = f"import pathlib, time; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    command = [sys.executable, "-c", program]
    with at_most(0.2, "export.timeout_s"), pytest.raises(ExportError) as refusal:
        run_logged(command)
    assert str(refusal.value) == "a process took longer than export.timeout_s, 0.2 s; raise it."
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()
    assert run_logged(command).returncode == 0


def test_what_it_said_goes_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger.name):
        run_logged([sys.executable, "-c", "print('one'); print('two')"], tmp_path / "x.log")
        run_logged([sys.executable, "-c", "pass"])
    (said,) = caplog.messages
    first, *lines = said.splitlines()
    assert first.endswith(f" said (the whole output is in {tmp_path / 'x.log'}):")
    assert lines == ["one", "two"]

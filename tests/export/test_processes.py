"""Why a child process failed, in the words of the sentence that ends a command."""

import sys

import pytest

from export.processes import run_logged

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

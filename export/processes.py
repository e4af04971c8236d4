"""Child processes whose output is kept in a file and shown when they fail."""

import contextlib
import logging
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from export.errors import ExportError

logger = logging.getLogger(__name__)
"""What child processes said, a record each when they have ended, for whoever keeps a log of a whole run."""

SHOWN_LINES, LOGGED_LINES = 20, 400
_limit: ContextVar[tuple[float | None, str]] = ContextVar("limit", default=(None, ""))
KILLED = (signal.SIGKILL, signal.SIGTERM)


@dataclass(frozen=True)
class Finished:
    """A child process that has ended.

    Attributes:
        returncode: its exit status; negative when a signal ended it.
        output: what it wrote to standard output and standard error.
        log: the file that holds it; None when nobody asked for one.
    """

    returncode: int
    output: str
    log: Path | None

    def reason(self) -> str:
        """Why it failed, as part of a sentence: its last line. What a failed assertion says comes first, and
        a trace of the stack follows, so of a process that a signal ended it is the first. What it said last
        is not why, if it was killed."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        if self.returncode < 0:
            name = signal.Signals(-self.returncode).name
            if -self.returncode in KILLED:
                return (
                    f"the process was ended by {name}, from outside or by the kernel where memory is short; "
                    "start the same command again"
                )
            said = lines[0].rstrip(".") if lines else "it said nothing"
            return f"the process was ended by {name}: {said}"
        if not lines:
            return f"it ended with status {self.returncode} and said nothing"
        return lines[-1].rstrip(".")

    def shown(self, most: int = SHOWN_LINES, who: str = "The process that failed") -> str:
        """The end of its output, so many lines of it, and where all of it is, for people who look for the
        cause."""
        lines = self.output.rstrip().splitlines()
        where = f"the whole output is in {self.log}" if self.log is not None else "its output"
        return "\n".join([f"{who} said ({where}):", *lines[-most:]])


@contextlib.contextmanager
def at_most(seconds: float, setting: str) -> Iterator[None]:
    """While it lasts, a child process that takes longer is ended.

    Args:
        seconds: how long each may take.
        setting: what the user calls that, for the sentence of the ``ExportError``.
    """
    token = _limit.set((seconds, setting))
    try:
        yield
    finally:
        _limit.reset(token)


def run_logged(
    command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Finished:
    """Runs a command to its end, without standard input.

    Args:
        command: the program and its arguments; no shell sees them.
        log: file to append the output to while it is written, after a line with time and command.
        environment: all of its environment variables; this process's by default.

    Raises:
        ExportError: it took longer than ``at_most`` allows.
    """
    finished = _finished(command, log, environment)
    tell_log(finished, command)
    return finished


def tell_log(finished: Finished, command: Sequence[str]) -> None:
    """Puts what a child process said, if anything, into this module's log."""
    if finished.output.strip() and logger.isEnabledFor(logging.INFO):
        logger.info("%s", finished.shown(LOGGED_LINES, " ".join([Path(command[0]).name, *command[1:]])))


def _finished(command: Sequence[str], log: Path | None, environment: Mapping[str, str] | None) -> Finished:
    if log is None:
        with tempfile.TemporaryFile() as file:
            status = _run(command, file.fileno(), environment)
            file.seek(0)
            return Finished(status, file.read().decode(errors="replace"), None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        status = _run(command, file.fileno(), environment)
    with log.open("rb") as file:
        file.seek(start)
        return Finished(status, file.read().decode(errors="replace"), log)


def _run(command: Sequence[str], output: int, environment: Mapping[str, str] | None) -> int:
    seconds, setting = _limit.get()
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=seconds,
        ).returncode
    except subprocess.TimeoutExpired:
        raise ExportError(f"a process took longer than {setting}, {seconds:g} s; raise it.") from None

"""Ctrl-C, SIGTERM and cancellation: child processes end with the run that started them.

Nothing is lost by ending at once: checkpoints and finished stages are on disk, and what is half-made has no
final name and is thrown away by the next run.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

from pipeline.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "martlet: interrupted; the same command goes on where this one stopped."
SERVER = "prefect.server.api.server"
"""What the command line of Prefect's embedded server holds."""
SERVER_GRACE_SECONDS = 3.0
"""In which Prefect itself starts its server again, where its port was taken."""

CLOSING_SECONDS = 1.0
"""How long an end waits for the screen to be drawn a last time; who draws may be what was interrupted."""

_ending = threading.Lock()
_closing: list[Callable[[], None]] = []


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """While it lasts, SIGINT and SIGTERM end this process and its children, whatever else handles them.

    Prefect installs a SIGTERM handler of its own for the time of a flow, which unwinds through its server;
    any Python handler waits for the main thread to leave library code. So the signal is not taken from a
    handler but from the interpreter's wake-up descriptor, which is written to the moment the signal comes,
    by a thread that waits for it.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    thread = threading.Thread(target=_wait_for_signal, args=(receiver,), daemon=True, name="interrupts")
    thread.start()
    earlier_descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_descriptor)
        sender.close()
        thread.join()
        receiver.close()


@contextlib.contextmanager
def leashed_children() -> Iterator[None]:
    """Child processes end with this process even where it has no say in it, as after SIGKILL: a small process
    beside it (``leash_process.py``) sees its pipe close and kills what carries this run's name. Within
    another such time it changes nothing."""
    if "MARTLET_RUN" in os.environ:
        yield
        return
    name = os.environ["MARTLET_RUN"] = uuid.uuid4().hex
    leash = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("leash_process.py")), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != "MARTLET_RUN"},
    )
    try:
        yield
    finally:
        leash.kill()
        leash.communicate()
        del os.environ["MARTLET_RUN"]


@contextlib.contextmanager
def ending_with_server(log: Path) -> Iterator[None]:
    """While it lasts, this process ends with one sentence when Prefect's embedded server has ended.

    Args:
        log: file that holds what the server said, for the sentence.

    Prefect itself does not notice: its client tries again for a minute and then raises what httpx raised, and
    while it waits for a server to start it waits for a dead one, too, until its time is over.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch_server, args=(over, log), daemon=True, name="server-watch")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def closed_before_ending(close: Callable[[], None]) -> Iterator[None]:
    """While it lasts, ``close`` is called before this process ends at once, so that a live view does not stay
    on the screen as if it still moved."""
    _closing.append(close)
    try:
        yield
    finally:
        _closing.remove(close)


def end_now(sentence: str = INTERRUPTED, code: int = EXIT_INTERRUPTED) -> None:
    """Ends this process with a sentence and an exit code (by default an interrupt's), its children first.

    They are stopped before they are killed: a stage that saw its child die would report that as a failure, or
    start the next child.
    """
    if not _ending.acquire(blocking=False):
        return
    stopped: set[int] = set()
    while new := {child.pid for child in psutil.Process().children(recursive=True)} - stopped:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= new
    for close in _closing:
        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        thread.join(CLOSING_SECONDS)
    Console(stderr=True).show_cursor()  # the live view hides it
    # Not through a live view that could not be closed: it would print above itself, and wait for itself.
    print(sentence, file=getattr(sys.stderr, "rich_proxied_file", sys.stderr), flush=True)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


@contextlib.contextmanager
def ending_children() -> Iterator[None]:
    """Kills the processes that were started inside it when it is left by a cancellation or another exit
    (Prefect's ``TerminationSignal``, ``KeyboardInterrupt``), which Prefect itself does not do."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        yield
    except Exception:
        raise
    except BaseException:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in before:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        raise


def _handle(number: int, frame: FrameType | None) -> None:
    end_now()


def _wait_for_signal(receiver: socket.socket) -> None:
    while numbers := receiver.recv(64):
        if any(number in SIGNALS for number in numbers):
            end_now()


def _watch_server(over: threading.Event, log: Path) -> None:
    server: psutil.Process | None = None
    missing_since = 0.0
    while not over.wait(1):
        if server is not None and _lives(server):
            continue
        found = next((child for child in psutil.Process().children() if _is_server(child)), None)
        if found is None and server is not None:
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > SERVER_GRACE_SECONDS and not over.is_set():
                end_now(
                    "martlet: Prefect's embedded server has ended, killed from outside or for lack of memory "
                    f"or disk space ({log} holds what it said); the same command goes on where this one "
                    "stopped.",
                    EXIT_BAD_INPUT,
                )
        elif found is not None:
            server, missing_since = found, 0.0


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_server(process: psutil.Process) -> bool:
    try:
        return _lives(process) and SERVER in " ".join(process.cmdline())
    except psutil.Error:
        return False

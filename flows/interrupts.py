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
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

from pipeline.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "martlet: interrupted; the same command goes on where this one stopped."

_ending = threading.Lock()


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
    beside it (``leash_process.py``) sees its pipe close and kills what carries this run's name."""
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


def end_now() -> None:
    """Ends this process with the interrupted sentence and exit code, its children first.

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
    Console(stderr=True).show_cursor()  # the live view hides it
    print(INTERRUPTED, file=sys.stderr, flush=True)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


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

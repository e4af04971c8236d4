"""Ends what a killed run leaves behind: ``python leash_process.py NAME``.

Waits until standard input ends, which happens when the process that holds its other end is gone, however it
went (SIGKILL included), and kills every process whose environment has ``MARTLET_RUN=NAME``: exporters,
measuring processes, Prefect's embedded server.
"""

import contextlib
import os
import sys

import psutil


def main() -> None:
    """Waits, then kills."""
    name = sys.argv[1]
    sys.stdin.buffer.read()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("MARTLET_RUN") == name:
                process.kill()


if __name__ == "__main__":
    main()

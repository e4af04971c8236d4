"""What this process holds in memory, from the kernel's own count. Imports nothing heavy: it is part of what
is measured."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def memory() -> dict[str, int]:
    """Bytes of this process by kind, from ``/proc/self/status``: anonymous (RssAnon), backed by files
    (RssFile), and the peak of all resident memory (VmHWM)."""
    values = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile", "VmHWM"):
            values[name] = int(rest.split()[0]) * 1024
    return values


def forget_peak() -> None:
    """Sets the peak (VmHWM) to what is resident now: importing libraries is not the file's doing."""
    # A container may forbid it; the peak then counts the imports too, which only overstates it.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def proportional_set_size() -> int | None:
    """Bytes resident in this process, those shared with others by their share (Pss); None where the kernel
    does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration, ValueError):
        return None


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, the C library keeps freed memory for the next request; at the end all of it goes back.

    Every step of training asks for the same large blocks. glibc returns such blocks to the system when they
    are freed, and each step then waits for the kernel to hand out and clear the same pages anew: 9 % of the
    time of a distillation step (docs/log.md). Another C library is left as it is.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, 2**30)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # Where glibc's own adaptation ends, too.
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
        library.mallopt(M_TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)

"""Freed memory is kept while training wants it again, and goes back afterwards."""

import ctypes
import subprocess
import sys

import pytest

# In a process of its own: where something is mapped behind the heap, glibc maps large blocks, too.
SCRIPT = """
from pipeline.memory import freed_memory_kept, memory

size = 2**28
before = memory()["RssAnon"]
with freed_memory_kept():
    block = bytearray(size)
    assert memory()["RssAnon"] - before > 0.9 * size
    del block
    assert memory()["RssAnon"] - before > 0.9 * size
assert memory()["RssAnon"] - before < 0.1 * size
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason=f"{sys.platform}: no glibc")
def test_freed_memory_is_kept_within_and_returned_afterwards() -> None:
    finished = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr

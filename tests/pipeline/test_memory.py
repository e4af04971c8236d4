"""Freed memory is kept while training wants it again, and goes back afterwards."""

import ctypes
import sys

import pytest

from pipeline.memory import freed_memory_kept, memory

BLOCK = 2**28


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason=f"{sys.platform}: no glibc")
def test_freed_memory_is_kept_within_and_returned_afterwards() -> None:
    before = memory()["RssAnon"]
    with freed_memory_kept():
        block = bytearray(BLOCK)
        assert memory()["RssAnon"] - before > 0.9 * BLOCK
        del block
        assert memory()["RssAnon"] - before > 0.9 * BLOCK
    assert memory()["RssAnon"] - before < 0.1 * BLOCK

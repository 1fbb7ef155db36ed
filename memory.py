"""Memory that will be needed is taken at the start, and what is no longer needed goes back: one large request is not kept for ever.

Only glibc's allocator needs telling: it keeps freed blocks for later, and an arena for each of many threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Iterator
from typing import Any

MMAP_THRESHOLD, PERTURB, ARENA_MAX = -3, -6, -8  # mallopt's names for them (malloc.h)


def libc() -> Any:
    """glibc, or None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def be_sparing() -> None:
    """From now on large blocks are mapped one by one, so that freeing one gives it back, and threads share their arenas."""
    if library := libc():
        library.mallopt(MMAP_THRESHOLD, 1 << 18)  # a threshold that is set no longer grows with what is freed
        library.mallopt(ARENA_MAX, 2)


@functools.cache
def settle() -> None:
    """What a process has at its start stays: no collection walks it again. Of what a later call would find some is garbage."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    if library := libc():
        library.malloc_trim(0)


@contextlib.contextmanager
def taken_at_once() -> Iterator[None]:
    """What is allocated meanwhile is written to, so that the system has to give it now: a KV cache that does not fit is found out
    when the model is loaded, not in the middle of somebody's answer, and no client makes the engine grow."""
    library = libc()
    if library:
        library.mallopt(PERTURB, 0xFF)  # blocks are filled with the complement, which is zeros
    try:
        yield
    finally:
        if library:
            library.mallopt(PERTURB, 0)

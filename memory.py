"""Memory that is no longer needed goes back to the system: what one large request took is not kept for ever.

Only glibc's allocator needs telling: it keeps freed blocks for later, and an arena for each of many threads.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

MMAP_THRESHOLD, ARENA_MAX = -3, -8  # mallopt's names for them (malloc.h)


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


def give_back() -> None:
    if library := libc():
        library.malloc_trim(0)

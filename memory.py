"""Memory that will be needed is taken at the start, and what is no longer needed goes back: one large request is not kept for ever.

Only glibc's allocator needs telling: it keeps freed blocks for later, and an arena for each of many threads. Only Linux is asked for
pages: large ones for what each step reads, and many at once for what is to be cleared.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from machine import contents

HUGE = 2 << 20  # bytes of a page
LARGE, VAST = 16 << 20, 128 << 20  # bytes: blocks that are moved, and such as only a KV cache is
SOON_S = 1.0  # the rest of a load, and the first answer, come first
MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 23, 25  # asm-generic/mman-common.h; Linux 2.6.38, 5.14, 6.1
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


def has_huge_pages() -> bool:
    """Does the system give pages of 2 MB to who asks for them?"""
    modes = contents("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never": in brackets the one that holds
    return bool(modes) and "[never]" not in modes


@contextlib.contextmanager
def in_huge_pages(wanted: bool = True) -> Iterator[None]:
    """Large blocks that are allocated meanwhile move to huge pages, afterwards and beside other work: a host may take long to give them.

    A decode step reads all weights, and waits up to a tenth of its time for the addresses of small pages.
    """
    if not (wanted and has_huge_pages()):
        yield
        return
    before = blocks(LARGE)
    yield
    if fresh := blocks(LARGE) - before:
        threading.Thread(target=move_to_huge_pages, args=(fresh,), name="huge-pages", daemon=True).start()


def blocks(least: int) -> set[tuple[int, int]]:
    """(begin, end) of memory of at least so many bytes that no file is behind (proc_pid_maps(5)); none where the system does not say."""
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\b", contents("/proc/self/maps"), re.M)
    places = ((int(begin, 16), int(end, 16)) for begin, end in found)
    return {(begin, end) for begin, end in places if end - begin >= least}


def move_to_huge_pages(found: Iterable[tuple[int, int]]) -> int:
    """How many were made. What has been freed meanwhile, or is something else now, comes to no harm."""
    time.sleep(SOON_S)
    made = 0
    for begin, end in sorted(found):
        madvise(begin, end - begin, MADV_HUGEPAGE)  # a system that does not know the next moves it in its own time
        for page in range(-(-begin // HUGE) * HUGE, end - HUGE + 1, HUGE):
            began = time.monotonic()
            made += madvise(page, HUGE, MADV_COLLAPSE)
            time.sleep(time.monotonic() - began)  # others compute
    return made


def madvise(begin: int, size: int, advice: int) -> bool:
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(call(begin, size, advice) == 0)


@contextlib.contextmanager
def taken_from_both_ends(wanted: bool = True) -> Iterator[None]:
    """A vast block that a library allocates meanwhile, and clears from its beginning on, is taken from its end on beside that: it is
    the system that takes its time for each page (0.4 s for 1 GB of them), and two cores need half of it."""
    if not wanted:
        yield
        return
    begun, cleared = threading.Event(), threading.Event()

    def take() -> None:
        try:
            before = blocks(VAST)  # its own stack may be one
        finally:
            begun.set()
        while not (fresh := blocks(VAST) - before):
            if cleared.wait(0.005):
                return
        for begin, end in fresh:
            for at in range(end - HUGE, begin, -HUGE):
                if cleared.is_set() or not madvise(at, HUGE, MADV_POPULATE_WRITE):
                    return

    beside = threading.Thread(target=take, name="both-ends")
    beside.start()
    begun.wait()
    try:
        yield
    finally:
        cleared.set()
        beside.join()

"""Settings of glibc's memory allocator, malloc. With other C libraries nothing changes."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


def keep_freed_memory() -> None:
    """For training: glibc keeps large blocks that were freed.

    Every step frees its activations and allocates the same again. By default glibc returns such blocks to the system,
    which clears every page before it hands it out. If they are kept, a step on a CPU takes 0.74 to 0.91 of the time.
    """
    _mallopt(_MMAP_THRESHOLD, 2**30)  # bytes
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def share_arenas() -> None:
    """For a server: limits glibc to two malloc arenas for all threads. By default each thread keeps what it freed.

    Over 500 photos the page then stays at 1.4 GB; without the limit it grows beyond 2.7 GB (tests/bench/page.py).
    """
    _mallopt(_ARENA_MAX, 2)


def _mallopt(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(parameter, value)

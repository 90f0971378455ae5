"""What glibc does with memory that was freed, set for what a process does. Other C libraries are left as they are."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


def keep_freed_memory() -> None:
    """For a training: large blocks that were freed are kept.

    Every step frees its activations and asks for the same again; by default glibc returns such blocks to the system,
    which clears each page before it gives it back. Kept, a step takes 0.74 to 0.91 of the time on a CPU.
    """
    _mallopt(_MMAP_THRESHOLD, 2**30)  # bytes
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def share_arenas() -> None:
    """For a server: its threads take memory from two places, and not each from its own, which would keep what it freed.

    The page then stays at 1.4 GB where it would grow beyond 2.7 over 500 photos (tests/bench/page.py).
    """
    _mallopt(_ARENA_MAX, 2)


def _mallopt(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(parameter, value)

"""What the process asks of glibc's malloc; no effect with another C library. No torch here."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt(3)


def give_back_large_blocks() -> None:
    """For training: tensors of 16 MiB and more are mapped and unmapped one by one. glibc otherwise raises that bound to 32 MiB
    as it sees them freed, and keeps them in a heap whose gaps grow with the step (QLoRA of 0.6B, 4096 tokens: a peak of
    2863 MiB against 1957). Smaller ones stay in the heap, where no page is touched anew."""
    _set({MMAP_THRESHOLD: 16 << 20})


def keep_freed_memory() -> None:
    """For microbenchmarks: large results come from memory that the process has already touched, for ours and for peers: by
    default glibc maps them anew on every call, and the page faults are most of a bandwidth-bound op's time and nearly all of
    its spread."""
    _set({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1})


def _set(options: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    for option, value in options.items():
        mallopt(option, value)

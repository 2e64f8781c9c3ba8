"""Large pages for what a decoder reads at every token: the kernel's 4 KiB pages cost a look-up each, and end every prefetch."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch

HUGEPAGE, COLLAPSE = 14, 25  # of madvise(2)
SIZE = 2 << 20  # of x86-64; where it is another one, Linux passes over the remainder
GAP = 8192  # between tensors that lie one after the other: what malloc keeps beside each, and the end of a page


def huge_pages(tensors: Iterable[torch.Tensor], *, written: bool) -> int:
    """Asks for huge pages behind tensors, wherever these lie next to each other for 2 MiB; values and addresses stay. Only
    speed depends on it: what the system refuses (another one than Linux, none free) stays as it is.

    Args:
        written: gathers the pages that are there already, now; else those that are touched first later will be huge.
    Returns: bytes that were asked for.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    ranges: list[list[int]] = []
    for begin, end in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)):
        if ranges and begin - ranges[-1][1] <= GAP:
            ranges[-1][1] = max(ranges[-1][1], end)
        else:
            ranges.append([begin, end])
    total = 0
    for begin, end in ranges:
        begin, end = -(-begin // SIZE) * SIZE, end // SIZE * SIZE
        if begin < end:
            madvise(begin, end - begin, HUGEPAGE)
            if written:
                madvise(begin, end - begin, COLLAPSE)
            total += end - begin
    return total

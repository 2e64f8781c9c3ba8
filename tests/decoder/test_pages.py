"""Huge pages change neither values nor addresses, and are there where the system gives them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from swiftk.decoder.pages import SIZE, huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return 1024 * int(found[1]) if found else 0


def test_values_and_addresses_stay():
    tensors = [torch.randn(n) for n in (0, 1, 1000, 300_000, 300_000, 300_000, 4_000_000)]
    tensors += [tensors[-1][5:70], torch.zeros(3, 700_000).t()]
    before = [(t.clone(), t.data_ptr()) for t in tensors]
    for written in (False, True):
        assert huge_pages(tensors, written=written) >= 4 * 4_000_000 - 2 * SIZE
    assert all(torch.equal(t, value) and t.data_ptr() == at for t, (value, at) in zip(tensors, before, strict=True))


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no huge pages to give")
def test_pages_are_huge():
    before, later = huge_bytes(), torch.empty(16 << 20)
    asked = huge_pages([later], written=False)
    assert asked >= later.nbytes - 2 * SIZE and huge_bytes() == before, "nothing was touched yet"
    later.fill_(1)
    if huge_bytes() == before:
        pytest.skip("no huge page was free")
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 1):
        pytest.skip("this Linux gathers no pages that are there already")
    before, written = huge_bytes(), torch.ones(16 << 20)
    huge_pages([written], written=True)
    assert huge_bytes() > before
    assert later.sum() == written.sum() == 16 << 20


def test_small_tensors_are_left_alone():
    assert huge_pages([torch.ones(1000)], written=True) == 0

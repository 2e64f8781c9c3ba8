"""Shared set-up of the tests: the machine's instruction sets, thread counts, seeds."""

from __future__ import annotations

import os

import pytest
import torch

from swiftk.kernels._native import native

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def _supported(isa: str) -> bool:
    try:
        native().resolve_isa(isa)
    except ValueError:
        return False
    return True


ISAS = [isa for isa in ("portable", "avx2", "avx512") if _supported(isa)]


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    if request.param not in ISAS:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def thread_count():
    """Calls f under a number of intra-op threads and restores the old number: thread_count(2, f)."""
    before = torch.get_num_threads()

    def run(n, f):
        torch.set_num_threads(n)
        try:
            return f()
        finally:
            torch.set_num_threads(before)

    return run

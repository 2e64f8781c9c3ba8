"""Every Triton kernel compiles as it is shipped, without spills: for sm_90 here, for all chips in the long tests."""

from __future__ import annotations

import pytest

from swiftk.benchmarks import compile_gpu

SHIPPED = compile_gpu.shipped()


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 100))])
@pytest.mark.parametrize("one", SHIPPED, ids=lambda one: one.label.replace(" ", "-"))
def test_compiles(one, arch):
    if arch in one.archs:
        assert compile_gpu.compile_triton(one, arch).wrong() is None


def test_spills_and_shared_memory_are_errors():
    fine = compile_gpu.Compiled("k", 80, 4, 255, 163 << 10, 0, 0, False, False)
    assert fine.wrong() is None
    assert "spilled" in (fine._replace(spills=8).wrong() or "")
    assert fine._replace(spills=8, allowed=8).wrong() is None
    assert "shared memory" in (fine._replace(shared=fine.shared + 1).wrong() or "")

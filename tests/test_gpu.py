"""Every op on a CUDA device, through whatever implementation exists there. Run by `make gpu`, skipped visibly elsewhere."""

from __future__ import annotations

import importlib

import pytest
import torch

from swiftk import bench
from swiftk.benchmarks.harness import Options

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", bench.kernel_names())
def test_values_on_cuda(name):
    """The benchmark's smallest cases: their checks compare with the reference."""
    for case in importlib.import_module(f"swiftk.benchmarks.kernels.bench_{name}").cases(Options(device="cuda", quick=True)):
        try:
            result = case.run()
        except NotImplementedError as error:
            assert "there is no CUDA kernel yet" in str(error)
            pytest.xfail(f"{name} has no CUDA kernel yet")
        case.check(result)

"""`pytest benchmarks [--device cuda] [--ops nf4 linear ...] [--quick]`: the cases of `python -m swiftk.bench kernels` under
pytest-benchmark, without peers: its statistics, --benchmark-save and --benchmark-compare. Values are checked first."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


def test_case(case_of, benchmark):
    cases, number = case_of
    case = cases[number]
    case.check(case.run())
    on_gpu = cases.options.device == "cuda"

    def run():
        case.run()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.group = case.op
    benchmark(run)
    benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops}

"""Options of `pytest benchmarks` (see test_kernels.py)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from swiftk import bench
from swiftk.benchmarks.harness import Case, Options


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("swiftk")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--ops", nargs="+", default=None, choices=bench.kernel_names(), help="only these")
    group.addoption("--quick", action="store_true", help="the smallest shape of each op")


def options(config: pytest.Config) -> Options:
    return Options(device=config.getoption("--device"), quick=config.getoption("--quick"), peers=frozenset())


class Cases:
    """The cases of an op by number; they are made one after the other, and only the last one is kept."""

    def __init__(self, op: str, options: Options) -> None:
        self.op, self.options, self.number = op, options, -1
        self.left: Iterator[Case] = iter(())

    def __getitem__(self, number: int) -> Case:
        if number <= self.number or self.number < 0:
            self.left = importlib.import_module(f"swiftk.benchmarks.kernels.bench_{self.op}").cases(self.options)
            self.number = -1
        case = next(itertools.islice(self.left, number - self.number - 1, None))
        self.number = number
        return case


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device", "cpu") == "cuda" and not torch.cuda.is_available():
        wants = "wants cpu, or a CUDA build of torch and its driver"
        raise pytest.UsageError(f"--device has cuda, but torch sees no CUDA device; {wants}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_of" not in metafunc.fixturenames:
        return
    values = []
    for op in metafunc.config.getoption("--ops") or bench.kernel_names():
        module = importlib.import_module(f"swiftk.benchmarks.kernels.bench_{op}")
        cases = Cases(op, options(metafunc.config))
        for number, case in enumerate(module.cases(cases.options)):  # inputs and all: their names are nowhere else
            name = f"{op} {case.name} {str(case.dtype).removeprefix('torch.')}"
            values.append(pytest.param((cases, number), id=name.replace(" ", "-")))
    metafunc.parametrize("case_of", values)

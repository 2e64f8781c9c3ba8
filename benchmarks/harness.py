"""What a microbenchmark is: a `Case` per (op, shape, dtype), made by `cases(options)` of benchmarks/kernels/bench_<op>.py.

`python -m swiftk.bench kernels` checks a case's values, then times it, each peer and the op against itself interleaved
in one run; bytes and FLOPs are counted by the case, in a comment beside the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    isa: str = "auto"
    device: str = "cpu"
    peers: bool = True  # False: do not build the peers' callables
    quick: bool = False  # the smallest shape of each op, for the tests of the benchmarks themselves


@dataclass(frozen=True)
class Case:
    """run() is ours and returns the result that `check` looks at; peers do the same work on the same inputs."""

    op: str  # "linear"
    name: str  # shape and what is timed: "fwd M=2048 N=3072 K=1024"
    dtype: torch.dtype
    run: Callable[[], Any]
    check: Callable[[Any], None]  # raises AssertionError where run()'s result is wrong
    bytes: int  # moved at least, per run
    flops: int = 0  # 0: bandwidth-bound, percent of the limit is of the bandwidth
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)  # {"torch": f}
    peer_memory: bool = False  # also compare the peak extra memory of run() and of each peer
    goal: str = ""  # as stated: "<= 1.25x torch"

"""nf4: dequantise to bf16 into a given buffer, and quantise. Bandwidth-bound: the limit is a copy of as many bytes.

Weights, outputs and the copy's buffers are walked through beyond the caches: a model's weights are never there. (In the cache a
copy writes 1.27 bytes a weight where dequantise writes 2.)
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize_out, nf4_dequantize_ref, nf4_quantize, nf4_quantize_ref

COLD_BYTES = 192 << 20  # what one pass over all buffers moves
GOAL = {"cpu": ">= 0.9x copy", "cuda": ">= 90 % of HBM, 1.5x bitsandbytes"}


def cases(options: Options) -> Iterator[Case]:
    sizes = [(4096, 14336), (8192, 28672)] if options.device == "cuda" else [(4096, 4096), (1152, 4304)]
    for N, K in [(32, 96)] if options.quick else sizes:
        x = torch.randn(N, K, dtype=torch.bfloat16, device=options.device)
        w = nf4_quantize(x)
        total = w.codes.nbytes + w.absmax.nbytes + x.nbytes  # codes and absmax, and bf16: one read, the other written
        copies = 1 if options.quick else max(2, -(-COLD_BYTES // total))  # an L2 cache has 50 MB
        yield dequantize(x, w, total, copies, options)
        yield quantize(x, total, copies, options)


def turns(copies: int, make: Callable[[], Any]) -> Callable[[], Any]:
    """Each call gives the next of `copies` things that were made alike."""
    return itertools.cycle([make() for _ in range(copies)]).__next__


def copy_of(total: int, copies: int, options: Options) -> Callable[[], Any]:
    """Reads and writes `total` bytes together."""
    pair = turns(copies, lambda: torch.zeros(2, total // 16, dtype=torch.int64, device=options.device))

    def run():
        source, target = pair()
        target.copy_(source)

    return run


def dequantize(x: torch.Tensor, w: NF4Tensor, total: int, copies: int, options: Options) -> Case:
    turn = turns(copies, lambda: (w._replace(codes=w.codes.clone(), absmax=w.absmax.clone()), torch.zeros_like(x)))

    def run():
        weight, out = turn()
        nf4_dequantize_out(weight, out, options.isa)
        return out

    peers = {"copy": copy_of(total, copies, options)}
    if importlib.util.find_spec("bitsandbytes") and options.wants("bitsandbytes"):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(x, blocksize=64, quant_type="nf4")
        theirs = turns(copies, packed.clone)
        peers["bitsandbytes"] = lambda: dequantize_4bit(theirs(), state)
    return Case(
        op="nf4", name=f"dequantize {x.shape[0]} x {x.shape[1]} cold", dtype=x.dtype, run=run, bytes=total, peers=peers,
        check=lambda y: torch.testing.assert_close(y, nf4_dequantize_ref(w), rtol=0, atol=0), goal=GOAL[options.device],
    )  # fmt: skip


def quantize(x: torch.Tensor, total: int, copies: int, options: Options) -> Case:
    turn = turns(copies, x.clone)

    def check(got: NF4Tensor) -> None:
        codes, absmax = nf4_quantize_ref(x)
        assert torch.equal(got.codes, codes) and torch.equal(got.absmax_fp32(), absmax)

    peers = {"copy": copy_of(total, copies, options)}
    if importlib.util.find_spec("bitsandbytes") and options.wants("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        peers["bitsandbytes"] = lambda: quantize_4bit(turn(), blocksize=64, quant_type="nf4")
    return Case(
        op="nf4", name=f"quantize {x.shape[0]} x {x.shape[1]} cold", dtype=x.dtype,
        run=lambda: nf4_quantize(turn(), isa=options.isa), bytes=total, peers=peers, check=check,
    )  # fmt: skip

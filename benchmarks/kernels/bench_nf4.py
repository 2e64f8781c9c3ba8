"""nf4: dequantise to bf16 into a given buffer, and quantise. Bandwidth-bound: the limit is a copy of as many bytes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize_out, nf4_dequantize_ref, nf4_quantize, nf4_quantize_ref


def cases(options: Options) -> Iterator[Case]:
    for N, K in [(32, 96)] if options.quick else [(4096, 4096), (1152, 4304)]:
        yield dequantize(N, K, options)
        yield quantize(N, K, options)


def copy_of(total: int, options: Options) -> Callable[[], Any]:
    """Reads and writes `total` bytes together."""
    source, target = (torch.zeros(total // 16, dtype=torch.int64, device=options.device) for _ in range(2))
    return lambda: target.copy_(source)


def size(w: NF4Tensor) -> int:
    return w.codes.nbytes + w.absmax.nbytes


def dequantize(N: int, K: int, options: Options) -> Case:
    x = torch.randn(N, K, dtype=torch.bfloat16, device=options.device)
    w, out = nf4_quantize(x), torch.empty_like(x)

    def run():
        nf4_dequantize_out(w, out, options.isa)
        return out

    total = size(w) + out.nbytes  # codes and absmax read, bf16 written
    peers = {"copy": copy_of(total, options)}
    if importlib.util.find_spec("bitsandbytes") and options.wants("bitsandbytes"):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(x, blocksize=64, quant_type="nf4")
        peers["bitsandbytes"] = functools.partial(dequantize_4bit, packed, state)
    return Case(
        op="nf4", name=f"dequantize {N} x {K}", dtype=x.dtype, run=run, bytes=total, peers=peers,
        check=lambda y: torch.testing.assert_close(y, nf4_dequantize_ref(w), rtol=0, atol=0), goal=">= 0.9x copy",
    )  # fmt: skip


def quantize(N: int, K: int, options: Options) -> Case:
    x = torch.randn(N, K, dtype=torch.bfloat16, device=options.device)
    w = nf4_quantize(x)

    def check(got: NF4Tensor) -> None:
        codes, absmax = nf4_quantize_ref(x)
        assert torch.equal(got.codes, codes) and torch.equal(got.absmax_fp32(), absmax)

    total = size(w) + x.nbytes  # bf16 read, codes and absmax written
    peers = {"copy": copy_of(total, options)}
    if importlib.util.find_spec("bitsandbytes") and options.wants("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        peers["bitsandbytes"] = functools.partial(quantize_4bit, x, blocksize=64, quant_type="nf4")
    return Case(
        op="nf4", name=f"quantize {N} x {K}", dtype=x.dtype, run=lambda: nf4_quantize(x, isa=options.isa), bytes=total,
        peers=peers, check=check,
    )  # fmt: skip

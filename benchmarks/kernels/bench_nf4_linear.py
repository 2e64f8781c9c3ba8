"""nf4_linear: forward, and forward + dx, against dequantise + torch and bitsandbytes. One row is bandwidth-bound and cold.

"torch" dequantises by swiftk's kernel and multiplies in fp32 where the CPU has no bf16 instructions (torch's bf16 product is
many times slower there). bitsandbytes' own CPU kernel is fetched from a hub: without a network its fallback is timed.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import Case, Options
from swiftk.benchmarks.kernels.bench_linear import COLD_BYTES
from swiftk.kernels.linear import matmul_dtype
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize, nf4_quantize
from swiftk.kernels.nf4_linear import nf4_linear, nf4_linear_ref
from swiftk.testing.accuracy import assert_accurate

GOALS = {
    1: ">= 85 % of read bandwidth (avx2: half of that)",
    4: ">= 2x torch",
    16: ">= 2x torch",
    64: ">= 1.2x torch",
    512: ">= 0.95x torch",
}
CUDA_GOALS = {1: ">= 80 % of HBM, 1.5x bitsandbytes", 16: ">= 70 % of HBM, 1.5x bitsandbytes"}


def cases(options: Options) -> Iterator[Case]:
    if options.device == "cuda" and not options.quick:
        for N, K in ((4096, 14336), (8192, 28672)):
            for M in (1, 4, 16, 64, 256, 4096):
                yield forward(M, N, K, torch.bfloat16, options)
            for M in (16, 4096):
                yield forward_backward(M, N, K, torch.bfloat16, options)
        return
    N, K = (256, 128) if options.quick else (4096, 4096)
    for dtype in (torch.bfloat16, torch.float32):
        for M in (1, 16) if options.quick else (1, 4, 16, 64, 512):
            yield forward(M, N, K, dtype, options)
        yield forward_backward(16 if options.quick else 512, N, K, dtype, options)


def dequantise_and_multiply(x: torch.Tensor, w: NF4Tensor) -> torch.Tensor:
    operand = matmul_dtype(x)
    return F.linear(x.to(operand), nf4_dequantize(w).to(operand)).to(x.dtype)


def bitsandbytes(weight: torch.Tensor, options: Options) -> dict[str, Callable[[torch.Tensor], Any]]:
    if not (importlib.util.find_spec("bitsandbytes") and options.wants("bitsandbytes")):
        return {}
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return {"bitsandbytes": lambda x: matmul_4bit(x, packed.t(), state)}


def forward(M: int, N: int, K: int, dtype: torch.dtype, options: Options) -> Case:
    x = torch.randn(M, K, dtype=dtype, device=options.device)
    weight = torch.randn(N, K, dtype=torch.bfloat16, device=options.device)
    w = nf4_quantize(weight)
    size = w.codes.nbytes + w.absmax.nbytes
    goals, streamed = (CUDA_GOALS, M <= 16) if options.device == "cuda" else (GOALS, M == 1)  # bound by bandwidth
    copies = 1 if not streamed or options.quick else max(1, -(-COLD_BYTES // size))
    weights = [w._replace(codes=w.codes.clone(), absmax=w.absmax.clone()) for _ in range(copies)]
    turn, peer_turn = itertools.cycle(weights), itertools.cycle(weights)
    exact = nf4_linear_ref(x.double(), w)
    peers = {"torch": lambda: dequantise_and_multiply(x, next(peer_turn))}
    peers |= {name: lambda f=f: f(x) for name, f in bitsandbytes(weight.to(dtype), options).items()}  # type: ignore[misc]
    return Case(
        op="nf4_linear", name=f"fwd M={M} N={N} K={K}" + (" cold W" if copies > 1 else ""), dtype=dtype,
        check=lambda y: assert_accurate(y, exact.to(dtype), exact),
        run=lambda: nf4_linear(x, next(turn), isa=options.isa),
        bytes=size + (x.numel() + M * N) * x.element_size(),  # codes, absmax and x read, y written
        flops=0 if streamed else 2 * M * N * K, peers=peers, goal=goals.get(M, ""),
    )  # fmt: skip


def forward_backward(M: int, N: int, K: int, dtype: torch.dtype, options: Options) -> Case:
    x, dy = (torch.randn(s, dtype=dtype, device=options.device) for s in ((M, K), (M, N)))
    weight = torch.randn(N, K, dtype=torch.bfloat16, device=options.device)
    w, xg = nf4_quantize(weight), x.clone().requires_grad_()
    exact = dy.double() @ nf4_dequantize(w).double()

    def both(f):
        return torch.autograd.grad(f(xg), xg, dy)[0]

    peers = {"torch": lambda: both(lambda x: dequantise_and_multiply(x, w))}
    peers |= {name: lambda f=f: both(f) for name, f in bitsandbytes(weight.to(dtype), options).items()}  # type: ignore[misc]
    return Case(
        op="nf4_linear", name=f"fwd+dx M={M} N={N} K={K}", dtype=dtype,
        check=lambda dx: assert_accurate(dx, exact.to(dtype), exact),
        run=lambda: both(lambda x: nf4_linear(x, w, isa=options.isa)),
        bytes=2 * (w.codes.nbytes + w.absmax.nbytes) + 2 * M * (N + K) * x.element_size(),  # W, x read, y written; W, dy, dx
        flops=4 * M * N * K, peers=peers,
    )  # fmt: skip

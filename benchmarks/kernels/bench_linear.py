"""linear: forward, and forward + backward, against F.linear. M = 1 is bandwidth-bound and reads W from memory."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.linear import linear
from swiftk.testing.accuracy import assert_accurate

COLD_BYTES = 192 << 20  # weights that M = 1 walks through: six times the largest L3 share we have seen; a GPU's L2 is flushed


def cases(options: Options) -> Iterator[Case]:
    if options.device == "cuda" and not options.quick:
        for numerics, M, (N, K) in itertools.product(("auto", "invariant"), (1, 16, 8192), ((4096, 4096), (14336, 4096))):
            yield forward(M, N, K, torch.bfloat16, options, numerics)
        yield forward_backward(8192, 4096, 4096, torch.bfloat16, options)
        return
    sizes = [(256, 128)] if options.quick else [(1536, 512), (3072, 1024), (4096, 4096)]
    for dtype in (torch.float32, torch.bfloat16):
        for N, K in sizes:
            for M in (1, 8) if options.quick else (1, 8, 256, 2048):
                yield forward(M, N, K, dtype, options)
        N, K = sizes[-2 % len(sizes)]
        yield forward_backward(8 if options.quick else 512, N, K, dtype, options)


def forward(M: int, N: int, K: int, dtype: torch.dtype, options: Options, numerics: str = "auto") -> Case:
    x = torch.randn(M, K, dtype=dtype, device=options.device)
    size = N * K * x.element_size()
    copies = 1 if M > 8 or options.quick or options.device == "cuda" else max(1, -(-COLD_BYTES // size))
    weights = [torch.randn(N, K, dtype=dtype, device=options.device) for _ in range(copies)]
    turn, peer_turn = itertools.cycle(weights), itertools.cycle(weights)

    def check(y):
        rows = slice(0, M, max(1, M // 256))
        want = F.linear(x[rows].double(), weights[0].double())
        assert_accurate(y[rows], want.to(dtype), want)

    peers = {"torch": lambda: F.linear(x, next(peer_turn))}
    if options.device == "cuda" and importlib.util.find_spec("transformer_engine"):
        peers["transformer_engine"] = lambda: linear(x, next(peer_turn), backend="transformer_engine")
    kind = (" invariant" if numerics == "invariant" else "") + (" cold W" if copies > 1 else "")
    return Case(
        op="linear", name=f"fwd M={M} N={N} K={K}{kind}", dtype=dtype, check=check,
        run=lambda: linear(x, next(turn), numerics=numerics, isa=options.isa),
        bytes=size + (x.numel() + M * N) * x.element_size(),  # W and x read, y written
        flops=0 if M == 1 else 2 * M * N * K,
        peers=peers,
        goal=">= 90 % of torch's bandwidth" if M == 1 else "<= 1.25x torch" if M >= 256 and K >= 512 else "",
    )  # fmt: skip


def forward_backward(M: int, N: int, K: int, dtype: torch.dtype, options: Options) -> Case:
    x, w, dy = (torch.randn(s, dtype=dtype, device=options.device) for s in ((M, K), (N, K), (M, N)))
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()

    def both(f):
        return torch.autograd.grad(f(xg, wg), (xg, wg), dy)

    def check(grads):
        for got, want in zip(grads, (dy.double() @ w.double(), dy.double().t() @ x.double()), strict=True):
            assert_accurate(got, want.to(dtype), want)

    return Case(
        op="linear", name=f"fwd+bwd M={M} N={N} K={K}", dtype=dtype, check=check,
        run=lambda: both(lambda a, b: linear(a, b, isa=options.isa)),
        bytes=3 * (M * K + N * K + M * N) * x.element_size(),  # three products, each operand and result once
        flops=6 * M * N * K,
        peers={"torch": lambda: both(F.linear)},
    )  # fmt: skip

"""rms_norm: forward, and forward + backward. Bandwidth-bound."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.rms_norm import rms_norm, rms_norm_ref
from swiftk.testing.accuracy import assert_accurate


def cases(options: Options) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, cols in [(64, 256)] if options.quick else [(4096, 1024), (2048, 4096), (1, 4096)]:
            yield forward(rows, cols, dtype, options)
            yield forward_backward(rows, cols, dtype, options)


def forward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    x = torch.randn(rows, cols, dtype=dtype, device=options.device)
    w = torch.rand(cols, dtype=dtype, device=options.device)

    def check(y):
        assert_accurate(y, rms_norm_ref(x, w), rms_norm_ref(x.double(), w.double()))

    return Case(
        op="rms_norm", name=f"fwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: rms_norm(x, w, isa=options.isa),
        bytes=2 * x.numel() * x.element_size(),  # x read, y written
        peers={"torch": lambda: torch.nn.functional.rms_norm(x, (cols,), w, 1e-6)},
    )  # fmt: skip


def forward_backward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    x, dy = (torch.randn(rows, cols, dtype=dtype, device=options.device) for _ in range(2))
    w = torch.rand(cols, dtype=dtype, device=options.device)

    def gradients(f, dtype=dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x.detach(), w.detach())]
        return torch.autograd.grad(f(*inputs), inputs, dy.to(dtype))

    def check(grads):
        for got, plain, exact in zip(grads, gradients(rms_norm_ref), gradients(rms_norm_ref, torch.float64), strict=True):
            assert_accurate(got, plain, exact)

    return Case(
        op="rms_norm", name=f"fwd+bwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: gradients(lambda x, w: rms_norm(x, w, isa=options.isa)),
        bytes=(2 + 3) * x.numel() * x.element_size(),  # backward: x, dy read, dx written
        peers={"torch": lambda: gradients(lambda x, w: torch.nn.functional.rms_norm(x, (cols,), w, 1e-6))},
    )  # fmt: skip

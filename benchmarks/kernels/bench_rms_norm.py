"""rms_norm: forward, and forward + backward. Bandwidth-bound."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from swiftk.benchmarks.harness import Case, Options, liger
from swiftk.kernels.rms_norm import rms_norm, rms_norm_ref
from swiftk.testing.accuracy import assert_accurate


def cases(options: Options) -> Iterator[Case]:
    shapes = [(4096, 1024), (2048, 4096), (1, 4096)] if options.device == "cpu" else [(16384, 4096), (16384, 8192), (1, 4096)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, cols in [(64, 256)] if options.quick else shapes:
            yield forward(rows, cols, dtype, options)
            yield forward_backward(rows, cols, dtype, options)


GOAL = {"cpu": "", "cuda": "90 % of HBM, at least liger"}


def peers(options: Options, cols: int, call: Callable[[Callable], Any]) -> dict[str, Callable[[], Any]]:
    """call(f): the case's work with f in the place of rms_norm(x, w)."""
    found = {"torch": lambda: call(lambda x, w: torch.nn.functional.rms_norm(x, (cols,), w, 1e-6))}
    theirs = liger(options)
    if theirs is not None:  # in_place would write over the case's dy
        found["liger"] = lambda: call(lambda x, w: theirs.liger_rms_norm(x, w, 1e-6, in_place=False))
    if options.device == "cuda" and importlib.util.find_spec("transformer_engine"):
        found["transformer_engine"] = lambda: call(lambda x, w: rms_norm(x, w, backend="transformer_engine"))
    return found


def forward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    x = torch.randn(rows, cols, dtype=dtype, device=options.device)
    w = torch.rand(cols, dtype=dtype, device=options.device)

    def check(y):
        assert_accurate(y, rms_norm_ref(x, w), rms_norm_ref(x.double(), w.double()))

    return Case(
        op="rms_norm", name=f"fwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: rms_norm(x, w, isa=options.isa),
        bytes=2 * x.numel() * x.element_size(),  # x read, y written
        peers=peers(options, cols, lambda f: f(x, w)), goal=GOAL[options.device],
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
        peers=peers(options, cols, gradients), goal=GOAL[options.device],
    )  # fmt: skip

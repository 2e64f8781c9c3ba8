"""swiglu: forward, and forward + backward. Bandwidth-bound.

Outputs stay below 32 MiB: glibc's malloc maps larger ones anew at every call, and the page faults would be what is timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swiftk.benchmarks.harness import Case, Options, liger
from swiftk.kernels.swiglu import swiglu, swiglu_ref
from swiftk.testing.accuracy import assert_accurate


def cases(options: Options) -> Iterator[Case]:
    shapes = [(2048, 3072), (512, 14336), (1, 14336)] if options.device == "cpu" else [(16384, 14336), (1, 14336)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, cols in [(64, 256)] if options.quick else shapes:
            yield forward(rows, cols, dtype, options)
            yield forward_backward(rows, cols, dtype, options)


GOAL = {"cpu": "<= 1x torch", "cuda": "90 % of HBM, at least liger"}


def torch_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def forward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    gate, up = (torch.randn(rows, cols, dtype=dtype, device=options.device) for _ in range(2))

    theirs = liger(options)

    def check(y):
        assert_accurate(y, swiglu_ref(gate, up), swiglu_ref(gate.double(), up.double()))

    return Case(
        op="swiglu", name=f"fwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: swiglu(gate, up, isa=options.isa),
        bytes=3 * gate.numel() * gate.element_size(),  # gate, up read, y written
        peers={"torch": lambda: torch_swiglu(gate, up)} | ({"liger": lambda: theirs.liger_swiglu(gate, up)} if theirs else {}),
        goal=GOAL[options.device],
    )  # fmt: skip


def forward_backward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    gate, up, dy = (torch.randn(rows, cols, dtype=dtype, device=options.device) for _ in range(3))

    def gradients(f, dtype=dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (gate.detach(), up.detach())]
        return torch.autograd.grad(f(*inputs), inputs, dy.to(dtype))

    theirs = liger(options)
    copies = [gate.clone(), up.clone()] if theirs else []  # its backward writes over its inputs

    def liger_gradients():
        inputs = [t.detach().requires_grad_() for t in copies]
        return torch.autograd.grad(theirs.liger_swiglu(*inputs), inputs, dy)

    def check(grads):
        for got, plain, exact in zip(grads, gradients(swiglu_ref), gradients(swiglu_ref, torch.float64), strict=True):
            assert_accurate(got, plain, exact)

    return Case(
        op="swiglu", name=f"fwd+bwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: gradients(lambda gate, up: swiglu(gate, up, isa=options.isa)),
        bytes=(3 + 5) * gate.numel() * gate.element_size(),  # backward: dy, gate, up read, dgate, dup written
        peers={"torch": lambda: gradients(torch_swiglu)} | ({"liger": liger_gradients} if theirs else {}),
        goal=GOAL[options.device],
    )  # fmt: skip

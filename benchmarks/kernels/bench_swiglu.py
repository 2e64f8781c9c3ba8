"""swiglu: forward, and forward + backward. Bandwidth-bound.

Outputs stay below 32 MiB: glibc's malloc maps larger ones anew at every call, and the page faults would be what is timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.swiglu import swiglu, swiglu_ref
from swiftk.testing.accuracy import assert_accurate


def cases(options: Options) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, cols in [(64, 256)] if options.quick else [(2048, 3072), (512, 14336), (1, 14336)]:
            yield forward(rows, cols, dtype, options)
            yield forward_backward(rows, cols, dtype, options)


def torch_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def forward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    gate, up = (torch.randn(rows, cols, dtype=dtype, device=options.device) for _ in range(2))

    def check(y):
        assert_accurate(y, swiglu_ref(gate, up), swiglu_ref(gate.double(), up.double()))

    return Case(
        op="swiglu", name=f"fwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: swiglu(gate, up, isa=options.isa),
        bytes=3 * gate.numel() * gate.element_size(),  # gate, up read, y written
        peers={"torch": lambda: torch_swiglu(gate, up)},
        goal="<= 1x torch",
    )  # fmt: skip


def forward_backward(rows: int, cols: int, dtype: torch.dtype, options: Options) -> Case:
    gate, up, dy = (torch.randn(rows, cols, dtype=dtype, device=options.device) for _ in range(3))

    def gradients(f, dtype=dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (gate.detach(), up.detach())]
        return torch.autograd.grad(f(*inputs), inputs, dy.to(dtype))

    def check(grads):
        for got, plain, exact in zip(grads, gradients(swiglu_ref), gradients(swiglu_ref, torch.float64), strict=True):
            assert_accurate(got, plain, exact)

    return Case(
        op="swiglu", name=f"fwd+bwd {rows} x {cols}", dtype=dtype, check=check,
        run=lambda: gradients(lambda gate, up: swiglu(gate, up, isa=options.isa)),
        bytes=(3 + 5) * gate.numel() * gate.element_size(),  # backward: dy, gate, up read, dgate, dup written
        peers={"torch": lambda: gradients(torch_swiglu)},
        goal="<= 1x torch",
    )  # fmt: skip

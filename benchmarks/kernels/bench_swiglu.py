"""swiglu: forward, and forward + backward. Bandwidth-bound."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.swiglu import swiglu, swiglu_ref
from swiftk.testing.accuracy import assert_accurate


def with_gradients(f, dy, *inputs):
    """(y, gradients of the inputs) as one call."""

    def run():
        y = f(*inputs)
        return y, *torch.autograd.grad(y, inputs, dy)

    return run


def check(results, dy, *inputs):
    exact = with_gradients(swiglu_ref, dy.double(), *(t.detach().double().requires_grad_() for t in inputs))()
    for got, plain, want in zip(results, with_gradients(swiglu_ref, dy, *inputs)(), exact, strict=True):
        assert_accurate(got, plain, want)


def cases(options: Options) -> Iterator[Case]:
    def torch_swiglu(gate, up):
        return torch.nn.functional.silu(gate) * up

    shapes = [(64, 256)] if options.quick else [(4096, 3072), (2048, 14336), (1, 14336)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, cols in shapes:
            gate, up, dy = (torch.randn(rows, cols, dtype=dtype, device=options.device) for _ in range(3))
            inputs = [t.clone().requires_grad_() for t in (gate, up)]
            one = gate.numel() * gate.element_size()

            def ours(gate, up):
                return swiglu(gate, up, isa=options.isa)

            yield Case(
                op="swiglu", name=f"fwd {rows} x {cols}", dtype=dtype,
                run=lambda gate=gate, up=up: ours(gate, up),
                check=lambda y, gate=gate, up=up: assert_accurate(y, swiglu_ref(gate, up), swiglu_ref(gate.double(), up.double())),
                bytes=3 * one,  # gate, up read, y written
                peers={"torch": lambda gate=gate, up=up: torch_swiglu(gate, up)},
                goal="<= 1x torch",
            )  # fmt: skip
            yield Case(
                op="swiglu", name=f"fwd+bwd {rows} x {cols}", dtype=dtype,
                run=with_gradients(ours, dy, *inputs),
                check=lambda results, dy=dy, inputs=inputs: check(results, dy, *inputs),
                bytes=3 * one + 5 * one,  # backward: dy, gate, up read, dgate, dup written
                peers={"torch": with_gradients(torch_swiglu, dy, *inputs)},
                goal="<= 1x torch",
            )  # fmt: skip

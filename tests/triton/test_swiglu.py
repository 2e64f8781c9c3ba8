from __future__ import annotations

import pytest
import torch

from swiftk.kernels import swiglu as module
from swiftk.kernels.swiglu import swiglu, swiglu_ref
from swiftk.testing.accuracy import assert_accurate
from tests.triton.launched import check_operator, operators_take


def plain(gate, up):
    return torch.nn.functional.silu(gate) * up


def gradients(f, *inputs, dy):
    inputs = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(f(*inputs), inputs, dy)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 130), (5, 64), (0, 8), (4, 0)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(shape, strided, dtype, device, monkeypatch):
    monkeypatch.setitem(module._META, "TILE", 32)
    monkeypatch.setattr(module, "TILE", 32)
    both = (4 * torch.randn(*shape[:-1], 2 * shape[-1], device=device)).to(dtype)
    gate, up = both.chunk(2, -1)
    if not strided:
        gate, up = gate.contiguous(), up.contiguous()
    dy = torch.randn(shape, device=device).to(dtype)
    with operators_take(dtype):
        y, grads = swiglu(gate, up), gradients(swiglu, gate, up, dy=dy)
    assert_accurate(y, plain(gate, up), swiglu_ref(gate.double(), up.double()))
    exact = gradients(swiglu_ref, gate.double(), up.double(), dy=dy.double())
    theirs = gradients(plain, gate, up, dy=dy)
    for name, got, torchs, want in zip(("dgate", "dup"), grads, theirs, exact, strict=True):
        assert_accurate(got, torchs, want, name)


def test_edges(device):
    gate = torch.tensor([-200.0, -87.4, -torch.inf, torch.inf, torch.nan, 0.0], device=device)
    y = swiglu(gate, torch.ones_like(gate))
    assert y[0] == 0 and y[2].isnan() and y[3] == torch.inf and y[4].isnan() and y[5] == 0


def test_operator(device):
    check_operator(swiglu, *(torch.randn(3, 40, device=device, requires_grad=True) for _ in range(2)))

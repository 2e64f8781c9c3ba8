from __future__ import annotations

import pytest
import torch

from swiftk.kernels.rms_norm import rms_norm, rms_norm_out, rms_norm_ref
from swiftk.testing.accuracy import assert_accurate
from tests.triton.launched import check_operator, operators_take

SHAPES = [(1, 1), (3, 7), (17, 64), (33, 100), (2, 3, 513), (0, 8)]


def plain(x, weight, residual=None):
    """The same steps as torch has them, each rounded."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def gradients(f, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(f(x, weight), (x, weight), dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, device):
    x, dy, weight = (torch.randn(s, device=device).to(dtype) for s in (shape, shape, shape[-1:]))
    with operators_take(dtype):
        y, grads = rms_norm(x, weight), gradients(rms_norm, x, weight, dy)
    assert_accurate(y, plain(x, weight), rms_norm_ref(x.double(), weight.double()))
    exact = gradients(rms_norm_ref, x.double(), weight.double(), dy.double())
    for name, got, torchs, want in zip(("dx", "dw"), grads, gradients(plain, x, weight, dy), exact, strict=True):
        assert_accurate(got, torchs, want, name)


def test_a_row_depends_on_itself_alone_and_repeats(device):
    x, weight = torch.randn(50, 200, device=device), torch.rand(200, device=device)
    y = rms_norm(x, weight)
    assert torch.equal(y[7:9], rms_norm(x[7:9], weight))
    poisoned = x.clone()
    poisoned[20] = torch.nan
    assert torch.equal(rms_norm(poisoned, weight)[:20], y[:20]) and rms_norm(poisoned, weight)[20].isnan().all()
    dy = torch.randn_like(x)
    for a, b in zip(gradients(rms_norm, x, weight, dy), gradients(rms_norm, x, weight, dy), strict=True):
        assert torch.equal(a, b)


def test_a_residual_is_added_in_place_and_rounded(dtype, device):
    x, residual, weight = (torch.randn(s, device=device).to(dtype) for s in ((5, 100), (5, 100), (100,)))
    y, rstd = torch.full_like(x, torch.nan), torch.full((5,), torch.nan, device=device)
    want = x + residual
    given = x.clone()
    rms_norm_out(given, weight, 1e-6, y, rstd, residual=residual)
    assert torch.equal(given, want)
    alone = torch.empty_like(x)
    rms_norm_out(want.clone(), weight, 1e-6, alone, rstd)
    assert torch.equal(y, alone)


def test_operator(device):
    x, weight = torch.randn(3, 40, device=device, requires_grad=True), torch.rand(40, device=device, requires_grad=True)
    check_operator(rms_norm, x, weight)

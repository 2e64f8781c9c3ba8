from __future__ import annotations

import pytest
import torch

from swiftk.kernels.dropout import TILE, Dropout, dropout, dropout_out, dropout_ref, keep_ref
from tests.kernels.test_dropout import make as on_cpu
from tests.triton.launched import check_operator, operators_take


def make(rows: int, device, **options) -> Dropout:
    d = on_cpu(rows, **options)
    return d._replace(seed_step=d.seed_step.to(device), token_index=d.token_index.to(device))


@pytest.mark.parametrize("columns", [1, 7, 8, 31, 129, TILE, TILE + 5, 2 * TILE + 1])
def test_bits_are_those_of_the_reference(columns, dtype, device):
    x, d = torch.randn(5, columns, device=device).to(dtype), make(5, device)
    want = dropout_ref(x, d)
    with operators_take(dtype):
        assert torch.equal(dropout(x, d), want)
    assert columns < 8 or 0 < (want != 0).sum() < want.numel()


def test_fp64_and_more_rows_than_a_tile(device):
    x, d = torch.randn(300, 9, device=device, dtype=torch.float64), make(300, device, p=1 / 3)
    assert torch.equal(dropout(x, d), dropout_ref(x, d))


def test_wide_counters(device):
    """Seed, step and token past 2^32, the last layer, columns far out."""
    x = torch.randn(3, 9_000, device=device)
    d = Dropout(
        0.5, torch.tensor([-3 - (7 << 33), 5 << 31], device=device), 65535,
        torch.tensor([(2**31 - 1) << 32 | 2**32 - 1, 0, -1], device=device),
    )  # fmt: skip
    assert torch.equal(dropout(x, d), dropout_ref(x, d))


def test_strides_and_a_factor_of_one(device):
    x, d = torch.randn(6, 50, device=device), make(6, device)
    y = torch.full((6, 64), torch.nan, device=device)
    dropout_out(x[:, :40], d.threshold, d.seed_step, d.layer, d.token_index, y[:, 3:43])
    assert torch.equal(y[:, 3:43], torch.where(keep_ref(d, 40), x[:, :40], 0))
    assert y[:, :3].isnan().all() and y[:, 43:].isnan().all()


def test_edges(device):
    assert dropout(torch.empty(0, 5, device=device), make(0, device)).shape == (0, 5)
    assert dropout(torch.empty(4, 0, device=device), make(4, device)).shape == (4, 0)
    x = torch.randn(4, 30, device=device)
    assert torch.equal(dropout(x, make(4, device, p=0.0)), x)
    x[:, ::2] = torch.nan
    d = make(4, device, p=0.5)
    assert torch.equal(dropout(x, d).isnan(), x.isnan() & keep_ref(d, 30))


def test_gradient_is_the_same_mask(dtype, device):
    x, dy = (torch.randn(9, 40, device=device).to(dtype) for _ in range(2))
    d = make(9, device)
    with operators_take(dtype):
        (dx,) = torch.autograd.grad(dropout(x.requires_grad_(), d), x, dy)
    assert torch.equal(dx, dropout_ref(dy, d))


def test_operator(device):
    d = make(3, device)
    check_operator(lambda x: dropout(x, d), torch.randn(3, 40, device=device, requires_grad=True))

from __future__ import annotations

import pytest
import torch

from swiftk.kernels.rope import rope, rope_ref
from tests.kernels.test_rope import make as on_cpu
from tests.triton.launched import check_operator, operators_take

# total, heads, head_dim, rotary_dim
SHAPES = [(1, 1, 2, 2), (7, 3, 10, 6), (5, 2, 64, 64), (3, 20, 40, 40), (4, 5, 96, 24), (3, 1, 134, 66), (0, 2, 8, 8)]


def make(shape, dtype, device, rows=50):
    return tuple(t.to(device) for t in on_cpu(shape, dtype, rows))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_formula(shape, dtype, device):
    """Every product and sum is rounded on its own, on every device: equal, not close; the gradient is the inverse turn."""
    x, cos, sin, positions = make(shape, dtype, device)
    x.requires_grad_()
    dy = torch.randn_like(x)
    with operators_take(dtype):
        y = rope(x, cos, sin, positions)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, rope_ref(x, cos, sin, positions))
    assert torch.equal(dx, rope_ref(dy, cos, -sin, positions))


def test_strides_int32_positions_and_in_place(device):
    x, cos, sin, positions = make((6, 4, 16, 12), torch.float32, device)
    want = rope_ref(x, cos, sin, positions)
    fused = torch.cat((x, torch.full_like(x, torch.nan)), 1)
    assert torch.equal(rope(fused[:, :4], cos, sin, positions.int()), want)
    assert torch.equal(rope(x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, positions), want)


def test_a_position_outside_of_the_table_is_nan(device):
    x, cos, sin, _ = make((3, 2, 8, 4), torch.float32, device)
    y = rope(x, cos, sin, torch.tensor([1, 50, -1], device=device))
    assert not y[0].isnan().any() and y[1:, :, :4].isnan().all() and torch.equal(y[..., 4:], x[..., 4:])


def test_operator(device):
    x, cos, sin, positions = make((6, 4, 16, 12), torch.float32, device)
    check_operator(rope, x.requires_grad_(), cos, sin, positions)

from __future__ import annotations

import pytest
import torch

from swiftk.kernels.attention import merge_attention
from swiftk.kernels.attention.merge import merge_attention_out, merge_attention_ref
from swiftk.testing.accuracy import assert_accurate
from tests.kernels.test_merge import EMPTY
from tests.kernels.test_merge import make as on_cpu
from tests.triton.launched import check_operator, operators_take


def make(tokens, heads, dim, dtype, device):
    return [t.to(device) for t in on_cpu(tokens, heads, dim, dtype)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 2, 8), (5, 3, 19), (33, 2, 64), (2, 1, 512)])
def test_values_and_gradients(shape, dtype, device):
    inputs = make(*shape, dtype, device)
    dout, dlse = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])
    results = []
    for ours, wide in ((True, False), (False, False), (False, True)):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
        with operators_take(dtype):
            merged = (merge_attention if ours else merge_attention_ref)(*leaves)
            grads = torch.autograd.grad(merged, leaves, (dout.to(merged[0].dtype), dlse.to(merged[1].dtype)))
        results.append((*merged, *grads))
    for name, got, plain, exact in zip(("out", "lse", "dout_a", "dlse_a", "dout_b", "dlse_b"), *results, strict=True):
        assert_accurate(got, plain, exact, name)


def test_rows_without_keys(device):
    """The side that has seen no key is not read: NaN there stays there. Neither side: 0 and -inf, gradients 0."""
    a, lse_a, b, lse_b = make(4, 2, 8, torch.float32, device)
    lse_a[:, 0] = lse_b[:, 1] = EMPTY
    lse_a[:, 2] = lse_b[:, 2] = EMPTY
    a[0], b[1], a[2], b[2] = (float("nan") for _ in range(4))
    leaves = [x.requires_grad_() for x in (a, lse_a, b, lse_b)]
    out, lse = merge_attention(*leaves)
    assert torch.equal(out[0], b[0]) and torch.equal(out[1], a[1]) and torch.equal(lse[:, 0], lse_b[:, 0])
    assert (out[2] == 0).all() and (lse[:, 2] == EMPTY).all()
    grads = torch.autograd.grad(out.sum() + lse[:, [0, 1, 3]].sum(), leaves)
    assert not any(g.isnan().any() for g in grads)
    assert (grads[0][0] == 0).all() and (grads[0][1] == 1).all() and (grads[3][:, 0] == 1).all() and (grads[0][2] == 0).all()


def test_in_place_and_of_itself_alone(device):
    inputs = make(70, 2, 64, torch.float32, device)
    want = merge_attention(*inputs)
    alone = merge_attention(*(x[7:9].contiguous() if x.dim() == 3 else x[:, 7:9].contiguous() for x in inputs))
    assert torch.equal(alone[0], want[0][7:9]) and torch.equal(alone[1], want[1][:, 7:9])
    merge_attention_out(*inputs, *inputs[:2])
    assert torch.equal(inputs[0], want[0]) and torch.equal(inputs[1], want[1])


def test_operator(device):
    check_operator(merge_attention, *(x.requires_grad_() for x in make(5, 2, 16, torch.float32, device)))

"""merge_attention: values, gradients, empty rows, equality with one pass, operator contracts, errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from swiftk.kernels.attention import merge_attention, segment_attention
from swiftk.kernels.attention.merge import merge_attention_ref
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
EMPTY = float("-inf")


def make(tokens, heads, dim, dtype):
    lse_dtype = torch.promote_types(dtype, torch.float32)
    outs = [torch.randn(tokens, heads, dim, dtype=torch.float64).to(dtype) for _ in range(2)]
    lses = [(3 * torch.randn(heads, tokens, dtype=torch.float64)).to(lse_dtype) for _ in range(2)]
    return [outs[0], lses[0], outs[1], lses[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 19), (33, 2, 64)])
def test_values_and_gradients(shape, dtype, isa):
    inputs = make(*shape, dtype)
    dout, dlse = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])
    results = []
    for ours, wide in ((True, False), (False, False), (False, True)):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
        merged = merge_attention(*leaves, isa=isa) if ours else merge_attention_ref(*leaves)
        grads = torch.autograd.grad(merged, leaves, (dout.to(merged[0].dtype), dlse.to(merged[1].dtype)))
        results.append((*merged, *grads))
    for name, got, plain, exact in zip(("out", "lse", "dout_a", "dlse_a", "dout_b", "dlse_b"), *results, strict=True):
        assert_accurate(got, plain, exact, name)


def test_rows_without_keys(isa):
    """The side that has seen no key is not read: NaN there stays there. Neither side: 0 and -inf, gradients 0."""
    a, lse_a, b, lse_b = make(4, 2, 8, torch.float32)
    lse_a[:, 0] = lse_b[:, 1] = EMPTY
    lse_a[:, 2] = lse_b[:, 2] = EMPTY
    a[0], b[1], a[2], b[2] = (float("nan") for _ in range(4))
    leaves = [x.requires_grad_() for x in (a, lse_a, b, lse_b)]
    out, lse = merge_attention(*leaves, isa=isa)
    assert torch.equal(out[0], b[0]) and torch.equal(out[1], a[1]) and torch.equal(lse[:, 0], lse_b[:, 0])
    assert (out[2] == 0).all() and (lse[:, 2] == EMPTY).all()
    grads = torch.autograd.grad(out.sum() + lse[:, [0, 1, 3]].sum(), leaves)
    assert not any(g.isnan().any() for g in grads)
    assert (grads[0][0] == 0).all() and (grads[0][1] == 1).all() and (grads[3][:, 0] == 1).all() and (grads[0][2] == 0).all()


@pytest.mark.parametrize("parts", [2, 5])
def test_merged_parts_equal_one_pass(parts):
    q, k, v = torch.randn(20, 4, 16).double(), torch.randn(100, 2, 16).double(), torch.randn(100, 2, 16).double()

    def attend(first, last):
        segment = torch.tensor([[0, 20, first, last - first, 60, first]], dtype=torch.int32)
        return segment_attention(q, k, v, segment, causal=True)

    want_out, want_lse = attend(0, 100)
    cuts = [100 * i // parts for i in range(parts + 1)]
    out, lse = attend(*cuts[:2])
    for first, last in itertools.pairwise(cuts[1:]):
        out, lse = merge_attention(out, lse, *attend(first, last))
    assert (out - want_out).abs().max() <= 1e-13 and (lse - want_lse).abs().max() <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_that_row_alone(dtype, isa, thread_count):
    a, lse_a, b, lse_b = make(37, 3, 21, dtype)
    out, lse = thread_count(2, lambda: merge_attention(a, lse_a, b, lse_b, isa=isa))
    for i in range(37):
        row = a[i : i + 1], lse_a[:, i : i + 1], b[i : i + 1], lse_b[:, i : i + 1]
        alone = thread_count(1, lambda row=row: merge_attention(*row, isa=isa))
        assert torch.equal(alone[0][0], out[i]) and torch.equal(alone[1][:, 0], lse[:, i])


def test_second_backward_and_double_backward():
    leaves = [x.requires_grad_() for x in make(4, 2, 8, torch.float32)]
    out, lse = merge_attention(*leaves)
    loss = out.square().sum() + lse.sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (da,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="merge_attention: the gradient of its gradient is not supported"):
        torch.autograd.grad(da.sum(), leaves[0])


def test_opcheck_and_compile():
    leaves = [x.requires_grad_() for x in make(4, 2, 8, torch.float32)]
    torch.library.opcheck(torch.ops.swiftk.merge_attention_fwd.default, (*leaves, "auto"))
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*leaves), merge_attention(*leaves), strict=True))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(4, 8), r"out_a has shape \(4, 8\), wants \(total_q, heads, head_dim\)"),
        (2, torch.randn(5, 2, 8), r"out_b has shape \(5, 2, 8\), out_a \(4, 2, 8\) needs"),
        (1, torch.randn(4, 2), r"lse_a has shape \(4, 2\), out_a \(4, 2, 8\) needs \(2, 4\)"),
        (3, torch.randn(2, 4).double(), r"lse_b has dtype torch.float64, wants torch.float32 \(lse_b.float\(\)\)"),
        (2, torch.randn(4, 2, 8).double(), "out_b has dtype torch.float64, wants torch.float32 like out_a"),
    ],
)
def test_errors(index, value, message):
    arguments = make(4, 2, 8, torch.float32)
    arguments[index] = value
    with pytest.raises(ValueError, match="merge_attention: " + message):
        merge_attention(*arguments)
    with pytest.raises(ValueError, match="merge_attention: isa has 'sse9', wants one of"):
        merge_attention(*make(4, 2, 8, torch.float32), isa="sse9")

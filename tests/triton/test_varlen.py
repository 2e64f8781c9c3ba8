"""Attention over packed sequences in Triton, in blocks of 32 rows and 16 keys, so that small tensors have several in each
direction; on a GPU in the shipped blocks too."""

from __future__ import annotations

import bisect
import itertools

import numpy as np
import pytest
import torch

from swiftk.kernels._triton import jit, launch, tl
from swiftk.kernels.attention import _varlen_tiles, segment_attention, segment_attention_backward, varlen_attention
from swiftk.kernels.attention.varlen import attention_backward_out, attention_out, varlen_attention_ref
from swiftk.testing.accuracy import assert_accurate, error
from tests.triton.conftest import ON_CUDA
from tests.triton.launched import check_operator, operators_take

EMPTY = float("-inf")
# lens_q, lens_k, heads, kv_heads, head_dim, causal, window, softcap, sinks, tail
CASES = [
    ([5, 0, 1, 30], [5, 0, 1, 30], 3, 1, 24, True, (-1, -1), 0.0, False, 2),
    ([20, 3], [41, 2], 2, 2, 40, True, (9, -1), 3.0, True, 2),
    ([1, 18], [40, 20], 2, 1, 16, False, (5, 9), 0.0, True, 1),
    ([3, 0], [0, 7], 2, 1, 8, False, (-1, -1), 0.0, True, 0),
    ([17], [9], 3, 3, 16, True, (-1, -1), 0.0, False, 0),
    ([60], [60], 2, 1, 16, True, (40, -1), 0.0, False, 0),  # whole tiles within a left window, and cut by it
]
LONG = [
    ([9, 0, 20], [0, 7, 50], 4, 1, 64, False, (-1, -1), 0.0, True, 0),
    ([5, 0, 1, 50], [5, 0, 1, 50], 6, 2, 24, True, (-1, -1), 0.0, False, 3),
    ([65, 129], [65, 129], 4, 2, 128, True, (-1, -1), 0.0, True, 0),
    ([40, 0], [150, 7], 2, 2, 160, False, (-1, -1), 0.0, False, 2),
    ([30, 5, 64], [0, 90, 64], 3, 3, 40, False, (-1, 12), 20.0, False, 0),
    ([97], [97], 8, 1, 1, True, (64, 3), 1.5, False, 5),
    ([31, 64], [64, 200], 2, 1, 96, True, (0, -1), 0.0, True, 0),
    ([50], [51], 2, 2, 512, True, (-1, -1), 0.0, False, 0),
    ([50], [51], 2, 1, 300, True, (20, -1), 4.0, True, 1),
]


@pytest.fixture(autouse=True, params=["small", "shipped"] if ON_CUDA else ["small"])
def _blocks(request, monkeypatch):
    if request.param == "small":
        small = dict(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=2)
        monkeypatch.setattr(_varlen_tiles, "blocks", lambda *args: small)


def offsets(lens, device):
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)


def make(case, dtype, device):
    lens_q, lens_k, heads, kv_heads, dim, causal, window, softcap, with_sinks, tail = case
    tokens = [(sum(lens_q) + tail, heads), (sum(lens_k) + tail, kv_heads), (sum(lens_k) + tail, kv_heads)]
    tensors = [torch.randn(n, h, dim, dtype=torch.float64, device=device).to(dtype) for n, h in tokens]
    sinks = torch.randn(heads, dtype=torch.float64, device=device).to(dtype) if with_sinks else None
    cu = offsets(lens_q, device), offsets(lens_k, device)
    return tensors, sinks, cu, dict(causal=causal, window_size=window, softcap=softcap)


def ours(q, k, v, *cu, **options):
    return varlen_attention(q, k, v, *cu, return_lse=True, **options)


def run(f, tensors, sinks, cu, options, cast, dout, dlse):
    leaves = [x.to(cast).requires_grad_() for x in (*tensors, *([] if sinks is None else [sinks]))]
    out, lse = f(*leaves[:3], *cu, sinks=leaves[3] if len(leaves) > 3 else None, **options)
    seen = lse > EMPTY
    loss = (out * dout.to(cast)).sum() + (lse.masked_fill(~seen, 0.0) * dlse.to(lse.dtype)).sum()
    return seen, (out, lse.masked_fill(~seen, 0.0), *torch.autograd.grad(loss, leaves))


def compare(case, dtype, device):
    tensors, sinks, cu, options = make(case, dtype, device)
    dout = torch.randn(tensors[0].shape, dtype=torch.float64, device=device).to(dtype)
    dlse = torch.randn(tensors[0].shape[1::-1], device=device)
    with operators_take(dtype):
        seen, got = run(ours, tensors, sinks, cu, options, dtype, dout, dlse)
    (_, plain), (seen_exactly, exact) = (
        run(varlen_attention_ref, tensors, sinks, cu, options, cast, dout, dlse) for cast in (dtype, torch.float64)
    )
    assert torch.equal(seen, seen_exactly)
    if sinks is not None:  # a sum over queries that cancel: its error is relative to what was added, which joins the values
        share = torch.sigmoid(sinks.double()[:, None] - exact[1].masked_fill(~seen, float("inf")))
        added = (share * (dout.double() * exact[0]).sum(-1).T).abs().sum(1)
        got, plain, exact = ((*x[:-1], torch.cat((x[-1], added.to(x[-1].dtype)))) for x in (got, plain, exact))
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, plain, exact, strict=False):
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_lse_and_gradients(case, dtype, device):
    compare(case, dtype, device)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=str)
def test_more_values(case, dtype, device):
    compare(case, dtype, device)


def test_documents_do_not_touch_each_other(device):
    """NaN in the middle document and in the tail: the others' bits, and zeros in the tail."""
    lens = [10, 9, 20]
    tensors, _, (cu, _), _ = make((lens, lens, 2, 1, 16, True, (-1, -1), 0.0, False, 4), torch.float32, device)
    dout = torch.randn_like(tensors[0])

    def grads(tensors, dout):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = ours(*leaves, cu, causal=True)
        return out.detach(), lse.detach().t(), *torch.autograd.grad(out, leaves, dout)

    def poisoned(x):
        x = x.clone()
        x[10:19], x[39:] = torch.nan, torch.nan
        return x

    clean, dirty = grads(tensors, dout), grads([poisoned(x) for x in tensors], poisoned(dout))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:10], b[:10]) and torch.equal(a[19:], b[19:])
        assert b[10:19].isnan().any()
    for x in (clean[0], *clean[2:]):
        assert (x[39:] == 0).all()
    assert (clean[1][39:] == EMPTY).all()


def each_alone(a, b, dtype=None):
    """The interpreter's products: numpy's BLAS adds in another order in other rows, a GPU's instruction does not."""
    return (np.ascontiguousarray(a)[:, :, None].astype(np.float64) * np.asarray(b)[None]).sum(1).astype(dtype or a.dtype)


def test_a_query_depends_on_itself_and_its_keys_alone_and_everything_repeats(device, monkeypatch):
    """Packed, alone, and in chunks over a prefix of the keys: the same bits."""
    monkeypatch.setattr(np, "matmul", each_alone)
    tensors, sinks, (cu, _), options = make(
        ([20, 1, 30], [20, 1, 30], 2, 1, 16, True, (20, -1), 2.0, True, 0), torch.float32, device
    )
    q, k, v = tensors
    packed = ours(q, k, v, cu, sinks=sinks, **options)
    for start, first, last in [(0, 0, 20), (21, 0, 30), (21, 7, 8), (21, 20, 30), (21, 25, 26)]:
        rows, keys = slice(start + first, start + last), slice(start, start + last)
        part = offsets([last - first], device), offsets([last], device)
        alone = ours(q[rows], k[keys], v[keys], *part, sinks=sinks, **options)
        assert torch.equal(alone[0], packed[0][rows]) and torch.equal(alone[1], packed[1][:, rows]), (start, first, last)

    def grads():
        leaves = [x.clone().requires_grad_() for x in (*tensors, sinks)]
        return torch.autograd.grad(varlen_attention(*leaves[:3], cu, sinks=leaves[3], **options), leaves, torch.ones_like(q))

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))


def test_strided_inputs_no_tokens_no_documents(device):
    qkv = torch.randn(50, 8, 16, device=device)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    cu = offsets([20, 30], device)
    want = varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu)
    assert torch.equal(varlen_attention(q, k, v, cu), want)
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)  # heads first in memory
    assert torch.equal(varlen_attention(by_head, k, v, cu), want)
    assert torch.equal(varlen_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, cu), want)
    out, lse = ours(q, k, v, offsets([], device))
    assert (out == 0).all() and (lse == EMPTY).all()
    assert ours(q[:0], k[:0], v[:0], offsets([0], device))[0].shape == (0, 4, 16)


@jit
def _found(document, block, cu, tiles, documents, GROUP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    i = tl.program_id(0)
    of, at = _varlen_tiles.find_tile(cu, tl.load(tiles + i), documents, GROUP, BLOCK, STEPS)
    tl.store(document + i, of)
    tl.store(block + i, at)


@pytest.mark.parametrize("documents", [1, 127, 128, 16383, 16384, 20000])
def test_the_document_of_a_block(documents, device):
    """One, two and three rounds of the search, against bisection."""
    group, block = 3, 32
    cu = offsets(torch.randint(0, 30, (documents,)).tolist(), device)
    first = [n * group // block + i for i, n in enumerate(cu.tolist())]
    tiles = [first[i] + d for i in (0, 1, documents // 2, documents - 1, documents) for d in (-1, 0, 1) if first[i] + d >= 0]
    got = torch.full((2, len(tiles)), -1, dtype=torch.int32, device=device)
    launch(
        _found, (len(tiles),), *got, cu, torch.tensor(tiles, dtype=torch.int32, device=device), documents, GROUP=group,
        BLOCK=block, STEPS=_varlen_tiles.steps_of(documents),
    )  # fmt: skip
    want = [bisect.bisect_right(first, tile) - 1 for tile in tiles]
    assert got.tolist() == [want, [tile - first[i] for tile, i in zip(tiles, want, strict=True)]]


def test_many_documents(device):
    """More than one step of the search for a block's document."""
    lens = [3, *[0] * 126, 2, 0, 4]
    cu = offsets(lens, device)
    q, k, v = (torch.randn(9, 1, 16, device=device) for _ in range(3))
    assert_accurate(
        varlen_attention(q, k, v, cu, causal=True), varlen_attention_ref(q, k, v, cu, causal=True)[0],
        varlen_attention_ref(q.double(), k.double(), v.double(), cu, causal=True)[0],
    )  # fmt: skip


@pytest.mark.parametrize("sink", [float("inf"), 3e38])
def test_an_infinite_sink_takes_everything(sink, device):
    leaves = [torch.randn(9, 2, 16, device=device).requires_grad_() for _ in range(3)]
    sinks = torch.tensor([sink, EMPTY], device=device)
    out, lse = ours(*leaves, offsets([9], device), causal=True, sinks=sinks)
    grads = torch.autograd.grad(out.sum(), leaves)
    plain = ours(*leaves, offsets([9], device), causal=True)
    assert (out[:, 0] == 0).all() and all((g[:, 0] == 0).all() for g in grads)
    assert torch.equal(lse, plain[1])
    assert (out[:, 1] - plain[0][:, 1]).abs().max() < 1e-6 and not any(g.isnan().any() for g in grads)


def test_bad_offsets_stay_inside_the_tensors(device):
    q, k, v = (torch.randn(10, 1, 16, device=device) for _ in range(3))
    leaf = q.clone().requires_grad_()
    cu = torch.tensor([-4, 6, 3, 900], dtype=torch.int32, device=device)
    varlen_attention(leaf, k, v, cu, causal=True).sum().backward()


# --- segments -----------------------------------------------------------------------------------------------------


def segments(rows, device):
    return torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("window", "softcap"), [((-1, -1), 0.0), ((15, -1), 4.0)])
def test_a_ring_of_calls_is_close_to_one_pass(window, softcap, device):
    """Queries in two halves meet the keys in two halves; the last call has the sinks. The gradients of all calls add up."""
    (q, k, v), sinks, (cu, _), options = make(
        ([30, 5],) * 2 + (2, 1, 24, True, window, softcap, True, 0), torch.float32, device
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    want = ours(*leaves[:3], cu, sinks=leaves[3], **options)
    dout, dlse = torch.randn_like(q), torch.randn_like(want[1])
    wanted = torch.autograd.grad(want, leaves, (dout, dlse))

    first = segments([[30, 5, 30, 5, 0, 0], [0, 14, 0, 13, 0, 0], [14, 16, 0, 13, 14, 0]], device)  # queries in any order
    second = segments([[0, 14, 13, 17, 0, 13], [14, 16, 13, 17, 14, 13]], device)  # the same keys twice
    every = segments([[0, 35, 0, 0, 0, 0]], device)
    out = lse = None
    for call in (first, second):
        out, lse = segment_attention(q, k, v, call, out=out, lse=lse, **options)
    out, lse = segment_attention(q, k, v, every, out=out, lse=lse, sinks=sinks, **options)
    grads = [torch.zeros_like(x) for x in (q, k, v, sinks)]
    state = dict(zip(("dq", "dk", "dv"), grads, strict=False), dlse=dlse, sinks=sinks, **options)
    for call in (first, second):
        segment_attention_backward(dout, q, k, v, out, lse, call, **state)
    segment_attention_backward(dout, q, k, v, out, lse, every, dsinks=grads[3], **state)
    for got, exact in zip((out, lse, *grads), (*want, *wanted), strict=True):
        assert error(got, exact) <= 1e-5


def test_writes_the_rows_of_segments_and_nothing_else(device):
    q, k, v = (
        torch.randn(30, 2, 19, device=device),
        torch.randn(20, 1, 19, device=device),
        torch.randn(20, 1, 19, device=device),
    )
    out, lse = torch.full((32, 2, 19), torch.nan, device=device), torch.full((2, 30), torch.nan, device=device)
    table = segments([[4, 10, 3, 9, 0, 5], [20, 3, 5, 0, 0, 0]], device)
    attention_out(q, k, v, table, None, 1.0, 0.0, -1, -1, out[1:31], lse)
    inside = torch.zeros(30, dtype=torch.bool, device=device)
    inside[4:14], inside[20:23] = True, True
    assert not out[1:31][inside].isnan().any() and out[1:31][~inside].isnan().all() and out[[0, 31]].isnan().all()
    assert not lse[:, inside].isnan().any() and lse[:, ~inside].isnan().all()

    # what no segment has is NaN in the inputs, and its gradients stay as they are
    q[~inside], k[:3], k[12:], v[:3], v[12:] = (torch.nan,) * 5
    dout, dq, dk, dv = torch.ones_like(q), torch.full_like(q, 7.0), torch.full_like(k, 7.0), torch.full_like(v, 7.0)
    dout[~inside] = torch.nan
    attention_backward_out(dout, None, q, k, v, out[1:31], lse, table, None, 1.0, 0.0, -1, -1, dq, dk, dv, None)
    assert not (dq[4:14] == 7).all() and (dq[~inside] == 7).all() and not dq.isnan().any()
    for x in (dk, dv):
        assert (x[:3] == 7).all() and (x[12:] == 7).all() and not (x[3:12] == 7).any() and not x.isnan().any()


def test_operator(device):
    tensors, sinks, (cu, _), _ = make(([9, 4], [9, 4], 2, 1, 16, True, (-1, -1), 0.0, True, 1), torch.float32, device)
    leaves = [x.requires_grad_() for x in (*tensors, sinks)]
    check_operator(lambda q, k, v, sinks, cu: varlen_attention(q, k, v, cu, causal=True, sinks=sinks), *leaves, cu)


@pytest.mark.skipif(not ON_CUDA, reason="fp64 is refused on CUDA alone")
def test_fp64_is_refused(device):
    x = torch.randn(4, 1, 16, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"varlen_attention: q has dtype torch\.float64, wants"):
        varlen_attention(x, x, x, offsets([4], device))

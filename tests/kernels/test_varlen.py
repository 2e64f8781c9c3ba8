"""varlen_attention and segment_attention: values, lse, every gradient, row invariance, resuming, operator contracts, errors."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend

from swiftk.kernels.attention import _foreign, segment_attention, segment_attention_backward, varlen_attention
from swiftk.kernels.attention.varlen import attention_out, varlen_attention_ref
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
EMPTY = float("-inf")
# lens_q, lens_k, heads, kv_heads, head_dim, causal, window, softcap, sinks, tail: each value of each option, and odd pairs
CASES = [
    ([5, 0, 1, 130], [5, 0, 1, 130], 2, 2, 8, True, (-1, -1), 0.0, False, 0),
    ([70, 3, 40], [100, 2, 129], 4, 2, 40, True, (17, -1), 3.0, True, 3),
    ([1, 77], [200, 64], 6, 1, 64, False, (5, 9), 0.0, True, 1),
    ([65, 129], [65, 129], 4, 2, 128, True, (-1, -1), 0.0, True, 0),
    ([40, 0], [150, 7], 2, 2, 160, False, (-1, -1), 0.0, False, 2),
    ([9, 33], [4, 33], 8, 2, 64, True, (-1, -1), 20.0, False, 0),
    ([30, 5, 64], [0, 90, 64], 3, 3, 40, False, (-1, 12), 0.0, False, 0),
    ([97], [97], 4, 1, 8, True, (64, 3), 1.5, False, 5),
    ([31, 64], [64, 200], 2, 1, 128, True, (0, -1), 0.0, True, 0),
    ([16], [16], 5, 5, 160, True, (-1, -1), 30.0, True, 0),
    ([12, 80], [12, 80], 2, 1, 1, False, (7, 0), 0.0, False, 0),
    ([50], [51], 2, 2, 512, True, (-1, -1), 0.0, False, 0),
]


def offsets(lens):
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)


def make(case, dtype):
    lens_q, lens_k, heads, kv_heads, dim, causal, window, softcap, with_sinks, tail = case
    tokens = [(sum(lens_q) + tail, heads), (sum(lens_k) + tail, kv_heads), (sum(lens_k) + tail, kv_heads)]
    tensors = [torch.randn(n, h, dim, dtype=torch.float64).to(dtype) for n, h in tokens]
    sinks = torch.randn(heads, dtype=torch.float64).to(dtype) if with_sinks else None
    return tensors, sinks, (offsets(lens_q), offsets(lens_k)), dict(causal=causal, window_size=window, softcap=softcap)


def ours(q, k, v, *cu, isa="auto", **options):
    return varlen_attention(q, k, v, *cu, return_lse=True, isa=isa, **options)


def run(f, tensors, sinks, cu, options, cast, dout, dlse):
    leaves = [x.to(cast).requires_grad_() for x in (*tensors, *([] if sinks is None else [sinks]))]
    out, lse = f(*leaves[:3], *cu, sinks=leaves[3] if len(leaves) > 3 else None, **options)
    seen = lse > EMPTY
    loss = (out * dout.to(cast)).sum() + (lse[seen] * dlse.to(lse.dtype)[seen]).sum()
    grads = torch.autograd.grad(loss, leaves)
    return (out, torch.where(seen, lse, 0.0), *grads, seen)


def assert_close(got, plain, exact, what):
    """The rule of accuracy.py; in fp64, where `exact` has the same rounding as `plain`, 1e-12 of the largest value."""
    if got.dtype == torch.float64:
        assert got.shape == exact.shape and (got - exact).abs().max() <= 1e-12 * exact.abs().max(), what
    else:
        assert_accurate(got, plain, exact, what)


def compare(case, dtype, isa):
    tensors, sinks, cu, options = make(case, dtype)
    dout = torch.randn(tensors[0].shape, dtype=torch.float64).to(dtype)
    dlse = torch.randn(tensors[0].shape[1::-1], dtype=torch.float64).float()
    got = run(lambda *a, **o: ours(*a, isa=isa, **o), tensors, sinks, cu, options, dtype, dout, dlse)
    plain, exact = (run(varlen_attention_ref, tensors, sinks, cu, options, cast, dout, dlse) for cast in (dtype, torch.float64))
    assert torch.equal(got[-1], exact[-1])
    if sinks is not None:  # a sum over queries that cancel: its error is relative to what was added, which joins the values
        share = torch.sigmoid(sinks.double()[:, None] - exact[1].masked_fill(~exact[-1], float("inf")))
        added = (share * (dout.double() * exact[0]).sum(-1).T).abs().sum(1)
        got, plain, exact = ((*x[:-2], torch.cat((x[-2], added.to(x[-2].dtype))), x[-1]) for x in (got, plain, exact))
    return list(zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got[:-1], plain[:-1], exact[:-1], strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_lse_and_gradients(case, dtype, isa):
    for name, got, plain, exact in compare(case, dtype, isa):
        assert_close(got, plain, exact, name)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("dim", [8, 40, 64, 128, 160])
def test_full_product(dim, heads, dtype, isa):
    lens = [([130, 0, 1, 65], [130, 0, 1, 65]), ([5, 100], [70, 33])]
    windows = [(-1, -1), (20, -1), (-1, 5), (70, 10)]
    for pair, causal, window, softcap, sinks in itertools.product(lens, [False, True], windows, [0.0, 5.0], [False, True]):
        for name, got, plain, exact in compare((*pair, *heads, dim, causal, window, softcap, sinks, 1), dtype, isa):
            assert_close(got, plain, exact, f"{name} {pair} {causal} {window} {softcap} {sinks}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "window", "softcap"), [(40, (-1, -1), 0.0), (64, (50, -1), 2.0)])
def test_a_query_depends_on_itself_and_its_keys_alone(dim, window, softcap, dtype, isa, thread_count):
    """Packed, alone, in chunks, and one at a time over a growing KV tensor: the same bits."""
    tensors, sinks, (cu, _), options = make(([100, 1, 213], [100, 1, 213], 4, 2, dim, True, window, softcap, True, 0), dtype)
    q, k, v = tensors
    packed = thread_count(2, lambda: ours(q, k, v, cu, sinks=sinks, isa=isa, **options))

    def same(start, first, last):  # queries [first, last) of the document that begins at `start`, over the KV prefix
        rows, keys = slice(start + first, start + last), slice(start, start + last)
        part = (offsets([last - first]), offsets([last]))
        alone = thread_count(1, lambda: ours(q[rows], k[keys], v[keys], *part, sinks=sinks, isa=isa, **options))
        assert torch.equal(alone[0], packed[0][rows]) and torch.equal(alone[1], packed[1][:, rows]), (start, first, last)

    for start, end in itertools.pairwise(cu.tolist()):
        same(start, 0, end - start)
        for i in range(0, end - start, 19):
            same(start, i, i + 1)
        for i in (62, 63, 64, 65, 127, 128):
            if i < end - start:
                same(start, i, i + 1)
    same(101, 30, 160)
    same(101, 64, 213)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_window_may_drop_the_keys_that_it_cannot_see(dtype, isa):
    (q, k, v), _, (cu, _), _ = make(([300], [300], 4, 2, 64, True, (50, -1), 0.0, False, 0), dtype)
    options = dict(causal=True, window_size=(50, -1), isa=isa)
    whole, lse = segment_attention(q, k, v, torch.tensor([[0, 300, 0, 300, 0, 0]], dtype=torch.int32), **options)
    assert torch.equal(whole.to(dtype), varlen_attention(q, k, v, cu, **options))
    for first in (192, 210, 249):
        part = torch.tensor([[299, 1, first, 300 - first, 299, first]], dtype=torch.int32)
        out, last = segment_attention(q, k, v, part, **options)
        assert torch.equal(out[299], whole[299]) and torch.equal(last[:, 299], lse[:, 299])


@pytest.mark.parametrize("poison", [5.0, float("nan")])
def test_documents_do_not_touch_each_other(poison, isa):
    lens = [40, 37, 90]
    tensors, _, (cu, _), _ = make((lens, lens, 4, 2, 40, True, (-1, -1), 0.0, False, 4), torch.float32)
    dout = torch.randn_like(tensors[0])

    def grads(tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = ours(*leaves, cu, causal=True, isa=isa)
        return out.detach(), lse.detach().t(), *torch.autograd.grad(out, leaves, dout)

    def poisoned(x):
        x = x.clone()
        x[40:77] += poison  # the middle document
        x[167:] += poison  # and the tokens that belong to none
        return x

    clean, dirty = grads(tensors), grads([poisoned(x) for x in tensors])
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:40], b[:40]) and torch.equal(a[77:167], b[77:167])
        assert not torch.equal(a[40:77], b[40:77])
    for x in (clean[0], *clean[2:]):
        assert (x[167:] == 0).all()
    assert (clean[1][167:] == EMPTY).all()


def test_what_a_query_does_not_see_may_be_nan(isa):
    (q, k, v), _, (cu, _), _ = make(([100], [100], 4, 2, 40, True, (30, -1), 0.0, False, 0), torch.float32)
    options = dict(causal=True, window_size=(30, -1), isa=isa)
    clean = varlen_attention(q, k, v, cu, **options)
    for x in (k, v):
        x[:10], x[90:] = float("nan"), float("nan")
    dirty = varlen_attention(q, k, v, cu, **options)
    assert torch.equal(clean[40:90], dirty[40:90]) and dirty[:40].isnan().all() and dirty[90:].isnan().all()


def test_writes_every_output_and_nothing_else():
    (q, k, v), _, _, _ = make(([30], [20], 2, 1, 19, False, (-1, -1), 0.0, False, 0), torch.float32)
    out, lse = torch.full((32, 2, 19), float("nan")), torch.full((2, 30), float("nan"))
    segments = torch.tensor([[4, 10, 0, 20, 0, 0], [20, 3, 5, 0, 0, 0]], dtype=torch.int32)
    attention_out(q, k, v, segments, None, 1.0, 0.0, -1, -1, out[1:31], lse)
    inside = torch.zeros(30, dtype=torch.bool)
    inside[4:14], inside[20:23] = True, True
    assert not out[1:31][inside].isnan().any() and out[1:31][~inside].isnan().all() and out[[0, 31]].isnan().all()
    assert not lse[:, inside].isnan().any() and lse[:, ~inside].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sink", [float("inf"), 3e38])
def test_an_infinite_sink_takes_everything(sink, dtype, isa):
    """Its head's out and gradients are 0, lse is without it; another head's sink of -inf is none."""
    tensors, _, cu, options = make(([70, 0, 5], [70, 4, 5], 2, 2, 40, True, (-1, -1), 0.0, False, 1), dtype)
    dout, dlse = torch.randn(tensors[0].shape), torch.zeros(2, 76)
    sinks = torch.tensor([sink, EMPTY], dtype=dtype)
    got = run(lambda *a, **o: ours(*a, isa=isa, **o), tensors, sinks, cu, options, dtype, dout, dlse)
    none = run(lambda *a, **o: ours(*a, isa=isa, **o), tensors, None, cu, options, dtype, dout, dlse)
    wanted = run(varlen_attention_ref, tensors, sinks, cu, options, torch.float64, dout, dlse)
    for at, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        assert (got[at][:, 0] == 0).all() and (wanted[at][:, 0] == 0).all(), name
        assert torch.equal(got[at][:, 1], none[at][:, 1]), name
    assert torch.equal(got[1], none[1]) and (got[5] == 0).all() and (wanted[5] == 0).all()


def test_a_sink_that_is_nan_gives_nan(isa):
    (q, k, v), _, (cu, _), options = make(CASES[3], torch.float32)
    out = varlen_attention(q, k, v, cu, sinks=torch.tensor([float("nan"), 0.0, 0.0, 0.0]), isa=isa, **options)
    assert out[:, 0].isnan().all() and not out[:, 1:].isnan().any()


def test_any_large_window_is_no_window():
    q, k, v = torch.randn(9, 2, 8), torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    want = varlen_attention(q, k, v, offsets([4, 5]))
    for size in (2**31, 2**63 - 1):
        assert torch.equal(varlen_attention(q, k, v, offsets([4, 5]), window_size=(size, size)), want)


def test_strided_inputs():
    qkv = torch.randn(50, 8, 16)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    cu = offsets([20, 30])
    assert torch.equal(varlen_attention(q, k, v, cu), varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu))
    turned = torch.randn(4, 16, 50).permute(2, 0, 1)
    assert torch.equal(varlen_attention(turned, k, v, cu), varlen_attention(turned.contiguous(), k, v, cu))
    leaf = q.contiguous().requires_grad_()
    (expanded,) = torch.autograd.grad(varlen_attention(leaf, k, v, cu).sum(), leaf)
    (dense,) = torch.autograd.grad(varlen_attention(leaf, k, v, cu), leaf, torch.ones(50, 4, 16))
    assert torch.equal(expanded, dense)


def test_no_tokens_no_documents():
    q, k, v = torch.randn(3, 2, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    out, lse = ours(q, k, v, offsets([]), offsets([]))
    assert (out == 0).all() and (lse == EMPTY).all()
    assert ours(q[:0], k[:0], v[:0], offsets([0]))[0].shape == (0, 2, 8)


def test_gradients_are_bitwise_repeatable(thread_count):
    """More than one chunk of keys and of rows, so that several waves meet in dq, dk and dv."""
    tensors, sinks, (cu, _), _ = make(([1100, 60], [1100, 60], 2, 1, 16, True, (-1, -1), 0.0, True, 0), torch.float32)
    dout = torch.randn_like(tensors[0])

    def grads():
        leaves = [x.clone().requires_grad_() for x in (*tensors, sinks)]
        return torch.autograd.grad(varlen_attention(*leaves[:3], cu, causal=True, sinks=leaves[3]), leaves, dout)

    one, two, four = (thread_count(n, grads) for n in (1, 2, 4))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, four, strict=True))
    exact = [x.double().requires_grad_() for x in (*tensors, sinks)]
    want = torch.autograd.grad(varlen_attention_ref(*exact[:3], cu, causal=True, sinks=exact[3])[0], exact, dout.double())
    for got, exactly in zip(one, want, strict=True):
        assert (got - exactly).abs().max() <= 1e-5 * exactly.abs().max()


def test_rounding_of_long_sums(isa):
    """Sums over 512 elements of a head and over 30,000 queries, in fp32."""
    tokens = 30_000
    q, k, v = (torch.zeros(tokens, 1, 1) for _ in range(3))
    v[:], sinks = 0.7, torch.zeros(1, requires_grad=True)
    one_key = offsets([1] * tokens)
    out = varlen_attention(q, k, v, one_key, sinks=sinks, isa=isa)  # p = f = 1/2: dsink = -sum (1 - f) dout f v
    (dsinks,) = torch.autograd.grad(out, sinks, torch.full_like(out, 0.3))
    assert abs(dsinks.item() / (-tokens * 0.25 * 0.7 * 0.3) - 1) <= 1e-6

    q, k, v, dout = (torch.randn(300, 1, 512) for _ in range(4))
    q.requires_grad_()
    out = varlen_attention(q, k, v, one_key[:301], softmax_scale=1.0, isa=isa)
    (dq,) = torch.autograd.grad(out, q, dout)  # (dout . v - D) k with D = dout . out and out = v: what is left is rounding
    assert (dq / k).abs().max() <= 16 * torch.finfo(torch.float32).eps * 512**0.5


def test_second_backward_and_double_backward():
    tensors, sinks, cu, options = make(CASES[1], torch.float32)
    leaves = [x.requires_grad_() for x in (*tensors, sinks)]
    out, lse = ours(*leaves[:3], *cu, sinks=leaves[3], **options)
    loss = out.square().sum() + lse[lse > EMPTY].sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (only_lse,) = torch.autograd.grad(lse[lse > EMPTY].sum(), leaves[0], retain_graph=True)
    assert only_lse.abs().max() > 0
    (dq,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"varlen_attention: the gradient of its gradient .*varlen_attention_ref"):
        torch.autograd.grad(dq.sum(), leaves[0])


def test_opcheck_and_compile():
    tensors, sinks, cu, _ = make(([9, 4], [9, 4], 4, 2, 16, True, (-1, -1), 0.0, True, 1), torch.float32)
    leaves = [x.requires_grad_() for x in (*tensors, sinks)]
    torch.library.opcheck(
        torch.ops.swiftk.varlen_attention_fwd.default, (*leaves[:3], *cu, leaves[3], 0.25, 0.0, -1, 0, "auto")
    )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = [f(*leaves[:3], *cu, sinks=leaves[3], causal=True) for f in (compiled, ours)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- segments -----------------------------------------------------------------------------------------------------


def zigzag(lens, ranks):
    """Documents in 2 ranks chunks; rank r holds chunks r and 2 ranks - 1 - r: (start, length, position, document) of each."""
    held = [[] for _ in range(ranks)]
    for start, end in itertools.pairwise(offsets(lens).tolist()):
        cuts = [start + (end - start) * i // (2 * ranks) for i in range(2 * ranks + 1)]
        for rank in range(ranks):
            for chunk in (rank, 2 * ranks - 1 - rank):
                held[rank].append((cuts[chunk], cuts[chunk + 1] - cuts[chunk], cuts[chunk] - start, start))
    return held


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("window", "softcap"), [((-1, -1), 0.0), ((40, -1), 4.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_ring_of_calls_equals_one_pass(ranks, window, softcap, dtype):
    """Each hop adds one rank's keys to one rank's queries, forward and backward, in the accumulate dtype."""
    lens = [150, 7, 93]
    (q, k, v), sinks, (cu, _), options = make((lens, lens, 4, 2, 24, True, window, softcap, True, 0), dtype)
    sinks = sinks.to(torch.promote_types(dtype, torch.float32))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    want_out, want_lse = ours(*leaves[:3], cu, sinks=leaves[3], **options)
    dout, dlse = torch.randn_like(q), torch.randn_like(want_lse)
    want = torch.autograd.grad((want_out, want_lse), leaves, (dout, dlse))

    held, acc = zigzag(lens, ranks), want_lse.dtype
    hops = []
    for mine, theirs in itertools.product(held, held):
        for q_start, q_len, q_pos, doc in mine:
            for k_start, k_len, k_pos, other in theirs:
                if doc == other:
                    hops.append(torch.tensor([[q_start, q_len, k_start, k_len, q_pos, k_pos]], dtype=torch.int32))
    out = lse = None
    for hop in hops:
        out, lse = segment_attention(q, k, v, hop, out=out, lse=lse, **options)
    every_query = torch.tensor([[0, sum(lens), 0, 0, 0, 0]], dtype=torch.int32)
    out, lse = segment_attention(q, k, v, every_query, out=out, lse=lse, sinks=sinks, **options)
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (q, k, v))
    dsinks = torch.zeros(4, dtype=acc)
    state = dict(dq=dq, dk=dk, dv=dv, dlse=dlse, sinks=sinks, **options)
    for hop in hops:
        segment_attention_backward(dout, q, k, v, out, lse, hop, **state)
    segment_attention_backward(dout, q, k, v, out, lse, every_query, dsinks=dsinks, **state)
    bound = 1e-12 if dtype == torch.float64 else 0.01
    for got, exact in zip((out, lse, dq, dk, dv, dsinks), (want_out, want_lse, *want), strict=True):
        assert (got - exact).abs().max() <= bound * exact.abs().max()


def test_keys_may_overlap_within_a_call(thread_count):
    """Two ranges of queries over overlapping keys, in one call and in two: the same gradients for any thread count."""
    q, k, v, dout = torch.randn(80, 2, 8), torch.randn(700, 1, 8), torch.randn(700, 1, 8), torch.randn(80, 2, 8)
    segments = torch.tensor([[0, 40, 0, 650, 640, 0], [40, 40, 30, 670, 640, 30]], dtype=torch.int32)

    def grads(calls):
        out = lse = None
        for call in calls:
            out, lse = segment_attention(q, k, v, call, causal=True, out=out, lse=lse)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for call in calls:
            segment_attention_backward(dout, q, k, v, out, lse, call, dq=dq, dk=dk, dv=dv, causal=True)
        return out, lse, dq, dk, dv

    once, again = (thread_count(n, lambda: grads([segments])) for n in (1, 4))
    apart = grads([segments[:1], segments[1:]])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, again, apart, strict=True))


def test_resuming_at_a_tile_is_close_to_one_pass():
    (q, k, v), _, _, _ = make(([200], [200], 2, 2, 32, True, (-1, -1), 0.0, False, 0), torch.float32)
    whole = segment_attention(q, k, v, torch.tensor([[0, 200, 0, 200, 0, 0]], dtype=torch.int32), causal=True)
    state = segment_attention(q, k, v, torch.tensor([[0, 200, 0, 128, 0, 0]], dtype=torch.int32), causal=True)
    rest = torch.tensor([[0, 200, 128, 72, 0, 128]], dtype=torch.int32)
    again = segment_attention(q, k, v, rest, causal=True, out=state[0], lse=state[1])
    assert again[0] is state[0] and torch.equal(again[0][:128], whole[0][:128])  # they see none of the new keys
    for a, b in zip(whole, again, strict=True):
        assert (a - b).abs().max() <= 1e-6


# --- errors -------------------------------------------------------------------------------------------------------

Q, K = torch.randn(6, 4, 8), torch.randn(6, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cu_seqlens_q=offsets([4, 2]).long()), r"cu_seqlens_q has dtype torch.int64, wants torch.int32 \(cu_seqlens_q"),
        (dict(cu_seqlens_q=torch.tensor([0, 4, 3], dtype=torch.int32)), "cu_seqlens_q has 3 at index 2, wants at least 4"),
        (dict(cu_seqlens_q=torch.tensor([1, 4], dtype=torch.int32)), "cu_seqlens_q has 1 at index 0, wants 0"),
        (dict(cu_seqlens_q=offsets([4, 3])), "cu_seqlens_q has 7 at index 2, wants at most 6, the number of tokens of q"),
        (dict(cu_seqlens_q=[0, 4, 6]), "cu_seqlens_q has type list, wants a torch.Tensor"),
        (dict(cu_seqlens_k=[0, 4, 6]), "cu_seqlens_k has type list, wants a torch.Tensor"),
        (dict(sinks=[0.0] * 4), "sinks has type list, wants a torch.Tensor"),
        (dict(cu_seqlens_k=offsets([6])), r"cu_seqlens_k has shape \(2,\), cu_seqlens_q \(3,\) needs \(3,\)"),
        (dict(cu_seqlens_k=offsets([4, 9])), "cu_seqlens_k has 13 at index 2, wants at most 6, the number of tokens of k"),
        (dict(q=torch.randn(6, 3, 8)), "q has 3 heads, wants a multiple of the 2 heads of k and v"),
        (dict(q=torch.randn(6, 4, 9)), r"k has shape \(6, 2, 8\), q \(6, 4, 9\) needs \(total_k, kv_heads, 9\)"),
        (dict(q=torch.randn(6, 4, 513)), "q has shape .* wants .* head_dim from 1 to 512"),
        (dict(v=torch.randn(5, 2, 8)), r"v has shape \(5, 2, 8\), k \(6, 2, 8\) needs \(6, 2, 8\)"),
        (dict(q=Q.half(), k=K.half(), v=K.half()), "q has dtype torch.float16, wants torch.bfloat16, torch.float32"),
        (dict(k=K.double()), "k has dtype torch.float64, wants torch.float32 like q"),
        (dict(window_size=(-2, 0)), r"window_size has \(-2, 0\), wants \(left, right\)"),
        (dict(window_size=128), r"window_size has 128, wants \(left, right\)"),
        (dict(softmax_scale=float("nan")), "softmax_scale has nan, wants a finite number, or None"),
        (dict(q=Q.to_sparse()), r"q has layout torch.sparse_coo, wants torch.strided \(q.to_dense\(\)\)"),
        (dict(softcap=-1.0), "softcap has -1.0, wants a finite number >= 0"),
        (dict(sinks=torch.zeros(2)), r"sinks has shape \(2,\), q \(6, 4, 8\) needs \(4,\)"),
        (dict(sinks=torch.zeros(4).double()), "sinks has dtype torch.float64 on cpu, wants torch.float32 on cpu"),
        (dict(backend="xformers"), "backend has 'xformers', wants one of swiftk, flash_attn, cudnn"),
        (dict(isa="sse9"), "isa has 'sse9', wants one of"),
    ],
)
def test_errors(change, message):
    arguments = dict(q=Q, k=K, v=K, cu_seqlens_q=offsets([4, 2])) | change
    with pytest.raises(ValueError, match="varlen_attention: " + message):
        varlen_attention(**arguments)


def stand_in(sinks=None):
    """flash_attn_varlen_func with the arguments of FA2, or with `sinks` of FA4, computed by the reference."""

    def fa2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert (max_seqlen_q, max_seqlen_k) == (4, 4)
        options = dict(causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap)
        return varlen_attention_ref(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)[0]

    def fa4(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, return_lse=False,
    ):  # fmt: skip
        assert max_seqlen_q is None and window_size == (3, None)
        options = dict(causal=causal, softmax_scale=softmax_scale, window_size=(3, -1), softcap=softcap, sinks=learnable_sink)
        return varlen_attention_ref(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)[0], None

    return fa4 if sinks else fa2


def test_other_backends(monkeypatch):
    """They are asked for, never chosen; what is missing, other or not theirs is said by name."""
    (q, k, v), cu = (x.bfloat16() for x in (Q, K, -K)), offsets([4, 2])
    for name in _foreign.FLASH_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="varlen_attention: q has device cpu, backend 'flash_attn' wants a CUDA device"):
        varlen_attention(q, k, v, cu, backend="flash_attn")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ImportError, match=r"varlen_attention: backend has 'flash_attn', .* pip install flash-attn"):
        varlen_attention(q, k, v, cu, backend="flash_attn")
    with pytest.raises(ValueError, match=r"q has dtype torch\.float32, backend 'cudnn' wants torch\.bfloat16"):
        varlen_attention(Q, K, K, cu, backend="cudnn")
    with pytest.raises(ValueError, match="return_lse has True, backend 'cudnn' wants False"):
        varlen_attention(q, k, v, cu, backend="cudnn", return_lse=True)

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = stand_in()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    options = dict(causal=True, softcap=3.0, window_size=(2, -1))
    got = varlen_attention(q, k, v, cu, backend="flash_attn", **options)
    assert torch.equal(got, varlen_attention_ref(q, k, v, cu, **options)[0])
    with pytest.raises(ValueError, match="sinks has a tensor, backend 'flash_attn' as installed wants None"):
        varlen_attention(q, k, v, cu, backend="flash_attn", sinks=torch.zeros(4))
    package.flash_attn_varlen_func = stand_in(sinks=True)
    options = dict(causal=True, window_size=(3, -1), sinks=torch.randn(4))
    got = varlen_attention(q, k, v, cu, backend="flash_attn", **options)
    assert torch.equal(got, varlen_attention_ref(q, k, v, cu, **options)[0])
    package.flash_attn_varlen_func = lambda q, k, v, cu_seqlens: q
    with pytest.raises(ImportError, match="the installed flash_attn_varlen_func takes q, k, v, cu_seqlens, wants causal"):
        varlen_attention(q, k, v, cu, backend="flash_attn")

    monkeypatch.setattr(_foreign, "CUDNN", [SDPBackend.MATH])
    got = varlen_attention(q, k, v, offsets([4, 0, 1]), causal=True, backend="cudnn")
    plain, exact = (varlen_attention_ref(*(x.to(t) for x in (q, k, v)), offsets([4, 0, 1]), causal=True)[0]
                    for t in (q.dtype, torch.float64))  # fmt: skip
    assert_accurate(got, plain, exact)
    for change, message in [
        (dict(softcap=2.0), "softcap has 2.0, backend 'cudnn' as installed wants 0.0"),
        (dict(window_size=(3, -1)), r"window_size has \(3, -1\), backend 'cudnn'"),
        (dict(sinks=torch.zeros(4)), "sinks has a tensor, backend 'cudnn' wants None"),
        (dict(cu_seqlens_k=offsets([2, 4]), causal=True), "cu_seqlens_k has another document's length"),
    ]:
        with pytest.raises(ValueError, match="varlen_attention: " + message):
            varlen_attention(q, k, v, cu, backend="cudnn", **change)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        ([[0, 7, 0, 6, 0, 0]], {}, r"segments has \(0, 7, 0, 6, 0, 0\) at row 0, wants queries within the 6 tokens of q"),
        ([[0, 2, 3, 4, 0, 0]], {}, "at row 0, wants keys within the 6 tokens of k"),
        ([[0, 2, 3, 2, 0, -1]], {}, "wants k_pos >= 0"),
        ([[3, 2, 0, 6, 0, 0], [0, 4, 0, 6, 0, 0]], {}, "segments has queries in common at rows 1 and 0, wants them disjoint"),
        ([[0, 6, 0, 6, 0]], {}, r"segments has shape \(1, 5\), wants \(S, 6\)"),
        ([[0, 6, 0, 6, 0, 0]], dict(out=torch.zeros(6, 4, 8)), "lse has None, wants both"),
        ([[0, 6, 0, 6, 0, 0]], dict(out=torch.zeros(6, 4, 8).bfloat16(), lse=torch.zeros(4, 6)), "out has dtype torch.bf"),
        ([[0, 6, 0, 6, 0, 0]], dict(q=Q.clone().requires_grad_()), "has requires_grad, wants torch.no_grad()"),
    ],
)
def test_segment_errors(rows, change, message):
    arguments = dict(q=Q, k=K, v=K, segments=torch.tensor(rows, dtype=torch.int32)) | change
    with pytest.raises(ValueError, match="segment_attention: .*" + message):
        segment_attention(**arguments)

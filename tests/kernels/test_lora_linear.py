"""lora_linear: values and gradients against fp64 and peft, row invariance, adapters by segment, groups, contracts, errors."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from swiftk.kernels.dropout import Dropout, keep_ref
from swiftk.kernels.linear import linear
from swiftk.kernels.lora_linear import Adapter, lora_linear, lora_linear_group, lora_linear_ref, lora_scale, row_norm_sq
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
# (M, N, K, r): tails of the strip of 128 columns, the block of 32 rows, the tile of 4, and of K
SHAPES = [(1, 1, 1, 1), (1, 37, 33, 4), (5, 19, 257, 3), (37, 130, 100, 16), (70, 33, 300, 9), (300, 20, 140, 33)]


def make(M, N, K, r, dtype, dora=False, seed=0):
    """x, weight, a, b, bias, magnitude (None without dora) as fp64 values that dtype holds."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((M, K), (N, K), (r, K), (N, r), (N,), (N,))
    x, w, a, b, bias, m = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype).double() for s in sizes)
    return x, w, a / 4, b / 4, bias, ((m.abs() + 0.5).to(dtype).double() if dora else None)


def make_dropout(M, p=0.3, layer=5, step=3):
    return Dropout(p, torch.tensor([7, step]), layer, torch.arange(M) * 3 + (2 << 32))


def call(f, args, dtype, master=None, *, scale=1.7, dropout=None, **kwargs):
    """y and the gradients of x, a, b, bias (and magnitude) by f, from fp64 args cast to dtype (a, b, m: to master)."""
    x, w, a, b, bias, m = (None if t is None else t.to(dtype, copy=True) for t in args)
    if master is not None:
        a, b, m = (None if t is None else t.to(master) for t in (a, b, m))
    leaves = [t.requires_grad_() for t in (x, a, b, bias, m) if t is not None]
    adapter = Adapter(a, b, scale, m, None if m is None else row_norm_sq(w))
    y = f(x, w, adapter, bias, dropout=dropout, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16()  # exact in every dtype
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def plain(x, w, adapter, bias, dropout=None):
    """What torch users write, in the dtype itself."""
    kept = x if dropout is None else torch.where(keep_ref(dropout, x.shape[-1]), x, 0) * dropout.scale
    y = F.linear(x, w) + adapter.scale * F.linear(F.linear(kept, adapter.a), adapter.b)
    if adapter.magnitude is not None:
        y = y * (adapter.magnitude / (w + adapter.scale * adapter.b @ adapter.a).norm(dim=1).detach())
    return y + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dora, p, dtype, isa):
    args = make(*shape, dtype, dora)
    dropout = make_dropout(shape[0], p)
    ours = call(functools.partial(lora_linear, isa=isa), args, dtype, dropout=dropout)
    other = call(plain, args, dtype, dropout=dropout)
    exact = call(lora_linear_ref, args, torch.float64, dropout=dropout)
    for name, *results in zip(("y", "dx", "da", "db", "dbias", "dm"), ours, other, exact, strict=False):
        assert_accurate(*results, name)


def test_fp64_equals_the_reference():
    for dora in (False, True):
        args = make(33, 20, 500, 8, torch.float64, dora)
        dropout = make_dropout(33)
        ours, ref = (call(f, args, torch.float64, dropout=dropout) for f in (lora_linear, lora_linear_ref))
        assert all((a - b).abs().max() <= 1e-11 * b.abs().max() for a, b in zip(ours, ref, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_fp32_masters_get_fp32_gradients(dora, isa):
    """Summed in fp32 and not rounded to bf16: dA is exact to fp32, dB to the one rounding of S, whose errors average out."""
    args = make(300, 40, 64, 8, torch.bfloat16, dora)
    ours = call(functools.partial(lora_linear, isa=isa), args, torch.bfloat16, torch.float32)
    exact = call(lora_linear_ref, args, torch.float64)
    assert [t.dtype for t in ours[2:4]] == [torch.float32] * 2 and ours[1].dtype == torch.bfloat16
    for got, want, bound in zip(ours[2:4], exact[2:4], (2**-8 if dora else 1e-6, 2**-8), strict=True):  # g B is rounded
        assert (got - want).abs().max() <= want.abs().max() * bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dora", "bias"), [(False, True), (True, False), (True, True)])
def test_a_row_depends_on_that_row_alone(dora, bias, dtype, isa, thread_count):
    x, w, a, b, c, m = (None if t is None else t.to(dtype) for t in make(140, 70, 333, 8, dtype, dora))
    c, dropout = c if bias else None, make_dropout(140)
    adapter = Adapter(a, b, 1.7, m, None if m is None else row_norm_sq(w))
    whole = thread_count(2, lambda: lora_linear(x, w, adapter, c, dropout=dropout, isa=isa))
    assert torch.equal(whole, thread_count(1, lambda: lora_linear(x, w, adapter, c, dropout=dropout, isa=isa)))
    for M in (1, 2, 3, 4, 5, 15, 16, 17, 40):
        rows = slice(3 * M % 100, 3 * M % 100 + M)
        some = dropout._replace(token_index=dropout.token_index[rows])
        assert torch.equal(lora_linear(x[rows], w, adapter, c, dropout=some, isa=isa), whole[rows]), M


def test_rows_are_masked_in_blocks(monkeypatch):
    """Each block of rows with its own token indices, in a group with and without dropout."""
    x, w, a, b, _, _ = (None if t is None else t.float() for t in make(50, 30, 64, 8, torch.float32))
    dropout = make_dropout(50)
    adapters, dropouts = [Adapter(a, b, 1.7)] * 2, [dropout._replace(layer=6), None]
    run = functools.partial(lora_linear_group, x, [w, w], adapters, dropouts=dropouts)
    whole = run()
    monkeypatch.setattr("swiftk.kernels._low_rank.MASK_BYTES", 7 * 64 * 4)
    assert all(torch.equal(p, q) for p, q in zip(run(), whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_depend_on_threads_or_repetition(dtype, isa, thread_count):
    """dA, dB and dm, whose sums are ours; dx adds a vendor's product."""
    args, dropout = make(150, 200, 300, 8, dtype, True), make_dropout(150)
    run = functools.partial(call, functools.partial(lora_linear, isa=isa), args, dtype, dropout=dropout)
    first = thread_count(1, run)
    for threads in (1, 2):
        again = thread_count(threads, run)
        assert all(torch.equal(p, q) for p, q in zip(first[2:], again[2:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_b_is_the_base_alone(dtype, isa):
    x, w, a, b, bias, _ = (None if t is None else t.to(dtype) for t in make(20, 30, 100, 8, dtype))
    got = lora_linear(x, w, Adapter(a, torch.zeros_like(b), 2.0), bias, dropout=make_dropout(20), isa=isa)
    assert torch.equal(got, linear(x, w, bias, isa=isa))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [3, 16, 40])
def test_several_adapters_equal_one_by_one(r, dtype, isa):
    M, N, K, E = 60, 37, 150, 3
    x, w, _, _, bias, _ = (None if t is None else t.to(dtype) for t in make(M, N, K, r, dtype))
    a, b = torch.randn(E, r, K).to(dtype), torch.randn(E, N, r).to(dtype)
    scales, ids, dropout = (0.5, 1.7, 3.1), torch.randint(-1, E, (M,)), make_dropout(M)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    dy = torch.randn(M, N).to(dtype)
    y = lora_linear(x, w, Adapter(a, b, scales), bias, dropout=dropout, segment_ids=ids, isa=isa)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    for e in range(-1, E):
        rows = (ids == e).nonzero()[:, 0]
        some = dropout._replace(token_index=dropout.token_index[rows])
        if e < 0:
            assert torch.equal(y[rows], linear(x[rows], w, bias, isa=isa))
            continue
        xe, ae, be = (t.detach().requires_grad_() for t in (x[rows], a[e], b[e]))
        ye = lora_linear(xe, w, Adapter(ae, be, scales[e]), bias, dropout=some, isa=isa)
        assert torch.equal(y[rows], ye)
        grads = torch.autograd.grad(ye, (xe, ae, be), dy[rows])
        for got, want in zip((dx[rows], da[e], db[e]), grads, strict=True):
            assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    with pytest.raises(ValueError, match="lora_linear: segment_ids has 3, wants -1 to 2"):
        lora_linear(x, w, Adapter(a, b, scales), segment_ids=ids.clamp(min=3))
    with pytest.raises(ValueError, match="lora_linear: adapter 1 of 3 has values in b that are not finite"):
        b.data[1, 3, 1] = float("inf")
        lora_linear(x, w, Adapter(a, b, scales), segment_ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "dropout", "dora", "adapters"])
def test_a_group_equals_its_linears(kind, dtype, isa):
    M, K, sizes = 45, 130, (64, 20, 37)
    ids = torch.randint(-1, 2, (M,)) if kind == "adapters" else None
    x = torch.randn(M, K).to(dtype).requires_grad_()
    weights = [torch.randn(N, K).to(dtype) for N in sizes]
    biases = [torch.randn(64).to(dtype), None, torch.randn(37).to(dtype)]
    lead = (2,) if kind == "adapters" else ()
    adapters = []
    for r, w, s in zip((8, 16, 5), weights, (2.0, 0.3, 1.1), strict=True):
        a, b = torch.randn(*lead, r, K).to(dtype), torch.randn(*lead, w.shape[0], r).to(dtype)
        dora = (torch.rand(w.shape[0]).to(dtype).requires_grad_(), row_norm_sq(w)) if kind == "dora" else ()
        adapters.append(Adapter(a.requires_grad_(), b.requires_grad_(), s, *dora))
    base = make_dropout(M)
    dropouts = [base, base._replace(layer=6, p=0.6), None] if kind == "dropout" else [None] * 3
    group = lora_linear_group(x, weights, adapters, biases, dropouts=dropouts, segment_ids=ids, isa=isa)
    alone = [
        lora_linear(x, *args, dropout=d, segment_ids=ids, isa=isa)
        for *args, d in zip(weights, adapters, biases, dropouts, strict=True)
    ]
    assert all(torch.equal(g, y) for g, y in zip(group, alone, strict=True))
    dys = [torch.randn_like(y) for y in alone]
    leaves = [t for adapter in adapters for t in (adapter.a, adapter.b, adapter.magnitude) if t is not None]
    ours, theirs = (torch.autograd.grad(ys, [x, *leaves], dys, retain_graph=True) for ys in (group, alone))
    assert all(torch.equal(p, q) for p, q in zip(ours[1:], theirs[1:], strict=True))
    assert (ours[0] - theirs[0]).abs().max() <= 4 * torch.finfo(dtype).eps * theirs[0].abs().max()
    one = torch.autograd.grad(group[1], [x, adapters[1].a, adapters[0].a], dys[1], retain_graph=True)  # the others unused
    want = torch.autograd.grad(alone[1], [x, adapters[1].a], dys[1])
    assert torch.equal(one[0], want[0]) and torch.equal(one[1], want[1]) and not one[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "blocksize", "nested"), [(200, 64, False), (333, 32, True), (40, 128, False)])
@pytest.mark.parametrize("dora", [False, True])
def test_an_nf4_base_equals_its_dequantised_weight(dora, K, blocksize, nested, dtype, isa):
    x, w, a, b, bias, m = (None if t is None else t.to(dtype).requires_grad_() for t in make(50, 36, K, 8, dtype, dora))
    packed = nf4_quantize(w.detach(), blocksize=blocksize, nested=nested)
    if m is not None:
        m.data[5] = 0  # dm from a row of the weight
    results, acc = [], torch.float64 if dtype == torch.float64 else torch.float32
    for weight in (packed, nf4_dequantize(packed).to(dtype)):
        adapter = Adapter(a, b, 1.7, m, None if m is None else row_norm_sq(weight, acc))
        y = lora_linear(x, weight, adapter, bias, dropout=make_dropout(50), isa=isa)
        leaves = [t for t in (a, b, bias, m, x) if t is not None]
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    *equal, (ours, theirs) = zip(*results, strict=True)
    assert all(torch.equal(p, q) for p, q in equal)
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()  # a vendor's sum in other slices


def test_a_group_of_nf4_and_plain(isa):
    x, w, a, b, _, _ = (None if t is None else t.float() for t in make(20, 30, 64, 4, torch.bfloat16))
    packed, adapter = nf4_quantize(w), Adapter(a.requires_grad_(), b.requires_grad_(), 2.0)
    ys = lora_linear_group(x.requires_grad_(), [w, packed, w], [adapter] * 3, isa=isa)
    alone = [lora_linear(x, weight, adapter, isa=isa) for weight in (w, packed, w)]
    assert all(torch.equal(y, z) for y, z in zip(ys, alone, strict=True))
    ours, theirs = (torch.autograd.grad(sum(y.square().sum() for y in t), (x, a, b)) for t in (ys, alone))
    assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-4 * q.abs().max()) for p, q in zip(ours, theirs, strict=True))


@functools.cache
def peft_module(use_dora: bool, use_rslora: bool, bias: bool):
    import peft

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(48, 30, bias=bias)).double()
    kinds = {"use_dora": use_dora, "use_rslora": use_rslora, "init_lora_weights": False}
    config = peft.LoraConfig(r=5, lora_alpha=11, lora_dropout=0.4, target_modules=["0"], **kinds)
    return peft.get_peft_model(model, config).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("use_dora", "use_rslora"), [(False, False), (False, True), (True, False), (True, True)])
def test_equals_peft(use_dora, use_rslora, bias):
    model = peft_module(use_dora, use_rslora, bias).eval()
    layer = model.base_model.model[0]
    x = torch.randn(13, 48, dtype=torch.float64, requires_grad=True)
    weight, c = layer.base_layer.weight, layer.base_layer.bias
    assert not weight.requires_grad
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight if use_dora else None
    adapter = Adapter(a, b, lora_scale(11, 5, use_rslora), m, row_norm_sq(weight) if use_dora else None)
    leaves, dy = [t for t in (x, a, b, m) if t is not None], torch.randn(13, 30, dtype=torch.float64)
    ours, theirs = lora_linear(x, weight, adapter, c), model(x)
    grads = (torch.autograd.grad(y, leaves, dy) for y in (ours, theirs))
    for got, want in zip((ours, *next(grads)), (theirs, *next(grads)), strict=True):
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_magnitude_and_row_norm_of_zero():
    """dm where m is 0 comes from x W^T + S B^T; a zero row of W + s B A gives 0 and no gradient, where peft gives NaN."""
    args = make(12, 10, 30, 4, torch.float64, True)
    args[5][3] = 0
    ours, ref = (call(f, args, torch.float64) for f in (lora_linear, lora_linear_ref))
    assert ref[5][3].abs() > 1e-3
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in zip(ours, ref, strict=True))
    args[1][4], args[3][4] = 0, 0
    y, *grads = call(lora_linear, args, torch.float64)
    assert torch.equal(y[:, 4], args[4][4].expand(12)) and grads[4][4] == 0 and not any(g.isnan().any() for g in grads)


def test_a_norm_that_is_nan_shows():
    x, w, a, b, _, m = (None if t is None else t.float() for t in make(5, 6, 30, 4, torch.float32, True))
    norm_sq = row_norm_sq(w)
    norm_sq[3] = torch.nan
    m.requires_grad_()
    y = lora_linear(x, w, Adapter(a, b, 2.0, m, norm_sq))
    y.sum().backward()
    assert y[:, 3].isnan().all() and m.grad[3].isnan() and y.isnan().sum() == 5 and m.grad.isnan().sum() == 1


def test_dm_beside_a_large_bias():
    """Qwen2's key biases exceed the products a hundredfold: y - bias from a rounded y would be noise."""
    args = make(60, 20, 40, 4, torch.bfloat16, True)
    args[4].mul_(512)
    ours, exact = call(lora_linear, args, torch.bfloat16, torch.float32), call(lora_linear_ref, args, torch.float64)
    assert (ours[5] - exact[5]).abs().max() <= 2**-7 * exact[5].abs().max()


def test_frozen_parts_get_no_gradient_and_keep_no_input():
    x, w, a, b, _, _ = (None if t is None else t.float() for t in make(9, 6, 20, 3, torch.float32))
    y = lora_linear(x.requires_grad_(), w, Adapter(a, b, 2.0))
    saved = [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None]
    assert sorted(saved) == [(3, 20), (6, 3), (6, 20)]
    y.sum().backward()
    assert torch.allclose(x.grad, (w + 2 * b @ a).sum(0).expand(9, 20), rtol=1e-4, atol=1e-5) and a.grad is None
    y = lora_linear(x.detach(), w, Adapter(a.requires_grad_(), b, 2.0))
    y.sum().backward()
    assert b.grad is None and torch.allclose(a.grad, 2 * b.sum(0)[:, None] * x.detach().sum(0), rtol=1e-4, atol=1e-5)


def test_empty_and_non_contiguous():
    x, w, a, b, bias, _ = (None if t is None else t.float() for t in make(8, 6, 20, 3, torch.float32))
    adapter = Adapter(a.requires_grad_(), b.requires_grad_(), 2.0)
    empty = lora_linear(x[:0].requires_grad_(), w, adapter, bias)
    assert empty.shape == (0, 6)
    assert not any(g.any() for g in torch.autograd.grad(empty.sum(), (a, b)))
    assert lora_linear(torch.randn(2, 0, 20), w, adapter).shape == (2, 0, 6)
    whole = lora_linear(x, w, adapter, bias)
    assert torch.equal(lora_linear(x.view(2, 4, 20), w, adapter, bias), whole.view(2, 4, 6))
    assert torch.equal(lora_linear(x[3], w, adapter, bias), whole[3])
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, w, a, b, bias)]
    assert torch.equal(lora_linear(strided[0], strided[1], Adapter(strided[2], strided[3], 2.0), strided[4]), whole)
    grads = [torch.autograd.grad(lora_linear(t, w, adapter).sum(), (a, b)) for t in (x, x.t().contiguous().t())]
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


def test_keys_of_the_dropout_may_be_strided():
    x, w, a, b, _, _ = (None if t is None else t.float() for t in make(8, 6, 20, 3, torch.float32))
    adapter, plain_keys = Adapter(a.requires_grad_(), b.requires_grad_(), 2.0), make_dropout(8)
    every_other = [torch.stack([t, t + 1], -1).flatten()[::2] for t in (plain_keys.seed_step, plain_keys.token_index)]
    strided = plain_keys._replace(seed_step=every_other[0], token_index=every_other[1])
    outs = [lora_linear(x, w, adapter, dropout=d) for d in (plain_keys, strided)]
    assert torch.equal(*outs)
    assert all(torch.equal(p, q) for p, q in zip(*(torch.autograd.grad(y.sum(), (a, b)) for y in outs), strict=True))


def test_second_backward_and_gradient_of_the_gradient():
    x, w, a, b, _, m = (None if t is None else t.requires_grad_() for t in make(9, 6, 20, 3, torch.float64, True))
    y = lora_linear(x, w.detach(), Adapter(a, b, 2.0, m, row_norm_sq(w.detach())), dropout=make_dropout(9))
    first = torch.autograd.grad(y.sum(), (x, a, b, m), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, a, b, m), create_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    with pytest.raises(NotImplementedError, match="lora_linear: the gradient of its gradient is not supported"):
        torch.autograd.grad(second[0].sum(), a)


def test_gradcheck():
    x, w, a, b, bias, _ = (None if t is None else t.requires_grad_() for t in make(4, 5, 7, 2, torch.float64))
    w, dropout = w.detach(), make_dropout(4)
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: lora_linear(x, w, Adapter(a, b, 1.3), bias, dropout=dropout), (x, a, b, bias)
    )


def group_of_two(x, w, a, b, bias, m, dropout):
    adapters = [Adapter(a, b, 1.5, m, row_norm_sq(w)), Adapter(a + 1, b - 1, 0.5, m, row_norm_sq(w))]
    return lora_linear_group(x, [w, w], adapters, [bias, None], dropouts=[dropout, dropout._replace(layer=6)])


@pytest.mark.parametrize("dora", [False, True])
def test_opcheck(dora):
    x, w, a, b, bias, m = (None if t is None else t.float() for t in make(6, 10, 20, 3, torch.float32, dora))
    x, a, b, bias = (t.requires_grad_() for t in (x, a, b, bias))
    d = make_dropout(6)
    none = torch.empty(0)
    torch.library.opcheck(
        torch.ops.swiftk.lora_linear_fwd.default,
        (x, [w, w], [], [0, 0], [bias, none], [a, a], [b, b], [2.0, 1.0], [m.requires_grad_()] * 2 if dora else [],
         [row_norm_sq(w)] * 2 if dora else [], [d.threshold, 0], [5, 6], d.seed_step, d.token_index, None, "auto", "auto"),
    )  # fmt: skip
    stack = (torch.randn(2, 3, 20).requires_grad_(), torch.randn(2, 10, 3).requires_grad_())
    torch.library.opcheck(
        torch.ops.swiftk.lora_linear_fwd.default,
        (x, [w], [], [0], [], [stack[0]], [stack[1]], [2.0, 1.0], [], [], [0], [0], None, None,
         torch.tensor([0, 1, -1, 0, 0, 1]), "auto", "auto"),
    )  # fmt: skip


def test_compile_without_recompilation_when_the_step_changes():
    x, w, a, b, bias, m = (t.float().requires_grad_() for t in make(6, 10, 20, 3, torch.float32, True))
    w, leaves = w.detach(), (x, a, b, bias, m)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(group_of_two, fullgraph=True, backend=counter)
    for step in range(3):
        dropout = make_dropout(6, step=step)
        grads = []
        for f in (compiled, group_of_two):
            ys = f(x, w, a, b, bias, m, dropout)
            grads.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)])
        assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))
    assert counter.frame_count == 1


def test_selective_checkpointing():
    """The operator's outputs are kept by name and nothing runs twice; all recomputed gives the same bits."""
    x, w, a, b, bias, m = (t.float().requires_grad_() for t in make(40, 10, 20, 3, torch.float32, True))
    w, leaves, dropout, calls = w.detach(), (x, a, b, bias, m), make_dropout(40), []

    def policy(ctx, op, *args, **kwargs):
        if op.name() == "swiftk::lora_linear_fwd":
            calls.append(1)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def run(**kwargs):
        f = lambda *args: sum(y.square().sum() for y in group_of_two(*args))  # noqa: E731
        args = (x, w, a, b, bias, m, dropout)
        return torch.autograd.grad(checkpoint(f, *args, use_reentrant=False, **kwargs) if kwargs else f(*args), leaves)

    want = run()
    full = run(preserve_rng_state=False)
    kept = run(context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
    assert calls
    assert all(torch.equal(p, q) and torch.equal(p, s) for p, q, s in zip(want, full, kept, strict=True))


def bad_calls():
    w, x = torch.randn(3, 4), torch.randn(2, 4)
    a, b = torch.randn(2, 4), torch.randn(3, 2)
    good = Adapter(a, b, 1.0)
    yield (x, torch.randn(3, 5), good), {}, r"weight has shape \(3, 5\), x \(2, 4\) needs \(3, 4\)"
    yield (torch.tensor(1.0), w, good), {}, r"x has \(\), wants \(..., K\)"
    yield (x, w.double(), good), {}, "weight has dtype torch.float64, wants torch.float32 like x"
    yield (x, nf4_quantize(torch.randn(3, 5)), good), {}, r"weight has shape \(3, 5\), x \(2, 4\) needs \(3, 4\)"
    yield (x, nf4_quantize(torch.randn(2, 3, 4)), good), {}, r"weight has shape \(2, 3, 4\), wants \(N, K\)"
    yield (x, w.clone().requires_grad_(), good), {}, "weight requires a gradient, but the base is frozen here; call"
    yield (x, w, good, torch.ones(2)), {}, r"bias has shape \(2,\), weight \(3, 4\) needs \(3,\)"
    yield (x, w, Adapter(torch.randn(2, 5), b, 1.0)), {}, r"adapter.a has shape \(2, 5\), weight \(3, 4\) needs \(2, 4\)"
    yield (x, w, Adapter(a, torch.randn(3, 5), 1.0)), {}, r"adapter.b has shape \(3, 5\), adapter.a \(2, 4\) needs \(3, 2\)"
    yield (x, w, Adapter(a.double(), b, 1.0)), {}, "adapter.a has dtype torch.float64 on cpu, wants a tensor of torch.float32"
    yield (x, w, good._replace(magnitude=torch.ones(3))), {}, "adapter.weight_norm_sq has None, wants torch.float32 on cpu"
    elsewhere = good._replace(magnitude=torch.ones(3), weight_norm_sq=torch.ones(3, device="meta"))
    yield (x, w, elsewhere), {}, "adapter.weight_norm_sq has dtype torch.float32 on meta, wants torch.float32 on cpu: row_n"
    yield (x, w, good._replace(magnitude=torch.ones(2))), {}, r"adapter.magnitude has shape \(2,\), weight \(3, 4\) needs"
    ids = torch.zeros(2, dtype=torch.int32)
    yield (x, w, good), {"segment_ids": ids}, r"adapter.a has shape \(2, 4\), wants \(adapters, r, K\) with segment_ids"
    stack = Adapter(a[None], b[None], (1.0, 2.0))
    yield (x, w, stack._replace(scale=1.0)), {"segment_ids": [0, 0]}, "segment_ids has type list, wants a torch.Tensor"
    yield (x, w, stack._replace(scale=1.0)), {}, r"adapter.a has shape \(1, 2, 4\), wants segment_ids \(T,\)"
    yield (x, w, stack), {"segment_ids": ids}, "adapter.scale has 2 entries, wants 1 like adapter.a"
    infinite = Adapter(a[None], torch.full((1, 3, 2), torch.inf), 1.0)
    yield (x, w, infinite), {"segment_ids": ids - 1}, "adapter 0 of 1 has values in b that are not finite in torch.float32"
    large = Adapter(a[None], torch.full((1, 3, 2), 3.4e38), 1.0)
    yield (x.bfloat16(), w.bfloat16(), large), {"segment_ids": ids - 1}, "adapter 0 of 1 has .* not finite in torch.bfloat16"
    yield (x, w, Adapter(a.tolist(), b, 1.0)), {}, "adapter.a has type list, wants a tensor of torch.float32"
    yield (x, w, (a, b)), {}, r"adapter has type tuple, wants an Adapter\(a, b, scale\)"
    yield (x, w, good), {"dropout": 0.1}, "dropout has type float, wants a Dropout"
    listed = make_dropout(2)._replace(seed_step=[1, 2])
    yield (x, w, good), {"dropout": listed}, "dropout.seed_step has type list, wants a torch.Tensor"
    yield (x, w, good), {"isa": "sse9"}, "isa has 'sse9', wants one of"
    yield (x, w, good), {"dropout": make_dropout(3)}, r"dropout.token_index has shape \(3,\), x \(2, 4\) needs \(2,\)"


@pytest.mark.parametrize(("args", "kwargs", "message"), list(bad_calls()))
def test_errors(args, kwargs, message):
    with pytest.raises(ValueError, match="lora_linear: " + message):
        lora_linear(*args, **kwargs)


def test_row_norm_sq_of_more_rows_than_are_decoded_at_a_time(monkeypatch):
    monkeypatch.setattr("swiftk.kernels.lora_linear.NORM_ROWS", 7)
    w = nf4_quantize(torch.randn(50, 65))
    want = nf4_dequantize(w).double().square().sum(1)
    assert ((row_norm_sq(w) - want).abs() <= 1e-5 * want).all()


def test_errors_of_a_group():
    x, w, good = torch.randn(2, 4), torch.randn(3, 4), Adapter(torch.randn(2, 4), torch.randn(3, 2), 1.0)
    with pytest.raises(ValueError, match=r"lora_linear_group: has .*'adapters': 1, 'biases': 2, 'dropouts': 2"):
        lora_linear_group(x, [w, w], [good])
    with pytest.raises(ValueError, match="lora_linear_group: 1 of 2 adapters have a magnitude, wants all or none"):
        lora_linear_group(x, [w, w], [good, good._replace(magnitude=torch.ones(3), weight_norm_sq=row_norm_sq(w))])
    with pytest.raises(ValueError, match="lora_linear_group: dropouts of one group have several seed_step or token_index"):
        lora_linear_group(x, [w, w], [good, good], dropouts=[make_dropout(2), make_dropout(2)])

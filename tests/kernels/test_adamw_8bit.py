"""adamw_8bit_: the maps, codes decided exactly, the update bit for bit against the reference, edge values, errors."""

from __future__ import annotations

import math

import pytest
import torch

from swiftk.kernels.adamw_8bit import (
    BLOCK,
    Moments,
    Update,
    adamw_8bit_,
    adamw_8bit_ref,
    dequantize_8bit_ref,
    new_moments,
    quantize_8bit_ref,
)
from swiftk.kernels.nf4 import dynamic_map
from swiftk.testing.accuracy import assert_accurate

# one block and less, a tail of every length class, several blocks
SIZES = [1, 7, 8, 255, 256, 257, 4096, 5003]


def make(n, dtype=torch.float32, *, step=3, min_8bit=0, scale=1.0):
    """A tensor in the middle of its training: moments that a first update left."""
    p, g, g0 = (torch.randn(n).mul(scale).to(dtype) for _ in range(3))
    u = Update(p, g0, new_moments(p, min_8bit=min_8bit), step - 1, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    p, moments = adamw_8bit_ref(u)
    return u._replace(param=p, grad=g, moments=moments, step=step)


def run(updates, isa="auto"):
    """Copies, updated in place: parameters and moments."""
    copies = [
        u._replace(param=u.param.clone(), moments=Moments(*(t if t is None else t.clone() for t in u.moments))) for u in updates
    ]
    adamw_8bit_(copies, isa=isa)
    return [(u.param, u.moments) for u in copies]


def equal(a, b):
    return a is b or (a is not None and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def assert_equal(got, want):
    for (p, moments), (q, others) in zip(got, want, strict=True):
        assert equal(p, q)
        for name, a, b in zip(Moments._fields, moments, others, strict=True):
            assert equal(a, b), name


def codes_of(x, isa):
    """The kernel's codes and absmax of x and of x^2: with both betas 0 the moments are g and g^2."""
    u = Update(torch.zeros_like(x), x, new_moments(x, min_8bit=0), 1, 0.0, (0.0, 0.0), 1e-8, 0.0)
    return run([u], isa)[0][1]


# --- maps and codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes_within_the_last_bits(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    ours, theirs = dynamic_map(signed).double(), functional.create_dynamic_map(signed=signed).double()
    assert len(ours) == 256 and (ours.diff() > 0).all() and ours[127 if signed else 0] == 0 and ours[255] == 1
    assert ((ours - theirs).abs() <= 4 * torch.finfo(torch.float32).eps * ours.abs()).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_reference_takes_the_nearest_value(signed):
    """By distances in fp64 to all 256 values."""
    code_map = dynamic_map(signed).double()
    x = torch.cat([torch.randn(512), 10.0 ** (-8 * torch.rand(512)), torch.ones(1)])
    x = x if signed else x.abs()
    codes, absmax = quantize_8bit_ref(x, signed)
    v = (x * (1 / absmax).repeat_interleave(BLOCK)[: len(x)]).double()
    distance = (v[:, None] - code_map).abs()
    least = distance.min(1)
    nearest = least.indices if signed else torch.where(v > 0, least.indices.clamp(min=1), least.indices)
    assert torch.equal(codes.long(), nearest)  # argmin takes the lower of two


@pytest.mark.parametrize("signed", [True, False])
def test_codes_at_every_threshold(signed, isa):
    """The fp32 numbers at, just below and just above each middle, in blocks whose absmax is 1; in a row, and each among ones:
    32 numbers far from every middle take another way."""
    code_map = dynamic_map(signed).double()
    middles = ((code_map[1:] + code_map[:-1]) / 2).float()
    around = torch.cat([torch.nextafter(middles, torch.tensor(s * math.inf)) for s in (-1, 1)] + [middles])
    if not signed:
        around = around.sqrt()
        around = torch.cat([torch.nextafter(around, torch.tensor(s * math.inf)) for s in (-1, 1)] + [around])
    if signed:
        around = torch.cat([around, torch.tensor([1e-45, -1e-45, 2.0**-126])])
    around = torch.cat([around, torch.cat([around[:, None], torch.ones(len(around), 31)], 1).flatten()])
    x = torch.nn.functional.pad(around, (0, -len(around) % (BLOCK - 1))).view(-1, BLOCK - 1)
    x = torch.cat([torch.ones(len(x), 1), x], 1).flatten()
    got = codes_of(x, isa)
    want = quantize_8bit_ref(x, True) if signed else quantize_8bit_ref(x * x, False)
    assert equal((got.exp_avg if signed else got.exp_avg_sq), want[0])
    assert len(want[0].unique()) >= 255  # every code, but 255 or 0 where nothing rounds to it


def test_every_code_is_decoded_to_the_maps_value(isa):
    """With beta 1/2, no gradient, lr 1 and eps 1: p <- -m at step 1, and -1 / (1 + sqrt(v)) where only v is given."""
    codes, one = torch.arange(256).to(torch.uint8), torch.ones(1)
    zero, zeros = torch.zeros(256), torch.zeros(256, dtype=torch.uint8)
    u = Update(zero, zero, Moments(codes, zeros, one, one), 1, 1.0, (0.5, 0.5), 1.0, 0.0)
    assert torch.equal(run([u], isa)[0][0], -dynamic_map(True))
    u = u._replace(moments=Moments(zeros + 255, codes, one, one))
    assert torch.equal(run([u], isa)[0][0], adamw_8bit_ref(u)[0])


def test_codes_of_any_bit_pattern(isa):
    """Random bit patterns: all exponents, subnormals, infinities and NaN among them; blocks of narrow range too."""
    patterns = torch.randint(-(2**31), 2**31 - 1, (BLOCK * 40,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    narrow = torch.randn(BLOCK * 40) * 2.0 ** torch.randint(-130, 110, (40,)).repeat_interleave(BLOCK)
    for x in (patterns, patterns.nan_to_num(), narrow):
        got = codes_of(x, isa)
        for i, values in ((0, x), (1, x * x)):
            codes, absmax = quantize_8bit_ref(values, i == 0)
            assert equal(got[i], codes) and equal(got[i + 2], absmax)


def test_zero_stays_zero_and_tiny_does_not_become_zero(isa):
    x = torch.zeros(BLOCK)
    x[0], x[1], x[2] = 1.0, 1e-9, -1e-9  # squares 1e-18: far below the smallest value of the map
    got = codes_of(x, isa)
    assert got.exp_avg[3:].eq(127).all() and got.exp_avg[1] == 127 and got.exp_avg_sq[3:].eq(0).all()
    assert got.exp_avg_sq[1] == got.exp_avg_sq[2] == 1 and got.exp_avg_sq[0] == 255
    decoded = dequantize_8bit_ref(got.exp_avg, got.exp_avg_absmax, dynamic_map(True))
    assert torch.equal(decoded[3:], torch.zeros(BLOCK - 3)) and decoded[0] == 1


# --- the update --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("min_8bit", [0, 1 << 30])
def test_the_update_equals_the_reference_bit_for_bit(min_8bit, dtype, isa, thread_count):
    updates = [make(n, dtype, step=2 + i, min_8bit=min_8bit, scale=10.0 ** (-i)) for i, n in enumerate(SIZES)]
    want = [adamw_8bit_ref(u) for u in updates]
    for threads in (1, 2):
        assert_equal(thread_count(threads, lambda: run(updates, isa)), want)
    assert_equal([run([u], isa)[0] for u in updates], want)  # alone


def test_mixed_tensors_in_one_call_on_any_number_of_threads(isa, thread_count):
    dtypes = (torch.float32, torch.bfloat16)
    updates = [make(n, d, min_8bit=m) for n in (5003, 300, 40000, 1) for d in dtypes for m in (0, 4096)]
    updates.insert(3, make(0))
    updates[1] = updates[1]._replace(lr=0.5, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.0, step=1000)
    want = [adamw_8bit_ref(u) for u in updates]
    for threads in (1, 2, 3, 7):
        assert_equal(thread_count(threads, lambda: run(updates, isa)), want)
    assert run([]) == []


def test_the_formula_is_torchs():
    """Ten steps with fp32 moments against torch.optim.AdamW in fp32 and fp64."""
    start, grads = torch.randn(60, 50), torch.randn(10, 60, 50)
    rates = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, moments = start.clone(), new_moments(start)
    assert moments.exp_avg.dtype == torch.float32
    plain, exact = (torch.nn.Parameter(start.to(d, copy=True)) for d in (torch.float32, torch.float64))
    optimizers = [torch.optim.AdamW([p], **rates) for p in (plain, exact)]
    for step, grad in enumerate(grads, 1):
        plain.grad, exact.grad = grad, grad.double()
        for optimizer in optimizers:
            optimizer.step()
        adamw_8bit_([Update(ours, grad, moments, step, *rates.values())])
    assert_accurate(ours, plain, exact)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_accurate(getattr(moments, name), optimizers[0].state[plain][name], optimizers[1].state[exact][name], name)


def test_nothing_outside_the_tensors_is_written(isa):
    u = make(700)
    frame = {name: torch.full((900,), 7, dtype=t.dtype) for name, t in zip(Moments._fields, u.moments, strict=True)}
    param, grad = torch.full((900,), 7.0), u.grad.clone()
    param[100:800] = u.param
    views = []
    for name, t in zip(Moments._fields, u.moments, strict=True):
        frame[name][100 : 100 + len(t)] = t
        views.append(frame[name][100 : 100 + len(t)])
    adamw_8bit_([u._replace(param=param[100:800], moments=Moments(*views))], isa=isa)
    assert_equal([(param[100:800], Moments(*views))], [adamw_8bit_ref(u)])
    for t, n in [(param, 700), *((frame[name], len(v)) for name, v in zip(Moments._fields, views, strict=True))]:
        assert t[:100].eq(7).all() and t[100 + n :].eq(7).all()
    assert torch.equal(grad, u.grad)


def test_a_nan_or_infinite_gradient_stays_visible(isa):
    """The element is NaN at once (infinity makes m / sqrt(v) NaN), its block one step later, other blocks never."""
    for bad in (math.nan, math.inf):
        u = make(3 * BLOCK)
        u.grad[BLOCK + 5] = bad
        (p, moments), *_ = run([u], isa)
        assert_equal([(p, moments)], [adamw_8bit_ref(u)])
        assert p.isnan().nonzero().flatten().tolist() == [BLOCK + 5]
        (p, _), *_ = run([u._replace(param=p, grad=torch.ones(3 * BLOCK), moments=moments)], isa)
        assert p[BLOCK : 2 * BLOCK].isnan().all() and p.isnan().sum() == BLOCK


def test_a_zero_gradient_from_the_start_only_decays(isa):
    p = torch.randn(4096)
    u = Update(p, torch.zeros(4096), new_moments(p), 1, 0.1, (0.9, 0.99), 1e-8, 0.5)
    (q, moments), *_ = run([u], isa)
    assert torch.equal(q, p * (1 - 0.1 * 0.5)) and moments.exp_avg.eq(127).all() and moments.exp_avg_sq.eq(0).all()


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: {"param": u.param.double()}, "param has dtype torch.float64, wants torch.float32 or torch.bfloat16"),
        (lambda u: {"grad": u.grad.bfloat16()}, r"grad is torch.bfloat16 \(5000,\), param wants torch.float32 \(5000,\)"),
        (lambda u: {"grad": u.grad[:4]}, r"grad is torch.float32 \(4,\), param wants"),
        (lambda u: {"moments": u.moments._replace(exp_avg=u.grad)}, r"moments are torch.float32 \(5000,\) and torch.uint8"),
        (lambda u: {"moments": u.moments._replace(exp_avg_absmax=torch.zeros(3))}, "absmax wants two fp32 tensors of 20"),
        (lambda u: {"moments": u.moments._replace(exp_avg_sq_absmax=None)}, "absmax wants two fp32 tensors of 20"),
        (lambda u: {"grad": torch.randn(10000)[::2]}, r"param \(5000,\), its grad or moments are strided"),
        (lambda u: {"step": 0}, "step has 0, wants at least 1"),
        (lambda u: {"moments": None}, r"moments has type NoneType, wants a Moments; new_moments\(param\) makes one"),
        (lambda u: {"lr": math.nan}, "lr has nan, wants a finite number >= 0"),
        (lambda u: {"eps": -1e-8}, "eps has -1e-08, wants a finite number >= 0"),
        (lambda u: {"betas": (0.9, 1.0)}, r"betas has \(0.9, 1.0\), wants two numbers from 0 to below 1"),
    ],
)
def test_errors(change, message):
    u = make(5000)
    with pytest.raises(ValueError, match=f"adamw_8bit_: {message}"):
        adamw_8bit_([u._replace(**change(u))])
    with pytest.raises(ValueError, match="adamw_8bit_: updates has a Tensor, each wants to be an Update"):
        adamw_8bit_([u.param])
    with pytest.raises(ValueError, match="adamw_8bit_: isa has 'sse9', wants one of"):
        adamw_8bit_([u], isa="sse9")

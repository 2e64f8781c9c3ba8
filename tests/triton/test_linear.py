from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swiftk.kernels._native import acc_dtype
from swiftk.kernels.linear import Product, linear, linear_group_out, linear_out, linear_ref
from swiftk.testing.accuracy import assert_accurate
from tests.triton.launched import check_operator, dots_like_a_gpus, operators_take

NUMERICS = pytest.mark.parametrize("numerics", ["auto", "invariant"])
# (M, N, K): one element; less than a tile; more than one in each direction, of both tiles; no K
SHAPES = [(1, 1, 1), (3, 7, 5), (65, 33, 100), (2, 40, 0), (130, 270, 129), (70, 300, 64)]


def make(M, N, K, dtype, device, R=0):
    shapes = ((M, K), (N, K), (N,), (M, R), (N, R))
    x, w, b, s, t = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return x, w, b, (s, t), torch.randn(N, device=device).to(acc_dtype(dtype))


def out(x, w, b, numerics, dtype=None, **epilogue):
    y = torch.full((len(x), len(w)), torch.nan, dtype=dtype or x.dtype, device=x.device)
    linear_out(x, w, b, y, numerics=numerics, **epilogue)
    return y


@NUMERICS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, numerics, dtype, device):
    x, w, b, *_ = make(*shape, dtype, device)
    dy = torch.randn(shape[:2], device=device).to(dtype)
    with operators_take(dtype):
        for args in ((x, w), (x, w, b)):
            results = []
            for f, cast in ((lambda *a: linear(*a, numerics=numerics), dtype), (F.linear, dtype), (F.linear, torch.float64)):
                inputs = [a.to(cast).requires_grad_() for a in args]
                y = f(*inputs)
                results.append([y, *torch.autograd.grad(y, inputs, dy.to(cast))])
            for name, ours, plain, exact in zip(("y", "dx", "dw", "db"), *results, strict=False):
                assert_accurate(ours, plain, exact, name)


@NUMERICS
@pytest.mark.parametrize(("shape", "R"), [((1, 5, 33), 1), ((17, 33, 0), 16), ((70, 140, 70), 70)], ids=str)
def test_tail_scale_and_bias(shape, R, numerics, dtype, device):
    x, w, b, tail, scale = make(*shape, dtype, device, R)
    tail64 = tail[0].double(), tail[1].double()
    for given, exact in (({"tail": tail}, {"tail": tail64}), ({"scale": scale}, {"scale": scale.double()}),
                         ({"tail": tail, "scale": scale}, {"tail": tail64, "scale": scale.double()})):  # fmt: skip
        for bias in (None, b):
            want = linear_ref(x.double(), w.double(), None if bias is None else bias.double(), **exact)
            assert_accurate(out(x, w, bias, numerics, **given), linear_ref(x, w, bias, **given), want, str(list(given)))


@NUMERICS
def test_logits_in_the_accumulate_dtype_are_not_rounded(numerics, dtype, device):
    x, w, b, tail, _ = make(70, 40, 200, dtype, device, 8)
    acc = acc_dtype(dtype)
    for bias, epilogue in ((None, {}), (b, {}), (None, {"tail": tail}), (b, {"tail": tail})):
        exact = linear_ref(x.double(), w.double(), None if bias is None else bias.double(),
                           tail=(tail[0].double(), tail[1].double()) if epilogue else None)  # fmt: skip
        wide = [None if t is None else t.to(acc) for t in (x, w, bias)]
        plain = linear_ref(*wide, tail=(tail[0].to(acc), tail[1].to(acc)) if epilogue else None)
        assert_accurate(out(x, w, bias, numerics, acc, **epilogue), plain, exact)


def test_invariant_a_row_and_a_column_depend_on_themselves_alone(dtype, device):
    """All tiles, rows anywhere in them; on a GPU also a K long enough for the pipeline."""
    # the tiles of fp32 are small; the interpreter takes tens of milliseconds for each
    M, N, K = (200, 300, 1008) if device.type == "cuda" else (70, 130, 40) if dtype == torch.float32 else (200, 300, 144)
    with dots_like_a_gpus():
        check_rows_and_columns(*make(M, N, K, dtype, device, 24))


def check_rows_and_columns(x, w, b, tail, scale):
    M, N = len(x), len(w)
    whole = out(x, w, b, "invariant", tail=tail, scale=scale)
    for rows in (slice(0, 1), slice(M - 50, M - 49), slice(M // 3, M // 3 + 17), slice(3, 68), slice(7, M)):
        got = out(x[rows], w, b, "invariant", tail=(tail[0][rows], tail[1]), scale=scale)
        assert torch.equal(got, whole[rows]), rows
    for columns in (slice(0, 1), slice(7, 12), slice(N - 50, N)):
        part = {"tail": (tail[0], tail[1][columns]), "scale": scale[columns].clone()}
        assert torch.equal(out(x, w[columns], b[columns], "invariant", **part), whole[:, columns]), columns
    apart = torch.cat([w, w[:, :3]], 1)[:, : w.shape[1]]  # a stride that is no multiple of 16 has its own tile
    assert torch.equal(out(x[3:70], apart, b, "invariant", tail=(tail[0][3:70], tail[1]), scale=scale), whole[3:70])


def test_invariant_a_tail_of_zeros_is_no_tail(dtype, device):
    x, w, b, tail, scale = make(70, 40, 100, dtype, device, 8)
    zeros = torch.zeros_like(tail[0]), tail[1]
    assert torch.equal(out(x, w, b, "invariant", tail=zeros, scale=scale), out(x, w, b, "invariant", scale=scale))


@NUMERICS
def test_a_group_strides_and_what_lies_beside(numerics, dtype, device):
    """Operands inside frames of NaN give what they give alone, in a group too; nothing is written beside a result."""
    x, w, b, tail, _ = make(70, 37, 65, dtype, device, 5)

    def framed(t):
        frame = torch.full((t.shape[0] + 2, t.shape[1] + 8), torch.nan, dtype=t.dtype, device=device)
        frame[1:-1, 3:-5] = t
        return frame[1:-1, 3:-5]

    want, bare = out(x, w, b, numerics, tail=tail), out(x, w[:9], None, numerics)
    results = [framed(torch.zeros_like(t)) for t in (want, bare)]
    linear_group_out(
        framed(x), [Product(framed(w), b, results[0], tuple(map(framed, tail))), Product(framed(w)[:9], None, results[1])],
        numerics=numerics,
    )  # fmt: skip
    for got, wanted in zip(results, (want, bare), strict=True):
        assert_accurate(got, wanted, wanted.double())
        if numerics == "invariant":
            assert torch.equal(got, wanted)
        assert got._base.isnan().sum() == got._base.numel() - got.numel()


@NUMERICS
def test_nan_stays_in_its_row_and_calls_repeat(numerics, device):
    x, w, b, *_ = make(70, 40, 100, torch.float32, device)
    y = linear(x, w, b, numerics=numerics)
    assert torch.equal(y, linear(x, w, b, numerics=numerics))
    poisoned = x.clone()
    poisoned[20, 3] = torch.nan
    z = linear(poisoned, w, b, numerics=numerics)
    assert z[20].isnan().all() and torch.equal(z[:20], y[:20]) and torch.equal(z[21:], y[21:])


@pytest.mark.parametrize("shape", [(0, 4, 8), (6, 0, 8), (0, 0, 0)], ids=str)
def test_sizes_of_zero(shape, device):
    inputs = [t.requires_grad_() for t in make(*shape, torch.float32, device)[:3]]
    for numerics in ("auto", "invariant"):
        y = linear(*inputs, numerics=numerics)
        assert y.shape == shape[:2]
        plain = torch.autograd.grad(F.linear(*inputs).sum(), inputs)
        assert all(torch.equal(a, c) for a, c in zip(torch.autograd.grad(y.sum(), inputs), plain, strict=True))


@NUMERICS
def test_operator(numerics, device):
    x, w, b = (t.requires_grad_() for t in make(5, 6, 16, torch.float32, device)[:3])
    check_operator(linear, x, w, b, numerics=numerics)


def test_errors(device):
    x, w, *_ = make(2, 3, 4, torch.float32, device)
    with pytest.raises(ValueError, match="linear: numerics has 'fast', wants one of auto, invariant"):
        linear(x, w, numerics="fast")

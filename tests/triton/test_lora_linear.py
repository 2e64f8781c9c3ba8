from __future__ import annotations

import pytest
import torch

from swiftk.kernels import _low_rank
from swiftk.kernels import lora_linear as module
from swiftk.kernels._native import acc_dtype
from swiftk.kernels.dropout import Dropout
from swiftk.kernels.lora_linear import Adapter, lora_linear, lora_linear_group, lora_linear_ref, row_norm_sq
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.testing.accuracy import assert_accurate
from tests.triton.launched import check_operator, dots_like_a_gpus, operators_take

NUMERICS = pytest.mark.parametrize("numerics", ["auto", "invariant"])
WIDE, KINDS = (70, 37, 100, 5), ("", "bias", "dropout", "dora", "dora bias dropout")  # two tiles of rows, two of K
CASES = [
    *(pytest.param(kind, WIDE, marks=[pytest.mark.long] * (kind in ("bias", "dropout"))) for kind in KINDS),
    *((KINDS[-1], shape) for shape in ((1, 1, 1, 1), (5, 130, 65, 20))),
]


@pytest.fixture(autouse=True)
def several_sums(monkeypatch):
    """More than one partial sum of dA and dm at 70 rows."""
    monkeypatch.setattr(_low_rank, "TRITON_ROWS", 64)


def make(M, N, K, r, kind, dtype, device):
    """x, W, a, b, bias, m and the options that go with the kind."""
    x, w, a, b, bias = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (r, K), (N, r), (N,)))
    a, b = a / max(1, K) ** 0.5, b / r**0.5
    m = 1 + torch.rand(N, device=device).to(dtype) if "dora" in kind else None
    return x, w / max(1, K) ** 0.5, a, b, bias if "bias" in kind else None, m, make_dropout(M, kind, device)


def make_dropout(M, kind, device, layer=3):
    if "dropout" not in kind:
        return None
    return Dropout(0.3, torch.tensor([2**40 + 17, 5], device=device), layer, torch.arange(M, device=device) * 2**31 + 9)


def adapter(w, a, b, m):
    norm = None if m is None else row_norm_sq(w.detach(), acc_dtype(w.dtype))
    return Adapter(a, b, 0.75, m, norm)


def run(f, cast, dy, args, kind, **options):
    """y and the gradients of x, a, b, bias, m where they are there."""
    x, w, a, b, bias, m, dropout = args
    x, a, b, bias, m = (None if t is None else t.detach().to(cast).requires_grad_() for t in (x, a, b, bias, m))
    y = f(x, w.to(cast), adapter(w.to(cast), a, b, m), bias, dropout=dropout, **options)
    return [y, *torch.autograd.grad(y, [t for t in (x, a, b, bias, m) if t is not None], dy.to(cast))]


@NUMERICS
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
def test_values_and_gradients(shape, kind, numerics, dtype, device):
    args = make(*shape, kind, dtype, device)
    dy = torch.randn(shape[:2], device=device).to(dtype)
    with operators_take(dtype):
        ours = run(lora_linear, dtype, dy, args, kind, numerics=numerics)
    plain, exact = (run(lora_linear_ref, cast, dy, args, kind) for cast in (dtype, torch.float64))
    for i, results in enumerate(zip(ours, plain, exact, strict=True)):
        assert_accurate(*results, f"result {i}")


def test_more_columns_of_s_than_a_tile(device):
    args = make(20, 30, 40, 130, "dropout", torch.float32, device)
    dy = torch.randn(20, 30, device=device)
    results = [run(f, cast, dy, args, "dropout") for f, cast in
               ((lora_linear, torch.float32), (lora_linear_ref, torch.float32), (lora_linear_ref, torch.float64))]  # fmt: skip
    for ours, plain, exact in zip(*results, strict=True):
        assert_accurate(ours, plain, exact)


def test_fp32_masters_under_x_of_lower_precision(dtype, device):
    x, w, a, b, *_ = make(9, 20, 40, 4, "", dtype, device)
    a, b = (t.float().requires_grad_() for t in (a, b))
    with operators_take(dtype):
        y = lora_linear(x, w, Adapter(a, b, 2.0))
        da, db = torch.autograd.grad(y.sum(), (a, b))
    assert y.dtype == dtype and da.dtype == db.dtype == torch.float32
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in (a, b)]
    exact = torch.autograd.grad(lora_linear_ref(x.double(), w.double(), Adapter(*rounded, 2.0)).sum(), rounded)
    for got, want in zip((da, db), exact, strict=True):
        assert_accurate(got.to(dtype), want.to(dtype), want)


@pytest.mark.parametrize("kind", ["", "bias dropout", pytest.param("dora", marks=pytest.mark.long)])
def test_a_group_equals_its_linears(kind, device):
    """Forward and the adapters' gradients bit for bit (S of the group is one product: to rounding); dx is their sum."""
    x = torch.randn(70, 40, device=device).requires_grad_()
    sizes = (33, 16, 5)
    each = [make(70, N, 40, 3 + i, kind, torch.float32, device) for i, N in enumerate(sizes)]
    leaves = [[t.requires_grad_() for t in (e[2], e[3]) if t is not None] for e in each]
    adapters = [adapter(e[1], e[2], e[3], e[5]) for e in each]
    dropouts = [make_dropout(70, kind, device)] * 3
    if dropouts[0] is not None:
        dropouts = [dropouts[0]._replace(layer=i, p=p) for i, p in enumerate((0.3, 0.0, 0.5))]
    ys = lora_linear_group(x, [e[1] for e in each], adapters, [e[4] for e in each], dropouts=dropouts)
    grads = torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *(t for pair in leaves for t in pair)])
    dx = torch.zeros_like(x, dtype=torch.float64)
    for i, e in enumerate(each):
        y = lora_linear(x, e[1], adapters[i], e[4], dropout=dropouts[i])
        assert_accurate(ys[i], y, y.double())
        alone = torch.autograd.grad(y.square().sum(), [x, *leaves[i]])
        dx += alone[0].double()
        for got, want in zip(grads[1 + 2 * i : 3 + 2 * i], alone[1:], strict=True):
            assert_accurate(got, want, want.double())
    assert_accurate(grads[0], dx.float(), dx)


@NUMERICS
def test_a_stack_with_segments(numerics, dtype, device):
    """Each row by its own adapter, -1 and ids outside by none; what another adapter holds for these rows is not seen."""
    x, w, *_ = make(70, 37, 40, 1, "", dtype, device)
    a, b = torch.randn(3, 5, 40, device=device).to(dtype), torch.randn(3, 37, 5, device=device).to(dtype)
    ids = torch.randint(-1, 3, (70,), device=device, dtype=torch.int32)
    dy = torch.randn(70, 37, device=device).to(dtype)
    results = []
    for f, cast in ((lora_linear, dtype), (lora_linear_ref, dtype), (lora_linear_ref, torch.float64)):
        leaves = [t.to(cast).requires_grad_() for t in (x, a, b)]
        with operators_take(dtype):
            options = {"numerics": numerics} if f is lora_linear else {}
            y = f(leaves[0], w.to(cast), Adapter(*leaves[1:], (0.5, 1.0, 2.0)), segment_ids=ids, **options)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(cast))])
    for ours, plain, exact in zip(*results, strict=True):
        assert_accurate(ours, plain, exact)


def test_a_magnitude_of_zero_gets_its_gradient(device):
    args = make(20, 12, 16, 3, "dora bias", torch.float32, device)
    args[5][:4] = 0
    dy = torch.randn(20, 12, device=device)
    results = [run(f, cast, dy, args, "dora") for f, cast in
               ((lora_linear, torch.float32), (lora_linear_ref, torch.float32), (lora_linear_ref, torch.float64))]  # fmt: skip
    for ours, plain, exact in zip(*results, strict=True):
        assert_accurate(ours, plain, exact)


@pytest.mark.parametrize("kind", ["bias", "dropout", "dora bias"])
def test_invariant_a_row_depends_on_itself_alone(kind, dtype, device):
    x, w, a, b, bias, m, dropout = make(150, 40, 70, 5, kind, dtype, device)
    lora = adapter(w, a, b, m)
    with operators_take(dtype), dots_like_a_gpus():
        whole = lora_linear(x, w, lora, bias, dropout=dropout, numerics="invariant")
        for rows in (slice(0, 1), slice(60, 70), slice(140, 150)):
            drop = None if dropout is None else dropout._replace(token_index=dropout.token_index[rows])
            got = lora_linear(x[rows], w, lora, bias, dropout=drop, numerics="invariant")
            assert torch.equal(got, whole[rows]), rows
        # what the decoder computes: one product with tail and factor
        if dropout is None:
            flat = module._flat(a, b, [0.75], dtype)
            s, y = x.new_empty(150, 5), torch.empty_like(whole)
            _low_rank.low_rank(x, flat[0], flat[2], _low_rank.Mask(0, None, 0, None), s, "auto", "invariant")
            gain = None
            if m is not None:
                gain = _low_rank.gain_of(m, _low_rank.adapted_norm(w, *flat, lora.weight_norm_sq, "auto"))
            _low_rank.base_product(x, w, bias, y, "auto", (s, flat[1]), gain, "invariant")
            assert torch.equal(y, whole)


@pytest.mark.parametrize("kind", ["bias dropout", "dora"])
def test_an_nf4_base(kind, device):
    """What its dequantised weight gives, to rounding."""
    x, w, a, b, bias, m, dropout = make(20, 33, 64, 3, kind, torch.float32, device)
    base = nf4_quantize(w)
    w = nf4_dequantize(base).float()
    leaves = [t.requires_grad_() for t in (x, a, b, m) if t is not None]
    results = []
    for weight in (base, w):
        norm = None if m is None else row_norm_sq(weight)
        y = lora_linear(x, weight, Adapter(a, b, 0.75, m, norm), bias, dropout=dropout)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert_accurate(got, want, want.double())


def test_nan_stays_in_its_row_and_calls_repeat(device):
    x, w, a, b, *_, dropout = make(70, 30, 40, 4, "dropout", torch.float32, device)
    x[20, 3] = torch.nan
    y, again = (lora_linear(x, w, Adapter(a, b, 1.0), dropout=dropout) for _ in range(2))
    keep = torch.arange(70, device=device) != 20
    assert y[20].isnan().all() and not y[keep].isnan().any() and torch.equal(y[keep], again[keep])


@pytest.mark.parametrize("kind", ["bias", "dora bias dropout"])
def test_no_rows_and_strides(kind, device):
    args = make(0, 6, 8, 3, kind, torch.float32, device)
    y, *grads = run(lora_linear, torch.float32, torch.zeros(0, 6, device=device), args, kind)
    assert y.shape == (0, 6) and all((g == 0).all() for g in grads)
    x, w, a, b, bias, m, dropout = make(12, 6, 8, 3, kind, torch.float32, device)
    cube = x.view(3, 4, 8).transpose(0, 1)
    if dropout is None:
        lora = adapter(w, a, b, m)
        want = lora_linear(cube.contiguous(), w, lora, bias)
        assert torch.equal(lora_linear(cube, w.t().contiguous().t(), lora, bias), want) and want.shape == (
            4,
            3,
            6,
        )


@pytest.mark.parametrize(
    ("kind", "numerics"), [("bias", "auto"), ("dora bias dropout", "auto"), ("dora bias dropout", "invariant")]
)
def test_operator(kind, numerics, device):
    x, w, a, b, bias, m, dropout = make(6, 10, 20, 3, kind, torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, a, b, bias, m) if t is not None]
    norm = row_norm_sq(w)

    def f(x, a, b, bias, m=None):
        return lora_linear(x, w, Adapter(a, b, 0.75, m, None if m is None else norm), bias, dropout=dropout, numerics=numerics)

    check_operator(f, *leaves)

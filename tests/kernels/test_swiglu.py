"""swiglu: values, gradients, element invariance, operator contracts, errors."""

from __future__ import annotations

import pytest
import torch

from swiftk.kernels.swiglu import swiglu, swiglu_out, swiglu_ref
from swiftk.testing.accuracy import assert_accurate

SHAPES = [(1, 3), (3, 7), (2, 5, 64), (3, 4099), (17,)]  # 4099: past one block of columns
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def make(shape, dtype, scale=3.0):
    return tuple((scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(2))


def value_and_gradients(f, dy, *inputs):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = f(*inputs)
    return y, *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, isa):
    gate, up = make(shape, dtype)
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    ours = value_and_gradients(lambda g, u: swiglu(g, u, isa=isa), dy, gate, up)
    plain = value_and_gradients(swiglu_ref, dy, gate, up)
    exact = value_and_gradients(swiglu_ref, dy.double(), gate.double(), up.double())
    for name, a, b, c in zip(("y", "dgate", "dup"), ours, plain, exact, strict=True):
        assert_accurate(a, b, c, name)


def test_fp64_kernel_equals_reference():
    gate, up = make((33, 100), torch.float64, scale=10.0)
    assert ((swiglu(gate, up) - swiglu_ref(gate, up)).abs() <= 1e-13 * (1 + swiglu_ref(gate, up).abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype, isa):
    """Every magnitude: no overflow of exp(-g) reaches the result, NaN stays NaN, small results keep their relative error."""
    big = torch.finfo(dtype).max
    gate = torch.tensor([0.0, -0.0, 80.0, -80.0, 88.0, -88.0, 700.0, -700.0, 1e30, -1e30, big, -big, float("nan")], dtype=dtype)
    up = torch.ones_like(gate)
    y, dgate, dup = value_and_gradients(lambda g, u: swiglu(g, u, isa=isa), up, gate, up)
    assert y[-1].isnan() and dgate[-1].isnan() and dup[-1].isnan()
    g = gate[:-1].double()
    s = torch.sigmoid(g)
    tiny = torch.finfo(dtype).tiny * 200
    for got, want in ((y, g * s), (dup, g * s), (dgate, s * (1 + g * (1 - s)))):
        torch.testing.assert_close(got[:-1].double(), want.to(dtype).double(), rtol=8 * torch.finfo(dtype).eps, atol=tiny)
    assert swiglu(torch.full((3,), float("-inf"), dtype=dtype), up[:3], isa=isa).isnan().all()


def test_empty_and_non_contiguous():
    gate, up = make((6, 8), torch.float32)
    assert swiglu(gate[:0], up[:0]).shape == (0, 8) and swiglu(gate[:, :0], up[:, :0]).shape == (6, 0)
    empty = value_and_gradients(swiglu, torch.empty(0, 8), gate[:0], up[:0])
    assert empty[1].shape == (0, 8)
    fused = torch.randn(2, 3, 16)
    swapped = fused.transpose(0, 1)
    for g, u in ((fused[..., :8], fused[..., 8:]), (swapped, swapped + 1), (fused[..., ::2], fused[..., 1::2])):
        dy = torch.randn(1, 1, g.shape[-1]).expand(g.shape)
        strided = torch.ops.swiftk.swiglu_bwd(dy, g, u, "auto")
        dense = torch.ops.swiftk.swiglu_bwd(dy.contiguous(), g.contiguous(), u.contiguous(), "auto")
        assert torch.equal(swiglu(g, u), swiglu(g.contiguous(), u.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_writes_every_output_and_nothing_else(isa):
    gate, up = make((5, 19), torch.float32)
    y = torch.full((7, 19), float("nan"))
    swiglu_out(gate, up, y[1:6], isa)
    assert not y[1:6].isnan().any() and y[0].isnan().all() and y[6].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_depends_on_that_element_alone(dtype, isa, thread_count):
    """The same bits in any lane, tail, block and thread (36,891 elements take two), at any alignment."""
    gate, up = make((9, 4099), dtype)
    dy = torch.randn(9, 4099).to(dtype)

    def run(*ts):
        dgate, dup = torch.ops.swiftk.swiglu_bwd(*ts, isa)
        return torch.stack((swiglu(ts[1], ts[2], isa=isa), dgate, dup))

    whole = thread_count(2, lambda: run(dy, gate, up))
    flat = [t.flatten() for t in (dy, gate, up)]
    for start, stop in ((0, 1), (1, 12), (5, 38), (4090, 8200), (18000, 36891)):
        part = thread_count(1, lambda start=start, stop=stop: run(*(t[start:stop] for t in flat)))
        assert torch.equal(part, whole.flatten(1)[:, start:stop])


def test_second_backward_and_double_backward():
    gate, up = (t.requires_grad_() for t in make((4, 16), torch.float32))
    y = swiglu(gate, up)
    first = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (dgate,) = torch.autograd.grad(y.sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu: the gradient of its gradient is not supported"):
        torch.autograd.grad(dgate.sum(), gate)


def test_opcheck_and_compile():
    gate, up = (t.requires_grad_() for t in make((4, 16), torch.float32))
    torch.library.opcheck(torch.ops.swiftk.swiglu_fwd.default, (gate, up, "auto"))
    torch.library.opcheck(torch.ops.swiftk.swiglu_fwd.default, (gate.t(), up.t(), "auto"))
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), swiglu(gate, up))
    ours, theirs = (torch.autograd.grad(f(gate, up).square().sum(), (gate, up)) for f in (swiglu, compiled))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(2, 4), torch.randn(2, 3)), r"swiglu: up has shape \(2, 3\), gate \(2, 4\) needs \(2, 4\)"),
        ((torch.randn(2, 4), torch.randn(2, 4).double()), "swiglu: up has dtype torch.float64, wants torch.float32 like gate"),
        ((torch.randn(2, 4).half(), torch.randn(2, 4).half()), "swiglu: gate has dtype torch.float16, wants torch.bfloat16"),
        ((torch.tensor(1.0), torch.tensor(1.0)), r"swiglu: gate has shape \(\), wants \(\.\.\., I\)"),
        ((torch.randn(2, 4), 3.0), "swiglu: up has type float, wants a torch.Tensor"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*args)
    with pytest.raises(ValueError, match="swiglu: isa has 'sse9', wants one of"):
        swiglu(torch.randn(2, 4), torch.randn(2, 4), isa="sse9")

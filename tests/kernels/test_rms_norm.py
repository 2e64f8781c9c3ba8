"""rms_norm: values, gradients, row invariance, operator contracts, errors."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from swiftk.kernels.rms_norm import rms_norm, rms_norm_out, rms_norm_ref
from swiftk.testing.accuracy import assert_accurate

SHAPES = [(1, 3), (3, 7), (2, 5, 64), (130, 257), (1, 1024)]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def make(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype), torch.rand(shape[-1], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, isa):
    x, w = make(shape, dtype)
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    results = []
    for f, cast in ((lambda x, w: rms_norm(x, w, isa=isa), dtype), (rms_norm_ref, dtype), (rms_norm_ref, torch.float64)):
        xs, ws = x.to(cast).requires_grad_(), w.to(cast).requires_grad_()
        y = f(xs, ws)
        results.append((y, *torch.autograd.grad(y, (xs, ws), dy.to(cast))))
    for name, ours, plain, exact in zip(("y", "dx", "dw"), *results, strict=True):
        assert_accurate(ours, plain, exact, name)


def test_fp64_kernel_equals_reference():
    x, w = make((33, 100), torch.float64)
    assert (rms_norm(x, w) - rms_norm_ref(x, w)).abs().max() <= 1e-12


def test_empty_and_non_contiguous():
    x, w = make((6, 8), torch.float32)
    assert rms_norm(x[:0], w).shape == (0, 8)
    assert torch.equal(rms_norm(torch.full((2, 1), 3.0), torch.ones(1), eps=0.0), torch.ones(2, 1))
    strided = torch.randn(8, 6).t()
    assert torch.equal(rms_norm(strided, w), rms_norm(strided.contiguous(), w))
    wide = torch.randn(6, 16)[:, ::2]
    assert torch.equal(rms_norm(wide, w), rms_norm(wide.contiguous(), w))
    spread, dense = (w.repeat_interleave(2)[::2].requires_grad_(), w.clone().requires_grad_())
    for x in (torch.randn(6, 8), torch.randn(8, 6).t()):
        strided, contiguous = (torch.autograd.grad(rms_norm(x, v), v, torch.ones(6, 8))[0] for v in (spread, dense))
        assert torch.equal(strided, contiguous)


def test_writes_every_output_and_nothing_else():
    x, w = make((5, 19), torch.float32)
    y, rstd = torch.full((7, 19), float("nan")), torch.full((7,), float("nan"))
    rms_norm_out(x, w, 1e-6, y[1:6], rstd[1:6])
    assert not y[1:6].isnan().any() and not rstd[1:6].isnan().any()
    assert y[0].isnan().all() and y[6].isnan().all() and rstd[0].isnan() and rstd[6].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_that_row_alone(dtype, isa, thread_count):
    x, w = make((70, 515), dtype)  # 36,050 elements: two threads
    whole = thread_count(2, lambda: rms_norm(x, w, isa=isa))
    alone = thread_count(1, lambda: torch.cat([rms_norm(row[None], w, isa=isa) for row in x]))
    assert torch.equal(whole, alone)


def test_gradients_are_bitwise_repeatable(thread_count):
    x, w = make((400, 96), torch.float32)

    def grads():
        xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
        return torch.autograd.grad(rms_norm(xs, ws).square().sum(), (xs, ws))

    one, two = thread_count(1, grads), thread_count(2, grads)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_second_backward_and_double_backward():
    x, w = (t.requires_grad_() for t in make((4, 16), torch.float32))
    y = rms_norm(x, w)
    first = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rms_norm: the gradient of its gradient is not supported"):
        torch.autograd.grad(dx.sum(), x)


def test_opcheck_and_compile():
    x, w = (t.requires_grad_() for t in make((4, 16), torch.float32))
    torch.library.opcheck(torch.ops.swiftk.rms_norm_fwd.default, (x, w, 1e-6, "auto"))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), rms_norm(x, w))


def test_nan_and_huge_values_stay_visible():
    x, w = make((3, 32), torch.float32)
    x[1, 3] = float("nan")
    y = rms_norm(x, w)
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(2, 4), torch.randn(3)), r"rms_norm: weight has shape \(3,\), x \(2, 4\) needs \(4,\)"),
        ((torch.randn(2, 4), torch.randn(4).double()), "rms_norm: weight has dtype torch.float64, wants torch.float32 like x"),
        ((torch.randn(2, 4).half(), torch.randn(4).half()), "rms_norm: x has dtype torch.float16, wants torch.bfloat16"),
        ((torch.randn(2, 4), torch.randn(4), "1e-6"), "rms_norm: eps has '1e-6', wants a finite number >= 0"),
        ((torch.randn(2, 4), torch.randn(4), float("nan")), "rms_norm: eps has nan, wants"),
        ((torch.randn(2, 4), torch.randn(4), -1e-6), "rms_norm: eps has -1e-06, wants"),
        ((torch.randn(2, 0), torch.randn(0)), r"rms_norm: x has shape \(2, 0\), wants"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*args)
    with pytest.raises(ValueError, match="rms_norm: isa has 'sse9', wants one of"):
        rms_norm(torch.randn(2, 4), torch.randn(4), isa="sse9")


def test_other_backends(monkeypatch):
    """transformer_engine is asked for, never chosen; where it is missing, other or on a CPU an error says what to do."""
    x, weight = torch.randn(2, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"rms_norm: backend has 'apex', wants one of swiftk, transformer_engine"):
        rms_norm(x, weight, backend="apex")
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match=r"rms_norm: x has device cpu, backend 'transformer_engine' wants a CUDA device"):
        rms_norm(x, weight, backend="transformer_engine")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ImportError, match=r"rms_norm: .*pip install transformer-engine\[pytorch\]"):
        rms_norm(x, weight, backend="transformer_engine")

    class Norm(torch.nn.Module):  # a stand-in, with the installed one's signature
        def __init__(self, normalized_shape, eps=1e-5, zero_centered_gamma=False, **kwargs):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.empty(normalized_shape, **kwargs)), eps

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    package, module = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    module.RMSNorm = Norm
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    weight.requires_grad_()
    y = rms_norm(x, weight, 1e-3, backend="transformer_engine")
    want = torch.nn.functional.rms_norm(x, (4,), weight, 1e-3)
    assert torch.equal(y, want)
    assert torch.equal(*(torch.autograd.grad(t.sum(), weight)[0] for t in (y, want)))
    module.RMSNorm = type("RMSNorm", (Norm,), {"__init__": lambda self, hidden_size: None})
    with pytest.raises(ImportError, match=r"takes self, hidden_size, wants eps, device, dtype among"):
        rms_norm(x, weight, backend="transformer_engine")

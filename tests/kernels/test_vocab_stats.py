"""vocab_stats: values, gradients per statistic, row invariance, shards, memory, operator contracts, errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from swiftk.kernels import _head
from swiftk.kernels import vocab_stats as module
from swiftk.kernels.vocab_stats import merge_vocab_stats, vocab_stats, vocab_stats_ref
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32]
IGNORE = -100


def make(tokens, hidden, vocab, dtype, scale=1.0):
    x = torch.randn(tokens, hidden, dtype=torch.float64).to(dtype)
    w = (scale * torch.randn(vocab, hidden, dtype=torch.float64) / hidden**0.5).to(dtype)
    y = torch.randint(vocab, (tokens,))
    y[1::5] = IGNORE
    return x, w, y


def everything(x, w, y, **options):
    return vocab_stats(x, w, y, logit_sum=True, entropy=True, **options)


def values_and_gradients(f, x, w, y, coefficients, cast):
    """All statistics but argmax, and the gradients of their weighted sum."""
    xs, ws = x.detach().to(cast).requires_grad_(), w.detach().to(cast).requires_grad_()
    stats = f(xs, ws, y)
    total = sum((c.to(s.dtype) * s).sum() for c, s in zip(coefficients, stats[:5], strict=True))
    return (*stats[:6], *torch.autograd.grad(total, (xs, ws)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (12, 32, 2048), (12, 33, 4099)])
def test_values_and_gradients(shape, softcap, dtype, isa):
    x, w, y = make(*shape, dtype, scale=2.0)
    coefficients = torch.randn(5, shape[0], dtype=torch.float64)
    ours = values_and_gradients(lambda *a: everything(*a, softcap=softcap, isa=isa), x, w, y, coefficients, dtype)
    plain, exact = (
        values_and_gradients(lambda *a: vocab_stats_ref(*a, softcap=softcap), x, w, y, coefficients, cast)
        for cast in (dtype, torch.float64)
    )
    names = ("lse", "label_logit", "logprob", "logit_sum", "entropy", "max_logit", "dx", "dw")
    for name, a, b, c in zip(names, ours, plain, exact, strict=True):
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_fp64_kernel_equals_reference(softcap, isa):
    x, w, y = make(5, 24, 4099, torch.float64, scale=3.0)
    coefficients = torch.randn(5, 5, dtype=torch.float64)
    ours = values_and_gradients(lambda *a: everything(*a, softcap=softcap, isa=isa), x, w, y, coefficients, torch.float64)
    reference = values_and_gradients(lambda *a: vocab_stats_ref(*a, softcap=softcap), x, w, y, coefficients, torch.float64)
    for a, b in zip(ours, reference, strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_row_depends_on_that_row_alone(dtype, isa, thread_count):
    x, w, y = make(21, 40, 4099, dtype)
    y[y == IGNORE] = 7
    whole = thread_count(2, lambda: everything(x, w, y, softcap=5.0, isa=isa))
    one_by_one = thread_count(1, lambda: [everything(x[i : i + 1], w, y[i : i + 1], softcap=5.0, isa=isa) for i in range(21)])
    for name, together, alone in zip(whole._fields, whole, zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(together, torch.cat(alone)), name


def test_blocks_of_rows_and_columns_do_not_change_a_bit(monkeypatch):
    x, w, y = make(50, 16, 9001, torch.float32)
    whole = everything(x, w, y)
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(_head, "BUFFER_BYTES", 16 * module.STEP * 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, everything(x, w, y), strict=True))


def test_gradients_in_blocks_equal_gradients_at_once(monkeypatch):
    x, w, y = make(50, 16, 9001, torch.float64)
    coefficients = torch.randn(5, 50, dtype=torch.float64)
    at_once = values_and_gradients(everything, x, w, y, coefficients, torch.float64)
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(_head, "BUFFER_BYTES", 16 * module.STEP * 8)
    in_blocks = values_and_gradients(everything, x, w, y, coefficients, torch.float64)
    for a, b in zip(at_once, in_blocks, strict=True):
        assert (a - b).abs().max() <= 1e-13 * max(1.0, b.abs().max())


def test_argmax_is_the_lowest_of_equal_ids():
    x, w, y = make(3, 8, 5000, torch.float32)
    w[4100] = w[17] = w[2050] = 100 * x[0]
    assert vocab_stats(x, w, y).argmax[0] == 17


def test_shards_add_up():
    x, w, y = make(23, 16, 6000, torch.float64, scale=2.0)
    coefficients = torch.randn(5, 23, dtype=torch.float64) * (y != IGNORE)
    cuts = [0, 1700, 1701, 6000]

    def sharded(xs, ws, ys, **options):
        shards = [everything(xs, ws[a:b], ys, vocab_start=a, vocab_size=6000, **options) for a, b in itertools.pairwise(cuts)]
        return merge_vocab_stats(shards)

    for softcap in (0.0, 4.0):
        whole, merged = (
            values_and_gradients(lambda *a, f=f, c=softcap: f(*a, softcap=c), x, w, y, coefficients, torch.float64)
            for f in (everything, sharded)
        )
        for a, b in zip(whole, merged, strict=True):
            kept = slice(None) if a.dim() == 2 else y != IGNORE
            assert (a[kept] - b[kept]).abs().max() <= 1e-12 * max(1.0, a.abs().max())
        assert torch.equal(sharded(x, w, y).argmax[y != IGNORE], everything(x, w, y).argmax[y != IGNORE])


def test_bf16_products_of_the_backward(monkeypatch):
    """What a CPU with bf16 instructions multiplies in, run here by torch's slow bf16 product."""
    x, w, y = make(12, 32, 4099, torch.bfloat16)
    coefficients = torch.randn(5, 12, dtype=torch.float64)
    plain, exact = (
        values_and_gradients(vocab_stats_ref, x, w, y, coefficients, cast) for cast in (torch.bfloat16, torch.float64)
    )
    monkeypatch.setattr(module, "product_dtype", lambda x, isa: x.dtype)
    ours = values_and_gradients(everything, x, w, y, coefficients, torch.bfloat16)
    for name, a, b, c in zip(("dx", "dw"), ours[-2:], plain[-2:], exact[-2:], strict=True):
        assert_accurate(a, b, c, name)


def test_ignored_rows_and_empty():
    x, w, y = make(9, 8, 300, torch.float32)
    x[y == IGNORE] = float("nan")  # never multiplied
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    stats = everything(xs, ws, y)
    assert all((s[y == IGNORE] == 0).all() for s in stats)
    dx, dw = torch.autograd.grad(stats.lse.sum() + stats.entropy.sum(), (xs, ws))
    assert (dx[y == IGNORE] == 0).all() and not dx.isnan().any() and not dw.isnan().any()
    for labels in (y[:0], torch.full((9,), IGNORE)):
        xs = x[: len(labels)].clone().requires_grad_()
        stats = everything(xs, ws, labels)
        dx, dw = torch.autograd.grad(stats.logprob.sum(), (xs, ws))
        assert stats.lse.shape == labels.shape and (dx == 0).all() and (dw == 0).all()


def test_nan_stays_in_its_row():
    x, w, y = make(4, 8, 3000, torch.float32)
    y[:] = 5
    x[2, 3] = float("nan")
    stats = everything(x, w, y)
    for name, value in zip(stats._fields[:5], stats, strict=False):
        assert value[2].isnan() and not value[[0, 1, 3]].isnan().any(), name
    w[:, 0] = 200.0  # logits of thousands: no overflow, no loss of the row
    x[2] = 0
    x[0, 0] = 50.0
    assert everything(x, w, y).lse.isfinite().all()


def test_non_contiguous_inputs():
    x, w, y = make(6, 8, 300, torch.float32)
    wide, tall = torch.randn(6, 16)[:, ::2].copy_(x), torch.randn(8, 300).t().copy_(w)
    assert torch.equal(vocab_stats(wide, tall, y).lse, vocab_stats(x, w, y).lse)


def test_second_backward_and_double_backward():
    x, w, y = make(5, 8, 300, torch.float32)
    x.requires_grad_(), w.requires_grad_()
    total = vocab_stats(x, w, y).logprob.square().sum()
    first, second = (torch.autograd.grad(total, (x, w), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (dx,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="vocab_stats: the gradient of its gradient is not supported"):
        torch.autograd.grad(dx.sum(), x)


def test_opcheck_and_compile():
    x, w, y = make(5, 8, 300, torch.float32)
    x.requires_grad_(), w.requires_grad_()
    arguments = (x, w, y, IGNORE, 0, 300, 0.0, True, True, None, 0, None, None, None, "vocab_stats", "auto", "auto")
    torch.library.opcheck(torch.ops.swiftk.vocab_stats_fwd.default, arguments)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    results = [(f(x, w, y), torch.autograd.grad(f(x, w, y).logprob.square().sum(), (x, w))) for f in (compiled, everything)]
    for a, b in zip(*results, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_errors():
    x, w, y = make(4, 8, 300, torch.float32)
    y[:] = torch.tensor([0, 299, IGNORE, 300])
    with pytest.raises(ValueError, match=r"vocab_stats: labels has id 300 at position 3, wants 0 <= id < V = 300"):
        vocab_stats(x, w, y)
    with pytest.raises(ValueError, match="labels has id -1 at position 0"):
        vocab_stats(x, w, y - 1)
    with pytest.raises(ValueError, match="vocab_stats: vocab_size has None, vocab_start 5 and 300 rows of weight need"):
        vocab_stats(x, w, y, vocab_start=5)
    with pytest.raises(ValueError, match=r"vocab_size has 300, vocab_start 1 and 300 rows of weight need .* at least 301"):
        vocab_stats(x, w, y, vocab_start=1, vocab_size=300)
    with pytest.raises(ValueError, match=r"vocab_stats: hidden has shape \(1, 4, 8\), wants \(T, H\)"):
        vocab_stats(x[None], w, y)
    with pytest.raises(ValueError, match=r"vocab_stats: weight has shape \(300, 4\), hidden \(4, 8\) needs \(V, 8\)"):
        vocab_stats(x, w[:, :4], y)
    with pytest.raises(ValueError, match=r"vocab_stats: labels has dtype torch.int32, wants torch.int64"):
        vocab_stats(x, w, y.int())
    with pytest.raises(ValueError, match=r"vocab_stats: labels has shape \(3,\), hidden \(4, 8\) needs \(4,\)"):
        vocab_stats(x, w, y[:3])
    for softcap in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"vocab_stats: softcap has {softcap}, wants a finite number >= 0"):
            vocab_stats(x, w, y, softcap=softcap)
    with pytest.raises(ValueError, match="vocab_stats: isa has 'sse9', wants one of"):
        vocab_stats(x, w, y, isa="sse9")

from __future__ import annotations

import pytest
import torch

from swiftk.kernels import _head
from swiftk.kernels import vocab_stats as module
from swiftk.kernels._triton import INTERPRETED
from swiftk.kernels.vocab_stats import merge_vocab_stats, vocab_stats, vocab_stats_ref
from swiftk.testing.accuracy import assert_accurate
from tests.kernels.test_vocab_stats import IGNORE, everything, values_and_gradients
from tests.kernels.test_vocab_stats import make as on_cpu
from tests.triton.launched import check_operator, dots_like_a_gpus, logits_ref_in_blocks, operators_take

NAMES = ("lse", "label_logit", "logprob", "logit_sum", "entropy", "max_logit", "dx", "dw")


def make(tokens, hidden, vocab, dtype, device):
    return tuple(t.to(device) for t in on_cpu(tokens, hidden, vocab, dtype, scale=2.0))


@pytest.fixture
def small_blocks(monkeypatch):
    """Two blocks of rows, two of columns; the reference in the same ones."""
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    monkeypatch.setattr(_head, "CUDA_BUFFER_BYTES", 4 * module.STEP * 4)
    monkeypatch.setattr(module, "logits_ref", logits_ref_in_blocks)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (6, 33, 4099)], ids=str)
def test_values_and_gradients(shape, softcap, dtype, device, small_blocks):
    x, w, y = make(*shape, dtype, device)
    coefficients = torch.randn(5, shape[0], dtype=torch.float64, device=device)
    with operators_take(dtype):
        ours = values_and_gradients(lambda *a: everything(*a, softcap=softcap), x, w, y, coefficients, dtype)
    plain, exact = (
        values_and_gradients(lambda *a: vocab_stats_ref(*a, softcap=softcap), x, w, y, coefficients, cast)
        for cast in (dtype, torch.float64)
    )
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=True):
        assert_accurate(a, b, c, name)


def test_softcap_in_fp64(device):
    """tanh is not that of fp32, whose series near 0 is 5e-8 off."""
    x, w, y = make(3, 7, 50, torch.float64, device)
    coefficients = torch.ones(5, 3, dtype=torch.float64, device=device)
    args = x, w, y, coefficients, torch.float64
    ours = values_and_gradients(lambda *a: everything(*a, softcap=9.0), *args)
    exact = values_and_gradients(lambda *a: vocab_stats_ref(*a, softcap=9.0), *args)
    assert all(((a - b).abs() <= 1e-13 * b.abs().clamp(min=1)).all() for a, b in zip(ours, exact, strict=True))


def test_argmax_is_the_lowest_of_equal_ones(device):
    x, w = torch.ones(2, 4, device=device), torch.zeros(5000, 4, device=device)
    w[[17, 3000, 4999]] = 1.0
    stats = vocab_stats(x, w, torch.tensor([3000, 5], device=device))
    assert stats.argmax.tolist() == [17, 17] and stats.max_logit.tolist() == [4, 4] and stats.label_logit.tolist() == [4, 0]


def test_a_row_depends_on_that_row_alone(device, monkeypatch):
    """With invariant products; blocks of rows and columns do not change a bit either."""
    x, w, y = make(40, 24, 2100, torch.float32, device)
    if INTERPRETED:  # fewer programs, each of which takes milliseconds
        tile = {"BLOCK_M": 32, "BLOCK_N": 1024, "BLOCK_K": 16, "GROUP": 8, "num_warps": 4, "STAGES": 3}
        monkeypatch.setattr("swiftk.kernels.linear._tile", lambda *_: tile)
    y[y == IGNORE] = 7
    options = {"numerics": "invariant", "softcap": 5.0}
    with dots_like_a_gpus():
        whole = everything(x, w, y, **options)
        for rows in (slice(0, 1), slice(30, 35)):
            for together, alone in zip(whole, everything(x[rows], w, y[rows], **options), strict=True):
                assert torch.equal(together[rows], alone)
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
        monkeypatch.setattr(_head, "CUDA_BUFFER_BYTES", 16 * module.STEP * 4)
        assert all(torch.equal(a, b) for a, b in zip(whole, everything(x, w, y, **options), strict=True))


def test_shards(device):
    x, w, y = make(9, 16, 300, torch.float32, device)
    coefficients = torch.randn(5, 9, dtype=torch.float64, device=device)

    def sharded(x, w, y):
        parts = [everything(x, part, y, vocab_start=start, vocab_size=300) for start, part in
                 ((0, w[:100]), (100, w[100:101]), (101, w[101:]))]  # fmt: skip
        merged, keep = merge_vocab_stats(parts), y != IGNORE
        return merged._replace(**{n: t.where(keep, 0) for n, t in merged._asdict().items()})

    ours = values_and_gradients(sharded, x, w, y, coefficients, torch.float32)
    plain, exact = (values_and_gradients(vocab_stats_ref, x, w, y, coefficients, c) for c in (torch.float32, torch.float64))
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=True):
        assert_accurate(a, b, c, name)
    assert torch.equal(sharded(x, w, y).argmax, vocab_stats_ref(x, w, y).argmax)


def test_ignored_rows_are_never_seen(device):
    """NaN in their hidden reaches no statistic and no gradient; all ignored; a label outside gives NaN, not a wrong loss."""
    x, w, y = make(11, 8, 300, torch.float32, device)
    ones = torch.ones(5, 11, device=device)
    clean = values_and_gradients(everything, x, w, y, ones, torch.float32)
    x[y == IGNORE] = torch.nan
    got = values_and_gradients(everything, x, w, y, ones, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert (got[-2][y == IGNORE] == 0).all() and all((t[y == IGNORE] == 0).all() for t in got[:6])
    none = torch.full_like(y, IGNORE)
    assert all((t == 0).all() for t in values_and_gradients(everything, x, w, none, ones, torch.float32))
    y[:2] = torch.tensor([300, -1], device=device)
    logprob = vocab_stats(x.nan_to_num(), w, y).logprob
    assert logprob[:2].isnan().all() and not logprob[2:].isnan().any()


def test_nan_and_peaked_rows(device):
    """A NaN stays in its row; log p near 0 and far below, and what follows for dx, to two roundings of l near 1."""
    x, w, y = make(6, 8, 300, torch.float32, device)
    y[:] = torch.tensor([3, 4, 5, 6, 7, 8])
    x[4, 2] = torch.nan
    stats = vocab_stats(x, w, y)
    assert stats.lse[4].isnan() and not stats.lse[[0, 1, 2, 3, 5]].isnan().any()
    x, w = torch.eye(2, device=device) * 20, torch.zeros(100, 2, device=device)
    w[0, 0] = w[1, 1] = 1.0
    x.requires_grad_()
    logprob = vocab_stats(x, w, torch.tensor([0, 0], device=device)).logprob
    exact = torch.log_softmax(x.double() @ w.double().t(), -1)[:, 0]
    assert ((logprob - exact).abs() <= 2.4e-7 + 1e-6 * exact.abs()).all()
    (dx,) = torch.autograd.grad(logprob.sum(), x)
    (want,) = torch.autograd.grad(exact.sum(), x)
    assert ((dx - want).abs() <= 2.4e-7 + 1e-6 * want.abs()).all()


@pytest.mark.parametrize("numerics", ["auto", "invariant"])
def test_operator(numerics, device):
    x, w, y = make(5, 8, 300, torch.float32, device)

    def f(x, w):
        stats = everything(x, w, y, numerics=numerics)
        return stats.logprob, stats.entropy, stats.logit_sum

    check_operator(f, x.requires_grad_(), w.requires_grad_())


def test_no_rows(device):
    x, w, y = make(0, 8, 30, torch.float32, device)
    got = values_and_gradients(everything, x, w, y, torch.ones(5, 0, device=device), torch.float32)
    assert all(len(t) == 0 for t in got[:7]) and (got[7] == 0).all()

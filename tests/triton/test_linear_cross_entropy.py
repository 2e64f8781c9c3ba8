from __future__ import annotations

import itertools

import pytest
import torch

from swiftk.kernels import _head, _low_rank, _triton, vocab_stats
from swiftk.kernels import linear_cross_entropy as module
from swiftk.kernels.dropout import Dropout
from swiftk.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    token_logprobs,
    token_logprobs_ref,
)
from swiftk.kernels.lora_linear import Adapter, row_norm_sq
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.testing.accuracy import assert_accurate
from tests.kernels.test_linear_cross_entropy import IGNORE
from tests.kernels.test_linear_cross_entropy import make as on_cpu
from tests.triton.launched import check_operator, logits_ref_in_blocks, operators_take

MODES, LONG = ["fused", "recompute"], pytest.mark.long


def make(tokens, hidden, vocab, dtype, device):
    return tuple(t.to(device) for t in (*on_cpu(tokens, hidden, vocab, dtype, scale=2.0), torch.rand(tokens)))


def loss_and_gradients(f, x, w, y, weights, cast, frozen, **options):
    xs, ws, ts = (t.detach().to(cast).requires_grad_(need) for t, need in ((x, True), (w, not frozen), (weights, True)))
    loss, stats = f(xs, ws, y, token_weights=ts, **options)
    return [loss, stats.lse, stats.label_logit, *torch.autograd.grad(loss, (xs, ts) if frozen else (xs, ts, ws))]


def reference(x, w, y, token_weights, **options):
    """Of the rows that are not ignored, spread over all."""
    keep = y != IGNORE
    loss, stats = linear_cross_entropy_ref(x[keep], w, y[keep], token_weights=token_weights[keep], **options)
    return loss, type(stats)(*(torch.zeros_like(y, dtype=t.dtype).masked_scatter(keep, t) for t in stats))


@pytest.fixture
def small_blocks(monkeypatch):
    """Two blocks of rows, two of columns, in each of the passes; the reference in the same ones."""
    for m, name, size in (
        (module, "BLOCK_ROWS", 4), (vocab_stats, "BLOCK_ROWS", 4), (module, "CUDA_TRAINED_ROWS", 4),
        (module, "CUDA_LABEL_ROWS", 3), (_head, "CUDA_BUFFER_BYTES", 4 * _head.STEP * 4),
        (vocab_stats, "logits_ref", logits_ref_in_blocks), (_low_rank, "TRITON_ROWS", 64),
    ):  # fmt: skip
        monkeypatch.setattr(m, name, size)


@pytest.mark.parametrize(("mode", "frozen"), [*itertools.product(MODES, [True, False])])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"z_loss": 0.01}, marks=LONG),
        {"softcap": 3.0},
        {"softcap": 3.0, "label_smoothing": 0.1},
        pytest.param({"label_smoothing": 0.2}, marks=LONG),
    ],
)
def test_values_and_gradients(options, mode, frozen, dtype, device, small_blocks):
    args = make(6, 33, 2100, dtype, device)
    args[1][-5:] *= 5  # the maximum is in the second block: what the first has added to dx is scaled down
    with operators_take(dtype):
        ours = loss_and_gradients(linear_cross_entropy, *args, dtype, frozen, mode=mode, **options)
    plain, exact = (loss_and_gradients(reference, *args, cast, frozen, **options) for cast in (dtype, torch.float64))
    for name, a, b, c in zip(("loss", "lse", "label_logit", "dx", "dweights", "dw"), ours, plain, exact, strict=False):
        assert_accurate(a, b.to(a.dtype), c, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [True, False])
def test_ignored_rows_are_never_seen(frozen, mode, device):
    x, w, y, weights = make(11, 8, 300, torch.float32, device)
    clean = loss_and_gradients(linear_cross_entropy, x, w, y, weights, torch.float32, frozen, mode=mode)
    x[y == IGNORE], weights[y == IGNORE] = torch.nan, 7.0
    got = loss_and_gradients(linear_cross_entropy, x, w, y, weights, torch.float32, frozen, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert (got[3][y == IGNORE] == 0).all()
    none = loss_and_gradients(linear_cross_entropy, x, w, torch.full_like(y, IGNORE), weights, torch.float32, frozen, mode=mode)
    assert all((t == 0).all() for t in none)


@pytest.mark.parametrize("mode", MODES)
def test_a_label_outside_is_nan_not_a_number(mode, device):
    x, w, y, _ = make(6, 8, 300, torch.float32, device)
    y[3] = 300
    loss, _ = linear_cross_entropy(x.requires_grad_(), w, y, mode=mode)
    assert loss.isnan()


@pytest.mark.skipif(not _triton.INTERPRETED, reason="an assertion on a device ends the process's use of it")
@pytest.mark.parametrize("op", [linear_cross_entropy, token_logprobs, vocab_stats.vocab_stats])
def test_a_label_outside_is_asserted_in_debug_mode(op, device, monkeypatch):
    x, w, y, _ = make(6, 8, 300, torch.float32, device)
    monkeypatch.setattr(_triton.triton.knobs.runtime, "debug", True)
    y[0] = IGNORE
    for bad in (300, -1):
        y[3] = 299
        op(x, w, y)
        y[3] = bad
        with pytest.raises(RuntimeError, match=f"{op.__name__}: labels has an id outside of the vocabulary, whose size is 300"):
            op(x, w, y)


def test_stats_and_correct(device):
    x, w, y, _ = make(12, 16, 500, torch.float32, device)
    z = x @ w.t()
    y[:3] = z.argmax(-1)[:3]
    y[1] = IGNORE
    for mode in MODES:
        _, stats = linear_cross_entropy(x.requires_grad_(), w, y, mode=mode, return_entropy=True)
        assert torch.equal(stats.correct, (z.argmax(-1) == y) & (y != IGNORE))
        want = torch.distributions.Categorical(logits=z.double()).entropy().where(y != IGNORE, 0)
        assert_accurate(stats.entropy, want.float(), want)


def test_token_logprobs(dtype, device):
    x, w, y, _ = make(12, 33, 300, dtype, device)
    y[y == IGNORE] = 5
    results = []
    for f, cast in ((token_logprobs, dtype), (token_logprobs_ref, dtype), (token_logprobs_ref, torch.float64)):
        with operators_take(dtype):
            xs = x.to(cast).requires_grad_()
            logprobs = f(xs, w.to(cast), y)
        results.append((logprobs, *torch.autograd.grad(logprobs.square().sum(), xs)))
    for ours, plain, exact in zip(*results, strict=True):
        assert_accurate(ours, plain, exact)


HEADS = ["lora dropout", pytest.param("dora", marks=LONG), pytest.param("nf4", marks=LONG), "nf4 dora dropout"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HEADS)
def test_adapted_and_nf4_heads(kind, mode, device, small_blocks):
    """Gradients of x, a, b and m; ignored rows hold NaN."""
    x, w, y, weights = make(6, 64, 2100, torch.float32, device)
    base = nf4_quantize(w) if "nf4" in kind else w
    w = nf4_dequantize(base).float() if "nf4" in kind else w
    a, b = torch.randn(3, 64, device=device) / 8, torch.randn(2100, 3, device=device) / 2
    m = 1 + torch.rand(2100, device=device) if "dora" in kind else None
    dropout = None
    if "dropout" in kind:
        dropout = Dropout(0.3, torch.tensor([7, 5], device=device), 2, torch.arange(6, device=device))
    x[y == IGNORE] = torch.nan
    keep, results = y != IGNORE, []
    for cast in (None, torch.float32, torch.float64):
        leaves = [t.to(cast or t.dtype).requires_grad_() for t in (x.detach(), a, b, m) if t is not None]
        if kind == "nf4":
            leaves = leaves[:1]
        factors = leaves[1:] or None
        weight = base if cast is None else w.to(cast)
        lora = (
            None
            if factors is None
            else Adapter(*factors[:2], 0.75, *([factors[2], row_norm_sq(weight)] if m is not None else []))
        )
        if cast is None:
            loss, _ = linear_cross_entropy(
                leaves[0], weight, y, adapter=lora, dropout=dropout, token_weights=weights, mode=mode
            )
        else:
            drop = None if dropout is None else dropout._replace(token_index=dropout.token_index[keep])
            loss, _ = linear_cross_entropy_ref(
                leaves[0][keep], weight, y[keep], adapter=lora, dropout=drop, token_weights=weights[keep].to(cast)
            )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for i, (ours, plain, exact) in enumerate(zip(*results, strict=True)):
        assert_accurate(ours, plain, exact, f"result {i}")
    assert (results[0][1][~keep] == 0).all()


@pytest.mark.parametrize(("mode", "frozen"), [("fused", True), ("recompute", False)])
def test_operator(mode, frozen, device):
    x, w, y, _ = make(5, 8, 300, torch.float32, device)
    check_operator(lambda x, w: linear_cross_entropy(x, w, y, mode=mode, z_loss=0.1)[0], x.requires_grad_(),
                   w.requires_grad_(not frozen))  # fmt: skip

"""linear_cross_entropy, token_logprobs: values and gradients in both modes, frozen heads, shards, memory, contracts, errors."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import peak_extra_mib
from swiftk.kernels.linear_cross_entropy import (
    cross_entropy_from_stats,
    linear_cross_entropy,
    token_logprobs,
    token_logprobs_ref,
)
from swiftk.kernels.vocab_stats import merge_vocab_stats, vocab_stats
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
MODES = ["fused", "recompute"]
OPTIONS = [
    {"softcap": c, "z_loss": z, "label_smoothing": e} for c, z, e in itertools.product((0.0, 4.0), (0.0, 1e-2), (0.0, 0.1))
]
IGNORE = -100


def make(tokens, hidden, vocab, dtype, scale=1.0):
    x = torch.randn(tokens, hidden, dtype=torch.float64).to(dtype)
    w = (scale * torch.randn(vocab, hidden, dtype=torch.float64) / hidden**0.5).to(dtype)
    y = torch.randint(vocab, (tokens,))
    y[1::5] = IGNORE
    return x, w, y


def oracle(x, w, y, *, token_weights=None, softcap=0.0, z_loss=0.0, label_smoothing=0.0):
    """The loss from torch's own cross_entropy: eager, the whole logits."""
    s = F.linear(x, w)
    s = s if s.dtype == torch.float64 else s.float()
    s = softcap * torch.tanh(s / softcap) if softcap else s
    loss = F.cross_entropy(s, y, reduction="none", ignore_index=IGNORE, label_smoothing=label_smoothing)
    loss = loss + z_loss * torch.logsumexp(s, -1).square() * (y != IGNORE)
    return (loss if token_weights is None else loss * token_weights.to(loss.dtype)).sum()


def loss_and_gradients(f, x, w, y, token_weights, cast, frozen=False):
    xs, ws = x.to(cast).requires_grad_(), w.to(cast).requires_grad_(not frozen)
    t = token_weights.to(torch.float64 if cast == torch.float64 else torch.float32).requires_grad_()
    loss = f(xs, ws, y, token_weights=t)
    loss = loss[0] if isinstance(loss, tuple) else loss
    wanted = (xs, t) if frozen else (xs, t, ws)
    return loss, *torch.autograd.grad(loss, wanted, torch.tensor(0.7, dtype=loss.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients(frozen, mode, dtype, isa):
    for options, shape in itertools.product(OPTIONS, [(1, 3, 2), (16, 17, 2051)]):
        x, w, y = make(*shape, dtype, scale=2.0)
        token_weights = torch.rand(shape[0])
        ours, plain, exact = (
            loss_and_gradients(f, x, w, y, token_weights, cast, frozen)
            for f, cast in (
                (functools.partial(linear_cross_entropy, mode=mode, isa=isa, **options), dtype),
                (functools.partial(oracle, **options), dtype),
                (functools.partial(oracle, **options), torch.float64),
            )
        )
        for name, a, b, c in zip(("loss", "dx", "dtoken_weights", "dw"), ours, plain, exact, strict=False):
            if dtype == torch.float64:  # the oracle's own roundings count here; the contract is 1e-9
                assert (a - c).abs().max() <= 1e-13 * max(1.0, c.abs().max()), name
            else:
                assert_accurate(a, b, c, f"{name} {options} {shape}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [False, True])
def test_ignored_rows_and_empty(frozen, mode):
    x, w, y = make(9, 8, 300, torch.float32)
    x[y == IGNORE] = float("nan")  # never multiplied
    for tokens, labels in ((9, y), (0, y[:0]), (9, torch.full((9,), IGNORE))):
        xs, ws = x[:tokens].clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        loss, stats = linear_cross_entropy(xs, ws, labels, mode=mode, label_smoothing=0.1, return_entropy=True)
        grads = torch.autograd.grad(loss, (xs,) if frozen else (xs, ws))
        assert not any(g.isnan().any() for g in grads) and (grads[0][labels == IGNORE] == 0).all()
        assert all((s[labels == IGNORE] == 0).all() for s in stats) and stats.lse.shape == labels.shape
        if not (labels != IGNORE).any():
            assert loss == 0 and all((g == 0).all() for g in grads)


def test_modes_give_the_same_loss_and_statistics():
    x, w, y = make(40, 16, 5000, torch.float32)
    options = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 1e-3, "return_entropy": True}
    results = []
    for mode, frozen in itertools.product(MODES, (False, True)):
        xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        loss, stats = linear_cross_entropy(xs, ws, y, mode=mode, **options)
        results.append((loss.detach(), *stats))
    results.append((lambda r: (r[0], *r[1]))(linear_cross_entropy(x, w, y, **options)))  # no gradient: statistics only
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_frozen_head_forms_no_dw_and_full_logits_never_exist():
    """2048 x 32768 logits are 256 MiB; a frozen head may take the 32 MiB buffer, a trained one 1024 rows and dW."""
    x, w, y = make(2048, 8, 32_768, torch.float32)
    for mode, frozen, limit in (("fused", True, 60), ("recompute", True, 60), ("fused", False, 180), ("recompute", False, 60)):

        def step(mode=mode, frozen=frozen):
            xs, ws = x.clone().requires_grad_(), w.detach().requires_grad_(not frozen)
            linear_cross_entropy(xs, ws, y, mode=mode)[0].backward()
            assert (ws.grad is None) == frozen
            ws.grad = None

        peak = peak_extra_mib(step)
        if peak is None:
            pytest.skip("this system does not tell the peak of the resident set")
        assert peak <= limit, f"{mode}, frozen {frozen}: {peak:.0f} MiB"


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs_and_entropy(dtype, thread_count):
    x, w, y = make(19, 24, 4099, dtype)
    kept = y != IGNORE
    logprobs, entropy = token_logprobs(x, w, y, softcap=5.0, return_entropy=True)
    plain, exact = (token_logprobs_ref(x.to(c), w.to(c), y.clamp_min(0), softcap=5.0) for c in (dtype, torch.float64))
    assert_accurate(logprobs[kept], plain[kept], exact[kept])
    assert (logprobs[~kept] == 0).all() and (entropy[~kept] == 0).all()
    alone = thread_count(1, lambda: torch.cat([token_logprobs(x[i : i + 1], w, y[i : i + 1], softcap=5.0) for i in range(19)]))
    assert torch.equal(logprobs, alone)


def test_shards_of_the_vocabulary_equal_the_whole():
    x, w, y = make(23, 16, 6000, torch.float64, scale=2.0)
    token_weights, cuts = torch.rand(23, dtype=torch.float64), [0, 1700, 1701, 6000]
    options = {"z_loss": 1e-2, "label_smoothing": 0.1}

    def sharded(xs, ws, ys, *, token_weights):
        shards = [
            vocab_stats(xs, ws[a:b], ys, vocab_start=a, vocab_size=6000, logit_sum=True)
            for a, b in itertools.pairwise(cuts)
        ]
        return cross_entropy_from_stats(merge_vocab_stats(shards), ys, 6000, token_weights=token_weights, **options)

    whole = loss_and_gradients(functools.partial(linear_cross_entropy, **options), x, w, y, token_weights, torch.float64)
    merged = loss_and_gradients(sharded, x, w, y, token_weights, torch.float64)
    for a, b in zip(whole, merged, strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1.0, a.abs().max())


def test_nan_is_seen():
    x, w, y = make(6, 8, 300, torch.float32)
    y[:] = 3
    x[4, 2] = float("nan")
    x.requires_grad_()
    loss, stats = linear_cross_entropy(x, w, y)
    assert loss.isnan() and stats.lse[4].isnan() and not stats.lse[:4].isnan().any() and not stats.correct[4]
    (dx,) = torch.autograd.grad(loss, x)
    assert dx[4].isnan().all() and not dx[:4].isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_and_double_backward(mode):
    x, w, y = make(5, 8, 300, torch.float32)
    x.requires_grad_(), w.requires_grad_()
    loss, _ = linear_cross_entropy(x, w, y, mode=mode)
    first, second, third = (torch.autograd.grad(loss, (x, w), torch.tensor(g), retain_graph=True) for g in (1.0, 1.0, 2.0))
    assert all(torch.equal(a, b) and torch.equal(2 * a, c) for a, b, c in zip(first, second, third, strict=True))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="the gradient of its gradient is not supported"):
        torch.autograd.grad(dx.sum(), x)


def test_opcheck_and_compile():
    x, w, y = make(5, 8, 300, torch.float32)
    x.requires_grad_(), w.requires_grad_()
    arguments = (x, w, y, torch.ones(5), IGNORE, 0.0, 0.0, 0.1, True, True, True, "auto")
    torch.library.opcheck(torch.ops.swiftk.linear_cross_entropy_fwd.default, arguments)
    for need_dx, need_dw in itertools.product((False, True), repeat=2):
        frozen = (x.detach(), w.detach(), *arguments[2:9], need_dx, need_dw, "auto")
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.swiftk.linear_cross_entropy_fwd.default, frozen, test_utils=checks)
    for mode in MODES:
        eager = functools.partial(linear_cross_entropy, mode=mode)
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        (a, da), (b, db) = ((f(x, w, y)[0], torch.autograd.grad(f(x, w, y)[0], (x, w))) for f in (compiled, eager))
        assert torch.equal(a, b) and all(torch.equal(s, t) for s, t in zip(da, db, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_errors(mode):
    x, w, y = make(4, 8, 300, torch.float32)
    x.requires_grad_()
    y[:] = torch.tensor([0, 299, IGNORE, 300])
    with pytest.raises(ValueError, match="linear_cross_entropy: labels has id 300 at position 3, wants 0 <= id < V = 300"):
        linear_cross_entropy(x, w, y, mode=mode)
    with pytest.raises(ValueError, match="token_logprobs: labels has id 300 at position 3"):
        token_logprobs(x, w, y)
    y[3] = 0
    with pytest.raises(ValueError, match="linear_cross_entropy: mode has 'both', wants 'fused' or 'recompute'"):
        linear_cross_entropy(x, w, y, mode="both")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: label_smoothing has 1.5, wants 0 to 1"):
        linear_cross_entropy(x, w, y, mode=mode, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: token_weights has shape \(3,\), hidden \(4, 8\) needs \(4,\)"):
        linear_cross_entropy(x, w, y, mode=mode, token_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: token_weights has torch.int64"):
        linear_cross_entropy(x, w, y, mode=mode, token_weights=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cross_entropy_from_stats: stats.logit_sum has None"):
        cross_entropy_from_stats(vocab_stats(x, w, y), y, 300, label_smoothing=0.1)

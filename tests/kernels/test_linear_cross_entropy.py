"""linear_cross_entropy, token_logprobs: values and gradients in both modes, frozen heads, shards, memory, contracts, errors."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import peak_extra_mib
from swiftk.kernels.dropout import Dropout, keep_ref
from swiftk.kernels.linear_cross_entropy import (
    cross_entropy_from_stats,
    linear_cross_entropy,
    token_logprobs,
    token_logprobs_ref,
)
from swiftk.kernels.lora_linear import Adapter, lora_linear, row_norm_sq
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize, nf4_quantize
from swiftk.kernels.nf4_linear import nf4_linear
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
    warm = [t.clone().requires_grad_(t.is_floating_point()) for t in make(8, 8, 64, torch.float32)]
    linear_cross_entropy(*warm)[0].backward()  # the first backward of a process loads libraries
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
            vocab_stats(xs, ws[a:b], ys, vocab_start=a, vocab_size=6000, logit_sum=True) for a, b in itertools.pairwise(cuts)
        ]
        return cross_entropy_from_stats(merge_vocab_stats(shards), ys, 6000, token_weights=token_weights, **options)

    whole = loss_and_gradients(functools.partial(linear_cross_entropy, **options), x, w, y, token_weights, torch.float64)
    merged = loss_and_gradients(sharded, x, w, y, token_weights, torch.float64)
    for a, b in zip(whole, merged, strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1.0, a.abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_mean_has_no_common_factor(mode):
    """1 / 255.5 is 0.2 % from a bf16 number, and so is every product of a bf16 number with it: rounding before the factor
    moves all gradients alike, which no average takes away."""
    torch.manual_seed(0)
    x, w, labels = make(64, 96, 500, torch.bfloat16)
    x.requires_grad_()
    loss, _ = linear_cross_entropy(x, w, labels, mode=mode)
    (dx,) = torch.autograd.grad(loss / 255.5, x)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(oracle(exact, w.double(), labels) / 255.5, exact)
    factor = (dx.double() * want).sum() / want.square().sum()
    assert abs(factor - 1) < 2**-12


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(dtype):
    x, w, y = make(5, 8, 300, dtype)
    x.requires_grad_(), w.requires_grad_()
    plain = (None, 0, None, None, None)
    arguments = (x, w, y, torch.ones(5), IGNORE, 0.0, 0.0, 0.1, True, [True, True, False, False, False], *plain, "auto", "auto")
    torch.library.opcheck(torch.ops.swiftk.linear_cross_entropy_fwd.default, arguments)
    for need_dx, need_dw in itertools.product((False, True), repeat=2):
        frozen = (x.detach(), w.detach(), *arguments[2:9], [need_dx, need_dw, False, False, False], *plain, "auto", "auto")
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
    with pytest.raises(ValueError, match=r"linear_cross_entropy: token_weights has dtype torch.int64"):
        linear_cross_entropy(x, w, y, mode=mode, token_weights=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cross_entropy_from_stats: stats.logit_sum has None"):
        cross_entropy_from_stats(vocab_stats(x, w, y), y, 300, label_smoothing=0.1)


# --- NF4 and adapted heads: the same tests in both modes -----------------------------------------------------------

HEADS = ["nf4", "lora", "nf4 lora dropout", "dora", "nf4 dora dropout"]


def make_head(kind, tokens, hidden, vocab, dtype):
    """(x, weight, y, adapter, dropout) of a kind; one label in five is ignored."""
    x, w, y = make(tokens, hidden, vocab, dtype, scale=2.0)
    weight = nf4_quantize(w, nested="dora" in kind) if "nf4" in kind else w
    if "lora" not in kind and "dora" not in kind:
        return x, weight, y, None, None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = torch.randn(4, hidden, dtype=acc) / hidden**0.5, torch.randn(vocab, 4, dtype=acc)
    adapter = Adapter(a, b, 0.75)
    if "dora" in kind:
        m = 2 * torch.rand(vocab, dtype=acc) + 0.5
        m[vocab // 2] = 0.0  # dm does not divide by it
        adapter = adapter._replace(magnitude=m, weight_norm_sq=row_norm_sq(weight, acc))
    tokens_at = torch.arange(tokens) * 7
    return x, weight, y, adapter, Dropout(0.25, torch.tensor([5, 9]), 3, tokens_at) if "dropout" in kind else None


def adapted_gradients(f, x, weight, y, adapter, dropout, cast):
    """The loss and its gradients by hidden, a, b and magnitude, everything in cast."""
    x = x.to(cast).requires_grad_()
    if not isinstance(weight, NF4Tensor):
        weight = weight.to(cast)
    wanted = [x]
    if adapter is not None:
        acc = torch.float64 if cast == torch.float64 else torch.float32
        norm = None if adapter.weight_norm_sq is None else row_norm_sq(weight, acc)
        parts = [None if t is None else t.detach().to(acc).requires_grad_() for t in (adapter.a, adapter.b, adapter.magnitude)]
        adapter = Adapter(parts[0], parts[1], adapter.scale, parts[2], norm)
        wanted += [t for t in parts if t is not None]
    loss = f(x, weight, y, adapter=adapter, dropout=dropout)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss, *torch.autograd.grad(loss, wanted, torch.tensor(0.7, dtype=loss.dtype))


def plain_head(x, weight, y, *, adapter, dropout, softcap=0.0, z_loss=0.0, label_smoothing=0.0):
    """torch's own: the dense logits of peft's formula (in x's dtype) and cross_entropy."""
    w = nf4_dequantize(weight).to(x.dtype) if isinstance(weight, NF4Tensor) else weight
    z = F.linear(x, w)
    if adapter is not None:
        a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
        dropped = x if dropout is None else torch.where(keep_ref(dropout, x.shape[1]), x, 0) * (1 / (1 - dropout.p))
        z = z + adapter.scale * F.linear(F.linear(dropped, a), b)
        if adapter.magnitude is not None:
            z = z * (adapter.magnitude / (w + adapter.scale * b @ a).norm(dim=1).detach()).to(z.dtype)
    z = z if z.dtype == torch.float64 else z.float()
    s = softcap * torch.tanh(z / softcap) if softcap else z
    loss = F.cross_entropy(s, y, reduction="none", ignore_index=IGNORE, label_smoothing=label_smoothing)
    return (loss + z_loss * torch.logsumexp(s, -1).square() * (y != IGNORE)).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HEADS)
def test_nf4_and_adapted_heads(kind, mode, dtype):
    """An adapted head that is trained as if frozen would fail here: a, b, m and the adapter's part of dx are compared."""
    for options in ({}, {"softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1}):
        head = make_head(kind, 16, 65, 2051, dtype)
        ours, plain, exact = (
            adapted_gradients(functools.partial(f, **options), *head, cast)
            for f, cast in (
                (functools.partial(linear_cross_entropy, mode=mode), dtype),
                (plain_head, dtype),
                (plain_head, torch.float64),
            )
        )
        for name, p, q, r in zip(("loss", "dx", "da", "db", "dm"), ours, plain, exact, strict=False):
            if dtype == torch.float64:
                assert (p - r).abs().max() <= 1e-12 * max(1.0, r.abs().max()), f"{name} {options}"
            else:
                assert_accurate(p, q, r, f"{name} {options}")


@pytest.mark.parametrize("kind", HEADS)
def test_adapted_logits_are_those_of_lora_linear_and_a_row_is_alone(kind, thread_count):
    x, weight, y, adapter, dropout = make_head(kind, 9, 65, 4099, torch.float32)
    y[y == IGNORE] = 5
    whole = token_logprobs(x, weight, y, adapter=adapter, dropout=dropout, return_entropy=True)

    def alone(i):
        drop = None if dropout is None else dropout._replace(token_index=dropout.token_index[i : i + 1])
        return token_logprobs(x[i : i + 1], weight, y[i : i + 1], adapter=adapter, dropout=drop, return_entropy=True)

    rows = thread_count(1, lambda: [alone(i) for i in range(9)])
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*rows, strict=True), strict=True))
    stats = vocab_stats(x, weight, y, adapter=adapter, dropout=dropout)
    z = nf4_linear(x, weight) if adapter is None else lora_linear(x, weight, adapter, dropout=dropout)
    assert torch.equal(stats.max_logit, z.max(-1).values) and torch.equal(stats.label_logit, z.gather(1, y[:, None])[:, 0])


@pytest.mark.parametrize("kind", HEADS)
def test_an_nf4_head_equals_its_dequantised_weight_and_modes_agree(kind):
    x, weight, y, adapter, dropout = make_head(kind, 20, 65, 5000, torch.bfloat16)
    plain = nf4_dequantize(weight) if isinstance(weight, NF4Tensor) else weight
    results = [
        linear_cross_entropy(x.requires_grad_(), w, y, adapter=adapter, dropout=dropout, mode=mode, label_smoothing=0.1)
        for mode, w in itertools.product(MODES, (weight, plain))
    ]
    for loss, stats in results[1:]:
        assert torch.equal(loss, results[0][0]) and all(map(torch.equal, stats[:3], results[0][1][:3]))


def test_shards_of_an_adapted_head():
    x, w, y, adapter, dropout = make_head("dora dropout", 23, 16, 6000, torch.float64)
    cuts = [0, 1700, 1701, 6000]

    def sharded(x, w, y, *, adapter, dropout):
        a, b, scale, m, norm = adapter
        shards = [
            vocab_stats(
                x, w[i:j], y, adapter=Adapter(a, b[i:j], scale, m[i:j], norm[i:j]), dropout=dropout, vocab_start=i,
                vocab_size=6000,
            )
            for i, j in itertools.pairwise(cuts)
        ]  # fmt: skip
        return cross_entropy_from_stats(merge_vocab_stats(shards), y, 6000)

    whole, merged = (adapted_gradients(f, x, w, y, adapter, dropout, torch.float64) for f in (plain_head, sharded))
    for p, q in zip(whole, merged, strict=True):
        assert (p - q).abs().max() <= 1e-12 * max(1.0, p.abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_ignored_rows_second_backward_compile_opcheck(mode, dtype):
    x, weight, y, adapter, dropout = make_head("nf4 dora dropout", 9, 64, 300, dtype)
    x[y == IGNORE] = float("nan")  # never multiplied, in S neither
    leaves = [t.requires_grad_() for t in (x, adapter.a, adapter.b, adapter.magnitude)]

    def loss(x, y):
        return linear_cross_entropy(x, weight, y, adapter=adapter, dropout=dropout, mode=mode)[0]

    total = loss(x, y)
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(first, second, strict=True))
    assert (first[0][y == IGNORE] == 0).all()
    with pytest.raises(NotImplementedError, match="the gradient of its gradient is not supported"):
        torch.autograd.grad(torch.autograd.grad(total, x, create_graph=True)[0].nansum(), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    assert torch.equal(compiled, total) and all(map(torch.equal, torch.autograd.grad(compiled, leaves), first))
    none = torch.full_like(y, IGNORE)
    assert all((g == 0).all() for g in torch.autograd.grad(loss(x, none), leaves))
    args = x.detach().nan_to_num().requires_grad_(), adapter.a, y, IGNORE, 0.75, *dropout_args(dropout), "auto", "auto"
    torch.library.opcheck(torch.ops.swiftk.head_low_rank_fwd.default, args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["lora dropout", "dora dropout", "nf4 dora dropout"])
def test_adapted_heads_in_blocks(kind, mode, monkeypatch):
    """Several blocks of rows, of columns and of masked rows; V is not a multiple of a step."""
    sizes = {"BLOCK_ROWS": 16, "TRAINED_ROWS": 9, "BUFFER_BYTES": 1000, "MASK_BYTES": 7 * 65 * 8}
    names = ("linear_cross_entropy", "vocab_stats", "_head", "_low_rank")
    modules = {name: sys.modules[f"swiftk.kernels.{name}"] for name in names}
    for name, size in sizes.items():
        found = [module for module in modules.values() if hasattr(module, name)]
        assert found, name
        for module in found:
            monkeypatch.setattr(module, name, size)
    ranges_of_rows, columns = set(), set()
    add = modules["_head"].AdapterGrad.add

    def counting(self, head, r, c, *rest):
        ranges_of_rows.add(r.start), columns.add(c.start)
        return add(self, head, r, c, *rest)

    monkeypatch.setattr(modules["_head"].AdapterGrad, "add", counting)
    head = make_head(kind, 50, 65, 4500, torch.float64)
    options = {"softcap": 3.0, "z_loss": 1e-2, "label_smoothing": 0.1}
    ours, exact = (
        adapted_gradients(functools.partial(f, **options), *head, torch.float64)
        for f in (functools.partial(linear_cross_entropy, mode=mode), plain_head)
    )
    assert len(ranges_of_rows) > 1 and len(columns) > 1
    for p, q in zip(ours, exact, strict=True):
        assert (p - q).abs().max() <= 1e-12 * max(1.0, q.abs().max())


def dropout_args(dropout):
    return dropout.threshold, dropout.layer, dropout.seed_step, dropout.token_index


def test_adapted_heads_take_no_full_logits_and_no_dequantised_head():
    """2048 x 32768 logits are 256 MiB, the head in fp32 64 MiB, in codes 8."""
    x, weight, y, adapter, _ = make_head("nf4 lora", 2048, 512, 32_768, torch.float32)
    adapter.b.requires_grad_(), x.requires_grad_()
    token_logprobs(x[:8], weight, y[:8], adapter=adapter).sum().backward()  # the first backward of a process loads libraries
    for f, limit in ((lambda: token_logprobs(x, weight, y, adapter=adapter).sum().backward(), 120),
                     (lambda: linear_cross_entropy(x, weight, y, adapter=adapter)[0].backward(), 240)):  # fmt: skip
        peak = peak_extra_mib(f)
        if peak is None:
            pytest.skip("this system does not tell the peak of the resident set")
        assert peak <= limit, f"{peak:.0f} MiB"


def test_errors_of_adapted_heads():
    x, w, y, adapter, dropout = make_head("dora dropout", 4, 64, 300, torch.float32)
    with pytest.raises(ValueError, match="linear_cross_entropy: dropout has a value without adapter, wants None"):
        linear_cross_entropy(x, w, y, dropout=dropout)
    with pytest.raises(ValueError, match="linear_cross_entropy: weight requires a gradient, but the base is frozen here"):
        linear_cross_entropy(x, w.clone().requires_grad_(), y, adapter=adapter)
    with pytest.raises(ValueError, match=r"token_logprobs: adapter.a has shape \(1, 4, 64\), wants \(r, H\): one adapter"):
        token_logprobs(x, w, y, adapter=adapter._replace(a=adapter.a[None]))
    with pytest.raises(ValueError, match=r"token_logprobs: adapter.b has shape \(299, 4\), .* needs \(300, 4\)"):
        token_logprobs(x, w, y, adapter=adapter._replace(b=adapter.b[1:]))
    with pytest.raises(ValueError, match=r"token_logprobs: weight has shape \(300, 64\), hidden \(4, 32\) needs \(V, 32\)"):
        token_logprobs(x[:, :32], nf4_quantize(w), y)

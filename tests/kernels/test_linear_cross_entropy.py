"""linear_cross_entropy, token_logprobs: values and gradients in both modes, frozen heads, shards, memory, contracts, errors."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from swiftk.kernels.linear_cross_entropy import (
    linear_cross_entropy,
)
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

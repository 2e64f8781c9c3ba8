"""vocab_stats: values, gradients per statistic, row invariance, shards, memory, operator contracts, errors."""

from __future__ import annotations

import pytest
import torch

from swiftk.kernels.vocab_stats import vocab_stats, vocab_stats_ref
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
    xs, ws = x.to(cast).requires_grad_(), w.to(cast).requires_grad_()
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

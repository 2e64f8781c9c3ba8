"""Schedule, clipping, weight decay."""

from __future__ import annotations

import math

import pytest
import torch

from swiftk.config import OptimConfig
from swiftk.trainer.optimizer import build_optimizer, clip_gradients_, gradient_norm, learning_rate
from tests.trainer import toy


def rates(total, **keys):
    return [learning_rate(s, total, OptimConfig(**keys)) for s in range(total)]


def test_schedules():
    assert rates(5, learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="constant") == [1.0] * 5
    assert rates(4, learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]
    cosine = rates(10, learning_rate=2.0, min_lr=0.5, warmup_ratio=0.2)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert learning_rate(10, 10, OptimConfig(learning_rate=2.0, min_lr=0.5)) == 0.5
    assert learning_rate(99, 10, OptimConfig(learning_rate=2.0, min_lr=0.5)) == 0.5
    assert learning_rate(0, 10, OptimConfig(warmup_ratio=0.0)) == 1e-5


def test_the_warmup_equals_transformers_cosine_after_one_step():
    """transformers counts from s / W, so its first step has rate 0; the decays agree from W on."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 12)
    for step in range(12):
        if step >= 3:
            want = schedule.get_last_lr()[0]
            assert learning_rate(step, 12, OptimConfig(learning_rate=1.0, warmup_ratio=0.25)) == pytest.approx(want)
        optimizer.step()
        schedule.step()


def test_lr_decay_steps_fixes_the_curve():
    short = [learning_rate(s, 5, OptimConfig(learning_rate=1.0, lr_decay_steps=10)) for s in range(5)]
    assert short == [learning_rate(s, 10, OptimConfig(learning_rate=1.0)) for s in range(5)]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_equals_torch(max_norm):
    ours, theirs = ([torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(7))] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = gradient_norm(ours)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)), rel=1e-6)
    clip_gradients_(ours, norm, max_norm)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6)


def test_only_matrices_decay_and_the_settings_arrive():
    model = toy.model(dtype=torch.float32)
    names = {p: n for n, p in model.named_parameters()}
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.99))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.3, 0.0, (0.8, 0.99))
    assert all("norm" in names[p] for p in plain["params"]) and not any("norm" in names[p] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names) and decayed["fused"]

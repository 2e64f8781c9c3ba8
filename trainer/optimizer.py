"""AdamW, the learning rate's schedule, and clipping.

With s the step (from 0), W warm-up steps, S steps of the schedule:
    lr(s) = peak (s + 1) / W                                   s < W
    lr(s) = min + (peak - min) f((s - W) / (S - W))            f(t) = (1 + cos pi t) / 2 | 1 - t | 1
Clipping: g <- g min(1, max_norm / (|g| + 1e-6)), |g| over all parameters (Pascanu et al. 2013; torch's epsilon).
AdamW: Loshchilov & Hutter 2019, torch's fused kernel; moments have the parameters' dtype, fp32. Decay applies to matrices
and not to norms and biases, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from swiftk.config import OptimConfig

DEFAULT_LEARNING_RATE = 1e-5  # full tuning


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step`, counted from 0; `total_steps` is the run's, unless lr_decay_steps fixes it."""
    peak = DEFAULT_LEARNING_RATE if config.learning_rate is None else config.learning_rate
    total = config.lr_decay_steps or total_steps
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    f = {"cosine": 0.5 * (1.0 + math.cos(math.pi * t)), "linear": 1.0 - t, "constant": 1.0}[config.lr_scheduler_type]
    return config.min_lr + (peak - config.min_lr) * f


def build_optimizer(params: Mapping[str, torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable ones, in two groups: matrices with weight decay, the rest without."""
    trainable = [p for p in params.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=config.adam_eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(params: Iterable[torch.nn.Parameter]) -> float:
    """The 2-norm over all gradients, of whole parameters (nothing is sharded yet); its sum of squares is fp64."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return 0.0
    return float(torch.stack([n.double() for n in torch._foreach_norm(grads)]).square().sum().sqrt())


def clip_gradients_(params: Iterable[torch.nn.Parameter], norm: float, max_norm: float) -> None:
    """Scales in place; max_norm 0 is no clipping."""
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0 and factor < 1.0:
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], factor)

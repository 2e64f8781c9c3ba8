"""AdamW, the learning rate's schedule, and clipping.

With s the step (from 0), W warm-up steps, S steps of the schedule:
    lr(s) = peak (s + 1) / W                                   s < W
    lr(s) = min + (peak - min) f((s - W) / (S - W))            f(t) = (1 + cos pi t) / 2 | 1 - t | 1
Clipping: g <- g min(1, max_norm / (|g| + 1e-6)), |g| over all parameters (Pascanu et al. 2013; torch's epsilon).
AdamW: Loshchilov & Hutter 2019, torch's fused kernel; moments have the parameters' dtype, fp32. Decay applies to matrices
and not to norms and biases, as in transformers. adamw_8bit keeps the moments in 8 bits (adamw_8bit.py); galore and q_galore
keep those of the projected gradients of the blocks' matrices (galore.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from swiftk.config import OptimConfig
from swiftk.model.parameters import EMBEDDING, HEAD
from swiftk.trainer.adamw_8bit import AdamW8bit
from swiftk.trainer.galore import GaLore

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


def build_optimizer(params: Mapping[str, torch.nn.Parameter], config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer over the trainable ones: matrices with weight decay, the rest without. `seed`: of GaLore's projections.

    Raises: ValueError for a dtype that the optimizer does not take, and for GaLore where no matrix can be projected.
    """
    trainable = {name: p for name, p in params.items() if p.requires_grad}
    galore = config.optim in ("galore", "q_galore")
    matrices = {name: p for name, p in trainable.items() if p.dim() >= 2}
    projected = {
        name: p for name, p in matrices.items()
        if galore and p.dim() == 2 and name not in (EMBEDDING, HEAD) and config.galore_rank < min(p.shape)
    }  # fmt: skip
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in matrices.items() if n not in projected], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in trainable.items() if p.dim() < 2], "weight_decay": 0.0},
        {"params": list(projected.items()), "weight_decay": config.weight_decay, "project": True},
    ]
    groups = [g for g in groups if g["params"]]
    common: dict[str, Any] = {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, **common, fused=True)
    if config.optim == "adamw_8bit":
        return AdamW8bit(groups, **common)
    if not projected:
        raise ValueError(
            f"galore_rank: has {config.galore_rank}, and no trained matrix of a block has both sides larger; lower it, or take "
            "--optim adamw_8bit"
        )
    return GaLore(
        groups, **common, rank=config.galore_rank, gap=config.galore_update_proj_gap, scale=config.galore_scale,
        quantized=config.optim == "q_galore", seed=seed,
    )  # fmt: skip


def state_of(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of p; made, as before the first step, where there is nothing yet."""
    state = optimizer.state[p]
    if not state:
        if isinstance(optimizer, AdamW8bit):
            state.update(optimizer.initial_state(p))
        else:
            state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return state


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

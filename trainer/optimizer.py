"""AdamW, the learning rate's schedule, and clipping.

With s the step (from 0), W warm-up steps, S steps of the schedule:
    lr(s) = peak (s + 1) / W                                   s < W
    lr(s) = min + (peak - min) f((s - W) / (S - W))            f(t) = (1 + cos pi t) / 2 | 1 - t | 1
A parameter learns at c lr(s), c = 1, or rate / peak where a regex of parameter_lr gives it a rate; with LoRA+ (Hayou, Ghosh &
Yu 2024) c = lorap_lr_ratio for an adapter's B and for vectors, as in PEFT, and lorap_emb_lr / peak for an embedding's adapter.
Clipping: g <- g min(1, max_norm / (|g| + 1e-6)), |g| over all parameters (Pascanu et al. 2013; torch's epsilon).
AdamW: Loshchilov & Hutter 2019, torch's fused kernel; moments have the parameters' dtype, fp32. Decay applies to matrices
and not to norms and biases, as in transformers. adamw_8bit keeps the moments in 8 bits (adamw_8bit.py); galore and q_galore
keep those of the projected gradients of the blocks' matrices (galore.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from swiftk.config import OptimConfig
from swiftk.model.freezing import nearest
from swiftk.model.parameters import EMBEDDING, HEAD
from swiftk.trainer.adamw_8bit import AdamW8bit
from swiftk.trainer.galore import GaLore

DEFAULT_LEARNING_RATE = 1e-5  # full tuning


def peak_rate(config: OptimConfig) -> float:
    return DEFAULT_LEARNING_RATE if config.learning_rate is None else config.learning_rate


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step`, counted from 0; `total_steps` is the run's, unless lr_decay_steps fixes it."""
    peak = peak_rate(config)
    total = config.lr_decay_steps or total_steps
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    f = {"cosine": 0.5 * (1.0 + math.cos(math.pi * t)), "linear": 1.0 - t, "constant": 1.0}[config.lr_scheduler_type]
    return config.min_lr + (peak - config.min_lr) * f


def lr_scales(vectors: Mapping[str, bool], config: OptimConfig) -> dict[str, float]:
    """Name -> its factor of the learning rate. vectors: name -> whether it has one dimension, of what is trained.

    Raises: ValueError for a regex of parameter_lr that is none, that no name has, or that shares a name with another one.
    """
    scales: dict[str, float] = {}
    for name, vector in vectors.items():
        if config.lorap_lr_ratio is None:
            scales[name] = 1.0
        elif ".lora_embedding_" in name:
            scales[name] = config.lorap_emb_lr / peak_rate(config)
        else:
            scales[name] = config.lorap_lr_ratio if vector or name.endswith(".lora_B") else 1.0
    claimed: dict[str, str] = {}
    for pattern, rate in config.parameter_lr.items():
        try:
            found = [name for name in vectors if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"parameter_lr: {pattern!r} is not a regex ({error})") from None
        if not found:
            raise ValueError(
                f"parameter_lr: {pattern!r} is found in the name of no trained parameter; {nearest(pattern, vectors)}"
            )
        for name in found:
            if name in claimed:
                raise ValueError(
                    f"parameter_lr: {claimed[name]!r} and {pattern!r} are both found in {name}, wants one rate: make one of "
                    "them narrower"
                )
            claimed[name], scales[name] = pattern, rate / peak_rate(config)
    return scales


def build_optimizer(params: Mapping[str, torch.nn.Parameter], config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer over the trainable ones: matrices with weight decay, the rest without; a group per factor of the learning
    rate (its `lr_scale`). `seed`: of GaLore's projections.

    Raises: ValueError for a dtype that the optimizer does not take, as `lr_scales` does, and for GaLore where no matrix can
    be projected.
    """
    trainable = {name: p for name, p in params.items() if p.requires_grad}
    galore = config.optim in ("galore", "q_galore")
    projected = {
        name for name, p in trainable.items()
        if galore and p.dim() == 2 and name not in (EMBEDDING, HEAD) and config.galore_rank < min(p.shape)
    }  # fmt: skip
    scales = lr_scales({name: p.dim() < 2 for name, p in trainable.items()}, config)
    kinds: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, p in trainable.items():
        settings = {"weight_decay": config.weight_decay if p.dim() >= 2 else 0.0, "lr_scale": scales[name]}
        if name in projected:
            settings["project"] = True
        group = kinds.setdefault((name in projected, p.dim() >= 2, scales[name]), {"params": [], **settings})
        group["params"].append((name, p))
    groups = list(kinds.values())
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
            step = torch.zeros((), dtype=torch.float32, device=p.device)  # where the fused kernel reads it
            state.update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return state


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """rate: of a parameter with the factor 1, which is that of a group that names none (added later, or from elsewhere)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


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

"""Cross entropy of a linear head without the full logits."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CrossEntropyStats(NamedTuple):
    """Per token, fp32 (fp64 for fp64), shape (T,), not differentiable: what a vocab- or context-parallel caller merges."""

    lse: torch.Tensor  # log sum exp of the logits
    label_logit: torch.Tensor  # logit of the label, 0 where ignored
    correct: torch.Tensor  # bool: the label is the argmax (False where ignored)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, token_weights: torch.Tensor | None = None,
    ignore_index: int = -100, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0, isa: str = "auto",
) -> tuple[torch.Tensor, CrossEntropyStats]:
    """hidden (T, H), weight (V, H), labels (T,) int64 -> (sum of the token losses, stats). T x V is materialised here."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    keep = labels != ignore_index
    safe = labels.clamp_min(0)
    lse = torch.logsumexp(logits, -1)
    label_logit = logits.gather(-1, safe[:, None])[:, 0]
    w = keep.to(lse.dtype) if token_weights is None else keep * token_weights
    loss = ((lse - label_logit) * w).sum()
    return loss, CrossEntropyStats(lse.detach(), (label_logit * keep).detach(), (logits.argmax(-1) == labels).detach())


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, softcap: float = 0.0, isa: str = "auto") -> torch.Tensor:
    """hidden (T, H), weight (V, H), labels (T,) int64 -> log p(label) (T,), fp32 (fp64 for fp64)."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]

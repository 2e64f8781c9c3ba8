"""Loss = sum over tokens / N with N the token count of the whole optimizer step, known before its first backward.

N counts the trained tokens of all ranks and all micro-batches; every local sum is divided by it, and from then on
everything is only added: over micro-batches by autograd, over ranks by parallel/data.py. A mean of micro-batch means
(another number under packing, where micro-batches have unequal token counts) appears nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftk.kernels.linear_cross_entropy import linear_cross_entropy
from swiftk.model import Model
from swiftk.trainer.packing import IGNORE_INDEX, Batch


class TokenLoss(NamedTuple):
    total: torch.Tensor  # sum of the token losses, differentiable, fp32 (fp64 for fp64)
    correct: torch.Tensor  # how many trained tokens are the argmax
    per_token: torch.Tensor  # (total tokens,) detached, 0 where not trained


def token_loss(model: Model, batch: Batch, *, seed_step: torch.Tensor | None = None, isa: str = "auto") -> TokenLoss:
    """Sum of -log p(label) over the trained tokens of a packed batch, in nats. seed_step: int64 (2,), seed and step, the
    keys of the adapters' dropout; None: no dropout."""
    token_index = None if seed_step is None else batch.token_index
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, seed_step=seed_step, token_index=token_index)
    head = model.head(seed_step, token_index)
    total, stats = linear_cross_entropy(
        hidden, head.weight, batch.labels, adapter=head.adapter, dropout=head.dropout, ignore_index=IGNORE_INDEX,
        numerics=model.numerics, isa=isa,
    )  # fmt: skip
    trained = batch.labels != IGNORE_INDEX
    per_token = torch.where(trained, stats.lse - stats.label_logit, 0.0)
    return TokenLoss(total, (stats.correct & trained).sum(), per_token)


def non_finite_documents(batch: Batch, per_token: torch.Tensor) -> list[int]:
    """Documents of the batch with a NaN or infinite token loss."""
    bounds = batch.cu_seqlens.tolist()
    return [i for i in range(len(bounds) - 1) if not bool(per_token[bounds[i] : bounds[i + 1]].isfinite().all())]

"""Held-out loss: nats per trained token, and per byte of the text they stand for (comparable across tokenizers)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swiftk.model import Model
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.data import Dataset
from swiftk.trainer.loss import token_loss
from swiftk.trainer.packing import BatchPlan, collate


@dataclass(frozen=True)
class Evaluation:
    nats_per_token: float
    nats_per_byte: float
    token_acc: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, num_bytes: int, plan: BatchPlan, mesh: Mesh, *, isa: str = "auto") -> Evaluation:
    """Sums over all rows of the dataset, each on one rank; `plan` has one step, which holds them all."""
    sums = torch.zeros(3, dtype=torch.float64)
    for micro_batch in plan.step(0):
        batch = collate(dataset, micro_batch)
        loss = token_loss(model, batch.to(model.device), isa=isa)
        sums += torch.tensor([float(loss.total), float(loss.correct), batch.num_loss_tokens], dtype=torch.float64)
    nats, correct, tokens = mesh.dp.comm.all_reduce_(sums).tolist()
    return Evaluation(nats / max(1.0, tokens), nats / max(1, num_bytes), correct / max(1.0, tokens), int(tokens), num_bytes)


@torch.no_grad()
def greedy(model: Model, prompt: torch.Tensor, stop: set[int], max_new_tokens: int) -> list[int]:
    """The most likely continuation of prompt (n,) int64, token by token over a cache, up to a stop token (not returned)."""
    device = model.device
    cache, ids, past = model.new_cache(), prompt.to(device), 0
    found: list[int] = []
    while len(found) < max_new_tokens and past + len(ids) <= model.config.max_position_embeddings:
        positions = torch.arange(past, past + len(ids), device=device)
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        hidden = model(ids, positions, cu_seqlens, kv_cache=cache)
        past += len(ids)
        token = int(model.logits(hidden[-1:]).argmax())
        if token in stop:
            break
        found.append(token)
        ids = torch.tensor([token], device=device)
    return found

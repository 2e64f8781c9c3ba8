"""A packed row is its documents: loss and gradients equal those of one document at a time, and no document feels another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.data import Dataset
from swiftk.trainer.loss import token_loss
from swiftk.trainer.packing import BatchPlan, collate
from swiftk.trainer.template import Encoded

VOCAB, DOCUMENTS = 60, 6  # document d uses the tokens 10 d .. 10 d + 9 alone, so that embedding rows tell them apart
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
}


def make(family):
    model = Model(
        ModelConfig.from_hf(SHAPE | FAMILIES[family]), Mesh.single(), compute_dtype=torch.float64, seed=1, recompute="none"
    )
    rng = np.random.default_rng(0)
    rows = []
    for document in range(DOCUMENTS):
        n = int(rng.integers(2, 14))
        rows.append(Encoded((10 * document + rng.integers(0, 10, n)).astype(np.int32), rng.random(n) < 0.7))
    return model, Dataset(rows, {})


def run(model, dataset, micro_batches):
    """Summed loss, and the gradient of every parameter, over micro-batches."""
    total = torch.zeros((), dtype=torch.float64)
    for micro_batch in micro_batches:
        loss = token_loss(model, collate(dataset, micro_batch)).total
        loss.backward()
        total += loss.detach()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return total, grads


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(family):
    model, dataset = make(family)
    alone = run(model, dataset, [[(row,)] for row in range(DOCUMENTS)])
    plans = [
        BatchPlan(dataset.lengths, packing_length=size, micro_batch_size=micro, global_batch_size=99, seed=0)
        for size, micro in ((16, 1), (64, 1), (16, 2), (None, 4))
    ]
    assert max(len(pack) for plan in plans for pack in plan.packs(0)) >= 3
    for plan in plans:
        loss, grads = run(model, dataset, plan.step(0))
        assert abs(loss - alone[0]) <= 1e-12 * abs(alone[0])
        largest = max(g.abs().max() for g in alone[1].values())
        for name, grad in grads.items():
            assert (grad - alone[1][name]).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_document_moves_nothing_of_another(family):
    model, dataset = make(family)
    pack = [tuple(range(DOCUMENTS))]
    changed = DOCUMENTS // 2
    old = dataset.rows[changed]
    new = Encoded(20 + (old.input_ids + 5 - 10 * changed) % 10 + 10 * (changed - 2), ~old.loss_mask)
    assert (new.input_ids != old.input_ids).all() and set(new.input_ids // 10) == {changed}
    results = []
    for row in (old, new):
        rows = [*dataset.rows[:changed], row, *dataset.rows[changed + 1 :]]
        batch = collate(Dataset(rows, {}), pack)
        logits = model.logits(model(batch.input_ids, batch.positions, batch.cu_seqlens)).detach()
        loss = token_loss(model, batch)
        loss.total.backward()
        document = torch.repeat_interleave(torch.arange(DOCUMENTS), (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long())
        embedding = model.get_parameter("model.embed_tokens.weight").grad.clone()
        model.zero_grad()
        results.append((logits, loss.per_token, embedding, document))
    (logits, losses, grads, document), (logits2, losses2, grads2, _) = results
    others = document != changed
    assert torch.equal(logits[others], logits2[others]) and torch.equal(losses[others], losses2[others])
    assert not torch.equal(logits[~others], logits2[~others])
    rows = torch.arange(VOCAB) // 10 != changed
    # backward products may sum in another order when another number of tokens is trained: rounding of fp64, not a leak
    assert (grads[rows] - grads2[rows]).abs().max() <= 1e-12 * grads.abs().max()
    assert (grads[~rows] - grads2[~rows]).abs().max() > 1e-3 * grads.abs().max() and (grads[rows] != 0).any()

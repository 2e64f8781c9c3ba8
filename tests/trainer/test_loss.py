"""Loss = sum / global count: unequal ranks and micro-batches equal one batch, in fp64, for every parameter."""

from __future__ import annotations

import pytest
import torch

from swiftk.parallel.comm import run_threads
from swiftk.parallel.data import sum_gradients_
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.loss import non_finite_documents, token_loss
from tests.trainer import toy

# documents of each micro-batch of each rank, and the share of trained tokens
RANKS = [
    [([5, 9], 0.9), ([17], 0.3), ([2, 2, 3], 1.0)],
    [([1, 30], 0.1), ([4], 1.0), ([11, 6], 0.5)],
]


def micro_batches(rank):
    return [toy.batch(lengths, trained, seed=10 * rank + i) for i, (lengths, trained) in enumerate(RANKS[rank])]


def whole():
    """All documents of all ranks in one batch, by hand."""
    parts = [b for rank in range(2) for b in micro_batches(rank)]
    lengths = torch.cat([b.cu_seqlens[1:] - b.cu_seqlens[:-1] for b in parts])
    cat = [torch.cat([getattr(b, name) for b in parts]) for name in ("input_ids", "labels", "positions", "token_index")]
    return toy.Batch(*cat[:3], torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), cat[3], tuple(range(len(lengths))))


def oracle_gradients():
    """Cross entropy of the whole batch's full logits by torch, mean over its trained tokens."""
    model, batch = toy.model(), whole()
    logits = model.logits(model(batch.input_ids, batch.positions, batch.cu_seqlens))
    torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def rank_gradients(comm, silent_rank=None):
    mesh = Mesh.from_comm(comm)
    model, batches = toy.model(mesh), micro_batches(comm.rank)
    if comm.rank == silent_rank:
        for b in batches:
            b.labels.fill_(-100)
    count = int(comm.all_reduce_(torch.tensor(sum(b.num_loss_tokens for b in batches))))
    for b in batches:
        (token_loss(model, b).total / count).backward()
    params = dict(model.named_parameters())
    sum_gradients_(params, model.specs, mesh)
    return {name: p.grad for name, p in params.items()}


def test_two_ranks_by_three_accumulation_steps_equal_one_batch():
    want = oracle_gradients()
    for grads in run_threads(2, rank_gradients):
        for name, grad in want.items():
            assert torch.allclose(grads[name], grad, rtol=0, atol=1e-12 * max(1.0, grad.abs().max().item())), name


def test_a_mean_of_means_would_be_caught():
    """The test above can fail: dividing by each micro-batch's own count moves the gradients far beyond its bound."""
    want = oracle_gradients()["model.embed_tokens.weight"]
    model = toy.model()
    for b in (b for rank in range(2) for b in micro_batches(rank)):
        (token_loss(model, b).total / max(1, b.num_loss_tokens) / 6).backward()
    assert (model.get_parameter("model.embed_tokens.weight").grad - want).abs().max() > 1e-3 * want.abs().max()


def test_a_rank_without_a_trained_token():
    both = run_threads(2, lambda comm: rank_gradients(comm, silent_rank=1))
    model, batches = toy.model(), micro_batches(0)
    count = sum(b.num_loss_tokens for b in batches)
    for b in batches:
        (token_loss(model, b).total / count).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(both[0][name], p.grad, rtol=1e-12, atol=1e-14), name
        assert torch.equal(both[0][name], both[1][name]), name


def test_counts_and_per_token_losses():
    model, batch = toy.model(), toy.batch([6, 3], 0.6, seed=3)
    found = token_loss(model, batch)
    logits = model.logits(model(batch.input_ids, batch.positions, batch.cu_seqlens))
    each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    assert torch.allclose(found.per_token.double(), each, rtol=1e-5, atol=1e-6)
    assert float(found.total.detach()) == pytest.approx(float(each.sum().detach()), rel=1e-6)
    assert int(found.correct) == int((logits.argmax(-1) == batch.labels).sum())


def test_the_document_with_a_nan_is_named():
    batch = toy.batch([4, 5, 3], 1.0, seed=4)
    per_token = torch.ones(12)
    assert non_finite_documents(batch, per_token) == []
    per_token[5] = float("nan")
    per_token[11] = float("inf")
    assert non_finite_documents(batch, per_token) == [1, 2]

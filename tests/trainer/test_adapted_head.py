"""The loss of a model whose head has an adapter, or is held in NF4: the formula's gradients in fp64, without V x H matrices."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from swiftk.config import TunerConfig
from swiftk.kernels.dropout import Dropout, dropout_ref
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.kernels.vocab_stats import vocab_stats
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.loss import token_loss
from tests.model.families import stir
from tests.trainer import toy

KEYS = torch.tensor([42, 7])  # seed and step
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True, "lora_dropout": 0.0}}


def make(kind="lora", dtype=torch.float64, tied=False, **changes) -> Model:
    tuner = {"lora_rank": 4, "lora_dropout": 0.3, "target_modules": ("lm_head", "v_proj"), **KINDS[kind]}
    model = Model(
        ModelConfig.from_hf({**toy.MODEL, "tie_word_embeddings": tied, **changes}), Mesh.single(), compute_dtype=dtype, seed=1,
        tuner=TunerConfig("lora", **tuner),
    )  # fmt: skip
    torch.manual_seed(0)
    stir(model)
    return model


def formula(model: Model, batch: toy.Batch) -> torch.Tensor:
    """Sum of the token losses in plain torch, logits and all; dropout from its reference."""
    leaf, weight = model.lm_head, nf4_dequantize(model.lm_head.base) if model.lm_head.codes is not None else model.head_base
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, seed_step=KEYS, token_index=batch.token_index)
    dropped = dropout_ref(hidden, Dropout(leaf.p, KEYS, leaf.number, batch.token_index)) if leaf.p else hidden
    logits = hidden @ weight.to(hidden.dtype).t() + model.tuning.scale * (dropped @ leaf.lora_A.t()) @ leaf.lora_B.t()
    if leaf.lora_magnitude_vector is not None:
        delta = (weight + model.tuning.scale * leaf.lora_B @ leaf.lora_A).detach()
        logits = logits * (leaf.lora_magnitude_vector / delta.norm(dim=1))
    return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_formulas(kind, tied):
    model, batch = make(kind, tied=tied), toy.batch([9, 1, 14], 0.7, seed=2)
    want = formula(model, batch)
    found = token_loss(model, batch, seed_step=KEYS)
    assert abs((found.total - want).item()) <= 1e-12 * want.item()
    ours, theirs = gradients(model, found.total), gradients(model, want)
    expected = {f"lm_head.lora_{part}" for part in ("A", "B", *(["magnitude_vector"] if kind == "dora" else []))}
    assert expected < set(ours) == set(theirs)
    for name, grad in theirs.items():
        assert grad.any() and (ours[name] - grad).abs().max() <= 1e-11 * grad.abs().max(), name
    assert torch.equal(token_loss(model, batch).total, found.total) == (kind == "rslora")  # the others have dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_losses_logits_are_the_models(kind, dtype):
    """Evaluation: loss, log-probabilities and greedy completion see the same numbers."""
    model, batch = make(kind, dtype), toy.batch([9, 1, 14], 1.0, seed=2)
    with torch.no_grad():
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens)
        logits, (weight, adapter, dropout) = model.logits(hidden), model.head()
        for v in (7, 299):
            stats = vocab_stats(hidden, weight, torch.full_like(batch.labels, v), adapter=adapter)
            assert torch.equal(stats.label_logit.to(dtype), logits[:, v])
        logprobs = token_logprobs(hidden, weight, batch.labels, adapter=adapter)
        assert dropout is None and logprobs.any()
        assert torch.allclose(token_loss(model, batch).per_token, -logprobs, rtol=0, atol=2e-6)  # lse - label, rounded there


@pytest.mark.parametrize(("kind", "tied"), [("lora", False), ("dora", False), ("dora", True)])
def test_a_head_in_nf4(kind, tied):
    """Nothing in the trainer makes one, but the codes of lm_head are enough; then the numbers are the dequantised weight's."""
    model, batch = make(kind, tied=tied), toy.batch([9, 1, 14], 0.7, seed=2)
    leaf, weight = model.lm_head, model.head_base
    leaf.weight = None
    leaf.set_nf4(nf4_quantize(weight.detach().float()))
    model.base_loaded()
    ours, want = token_loss(model, batch, seed_step=KEYS).total, formula(model, batch)
    assert abs((ours - want).item()) <= 1e-12 * want.item()
    for (name, a), b in zip(gradients(model, ours).items(), gradients(model, want).values(), strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max(), name
    plain = make(kind)
    with torch.no_grad():
        plain.lm_head.weight.copy_(nf4_dequantize(leaf.base))
        plain.base_loaded()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens)
        assert torch.equal(model.logits(hidden), plain.logits(hidden))
        assert torch.equal(token_loss(model, batch).per_token, token_loss(plain, batch).per_token)


def largest_allocation(run) -> int:
    """Bytes of the largest single allocation of a call on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    return max(e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_nothing_of_the_size_of_the_head_is_allocated(kind):
    """Neither W + s B A nor a gradient of it: the largest is a few rows of logits. What was there before would be seen."""
    tokens, hidden, vocab = 16, 128, 6000
    model = make(kind, torch.float32, vocab_size=vocab, hidden_size=hidden)
    batch = toy.batch([tokens], 1.0, seed=2)
    size, logits = 4 * vocab * hidden, 4 * vocab * tokens

    def step():
        token_loss(model, batch, seed_step=KEYS).total.backward()

    def composed():
        leaf = model.lm_head
        (model.head_base + leaf.lora_B @ leaf.lora_A).sum().backward()

    assert largest_allocation(composed) >= size
    assert largest_allocation(step) <= 2 * logits < size / 3

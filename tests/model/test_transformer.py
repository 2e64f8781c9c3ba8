"""The model against transformers: logits and every gradient."""

from __future__ import annotations

import pytest
import torch
import transformers

from swiftk.model import Model, ModelConfig, load_checkpoint, save_checkpoint
from swiftk.parallel.mesh import Mesh

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, attn_implementation="eager", initializer_range=0.2,
)  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = Model(ModelConfig.from_hf(tmp_path / "theirs"), Mesh.single(), seed=None)
    load_checkpoint(ours, tmp_path / "theirs")
    save_checkpoint(ours, tmp_path / "ours", max_shard_size=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids, positions, cu_seqlens = torch.randint(0, 97, (23,)), torch.arange(23), torch.tensor([0, 23], dtype=torch.int32)
    got, want = ours.logits(ours(ids, positions, cu_seqlens)), theirs(ids[None]).logits[0]
    assert torch.equal(again(ids[None]).logits[0], want)
    dy = torch.randn_like(want)
    got.backward(dy), want.backward(dy)
    floor = 1e-3 * sum(p.grad.square().sum() for p in theirs.parameters()).sqrt()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    for name, p in ours.named_parameters():
        w = theirs.get_parameter(name).grad
        assert (p.grad - w).abs().max() <= 1e-5 * torch.maximum(w.abs().max(), floor), name

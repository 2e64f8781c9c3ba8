"""Small random transformers of each family: the oracle of the model's tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from swiftk.model import Model, ModelConfig, load_checkpoint
from swiftk.model.adapter import is_adapter
from swiftk.parallel.mesh import Mesh

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.2, attn_implementation="eager",
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16,
    rope_theta=5e5,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, rope_theta=1e4)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-bias-yarn": transformers.LlamaConfig(**SIZES, rope_parameters=YARN, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5, head_dim=16),
    "qwen2": transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def make_theirs(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model, in training mode without dropout; norms and biases moved off their constants."""
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    for name, p in theirs.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return theirs


def make_ours(family: str, directory: Path, dtype: torch.dtype = torch.float32, **options) -> tuple[Model, torch.nn.Module]:
    """Both models with the same weights, ours read from theirs' checkpoint in several files."""
    theirs = make_theirs(family, dtype)
    theirs.save_pretrained(directory, max_shard_size="20KB")
    ours = Model(ModelConfig.from_hf(directory), Mesh.single(), compute_dtype=dtype, seed=None, **options)
    load_checkpoint(ours, directory)
    return ours, theirs


def stir(model: Model) -> None:
    """Adapters off their first values, where B is zero and nothing would be seen of them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and is_adapter(name):
                p.add_(torch.randn_like(p), alpha=0.3 * float(p.abs().mean()) if p.dim() == 1 else 0.1)


def pack(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random input_ids, positions, cu_seqlens of documents of these lengths."""
    ids = torch.randint(0, SIZES["vocab_size"], (sum(lengths),))
    return ids, torch.cat([torch.arange(n) for n in lengths]), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

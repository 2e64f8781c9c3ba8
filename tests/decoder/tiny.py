"""A checkpoint that loads in no time: two narrow layers, random weights, a tokenizer of 320 tokens with a chat template."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers

from swiftk.trainer.tokenizer import train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. Grüße aus Köln; hello world, def f(x): return x"


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """Config of Qwen3, in fp32; the vocabulary is padded beyond the tokenizer's, as models do."""
    config: dict[str, object] = dict(
        vocab_size=328, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**{**config, **changes}))
    model.save_pretrained(folder)
    train_tokenizer([TEXT] * 4, 320).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """LoRA on two linears of each layer, far enough from zero to change every text."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder

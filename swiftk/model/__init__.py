"""The decoder-only transformer: `Model`, its `ModelConfig`, and Hugging Face checkpoints and PEFT adapters read and written."""

from swiftk.model.checkpoint import load_checkpoint, save_checkpoint
from swiftk.model.config import ModelConfig
from swiftk.model.peft_files import load_adapter, read_adapter_config, save_adapter
from swiftk.model.transformer import Model

__all__ = [
    "Model", "ModelConfig", "load_adapter", "load_checkpoint", "read_adapter_config", "save_adapter", "save_checkpoint",
]  # fmt: skip

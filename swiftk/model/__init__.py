"""The decoder-only transformer: `Model`, its `ModelConfig`, and Hugging Face checkpoints read and written."""

from swiftk.model.checkpoint import load_checkpoint, save_checkpoint
from swiftk.model.config import ModelConfig
from swiftk.model.transformer import Model

__all__ = ["Model", "ModelConfig", "load_checkpoint", "save_checkpoint"]

"""The paged decoder: `Engine` (continuous batching on a checkpoint or the live trainer), `SamplingParams`, what comes out."""

from swiftk.decoder.engine import Completion, Engine, Output, Update
from swiftk.decoder.params import SamplingParams

__all__ = ["Completion", "Engine", "Output", "SamplingParams", "Update"]

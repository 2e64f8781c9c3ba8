"""The paged decoder: `Engine` (continuous batching on a checkpoint or the live trainer), `SamplingParams`, what comes out."""

from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.results import Completion, Output, Update

__all__ = ["Completion", "Engine", "Output", "SamplingParams", "Update"]

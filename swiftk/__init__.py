"""swiftk: low-level kernels for fine-tuning and decoding large language models."""

__version__ = "0.1.0"

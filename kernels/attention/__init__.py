"""Attention over packed sequences: `varlen_attention` (cu_seqlens), `segment_attention` (resumable), `merge_attention`."""

from swiftk.kernels.attention.varlen import varlen_attention

__all__ = ["varlen_attention"]

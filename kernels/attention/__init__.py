"""Attention over packed sequences: `varlen_attention` (cu_seqlens), `segment_attention` (resumable), `merge_attention`; over a
paged cache: `paged_attention`, `store_kv_`."""

from swiftk.kernels.attention.merge import merge_attention
from swiftk.kernels.attention.paged import paged_attention, store_kv_
from swiftk.kernels.attention.varlen import segment_attention, segment_attention_backward, varlen_attention

__all__ = [
    "merge_attention", "paged_attention", "segment_attention", "segment_attention_backward", "store_kv_", "varlen_attention",
]  # fmt: skip

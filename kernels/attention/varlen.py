"""Packed variable-length attention."""

from __future__ import annotations

import torch


def varlen_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None, *,
    causal: bool = False, softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (total_q, num_heads, head_dim), k, v (total_k, num_kv_heads, head_dim) -> out like q, lse (num_heads, total_q)."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    acc = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for i in range(cu_seqlens_q.numel() - 1):
        qi = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].to(acc)
        ki = k[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].to(acc).repeat_interleave(group, 1)
        vi = v[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].to(acc).repeat_interleave(group, 1)
        s = torch.einsum("qhd,khd->hqk", qi, ki) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        q_pos = torch.arange(qi.shape[0])[:, None] + ki.shape[0] - qi.shape[0]
        k_pos = torch.arange(ki.shape[0])[None]
        keep = torch.ones(qi.shape[0], ki.shape[0], dtype=torch.bool)
        if causal:
            keep &= k_pos <= q_pos
        if window_size[0] >= 0:
            keep &= k_pos >= q_pos - window_size[0]
        if window_size[1] >= 0:
            keep &= k_pos <= q_pos + window_size[1]
        s = s.masked_fill(~keep, float("-inf"))
        lse = torch.logsumexp(s, -1)
        total = lse if sinks is None else torch.logaddexp(lse, sinks.to(acc)[:, None])
        p = torch.exp(s - total[..., None]).masked_fill(~keep, 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", p, vi).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None, *,
    causal: bool = False, softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    sinks: torch.Tensor | None = None, return_lse: bool = False, backend: str = "swiftk", isa: str = "auto",
):
    out, lse = varlen_attention_ref(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap,
        sinks=sinks,
    )
    return (out, lse) if return_lse else out

"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def rope_table(
    rotary_dim: int, max_position: int, *, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (max_position, rotary_dim / 2). scaling: Hugging Face's `rope_parameters` ("rope_type" default|llama3|yarn)."""
    inv_freq = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    angle = torch.arange(max_position, dtype=torch.float64)[:, None] * inv_freq.double()
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x (total, heads, head_dim), cos/sin (max_position, rotary_dim / 2), positions (total,) -> like x."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    y1, y2 = x1.to(c.dtype) * c - x2.to(c.dtype) * s, x2.to(c.dtype) * c + x1.to(c.dtype) * s
    return torch.cat((y1.to(x.dtype), y2.to(x.dtype), rest), -1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, isa: str = "auto") -> torch.Tensor:
    return rope_ref(x, cos, sin, positions)

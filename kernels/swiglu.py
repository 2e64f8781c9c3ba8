"""SwiGLU: y = silu(gate) up."""

from __future__ import annotations

import torch


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up (..., I) -> (..., I)."""
    g = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, isa: str = "auto") -> torch.Tensor:
    return swiglu_ref(gate, up)

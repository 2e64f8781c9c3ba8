"""What a machine computes in: the path of the kernels that `isa` means there, and the dtype that goes with it."""

from __future__ import annotations

import torch

from swiftk.kernels._native import ISAS, native

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def isa_path(isa: str) -> str:
    """What `isa` means on this machine; ValueError if it has no such instructions."""
    best = native().best_isa()
    try:
        native().resolve_isa(isa)
    except ValueError:
        has = ", ".join(ISAS[ISAS.index(best) :])
        raise ValueError(f"isa: has {isa!r}, wants what this CPU has: auto, {has}") from None
    return best if isa == "auto" else isa


def compute_dtype(name: str | None, isa: str) -> torch.dtype:
    """That of a name (torch_dtype); None: bf16 where the CPU multiplies it (the kernels' avx512 path means AVX-512 with BF16),
    else fp32."""
    if name is None:
        return torch.bfloat16 if isa_path(isa) == "avx512" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"torch_dtype: has {name!r}, wants one of {', '.join(DTYPES)}")
    return DTYPES[name]

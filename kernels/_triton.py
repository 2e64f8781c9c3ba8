"""The one import of Triton; and the list of what is shipped, which `make compile-gpu` compiles on a machine without a GPU.

With TRITON_INTERPRET=1 in the environment before this file is imported, kernels run on CPU tensors (the interpreter's bf16 is
wrong: casts truncate, products multiply bits; tests use fp16, fp32 and fp64). Without Triton the import works and a launch raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, tl, _missing = None, None, error


def tl_acc(dtype: torch.dtype) -> Any:
    """The dtype that a kernel computes in: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


class Shipped(NamedTuple):
    """A kernel as it is launched: the types of its arguments, its constants, warps."""

    label: str
    kernel: Any
    types: Mapping[str, str]  # argument -> "*bf16", "i32", "i64", "fp32" ...
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


SHIPPED: list[Shipped] = []


def jit(f: Callable) -> Any:
    """triton.jit, or where Triton is not installed something that raises when it is launched."""
    return _Absent(f.__name__) if triton is None else triton.jit(f)


def ship(label: str, kernel: Any, types: str, *, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
    """Enters a kernel into the list. types: of its arguments that are no constants, in their order, separated by blanks."""
    if triton is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        SHIPPED.append(Shipped(
            label, kernel, dict(zip(names, types.split(), strict=True)), constants, num_warps, num_stages
        ))  # fmt: skip


class _Absent:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(
            f"swiftk: {self._name} is a Triton kernel and Triton cannot be imported ({_missing}); "
            "install it with `pip install triton` (Linux with an NVIDIA GPU)"
        )

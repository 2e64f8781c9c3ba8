"""The one import of Triton, how its kernels are launched and registered, the list of what is shipped, and a tanh.

With TRITON_INTERPRET=1 in the environment before this file is imported, Triton's interpreter runs the kernels on CPU tensors,
and every operator that has a Triton kernel takes it for CPU tensors too (`register_cuda`, `on_gpu`): autograd, torch.compile,
the model and the decoder then run on it, slowly. The interpreter's bf16 is wrong (casts truncate, products multiply bits):
fp32, fp64 and, below the public functions, fp16. Without Triton the import works and a launch raises; with TRITON_INTERPRET=1
the import raises, since the CPU's own kernels would run in the place of those that were asked for.
"""

from __future__ import annotations

import functools
import os
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes"):  # as Triton would read it
        raise ImportError(
            f"swiftk: TRITON_INTERPRET is set and Triton cannot be imported ({error}); "
            "install it with `pip install triton` (Linux), or unset TRITON_INTERPRET"
        ) from error
    triton, _missing = None, error
    tl = types.SimpleNamespace(float32=None, float64=None)  # what is read where kernels are defined

INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x's kernels are Triton's: on CUDA, and everywhere under the interpreter."""
    return x.is_cuda or INTERPRETED


def debug() -> bool:
    """Whether values are asserted on the device: TRITON_DEBUG=1, which `tl.device_assert` obeys by itself."""
    return triton is not None and triton.knobs.runtime.debug


def tl_acc(dtype: torch.dtype) -> Any:
    """The dtype that a kernel computes in: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def next_power_of_2(n: int) -> int:
    """Of n >= 1."""
    return 1 << (n - 1).bit_length()


def jit(f: Callable | None = None, *, varies: Sequence[str] = ()) -> Any:
    """triton.jit, or where Triton is not installed something that raises when it is launched.

    varies: arguments that change from step to step (tokens, documents). Triton compiles another kernel for 1 and for multiples
    of 16 of any other integer, seconds each.
    """
    if f is None:
        return functools.partial(jit, varies=varies)
    return _Absent(f.__name__) if triton is None else triton.jit(do_not_specialize=list(varies))(f)


class _Absent:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(
            f"swiftk: {self._name} is a Triton kernel and Triton cannot be imported ({_missing}); "
            "install it with `pip install triton` (Linux with an NVIDIA GPU)"
        )


# --- launching ---------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: Sequence[int], *args: Any, fuse: bool = True, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the device of the first argument, a tensor; nothing where the grid is empty.

    Integers may wrap: hashes do so on purpose, and under TRITON_DEBUG=1 Triton would assert that none does.
    fuse: a product and a sum may become one fused multiply-add (Triton 3.9 does by default, 3.10 does not: said here once).
    False where bits are promised.
    """
    if 0 in grid:
        return
    if INTERPRETED and any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args):
        raise ValueError(
            f"{kernel.fn.__name__}: an argument has dtype torch.bfloat16, whose arithmetic is wrong under TRITON_INTERPRET=1, "
            "wants torch.float32 or torch.float64"
        )
    device, meta = args[0].device, meta | {"enable_fp_fusion": fuse, "sanitize_overflow": False}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments
            kernel[tuple(grid)](*args, **meta)
    else:
        kernel[tuple(grid)](*args, **meta)


_interpreted = torch.library.Library("swiftk", "IMPL") if INTERPRETED else None


def register_cuda(operator: str) -> Callable[[Callable], Callable]:
    """torch.library.register_kernel(operator, "cuda"), and under the interpreter in the place of the CPU's kernel too, whose
    registration comes before."""

    def register(f: Callable) -> Callable:
        torch.library.register_kernel(operator, "cuda")(f)
        if _interpreted is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one already
                _interpreted.impl(operator.removeprefix("swiftk::"), f, "CPU", allow_override=True)
        return f

    return register


# --- what is shipped ---------------------------------------------------------------------------------------------


class Shipped(NamedTuple):
    """A kernel as it is launched, for `make compile-gpu`, which compiles it on a machine without a GPU."""

    label: str
    kernel: Any
    types: Mapping[str, str]  # argument -> "*bf16", "i32", "i64", "fp32" ...
    divisible: frozenset[str]  # arguments that are multiples of 16
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    fuse: bool
    archs: tuple[int, ...]
    spills: int  # bytes that may spill, with the measurement that says why beside the call


SHIPPED: list[Shipped] = []


def ship(
    label: str, kernel: Any, arguments: str, *, num_warps: int = 4, num_stages: int = 2, fuse: bool = True,
    archs: tuple[int, ...] = (80, 90, 100), spills: int = 0, **constants: Any,
) -> None:  # fmt: skip
    """Enters a kernel into the list.

    arguments: types of those that are no constants, in their order, separated by blanks, as Triton writes them; `i32:16` is a
    multiple of 16. Pointers are: torch's allocations are, and Triton compiles another kernel for those that are not.
    """
    if triton is None or INTERPRETED:
        return
    names = [name for name in kernel.arg_names if name not in constants]
    given = dict(zip(names, arguments.split(), strict=True))
    divisible = frozenset(name for name, t in given.items() if t.startswith("*") or t.endswith(":16"))
    bare = {name: t.removesuffix(":16") for name, t in given.items()}
    SHIPPED.append(Shipped(label, kernel, bare, divisible, constants, num_warps, num_stages, fuse, archs, spills))


# --- what Triton has not -----------------------------------------------------------------------------------------


@jit
def tanh(x):
    """fp32: relative error below 4e-7, by the series below 0.3, where 1 - exp(-2 |x|) cancels. fp64: absolute below 1e-15."""
    e = tl.exp2(tl.abs(x) * -2.885390081777927)
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if x.dtype == tl.float32:
        z = x * x
        series = z * (z * (z * 0.021869488536155203 - 0.05396825396825397) + 0.13333333333333333) - 0.3333333333333333
        y = tl.where(z < 0.09, x + x * z * series, y)
    return y

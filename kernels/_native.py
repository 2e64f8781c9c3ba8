"""Finds `_swiftk_C` and `_swiftk_cuda`, the compiled kernels, and translates tensors to what they take: addresses, sizes, a
dtype code, a stream.

They include no torch header, so one build serves every torch. They are looked up on the first native call, not at import: a
missing build is one error that says what to run, and never a slower path. So is one of other sources than lie beside this file.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VERSION = "0.1.0"
DTYPE_CODES = {torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}
ISAS = ("auto", "avx512", "avx2", "portable")


@functools.cache
def native() -> types.ModuleType:
    """The module `_swiftk_C`; ImportError with the next step where it is missing, of another version or of other sources."""
    build = "build it with `make build`, or `pip install -e .` in the source tree"
    try:
        import _swiftk_C
    except ImportError as error:
        raise ImportError(f"swiftk: the compiled kernels (_swiftk_C) cannot be imported ({error}); {build}") from error
    _check(_swiftk_C, build)
    return _swiftk_C


@functools.cache
def native_cuda() -> types.ModuleType:
    """The module `_swiftk_cuda`; ImportError with the next step where it is missing, of another version or of other sources."""
    build = "build it, with nvcc: `SWIFTK_CUDA=1 python setup.py build_ext --inplace`, or `SWIFTK_CUDA=1 pip install -e .`"
    try:
        import _swiftk_cuda
    except ImportError as error:
        raise ImportError(f"swiftk: there is no GPU build, _swiftk_cuda cannot be imported ({error}); {build}") from error
    _check(_swiftk_cuda, build)
    return _swiftk_cuda


def _check(module: Any, build: str) -> None:
    if module.__version__ != VERSION:
        raise ImportError(f"swiftk: {module.__name__} has version {module.__version__}, wants {VERSION}; {build}")
    csrc = Path(__file__).resolve().parent.parent / "csrc"  # in a source tree; a wheel has none
    if csrc.is_dir() and getattr(module, "__sources__", "") != digest(csrc):
        raise ImportError(f"swiftk: {module.__name__} was built of other sources than lie in {csrc}; {build}")


def digest(csrc: Path) -> str:
    """Of all sources, as setup.py has it, which cannot import this file."""
    files = sorted(p for p in csrc.rglob("[!.]*") if p.suffix in (".h", ".inc", ".cpp", ".cu") and p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:16]


def on_stream(f: Callable[..., None], device: torch.device, *args: Any) -> None:
    """f(*args, stream): a launch of `native_cuda()` on the current stream of device."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        f(*args, stream)
        return
    with torch.cuda.device(device):
        f(*args, stream)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics of `dtype` inputs are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


GRAIN = 16384  # elements of elementwise work per thread: some 10 us, against 2-5 us for waking a thread (and ms on a busy core)


def threads(elements: int | None = None) -> int:
    """torch's number of intra-op threads; with `elements` no more than bandwidth-bound work of that size pays for."""
    limit = torch.get_num_threads()
    return limit if elements is None else max(1, min(limit, elements // GRAIN))

"""Checks of the public functions. Every message reads "op: argument has X, wants Y"."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from swiftk.kernels._native import DTYPE_CODES, ISAS, native


def check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{op}: {name} has type {type(x).__name__}, wants a torch.Tensor")


def check_floating(op: str, **tensors: torch.Tensor) -> None:
    """All strided, of one supported dtype (bf16, fp32, fp64) and on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {name} has layout {tensor.layout}, wants torch.strided ({name}.to_dense())")
        if tensor.dtype not in DTYPE_CODES:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, wants torch.bfloat16, torch.float32 or torch.float64")
        if tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, wants {first.dtype} like {first_name}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} has device {tensor.device}, wants {first.device} like {first_name}")


def check_shape(op: str, name: str, tensor: torch.Tensor, want: tuple[int, ...], why: str) -> None:
    """`why` names the argument the wanted shape comes from, e.g. "x (2, 4)"."""
    check_tensor(op, name, tensor)
    if tuple(tensor.shape) != tuple(want):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, {why} needs {tuple(want)}")


CASTS = {
    torch.bool: "bool", torch.int32: "int", torch.int64: "long", torch.float32: "float", torch.float64: "double",
}  # fmt: skip


def check_dtype(op: str, name: str, x: torch.Tensor, dtype: torch.dtype, device: torch.device, like: str) -> None:
    """`like` names the argument the wanted device comes from."""
    check_tensor(op, name, x)
    if x.dtype != dtype:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}, wants {dtype} ({name}.{CASTS[dtype]}())")
    if x.device != device:
        raise ValueError(f"{op}: {name} has device {x.device}, wants {device} like {like}")


def check_isa(op: str, isa: str) -> None:
    if isa not in ISAS:
        raise ValueError(f"{op}: isa has {isa!r}, wants one of {', '.join(ISAS)}")
    if isa != "auto" and not torch.compiler.is_compiling():  # a graph has no native call; the kernel refuses it then
        try:
            native().resolve_isa(isa)
        except ValueError:
            has = ", ".join(ISAS[ISAS.index(native().best_isa()) :])
            raise ValueError(f"{op}: isa has {isa!r}, which this CPU does not support; wants auto, {has}") from None


def transformer_engine(op: str, name: str, x: torch.Tensor, since: str, *signatures: tuple[str, ...]) -> Any:
    """The class `name` of transformer_engine.pytorch, whose __init__ has the arguments of one of `signatures`, the first
    named in the error. Checked are x's device, then the package, then the signature."""
    if not x.is_cuda:
        raise ValueError(f"{op}: x has device {x.device}, backend 'transformer_engine' wants a CUDA device")
    try:
        module = getattr(importlib.import_module("transformer_engine.pytorch"), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{op}: backend has 'transformer_engine', which cannot be imported ({error}); "
            "pip install transformer-engine[pytorch], or leave out backend"
        ) from error
    known = inspect.signature(module.__init__).parameters
    if not any(set(wanted) <= known.keys() for wanted in signatures):
        raise ImportError(
            f"{op}: the installed transformer_engine's {name} takes {', '.join(known)}, wants {', '.join(signatures[0])} "
            f"among them ({since} or later); leave out backend"
        )
    return module


def refuse_double_backward(op: str, operator: str, reference: str | None = None) -> None:
    """Registers for a backward operator a derivative that says what is missing, in place of torch's silent zero."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"{op}: the gradient of its gradient is not supported; "
            f"use {reference or f'swiftk.kernels.{op}.{op}_ref'}, which torch differentiates any number of times"
        )

    torch.library.register_autograd(operator, refuse)

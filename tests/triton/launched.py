"""What the tests of Triton kernels share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

from swiftk.kernels import _checks, _native, vocab_stats
from swiftk.kernels._head import STEP, ranges
from swiftk.kernels._triton import INTERPRETED
from swiftk.kernels.vocab_stats import even_blocks, logits_ref


@contextlib.contextmanager
def operators_take(dtype: torch.dtype):
    """The public functions accept `dtype` too: fp16, which the interpreter rounds to as a GPU does, is refused by them."""
    with mock.patch.dict(_native.DTYPE_CODES, {dtype: _native.DTYPE_CODES.get(dtype, -1)}):
        assert _checks.DTYPE_CODES is _native.DTYPE_CODES
        yield


@contextlib.contextmanager
def dots_like_a_gpus():
    """Under the interpreter, an element of tl.dot is a function of its row and column alone, as a tensor core's is. numpy's
    depends on the shape of the tile and on the place in it; summed in fp64 and rounded, it does not."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, *_):
        exact = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield


@contextlib.contextmanager
def device_asserts():
    """As under TRITON_DEBUG=1 on a GPU: tl.device_assert is evaluated, and raises its text. Triton's own
    asserts that integers do not wrap are there too where a launch asks for them. On a GPU nothing changes."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    launch, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder

    def create_assert(self, condition, message):
        assert np.all(condition.data), message

    def call(self, *args, sanitize_overflow=True, **kwargs):
        debugged = dataclasses.replace(builder.options, debug=True, sanitize_overflow=sanitize_overflow)
        with mock.patch.object(builder, "options", debugged):
            return launch(self, *args, **kwargs)

    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_assert", create_assert),
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
    ):
        yield


@contextlib.contextmanager
def asserts(message: str):
    """One device assertion with `message` fails. Not for a GPU, where it ends the process's use of the device."""
    from triton.runtime.errors import InterpreterError

    with device_asserts(), pytest.raises(InterpreterError, match=message):
        yield


def logits_ref_in_blocks(hidden, weight, softcap=0.0, *, adapter=None, dropout=None) -> torch.Tensor:
    """logits_ref of the blocks of rows and columns that the operators take, so that torch's products of the gradient are of the
    same shapes: on one thread MKL's error in a sum of 2048 is 2e-7 for 6 rows and 1.5e-6 for 3."""

    def part(r: slice, c: slice) -> torch.Tensor:
        own = dropout and dropout._replace(token_index=dropout.token_index[r])
        rest = [None if t is None else t[c] for t in adapter[3:]] if adapter else ()
        lora = adapter and type(adapter)(adapter.a, adapter.b[c], adapter.scale, *rest)
        return logits_ref(hidden[r], weight[c], softcap, adapter=lora, dropout=own)

    rows, columns = even_blocks(len(hidden), vocab_stats.BLOCK_ROWS), list(ranges(len(weight), STEP))
    return torch.cat([torch.cat([part(r, c) for c in columns], -1) for r in rows])


def check_operator(f: Callable, *inputs: torch.Tensor, **options) -> None:
    """f under torch.compile(fullgraph=True), under activation checkpointing and a second time backward: the bits of plain
    calls. inputs: fp32 leaves; at least one requires a gradient. On CUDA also on a side stream and in a CUDA graph."""
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def run(g: Callable) -> list[torch.Tensor]:
        y = g(*inputs)
        ys = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
        loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape)).sum() for t in ys)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        return [*ys, *first]

    def call(*args):
        return f(*args, **options)

    want = run(call)
    torch._dynamo.reset()  # `call` of another op is the same code to it, and it compiles that only so often
    ways = {
        "compiled": torch.compile(call, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda *args: torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False),
    }
    if inputs[0].is_cuda:
        ways["on a side stream"] = lambda *args: _on_side_stream(call, args)
        _check_graph(call, inputs)
    for name, way in ways.items():
        for got, wanted in zip(run(way), want, strict=True):
            assert torch.equal(got, wanted), name


def _on_side_stream(f: Callable, args: tuple):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = f(*args)
    torch.cuda.current_stream().wait_stream(stream)
    return y


def _check_graph(f: Callable, inputs: tuple) -> None:
    """Captured once, replayed on other values in the same places."""
    fixed = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in inputs]
    f(*fixed)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = f(*fixed)
    for t in fixed:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.mul_(1.25)
    graph.replay()
    torch.cuda.synchronize()
    want = f(*fixed)
    for a, b in zip(y if isinstance(y, tuple) else (y,), want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(a, b)

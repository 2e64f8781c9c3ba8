"""Dropout from a counter-based generator: y = x / (1 - p) where an element is kept, 0 elsewhere. No mask is stored.

Whether the element of token t in column c is kept is a function of (seed, step, layer, token index, c) and of nothing else: the
same token draws the same mask alone, in any pack, order, micro-batch or rank. Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011,
"Parallel random numbers: as easy as 1, 2, 3"), one call per 8 columns:

    key     (seed mod 2^32, seed / 2^32)
    counter (layer 2^16 + c / 8, step mod 2^32, token mod 2^32, token / 2^32)
    draws   the four words as eight 16-bit numbers, low half first; column c takes number c mod 8
    kept    draw >= round(65536 p): p counts in multiples of 2^-16, and the factor 1 / (1 - p) is that of the rounded p

Bytes: 1 read, 1 write of x. About 3 integer operations an element (AVX2).
Not supported: layers above 65535, more than 524288 columns, a CUDA kernel (not there yet).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, no_cuda_kernel, threads

MAX_LAYERS, MAX_COLUMNS = 1 << 16, 1 << 19


class Dropout(NamedTuple):
    """Which elements are dropped; see the formula above."""

    p: float  # 0 <= p < 1
    seed_step: torch.Tensor  # int64 (2,): seed and step, a tensor so that a step compiles nothing
    layer: int  # one number per place in the model that drops
    token_index: torch.Tensor  # int64 (T,), one per row of x: (row number in the data set) << 32 | position in the row

    @property
    def threshold(self) -> int:
        return round(self.p * 65536)

    @property
    def scale(self) -> float:
        return 65536 / (65536 - self.threshold)


# --- reference ---------------------------------------------------------------------------------------------------


def philox_ref(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10 of four int64 tensors that hold 32-bit words, by one key."""
    word, (x0, x1, x2, x3), (k0, k1) = 0xFFFFFFFF, counter, key
    for _ in range(10):
        p, q = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # mod 2^64
        x0, x1, x2, x3 = (q >> 32 & word) ^ x1 ^ k0, q & word, (p >> 32 & word) ^ x3 ^ k1, p & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [x0, x1, x2, x3]


def keep_ref(dropout: Dropout, columns: int) -> torch.Tensor:
    """True where an element is kept, (T, columns)."""
    seed, step = dropout.seed_step.tolist()
    call = torch.arange(-(-columns // 8)) + (dropout.layer << 16)
    token = dropout.token_index[:, None]
    counter = [call, torch.tensor(step & 0xFFFFFFFF), token & 0xFFFFFFFF, token >> 32 & 0xFFFFFFFF]
    words = philox_ref([c.expand(len(token), len(call)) for c in counter], (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)  # (T, calls, 8)
    return draws.flatten(1)[:, :columns] >= dropout.threshold


def dropout_ref(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """The formula, rounded once. x (..., H) -> (..., H)."""
    keep = keep_ref(dropout, x.shape[-1]).view(x.shape)
    return torch.where(keep, x.to(acc_dtype(x.dtype)) * dropout.scale, 0).to(x.dtype)


# --- launchers ---------------------------------------------------------------------------------------------------


def dropout_out(
    x: torch.Tensor, threshold: int, seed_step: torch.Tensor, layer: int, token_index: torch.Tensor, y: torch.Tensor,
    scale: float = 1.0, isa: str = "auto",
) -> None:  # fmt: skip
    """y = scale x where kept, else 0; no checks, no autograd. x, y (rows, H) with contiguous rows, threshold >= 1."""
    rows, cols = x.shape
    native().dropout_fwd(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), rows, cols, scale, threshold,
        seed_step.data_ptr(), layer, token_index.data_ptr(), threads(rows * cols), isa,
    )  # fmt: skip


def dropout_keys(
    seed_step: torch.Tensor | None, token_index: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As the native calls read them, one after the other in memory."""
    return None if seed_step is None else seed_step.contiguous(), None if token_index is None else token_index.contiguous()


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::dropout_fwd", "(Tensor x, int threshold, Tensor seed_step, SymInt layer, Tensor token_index, str isa) -> Tensor"
)


@torch.library.register_kernel("swiftk::dropout_fwd", "cpu")
def _dropout_fwd_cpu(x, threshold, seed_step, layer, token_index, isa):
    if threshold == 0 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    x2 = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(x.shape)  # not a view, which autograd would not let be changed in place
    seed_step, token_index = dropout_keys(seed_step, token_index)
    dropout_out(x2, threshold, seed_step, layer, token_index, y.view(x2.shape), 65536 / (65536 - threshold), isa)
    return y


@torch.library.register_kernel("swiftk::dropout_fwd", "cuda")
def _dropout_fwd_cuda(x, threshold, seed_step, layer, token_index, isa):
    no_cuda_kernel("dropout")


@torch.library.register_fake("swiftk::dropout_fwd")
def _dropout_fwd_fake(x, threshold, seed_step, layer, token_index, isa):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    _x, ctx.threshold, seed_step, ctx.layer, token_index, ctx.isa = inputs
    ctx.save_for_backward(seed_step, token_index)


def _backward(ctx, dy):
    # dx = dy / (1 - p) where kept, else 0: the same operator, so the gradient of the gradient is there too
    seed_step, token_index = ctx.saved_tensors
    return torch.ops.swiftk.dropout_fwd(dy, ctx.threshold, seed_step, ctx.layer, token_index, ctx.isa), *[None] * 5


torch.library.register_autograd("swiftk::dropout_fwd", _backward, setup_context=_setup_context)


# --- public ------------------------------------------------------------------------------------------------------


def check_dropout(op: str, dropout: Dropout, x: torch.Tensor) -> None:
    """Of a public function that takes x (..., H) and a Dropout."""
    if not (0 <= dropout.p < 1 and dropout.threshold < 65536):
        raise ValueError(f"{op}: dropout.p has {dropout.p}, wants 0 <= p <= 65535 / 65536")
    if not 0 <= dropout.layer < MAX_LAYERS:
        raise ValueError(f"{op}: dropout.layer has {dropout.layer}, wants 0 <= layer < {MAX_LAYERS}")
    if x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"{op}: x has {x.shape[-1]} columns, dropout wants at most {MAX_COLUMNS}")
    for name, tensor, size in (("seed_step", dropout.seed_step, 2), ("token_index", dropout.token_index, x.shape[:-1].numel())):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64 or tensor.device != x.device:
            have = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: dropout.{name} has {have}, wants torch.int64 on {x.device}")
        check_shape(op, f"dropout.{name}", tensor, (size,), f"x {tuple(x.shape)}")


def dropout(x: torch.Tensor, dropout: Dropout, *, isa: str = "auto") -> torch.Tensor:
    """x / (1 - p) where kept, else 0, differentiable in x; an element depends on its token, column, layer, seed and step.

    Args:
        x: (..., H), bf16, fp32 or fp64, any strides; zero rows are allowed.
        dropout: p, seed and step, the layer's number and one token index per row of x.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; the results are equal.
    Returns: (..., H) in x's dtype, contiguous; a dropped element is 0 whatever x holds.
    Raises: ValueError for a wrong shape, dtype, device, range or isa; NotImplementedError on CUDA (no kernel yet).
    """
    check_floating("dropout", x=x)
    if x.dim() == 0:
        raise ValueError("dropout: x has shape (), wants (..., H)")
    check_dropout("dropout", dropout, x)
    check_isa("dropout", isa)
    return torch.ops.swiftk.dropout_fwd(x, dropout.threshold, dropout.seed_step, dropout.layer, dropout.token_index, isa)

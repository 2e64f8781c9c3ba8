"""Dropout from a counter-based generator: y = x / (1 - p) where an element is kept, 0 elsewhere. No mask is stored.

Whether the element of token t in column c is kept is a function of (seed, step, layer, token index, c) and of nothing else: the
same token draws the same mask alone, in any pack, order, micro-batch or rank. Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011,
"Parallel random numbers: as easy as 1, 2, 3"), one call per 8 columns:

    key     (seed mod 2^32, seed / 2^32)
    counter (layer 2^16 + c / 8, step mod 2^32, token mod 2^32, token / 2^32)
    draws   the four words as eight 16-bit numbers, low half first; column c takes number c mod 8
    kept    draw >= round(65536 p): p counts in multiples of 2^-16, and the factor 1 / (1 - p) is that of the rounded p

Bytes: 1 read, 1 write of x. About 3 integer operations an element (AVX2).
Not supported: layers above 65535, more than 524288 columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from swiftk.kernels._checks import check_dtype, check_floating, check_isa, check_shape
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, ship, tl, tl_acc

MAX_LAYERS, MAX_COLUMNS = 1 << 16, 1 << 19


class Dropout(NamedTuple):
    """Which elements of x (..., H) with T rows are dropped; see the formula above. Both tensors on x's device."""

    p: float  # 0 <= p <= 65535 / 65536; 0 drops nothing
    seed_step: torch.Tensor  # int64 (2,): seed and step, a tensor so that a step compiles nothing
    layer: int  # one number per place in the model that drops, 0 to 65535
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
    token = dropout.token_index[:, None]
    call = torch.arange(-(-columns // 8), device=token.device) + (dropout.layer << 16)
    counter = [call, torch.full_like(call, step & 0xFFFFFFFF), token & 0xFFFFFFFF, token >> 32 & 0xFFFFFFFF]
    words = philox_ref([c.expand(len(token), len(call)) for c in counter], (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)  # (T, calls, 8)
    return draws.flatten(1)[:, :columns] >= dropout.threshold


def dropout_ref(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """The formula, rounded once. x (..., H) -> (..., H)."""
    keep = keep_ref(dropout, x.shape[-1]).view(x.shape)
    return torch.where(keep, x.to(acc_dtype(x.dtype)) * dropout.scale, 0).to(x.dtype)


# --- Triton ------------------------------------------------------------------------------------------------------
#
# A thread draws the eight numbers of a call for eight neighbouring columns: 16 bytes of bf16. Tiles of 1024 elements, from
# registers (`make compile-gpu`); no GPU has measured them.

TILE = 1024


@jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: tensors of uint32 that broadcast to c0's shape, the counter's and the key's words -> four, drawn."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32)), c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        high2, low2 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32)), c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@jit
def keep_tile(seed_step, layer, tokens, first_call, threshold, ROWS: tl.constexpr, CALLS: tl.constexpr):
    """True where an element is kept, (ROWS, 8 CALLS): the columns from 8 first_call on of the tokens (ROWS,), int64."""
    seed, step = tl.load(seed_step), tl.load(seed_step + 1)
    zero = tl.zeros((ROWS, CALLS), tl.uint32)
    call = zero + (layer * 65536 + first_call + tl.arange(0, CALLS)).to(tl.uint32)[None, :]
    token = tokens[:, None]
    x0, x1, x2, x3 = philox(
        call, zero + step.to(tl.uint32), zero + token.to(tl.uint32), zero + (token >> 32).to(tl.uint32),
        zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # word 2 i + j at [..., i, j]
    draws = tl.join(words & 0xFFFF, words >> 16)
    return draws.reshape(ROWS, 8 * CALLS).to(tl.int32) >= threshold


@jit
def _dropout_kernel(
    x, y, seed_step, token_index, rows, cols, ld_x, ld_y, layer, threshold,
    SCALE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tokens = tl.load(token_index + row, mask=row < rows, other=0)
    keep = keep_tile(seed_step, layer, tokens, tl.program_id(1) * (COLS // 8), threshold, ROWS, COLS // 8)
    v = tl.load(x + row[:, None] * ld_x + col[None, :], mask=inside, other=0.0).to(ACC)
    tl.store(y + row[:, None] * ld_y + col[None, :], tl.where(keep, v * SCALE, 0.0).to(y.dtype.element_ty), mask=inside)


def _tile(cols: int) -> dict[str, Any]:
    width = min(TILE, max(8, next_power_of_2(cols)))
    return {"ROWS": TILE // width, "COLS": width, "num_warps": 4}


for _cols in (64, 4096):
    ship(
        f"dropout bf16 {_cols}", _dropout_kernel, "*bf16 *bf16 *i64 *i64 i32 i32:16 i32:16 i32:16 i32 i32",
        SCALE=65536 / (65536 - 3277), ACC=tl.float32, **_tile(_cols),
    )  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------------------------


def dropout_out(
    x: torch.Tensor, threshold: int, seed_step: torch.Tensor, layer: int, token_index: torch.Tensor, y: torch.Tensor,
    scale: float = 1.0, isa: str = "auto",
) -> None:  # fmt: skip
    """y = scale x where kept, else 0; no checks, no autograd. x, y (rows, H) with contiguous rows, threshold >= 1."""
    rows, cols = x.shape
    if on_gpu(x):
        tile = _tile(cols)
        grid = -(-rows // tile["ROWS"]), -(-cols // tile["COLS"])
        launch(
            _dropout_kernel, grid, x, y, seed_step, token_index, rows, cols, x.stride(0), y.stride(0), layer, threshold,
            SCALE=scale, ACC=tl_acc(x.dtype), **tile,
        )  # fmt: skip
        return
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


@torch.library.register_kernel("swiftk::dropout_fwd", ("cpu", "cuda"))
def _dropout_fwd(x, threshold, seed_step, layer, token_index, isa):
    if threshold == 0 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    x2 = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(x.shape)  # not a view, which autograd would not let be changed in place
    seed_step, token_index = dropout_keys(seed_step, token_index)
    dropout_out(x2, threshold, seed_step, layer, token_index, y.view(x2.shape), 65536 / (65536 - threshold), isa)
    return y


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
    if not isinstance(dropout, Dropout):
        raise ValueError(f"{op}: dropout has type {type(dropout).__name__}, wants a Dropout(p, seed_step, layer, token_index)")
    if not (0 <= dropout.p < 1 and dropout.threshold < 65536):
        raise ValueError(f"{op}: dropout.p has {dropout.p}, wants 0 <= p <= 65535 / 65536")
    if not 0 <= dropout.layer < MAX_LAYERS:
        raise ValueError(f"{op}: dropout.layer has {dropout.layer}, wants 0 <= layer < {MAX_LAYERS}")
    if x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"{op}: x has {x.shape[-1]} columns, dropout wants at most {MAX_COLUMNS}")
    for name, tensor, size in (("seed_step", dropout.seed_step, 2), ("token_index", dropout.token_index, x.shape[:-1].numel())):
        check_dtype(op, f"dropout.{name}", tensor, torch.int64, x.device, "x")
        check_shape(op, f"dropout.{name}", tensor, (size,), f"x {tuple(x.shape)}")


def dropout(x: torch.Tensor, dropout: Dropout, *, isa: str = "auto") -> torch.Tensor:
    """x / (1 - p) where kept, else 0, differentiable in x; an element depends on its token, column, layer, seed and step.

    Args:
        x: (..., H), bf16, fp32 or fp64, any strides; zero rows are allowed.
        dropout: p, seed and step, the layer's number and one token index per row of x.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; the results are equal,
            on CUDA too.
    Returns: (..., H) in x's dtype, contiguous; a dropped element is 0 whatever x holds.
    Raises: ValueError for a wrong shape, dtype, device, range or isa; on CUDA ImportError without Triton.
    """
    check_floating("dropout", x=x)
    if x.dim() == 0:
        raise ValueError("dropout: x has shape (), wants (..., H)")
    check_dropout("dropout", dropout, x)
    check_isa("dropout", isa)
    return torch.ops.swiftk.dropout_fwd(x, dropout.threshold, dropout.seed_step, dropout.layer, dropout.token_index, isa)

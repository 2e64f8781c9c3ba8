"""Rotary position embedding: pairs of a head's elements turn by angle = position * inv_freq.

With c, s the table's row for a token's position and x1, x2 the halves of the first rotary_dim elements of a head
(the pairing of Llama and Hugging Face's `rotate_half`, not GPT-J's neighbours):

    y1 = x1 c - x2 s,    y2 = x2 c + x1 s,    elements past rotary_dim pass through.

Source: Su et al. 2021, "RoFormer"; linear scaling of positions: Chen et al. 2023; YaRN: Peng et al. 2023; the `llama3`
scaling as published with Llama 3.1. Products and the table are in fp32 (fp64 for fp64), rounded once; transformers rounds
the table to bf16 for a bf16 model, and position * inv_freq to fp32 (2^-24 of 100,000 radians is 0.006), so it differs there.
Bytes per element of x: 1 read, 1 write, in the forward and in the backward; the table's row is shared by the heads.
Not supported: interleaved pairs, `dynamic` and `longrope` scaling (their frequencies depend on the length of the input),
a gradient for the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, check_tensor
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, ship, tl

# --- table -------------------------------------------------------------------------------------------------------

# rope_type: (keys it needs, keys it may have)
_SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def _check_scaling(scaling: Mapping[str, Any], theta: float) -> str:
    kind = scaling.get("rope_type", "default")
    if kind not in _SCALING_KEYS:
        raise ValueError(f"rope_table: scaling has rope_type {kind!r}, wants one of {', '.join(_SCALING_KEYS)}")
    needed, optional = _SCALING_KEYS[kind]
    for key in needed:
        if not isinstance(scaling.get(key), int | float) or scaling[key] <= 0:
            raise ValueError(f"rope_table: scaling has {key} {scaling.get(key)!r}, rope_type {kind!r} wants a number above 0")
    # partial_rotary_factor is rotary_dim / head_dim, which the caller has applied
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *needed, *optional}
    for key, value in scaling.items():
        if key not in known and value is not None:
            raise ValueError(f"rope_table: scaling has key {key!r}, rope_type {kind!r} wants {', '.join(sorted(known))}")
    if scaling.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_table: scaling has rope_theta {scaling['rope_theta']}, wants theta {theta}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"rope_table: scaling has high_freq_factor {scaling['high_freq_factor']}, "
            f"wants more than low_freq_factor {scaling['low_freq_factor']}"
        )
    return kind


def rope_frequencies(
    rotary_dim: int, *, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, float]:
    """inv_freq (rotary_dim / 2,) fp32 in radians per position, and the factor on cos and sin (1.0 but for YaRN).

    In fp32, operation by operation as transformers does it: models are trained with these bits, and at position 100,000 one
    ulp of inv_freq is an angle of 0.006. Arguments and errors: `rope_table`.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rope_table: rotary_dim has {rotary_dim}, wants an even number, at least 2")
    if not theta > 1:
        raise ValueError(f"rope_table: theta has {theta}, wants more than 1")
    scaling = scaling or {}
    kind = _check_scaling(scaling, theta)
    period = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)  # positions per radian
    inv_freq = 1.0 / period
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if kind == "yarn":
        return _yarn(period, rotary_dim, theta, scaling), _yarn_attention_factor(scaling)
    return inv_freq, 1.0


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    # turns over the original context:  > high_freq_factor: kept;  < low_freq_factor: divided by factor;  between: blended
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq  # positions per turn
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, blended)
    return torch.where(wavelength < context / high, inv_freq, scaled)


def _yarn(period: torch.Tensor, rotary_dim: int, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    # pairs that turn more than beta_fast times over the original context are kept, fewer than beta_slow are divided by
    # factor, and a linear ramp over the pair's index lies between
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def pair_with_turns(turns: float) -> float:
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_turns(scaling.get("beta_fast") or 32), pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a step; no division by zero
    ramp = torch.clamp((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * period) * (1 - kept) + 1.0 / period * kept


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, mscale_all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)


def rope_table(
    rotary_dim: int, max_position: int, *, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """cos and sin of every position, on the CPU; row p has the same bits in a table of any length.

    Args:
        rotary_dim: elements of a head that turn; even.
        max_position: rows; positions 0 .. max_position - 1.
        theta: base of the geometric series of frequencies, > 1.
        scaling: Hugging Face's `rope_parameters`: "rope_type" default, linear, llama3 or yarn, and that type's keys (None
            values are as good as absent ones); "rope_theta", where present, must equal theta. The caller has turned the old
            spelling ("type") into this one and has filled in original_max_position_embeddings.
        dtype: torch.float32 (for bf16 and fp32 inputs) or torch.float64.
    Returns: cos, sin, each (max_position, rotary_dim / 2). inv_freq is rounded to fp32 for either dtype, the angle is in fp64.
    Raises: ValueError for an unknown rope_type or key, a key that is missing or not above 0, or an odd rotary_dim.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rope_table: dtype has {dtype}, wants torch.float32 or torch.float64")
    if max_position < 0:
        raise ValueError(f"rope_table: max_position has {max_position}, wants 0 or more")
    frequencies, scale = rope_frequencies(rotary_dim, theta=theta, scaling=scaling)
    inv_freq = frequencies.double()
    cos, sin = (torch.empty(max_position, rotary_dim // 2, dtype=dtype, device="cpu") for _ in range(2))
    native().rope_table(
        DTYPE_CODES[dtype], inv_freq.data_ptr(), max_position, rotary_dim // 2, scale, cos.data_ptr(), sin.data_ptr(),
        threads(),
    )  # fmt: skip
    return cos, sin


# --- reference ---------------------------------------------------------------------------------------------------


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The formula in the table's dtype, rounded once. x (total, heads, head_dim), cos, sin (max_position, rotary_dim / 2)."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    x1, x2, rest = x[..., :half].to(c.dtype), x[..., half : 2 * half].to(c.dtype), x[..., 2 * half :]
    return torch.cat(((x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), rest), -1)


# --- Triton ------------------------------------------------------------------------------------------------------
# A program turns HEADS heads of one token, both halves read before either is written; products and sums are rounded apart
# (fuse=False), so the bits are the CPU's. A position outside of the table gives NaN, under TRITON_DEBUG=1 an error.


@jit
def _rope_kernel(
    x, x_token, x_head, cos, sin, table_rows, positions, y, heads, head_dim, half, INVERSE: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    at = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + token).to(tl.int64)
    known = (position >= 0) & (position < table_rows)
    tl.device_assert(known, "rope: positions has a value outside of the table")
    seen = at < tl.where(known, half, 0)
    c = tl.load(cos + position * half + at, mask=seen, other=float("nan"))
    s = tl.load(sin + position * half + at, mask=seen, other=float("nan"))
    if INVERSE:
        s = -s
    inside = (at < half) & (head < heads)
    a = x + token * x_token + head * x_head
    b = y + (token * heads + head) * head_dim
    x1 = tl.load(a + at, mask=inside, other=0.0).to(c.dtype)
    x2 = tl.load(a + half + at, mask=inside, other=0.0).to(c.dtype)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        past = (rest < head_dim) & (head < heads)
        tl.store(b + rest, tl.load(a + rest, mask=past, other=0.0), mask=past)
    tl.store(b + at, (x1 * c - x2 * s).to(y.dtype.element_ty), mask=inside)
    tl.store(b + half + at, (x2 * c + x1 * s).to(y.dtype.element_ty), mask=inside)


def _shape(heads: int, head_dim: int, half: int) -> dict[str, Any]:
    """A power of two of heads that make about 2048 elements: four warps of 16 a thread; no GPU has measured it."""
    wide, rest = next_power_of_2(half), head_dim - 2 * half
    return {
        "HALF": wide, "REST": next_power_of_2(rest) if rest else 0,
        "HEADS": min(next_power_of_2(heads), max(1, 1024 // wide)), "num_warps": 4,
    }  # fmt: skip


ship(
    "rope bf16 128", _rope_kernel, "*bf16 i32:16 i32:16 *fp32 *fp32 i32 *i64 *bf16 i32:16 i32:16 i32:16", fuse=False,
    INVERSE=False, **_shape(32, 128, 64),
)  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------------------------


def rope_out(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, y: torch.Tensor, *, inverse: bool = False,
    isa: str = "auto",
) -> None:  # fmt: skip
    """Writes y; no autograd, and of the checks only that of the positions (on the CPU).

    x (total, heads, head_dim) with a contiguous last dimension, cos, sin, positions and y contiguous; y may be x itself where
    x is contiguous. inverse: the negative angle."""
    total, heads, head_dim = x.shape
    if on_gpu(x):
        meta = _shape(heads, head_dim, cos.shape[1]) if x.numel() else {"HEADS": 1}
        launch(
            _rope_kernel, (total, -(-heads // meta["HEADS"])), x, x.stride(0), x.stride(1), cos, sin, cos.shape[0], positions,
            y, heads, head_dim, cos.shape[1], INVERSE=inverse, fuse=False, **meta,
        )  # fmt: skip
        return
    outside = native().rope(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), cos.shape[0],
        positions.data_ptr(), positions.dtype == torch.int64, y.data_ptr(), total, heads, head_dim, cos.shape[1], inverse,
        threads(x.numel()), isa,
    )  # fmt: skip
    if outside >= 0:
        raise ValueError(
            f"rope: positions has {positions[outside].item()} at token {outside}, wants 0 .. {cos.shape[0] - 1} "
            f"(cos has {cos.shape[0]} rows); build a longer table with rope_table"
        )


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define("swiftk::rope", "(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool inverse, str isa) -> Tensor")


@torch.library.register_kernel("swiftk::rope", ("cpu", "cuda"))
def _rope(x, cos, sin, positions, inverse, isa):
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rope_out(x, cos.contiguous(), sin.contiguous(), positions.contiguous(), y, inverse=inverse, isa=isa)
    return y


@torch.library.register_fake("swiftk::rope")
def _rope_fake(x, cos, sin, positions, inverse, isa):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    _x, cos, sin, positions, ctx.inverse, ctx.isa = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dy):
    # a rotation R is orthogonal: dx = R^T dy, the rotation by the negative angle; linear, so it differentiates again
    cos, sin, positions = ctx.saved_tensors
    return torch.ops.swiftk.rope(dy, cos, sin, positions, not ctx.inverse, ctx.isa), None, None, None, None, None


torch.library.register_autograd("swiftk::rope", _backward, setup_context=_setup_context)


# --- public ------------------------------------------------------------------------------------------------------


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, isa: str = "auto") -> torch.Tensor:
    """Turns every head of every token by its position, differentiable in x; a token's result depends on that token alone.

    Args:
        x: (total, heads, head_dim), bf16, fp32 or fp64, any strides; with a contiguous last dimension (slices of a fused
            projection) it is read in place. total and heads may be 0.
        cos, sin: (max_position, rotary_dim / 2) from `rope_table`, fp32 (fp64 for fp64 x); rotary_dim <= head_dim, elements
            past it pass through. No gradient flows into them.
        positions: (total,), int64 or int32, each a row of the table.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; all, and CUDA, give the same bits.
    Returns: (total, heads, head_dim) in x's dtype, contiguous.
    Raises: ValueError for a wrong shape, dtype, device or isa, a table that requires grad, or (on the CPU) a position
        outside of the table, which on CUDA gives NaN (asserted under TRITON_DEBUG=1); there ImportError without Triton.
    """
    check_floating("rope", x=x)
    check_floating("rope", cos=cos, sin=sin)
    if x.dim() != 3:
        raise ValueError(f"rope: x has shape {tuple(x.shape)}, wants (total, heads, head_dim)")
    if cos.dtype != acc_dtype(x.dtype):
        raise ValueError(f"rope: cos has dtype {cos.dtype}, wants {acc_dtype(x.dtype)} for x in {x.dtype}")
    if cos.dim() != 2 or not 2 <= 2 * cos.shape[1] <= x.shape[2]:
        raise ValueError(
            f"rope: cos has shape {tuple(cos.shape)}, wants (max_position, rotary_dim / 2) with "
            f"2 <= rotary_dim <= head_dim {x.shape[2]}"
        )
    check_shape("rope", "sin", sin, tuple(cos.shape), f"cos {tuple(cos.shape)}")
    check_tensor("rope", "positions", positions)
    if positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rope: positions has dtype {positions.dtype}, wants torch.int64 or torch.int32 (positions.long())")
    check_shape("rope", "positions", positions, (x.shape[0],), f"x {tuple(x.shape)}")
    for name, tensor in (("cos", cos), ("positions", positions)):
        if tensor.device != x.device:
            raise ValueError(f"rope: {name} has device {tensor.device}, wants {x.device} like x")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: cos or sin has requires_grad, wants a constant table; detach it, or use rope_ref")
    check_isa("rope", isa)
    return torch.ops.swiftk.rope(x, cos, sin, positions, False, isa)

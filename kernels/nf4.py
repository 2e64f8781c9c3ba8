"""NF4: weights of 4 bits with one scale a block, byte for byte the same everywhere.

Source: Dettmers et al. 2023, "QLoRA"; the format of bitsandbytes, with rows that begin at a block. The specification; every
implementation reproduces it byte for byte, and tests/kernels/nf4_golden.json was made by another one, in exact arithmetic:

- Arithmetic is fp32, IEEE, round to nearest even, subnormals kept, one rounding per operation (no fused multiply-add). A bf16
  source is widened, an fp64 source first rounded to fp32 (what overflows there counts as infinite).
- A row of K elements is cut into blocks of `blocksize` (32, 64, ..., 4096); the last block of a row may be short. A stack of
  weights (E, N, K) is E N rows.
- absmax = max |x| over the block; below 2^-126 (zeros, -0.0 and subnormals alone) it is 0 and every code of the block is 7.
  A NaN or an infinity is an error that names row and block, never a value.
- The code of x is the number of thresholds below v = x * (1 / absmax): a reciprocal, which is subnormal above 2^126, and a
  product. Thresholds are (value[i] + value[i + 1]) / 2; a value on a threshold takes the lower code.
- Byte j of a row has the code of element 2j in its high nibble, of 2j + 1 in the low one; the pad nibble of an odd K is 7.
- absmax is kept in bf16 where the source is bf16 (exact: it is one of the source's magnitudes), else in fp32.
- The weight that a code stands for is bf16(value * absmax): two roundings, and nothing but this is used in a product. In
  fp32 it is the unrounded product, bitsandbytes' value. Above 3.3895e38 the rounding to bf16 gives infinity, as torch's does.
- Nested: the absmax of all blocks, flattened (n), are quantised themselves, in blocks of 256. offset = fp32(mean), the mean in
  fp64, its sum by halving (pad to an even count with 0, add the two halves, repeat). Of d = absmax - offset the 8-bit code is
  the number of thresholds (map[i] + map[i + 1]) / 2 below d * (1 / max |d|), where max |d| below 2^-126 counts as 0 and d * 0
  takes the product's place. Decoded: map[code] * max |d| + offset, two roundings. The codes of the elements are those of the
  absmax before it was nested. The map is the one the tensor carries; ours is `dynamic_map()`.

bitsandbytes differs where its own implementations differ from each other: an all-zero block has code 0 (-0.0) on its CUDA
path (such codes are kept as they are), codes within a few ulp of a threshold, the map's last bits.
Bytes per element: 0.5 + 2 / blocksize (bf16 absmax), 0.5 + 4 / blocksize (fp32), 0.5 + 1 / blocksize + 4 / (256 blocksize)
(nested); dequantise writes 2. Not supported: fp4, fp16, blocks that run across rows.

On CUDA (csrc/cuda/nf4.cu, C++: a look-up by Triton is bound by its instructions) the bytes are the same: the arithmetic is
csrc/cuda/nf4_arith.h, which the tests also run on the CPU. A nested absmax is decoded as it is read by `nf4_dequantize_out`.
"""

from __future__ import annotations

import functools
import json
import math
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape
from swiftk.kernels._native import DTYPE_CODES, native, native_cuda, on_stream, threads

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SMALLEST_ABSMAX = 2.0**-126


class Nested(NamedTuple):
    """The absmax of NF4 blocks, quantised itself: code_map fp32 (256,) ascending, absmax fp32 (ceil(n / 256),) over the n
    flattened absmax, offset fp32 ()."""

    code_map: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor


class NF4Tensor(NamedTuple):
    """A quantised weight (N, K), or a stack (E, N, K). A slice of rows, or of columns that begin and end at a block, is a
    slice of `codes` and `absmax` (unless nested).

    codes uint8 (..., N, ceil(K / 2)); absmax (..., N, ceil(K / blocksize)), fp32 or bf16, uint8 where nested; in_features = K.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    in_features: int
    blocksize: int = 64
    nested: Nested | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.in_features))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def absmax_fp32(self) -> torch.Tensor:
        """absmax in fp32, (..., N, ceil(K / blocksize)): widened, or decoded where nested."""
        if self.nested is None:
            return self.absmax.float()
        code_map, absmax, offset = self.nested
        scale = absmax.repeat_interleave(NESTED_BLOCKSIZE)[: self.absmax.numel()].view(self.absmax.shape)
        return code_map[self.absmax.int()] * scale + offset


def plain_absmax(w: NF4Tensor) -> NF4Tensor:
    """With its absmax decoded, where that is nested."""
    return w if w.nested is None else w._replace(absmax=w.absmax_fp32(), nested=None)


def take_rows(weight, rows: slice | torch.Tensor):
    """Rows of a weight, plain or NF4 (not nested)."""
    if isinstance(weight, NF4Tensor):
        return weight._replace(codes=weight.codes[rows], absmax=weight.absmax[rows])
    return weight[rows]


# --- reference ---------------------------------------------------------------------------------------------------


def _thresholds(values: torch.Tensor) -> torch.Tensor:
    return (values[:-1] + values[1:]) / 2


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax of the last dimension, 0 below 2^-126, and x * (1 / absmax), or x * 0."""
    absmax = x.abs().amax(-1)
    absmax = torch.where(absmax < SMALLEST_ABSMAX, 0, absmax)
    return absmax, x * torch.where(absmax == 0, 0, 1 / absmax)[..., None]


def nf4_quantize_ref(weight: torch.Tensor, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (..., K) of finite values -> codes uint8 (..., ceil(K / 2)), absmax fp32 (..., ceil(K / blocksize))."""
    K = weight.shape[-1]
    x = torch.nn.functional.pad(weight.float(), (0, -K % blocksize)).unflatten(-1, (-1, blocksize))
    absmax, v = _scaled(x)
    codes = torch.bucketize(v, _thresholds(torch.tensor(VALUES, device=v.device))).flatten(-2)[..., : K + K % 2].to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2], absmax


def nf4_dequantize_ref(w: NF4Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The products value * absmax in fp32, rounded to dtype: (..., N, K)."""
    K = w.in_features
    codes = torch.stack((w.codes >> 4, w.codes & 15), -1).flatten(-2)[..., :K]
    absmax = w.absmax_fp32().repeat_interleave(w.blocksize, -1)[..., :K]
    return (torch.tensor(VALUES, device=absmax.device)[codes.int()] * absmax).to(dtype)


# --- nested ------------------------------------------------------------------------------------------------------
# 1 / blocksize of the elements: plain torch, the only implementation


@functools.cache
def dynamic_map(signed: bool = True) -> torch.Tensor:
    """The 8-bit dynamic map, fp32 (256,) ascending: 0, 1 and +-10^(i - 6) times the n = 2^i (unsigned: 2^(i + 1)) midpoints
    of [0.1, 1], i = 0, ..., 6; rational, rounded to fp64 and then to fp32. Source: Dettmers 2015 (arXiv:1511.04561)."""
    values = [Fraction(0), Fraction(1)]
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        for j in range(n):
            value = Fraction(10) ** (i - 6) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * n))
            values += [value, -value] if signed else [value]
    return torch.tensor([float(value) for value in sorted(values)], dtype=torch.float32)


def _nest(absmax: torch.Tensor) -> tuple[torch.Tensor, Nested]:
    """absmax fp32 -> its 8-bit codes, of the same shape, and what decodes them."""
    total = absmax.flatten().double()
    while total.numel() > 1:
        total = torch.nn.functional.pad(total, (0, total.numel() % 2))
        total = total[: total.numel() // 2] + total[total.numel() // 2 :]
    offset = (total.sum() / max(absmax.numel(), 1)).float()
    d = (absmax - offset).flatten()
    blocks = torch.nn.functional.pad(d, (0, -d.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    scale, v = _scaled(blocks)
    code_map = dynamic_map().to(absmax.device, copy=True)  # tensors that share memory cannot be saved as safetensors
    codes = torch.bucketize(v, _thresholds(code_map)).flatten()[: d.numel()].to(torch.uint8)
    return codes.view(absmax.shape), Nested(code_map, scale, offset)


# --- launchers ---------------------------------------------------------------------------------------------------


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(rows, last dimension) with contiguous rows of one stride, copied only where t has no such view."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # not -1, which is ambiguous where a size is 0
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _dequantize_out(codes: torch.Tensor, absmax: torch.Tensor, blocksize: int, out: torch.Tensor, isa: str) -> None:
    codes, absmax, out = _rows(codes), _rows(absmax), out.view(math.prod(out.shape[:-1]), out.shape[-1])
    native().nf4_dequantize(
        codes.data_ptr(), codes.stride(0), DTYPE_CODES[absmax.dtype], absmax.data_ptr(), absmax.stride(0), *out.shape,
        blocksize, DTYPE_CODES[out.dtype], out.data_ptr(), out.stride(0), threads(out.numel()), isa,
    )  # fmt: skip


def scale_args(w: NF4Tensor) -> tuple[tuple[int, int, int, int, int, int], list[torch.Tensor]]:
    """absmax as the CUDA kernels take it: kind, address, row stride, and what decodes a nested one; and the tensors whose
    memory that is."""
    if w.nested is None:
        absmax = _rows(w.absmax)
        return (int(absmax.dtype == torch.float32), absmax.data_ptr(), absmax.stride(0), 0, 0, 0), [absmax]
    codes, *nested = (t.contiguous() for t in (w.absmax, *w.nested))
    return (2, codes.data_ptr(), codes.shape[-1], *(t.data_ptr() for t in nested)), [codes, *nested]  # type: ignore[return-value]


def _dequantize_on_cuda(w: NF4Tensor, out: torch.Tensor) -> None:
    scales, alive = scale_args(w)
    codes, out = _rows(w.codes), out.view(math.prod(out.shape[:-1]), out.shape[-1])
    on_stream(
        native_cuda().nf4_dequantize, out.device, codes.data_ptr(), codes.stride(0), scales, *out.shape, w.blocksize,
        out.dtype == torch.float32, out.data_ptr(), out.stride(0),
    )  # fmt: skip
    del alive  # until here


def nf4_dequantize_out(w: NF4Tensor, out: torch.Tensor, isa: str = "auto") -> None:
    """Writes out, bf16 or fp32, shape (..., N, K), any row stride; no checks, no autograd. On a CPU outputs of more than 4 MiB
    go past the caches."""
    if out.is_cuda:
        _dequantize_on_cuda(w, out)
        return
    _dequantize_out(w.codes, w.absmax if w.nested is None else w.absmax_fp32(), w.blocksize, out, isa)


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::nf4_quantize", "(Tensor weight, int blocksize, ScalarType absmax_dtype, str isa) -> (Tensor codes, Tensor absmax)"
)
torch.library.define(
    "swiftk::nf4_dequantize",
    "(Tensor codes, Tensor absmax, int in_features, int blocksize, ScalarType dtype, str isa) -> Tensor",
)


def _refuse_block(weight: torch.Tensor, blocksize: int, bad: int) -> NoReturn:
    row, block = divmod(bad, -(-weight.shape[-1] // blocksize))
    place = f"row {row}" if weight.dim() == 2 else f"matrix {row // weight.shape[1]}, row {row % weight.shape[1]}"
    last = min((block + 1) * blocksize, weight.shape[-1]) - 1
    raise ValueError(
        f"nf4_quantize: weight has NaN or infinity in {place}, block {block} (columns {block * blocksize} to {last}), "
        "wants finite values in fp32; check the checkpoint that it was read from"
    )


@torch.library.register_kernel("swiftk::nf4_quantize", "cpu")
def _nf4_quantize_cpu(weight, blocksize, absmax_dtype, isa):
    codes, absmax = _nf4_quantize_fake(weight, blocksize, absmax_dtype, isa)
    w2 = _rows(weight)
    bad = native().nf4_quantize(
        DTYPE_CODES[weight.dtype], w2.data_ptr(), w2.stride(0), *w2.shape, blocksize, codes.data_ptr(),
        DTYPE_CODES[absmax_dtype], absmax.data_ptr(), threads(w2.numel()), isa,
    )  # fmt: skip
    if bad >= 0:
        _refuse_block(weight, blocksize, bad)
    return codes, absmax


@torch.library.register_kernel("swiftk::nf4_dequantize", "cpu")
def _nf4_dequantize_cpu(codes, absmax, in_features, blocksize, dtype, isa):
    out = _nf4_dequantize_fake(codes, absmax, in_features, blocksize, dtype, isa)
    _dequantize_out(codes, absmax, blocksize, out, isa)
    return out


@torch.library.register_kernel("swiftk::nf4_quantize", "cuda")
def _nf4_quantize_cuda(weight, blocksize, absmax_dtype, isa):
    codes, absmax = _nf4_quantize_fake(weight, blocksize, absmax_dtype, isa)
    w2 = _rows(weight)
    none = torch.iinfo(torch.int64).max
    first_bad = torch.full((), none, dtype=torch.int64, device=weight.device)
    on_stream(
        native_cuda().nf4_quantize, weight.device, DTYPE_CODES[weight.dtype], w2.data_ptr(), w2.stride(0), *w2.shape, blocksize,
        codes.data_ptr(), absmax_dtype == torch.bfloat16, absmax.data_ptr(), first_bad.data_ptr(),
    )  # fmt: skip
    # the one wait for the device among the kernels: weights are quantised once, and an error names its block
    if not torch.cuda.is_current_stream_capturing() and (bad := int(first_bad)) != none:
        _refuse_block(weight, blocksize, bad)
    return codes, absmax


@torch.library.register_kernel("swiftk::nf4_dequantize", "cuda")
def _nf4_dequantize_cuda(codes, absmax, in_features, blocksize, dtype, isa):
    out = _nf4_dequantize_fake(codes, absmax, in_features, blocksize, dtype, isa)
    _dequantize_on_cuda(NF4Tensor(codes, absmax, in_features, blocksize), out)
    return out


@torch.library.register_fake("swiftk::nf4_quantize")
def _nf4_quantize_fake(weight, blocksize, absmax_dtype, isa):
    *rows, K = weight.shape
    codes = weight.new_empty(*rows, (K + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(*rows, (K + blocksize - 1) // blocksize, dtype=absmax_dtype)


@torch.library.register_fake("swiftk::nf4_dequantize")
def _nf4_dequantize_fake(codes, absmax, in_features, blocksize, dtype, isa):
    return codes.new_empty(*codes.shape[:-1], in_features, dtype=dtype)


# --- bitsandbytes ------------------------------------------------------------------------------------------------


def _refuse_split_rows(op: str, name: str, shape: tuple[int, ...], blocksize: int) -> None:
    if shape[-1] % blocksize:
        raise ValueError(
            f"{op}: {name} has shape {shape}, wants K = {shape[-1]} to be a multiple of the blocksize {blocksize}: the "
            "blocks of bitsandbytes run across rows; dequantise it there and quantise the result"
        )


def nf4_to_bitsandbytes(w: NF4Tensor, dtype: torch.dtype, name: str = "weight") -> dict[str, torch.Tensor]:
    """The entries of a bitsandbytes state dict for the parameter `name`, byte for byte what `Linear4bit` saves.

    dtype is that of the weight before it was quantised (bitsandbytes dequantises to it). Codes and absmax are not changed; a
    bf16 absmax is widened.
    Raises: ValueError where K is not a multiple of the blocksize.
    """
    check_nf4("nf4_to_bitsandbytes", w)
    _refuse_split_rows("nf4_to_bitsandbytes", "w", tuple(w.shape), w.blocksize)
    meta: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": w.blocksize, "dtype": str(dtype).removeprefix("torch."), "shape": list(w.shape),
    }  # fmt: skip
    state = {name: w.codes.reshape(-1, 1)}
    state[f"{name}.absmax"] = (w.absmax if w.nested else w.absmax.float()).flatten()
    if w.nested:
        meta |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": w.nested.offset.item()}
        state |= {f"{name}.nested_absmax": w.nested.absmax, f"{name}.nested_quant_map": w.nested.code_map}
    state[f"{name}.quant_map"] = torch.tensor(VALUES, device=w.device)
    blob = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return state | {f"{name}.quant_state.bitsandbytes__nf4": blob.to(w.device)}


def nf4_from_bitsandbytes(state: dict[str, torch.Tensor], name: str = "weight") -> NF4Tensor:
    """The weight `name` of a bitsandbytes state dict (other keys may be there), codes and absmax as they are.

    A nested absmax is decoded with the map that the dict carries. Views of the dict's tensors where their layout allows.
    Raises: ValueError for a missing key, another format than nf4, a block that runs across rows, an absmax that is not finite.
    """
    op = "nf4_from_bitsandbytes"

    def entry(key: str) -> torch.Tensor:
        full = f"{name}.{key}" if key else name
        if full not in state:
            found = sorted(k for k in state if k.startswith(name))
            raise ValueError(f"{op}: state has no {full!r}, wants what bitsandbytes saves of an NF4 weight; it has {found}")
        return state[full]

    meta = json.loads(bytes(entry("quant_state.bitsandbytes__nf4").cpu().tolist()))
    if meta["quant_type"] != "nf4" or entry("quant_map").float().cpu().tolist() != list(VALUES):
        raise ValueError(f"{op}: {name} has quant_type {meta['quant_type']!r} or another table of values, wants 'nf4'")
    shape, blocksize = tuple(meta["shape"]), meta["blocksize"]
    _refuse_split_rows(op, name, shape, blocksize)
    codes = entry("").detach().contiguous().view(torch.uint8).view(*shape[:-1], shape[-1] // 2)  # any storage dtype
    absmax = entry("absmax").view(*shape[:-1], shape[-1] // blocksize)
    nested = None
    if "nested_offset" in meta:
        if meta["nested_blocksize"] != NESTED_BLOCKSIZE:
            raise ValueError(f"{op}: {name} has nested_blocksize {meta['nested_blocksize']}, wants {NESTED_BLOCKSIZE}")
        offset = torch.tensor(meta["nested_offset"], dtype=torch.float32, device=codes.device)
        nested = Nested(entry("nested_quant_map").float(), entry("nested_absmax").float(), offset)
    w = NF4Tensor(codes, absmax if nested else absmax.float(), shape[-1], blocksize, nested)
    check_nf4(op, w)
    finite = w.absmax_fp32().isfinite().flatten()
    if not finite.all():
        block = int((~finite).nonzero()[0])
        raise ValueError(f"{op}: {name} has NaN or infinity as the absmax of block {block}, wants finite values")
    return w


# --- public ------------------------------------------------------------------------------------------------------


def check_nf4(op: str, w: NF4Tensor, name: str = "w") -> None:
    """ValueError unless the parts of w, an argument of that name, belong together; does not look at values."""
    if not isinstance(w, NF4Tensor):
        raise ValueError(f"{op}: {name} has type {type(w).__name__}, wants an NF4Tensor; make one with nf4_quantize")
    if w.blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: blocksize has {w.blocksize!r}, wants one of {', '.join(map(str, BLOCKSIZES))}")
    if w.codes.dim() not in (2, 3) or w.codes.dtype != torch.uint8:
        raise ValueError(
            f"{op}: codes has shape {tuple(w.codes.shape)} of {w.codes.dtype}, wants (..., N, K / 2) of torch.uint8"
        )
    rows, why = w.codes.shape[:-1], f"in_features {w.in_features} and blocksize {w.blocksize}"
    check_shape(op, "codes", w.codes, (*rows, -(-w.in_features // 2)), why)
    check_shape(op, "absmax", w.absmax, (*rows, -(-w.in_features // w.blocksize)), why)
    wants = (torch.uint8,) if w.nested else (torch.float32, torch.bfloat16)
    if w.absmax.dtype not in wants:
        raise ValueError(f"{op}: absmax has dtype {w.absmax.dtype}, wants {' or '.join(map(str, wants))}")
    if w.absmax.device != w.codes.device:
        raise ValueError(f"{op}: absmax has device {w.absmax.device}, wants {w.codes.device} like codes")
    if w.nested:
        for name, t in w.nested._asdict().items():
            if t.dtype != torch.float32 or t.device != w.codes.device:
                raise ValueError(
                    f"{op}: nested.{name} has dtype {t.dtype} on {t.device}, wants torch.float32 on {w.codes.device}: the "
                    "parts of an NF4Tensor are not cast with a model"
                )
        count = -(-w.absmax.numel() // NESTED_BLOCKSIZE)
        for name, want in (("code_map", (256,)), ("absmax", (count,)), ("offset", ())):
            check_shape(op, f"nested.{name}", getattr(w.nested, name), want, f"absmax {tuple(w.absmax.shape)}")


def nf4_quantize(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    nested: bool = False,
    absmax_dtype: torch.dtype | None = None,
    isa: str = "auto",
) -> NF4Tensor:
    """The NF4 codes of a weight, or of a stack of weights; not differentiable.

    Args:
        weight: (N, K) or (E, N, K), bf16, fp32 or fp64, any strides, finite; sizes may be 0.
        blocksize: elements that share one absmax: 32, 64, 128, ..., 4096.
        nested: quantise the absmax too: 4.13 bits per weight where bf16 absmax takes 4.25 (blocksize 64), and inexact.
        absmax_dtype: torch.float32 or torch.bfloat16; None: bf16 for a bf16 weight, where it is exact, else fp32.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; all give the same bytes.
    Returns: the NF4Tensor, on weight's device.
    Raises: ValueError for a wrong shape, dtype, blocksize or isa, and for NaN or infinity, naming row and block. On CUDA this
        waits for the device; where a CUDA graph is captured it cannot, and the absmax of such a block is NaN instead.
        ImportError on CUDA where swiftk has no GPU build.
    """
    op = "nf4_quantize"
    check_floating(op, weight=weight)
    if weight.dim() not in (2, 3):
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, wants (N, K) or (E, N, K)")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: blocksize has {blocksize!r}, wants one of {', '.join(map(str, BLOCKSIZES))}")
    exact = torch.bfloat16 if weight.dtype == torch.bfloat16 and not nested else torch.float32
    if absmax_dtype not in (None, torch.float32, exact):
        raise ValueError(
            f"{op}: absmax_dtype has {absmax_dtype}, wants torch.float32 for a {weight.dtype} weight"
            + (" that is nested" if nested else "; bf16 would round it: quantise weight.bfloat16()")
        )
    check_isa(op, isa)
    codes, absmax = torch.ops.swiftk.nf4_quantize(weight.detach(), blocksize, absmax_dtype or exact, isa)
    w = NF4Tensor(codes, absmax, weight.shape[-1], blocksize)
    if nested:
        absmax, decoder = _nest(absmax)
        w = w._replace(absmax=absmax, nested=decoder)
    return w


def nf4_dequantize(w: NF4Tensor, dtype: torch.dtype = torch.bfloat16, *, isa: str = "auto") -> torch.Tensor:
    """The weight that w stands for: (N, K) or (E, N, K), contiguous.

    Args:
        w: from `nf4_quantize` or `nf4_from_bitsandbytes`, or made of their parts (slices, parts of a checkpoint).
        dtype: torch.bfloat16, the values that every product uses (widen them for fp32 and fp64), or torch.float32, the
            products before that rounding.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; all give the same bytes.
    Raises: ValueError for parts that do not belong together, dtype or isa; ImportError on CUDA where swiftk has no GPU build.
    """
    check_nf4("nf4_dequantize", w)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"nf4_dequantize: dtype has {dtype}, wants torch.bfloat16 or torch.float32")
    check_isa("nf4_dequantize", isa)
    absmax = w.absmax if w.nested is None else w.absmax_fp32()
    return torch.ops.swiftk.nf4_dequantize(w.codes, absmax, w.in_features, w.blocksize, dtype, isa)

"""Attention over a paged cache: `varlen_attention` (causal) whose keys and values lie in blocks that a table names, and
`store_kv_`, which writes them there.

Sources: Kwon et al. 2023 (block tables); the formula, its masks and its tiles are those of varlen.py, in the same C++ body.
Position p of sequence i is token p % block_size of block block_table[i, p / block_size]; the queries of a sequence are its last
positions. A query's out and lse depend on that query and the keys it sees alone, bit for bit: they equal varlen_attention's on
the gathered keys for any block size, order of the blocks, chunks of a prefill, mix of sequences and thread count.
Bytes: q and out once, K and V of every sequence once per 192 rows (query heads of a KV head times its queries): at decoding,
2 seqlen kv_heads head_dim elements a sequence. FLOPs: 4 d per query head and visible key.
A cache whose tokens of a head lie together, torch.empty(blocks, kv_heads, block_size, head_dim).transpose(1, 2), decodes
fastest: tokens 2 or 4 KiB apart share sets of the first-level cache.
Not supported: gradients (use varlen_attention), a quantised cache, keys beyond a query (no padding inside a sequence), fp64 on
CUDA.
"""

from __future__ import annotations

import torch

from swiftk.kernels._checks import check_dtype, check_floating, check_shape
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import on_gpu
from swiftk.kernels.attention._paged_triton import paged_triton, store_kv_triton
from swiftk.kernels.attention.varlen import (
    _address,
    _check,
    _check_int32,
    _rows,
    _scale,
    _strides,
    _window,
    varlen_attention_ref,
)
from swiftk.kernels.linear import check_numerics

# --- reference ---------------------------------------------------------------------------------------------------


def gather_ref(cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor) -> torch.Tensor:
    """(blocks, block_size, kv_heads, d) -> (sum of cache_seqlens, kv_heads, d): the sequences one after the other."""
    size = cache.shape[1]
    lens = cache_seqlens.tolist()
    rows = [cache[table[: -(-n // size)].long()].flatten(0, 1)[:n] for table, n in zip(block_table, lens, strict=True)]
    return torch.cat([cache.new_empty(0, *cache.shape[2:]), *rows])


def paged_attention_ref(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, **options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """varlen_attention's reference on the gathered keys and values; shapes as in `paged_attention` -> out, lse."""
    cu_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) if cu_seqlens_q is None else cu_seqlens_q
    cu_k = torch.cat([cache_seqlens.new_zeros(1), cache_seqlens.cumsum(0)]).int()
    k, v = (gather_ref(cache, block_table, cache_seqlens) for cache in (k_cache, v_cache))
    return varlen_attention_ref(q, k, v, cu_q, cu_k, causal=True, **options)


# --- launchers ---------------------------------------------------------------------------------------------------


def _cache(k_cache: torch.Tensor, v_cache: torch.Tensor):
    k, v = ((x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)) for x in (k_cache, v_cache))
    return k, v, k_cache.shape[0], k_cache.shape[1]


def paged_attention_out(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, out, lse=None,
    isa="auto", numerics="auto",
) -> None:  # fmt: skip
    """Writes the rows of out (and of lse, if given) that cu_seqlens_q covers; checks the values of the three int32 tensors,
    which are read when the kernel runs, and nothing else (on CUDA these only under TRITON_DEBUG=1).

    q, out (total_q, heads, head_dim): head_dim contiguous, and of out heads too; k_cache, v_cache: head_dim contiguous;
    block_table: its rows contiguous; cache_seqlens, cu_seqlens_q contiguous; lse (heads, total_q) and sinks in the accumulate
    dtype, contiguous. left, right: the window, -1 for unlimited, right = 0 for causal.
    """
    if on_gpu(q):
        tables = block_table, cache_seqlens, cu_seqlens_q
        paged_triton(q, k_cache, v_cache, *tables, sinks, softmax_scale, softcap, left, right, out, lse, numerics)
        return
    options = (q.shape[1], k_cache.shape[2], q.shape[2], softmax_scale, softcap, left, right)
    native().paged_fwd(
        DTYPE_CODES[q.dtype], _strides(q), q.shape[0], _cache(k_cache, v_cache), options, cu_seqlens_q.data_ptr(),
        cache_seqlens.data_ptr(), (block_table.data_ptr(), block_table.stride(0), block_table.shape[1]), cache_seqlens.numel(),
        out.data_ptr(), out.stride(0), _address(lse), _address(sinks), threads(), isa,
    )  # fmt: skip


def store_kv_out(k, v, k_cache, v_cache, slot_mapping) -> None:
    """Writes tokens into the cache; checks the slots, which are read when the kernel runs, and nothing else (on CUDA under
    TRITON_DEBUG=1; a slot out of range is skipped). All with a contiguous head_dim, slot_mapping contiguous."""
    if on_gpu(k):
        store_kv_triton(k, v, k_cache, v_cache, slot_mapping)
        return
    native().store_kv(
        DTYPE_CODES[k.dtype], _strides(k), _strides(v), _cache(k_cache, v_cache), slot_mapping.data_ptr(), *k.shape,
        threads(2 * k.numel()),
    )  # fmt: skip


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, Tensor cu_seqlens_q, Tensor? sinks, "
    "float softmax_scale, float softcap, int left, int right, str numerics, str isa) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "swiftk::store_kv_", "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()"
)


@torch.library.register_kernel("swiftk::paged_attention", ("cpu", "cuda"))
def _paged(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, numerics, isa
):  # fmt: skip
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)  # tokens of no sequence: out 0, lse -inf
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=acc_dtype(q.dtype))
    wide_sinks = None if sinks is None else sinks.to(lse.dtype).contiguous()
    tables = block_table.contiguous(), cache_seqlens.contiguous(), cu_seqlens_q.contiguous()
    paged_attention_out(
        _rows(q), k_cache, v_cache, *tables, wide_sinks, softmax_scale, softcap, left, right, out, lse, isa, numerics
    )
    return out, lse


@torch.library.register_kernel("swiftk::store_kv_", ("cpu", "cuda"))
def _store(k, v, k_cache, v_cache, slot_mapping):
    store_kv_out(_rows(k), _rows(v), k_cache, v_cache, slot_mapping.contiguous())


@torch.library.register_fake("swiftk::paged_attention")
def _paged_fake(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, numerics, isa
):  # fmt: skip
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=acc_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.register_fake("swiftk::store_kv_")
def _store_fake(k, v, k_cache, v_cache, slot_mapping):
    pass


# --- public ------------------------------------------------------------------------------------------------------


def _check_cache(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_heads: int | None, head_dim: int, why: str) -> None:
    heads = "kv_heads" if kv_heads is None else kv_heads
    if k_cache.dim() != 4 or k_cache.shape[3] != head_dim or kv_heads not in (None, k_cache.shape[2]):
        raise ValueError(
            f"{op}: k_cache has shape {tuple(k_cache.shape)}, {why} needs (blocks, block_size, {heads}, {head_dim})"
        )
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape), f"k_cache {tuple(k_cache.shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[1] == 0 or (cache.stride(3) != 1 and head_dim > 1):
            have = f"shape {tuple(cache.shape)}, strides {cache.stride()}"
            raise ValueError(f"{op}: {name} has {have}, wants block_size >= 1 and a contiguous head_dim")


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, *, softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, sinks: torch.Tensor | None = None, return_lse: bool = False, numerics: str = "auto",
    isa: str = "auto",
):  # fmt: skip
    """Attention of the last tokens of each sequence to all of it, keys and values in a paged cache. No autograd.

    Args:
        q: (total_q, heads, head_dim), bf16, fp32 or fp64, head_dim 1 to 512; any strides (last one 1: no copy).
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) like q, head_dim contiguous, any other strides, any
            block_size >= 1; query head h reads KV head h // (heads / kv_heads).
        block_table: int32 (batch, max_blocks); row i holds the blocks of sequence i in order. Entries past
            ceil(cache_seqlens[i] / block_size) are not read, nor are the tokens past cache_seqlens[i] in the last block.
        cache_seqlens: int32 (batch,): keys of each sequence, those of its queries included (`store_kv_` comes first). 0 pads
            the batch: the sequence's queries get out 0, lse -inf.
        cu_seqlens_q: int32 (batch + 1,), from 0, not decreasing; sequence i has the queries q[cu[i] : cu[i + 1]], possibly
            none, at its last positions. None: one query each, total_q = batch. Tokens past cu[-1]: out 0, lse -inf.
        softmax_scale, window_size, softcap, sinks, isa: as in `varlen_attention`, causal (window_size[1] has no effect).
        return_lse: also return lse (heads, total_q): natural log, without the sink, fp32 (fp64 for fp64).
        numerics: on CUDA, "invariant" is `varlen_attention`'s kernel whatever the number of queries: its bits, the same in a
            prefill, in chunks and decoded alone; "auto" cuts the keys into splits where there are few queries a sequence, which
            a few long sequences need for speed. No effect on the CPU.
    Returns: out like q, contiguous; with return_lse (out, lse).
    Raises: ValueError for a wrong shape, dtype, device or option, for a length or block that is out of range (on CUDA seen
        under TRITON_DEBUG=1 alone, clamped else), for fp64 on CUDA, or where autograd would record; on CUDA ImportError
        without Triton.
    """
    op = "paged_attention"
    check_floating(op, q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, wants (total_q, heads, head_dim)")
    _check_cache(op, k_cache, v_cache, None, q.shape[2], f"q {tuple(q.shape)}")
    _check(op, q, k_cache[:, 0], v_cache[:, 0], window_size, softcap, sinks, isa)
    check_numerics(op, numerics)
    if q.is_cuda and q.dtype == torch.float64:
        raise ValueError(f"{op}: q has dtype torch.float64, wants torch.bfloat16 or torch.float32 on CUDA; move it to the CPU")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, sinks)):
        raise ValueError(f"{op}: q, k_cache, v_cache or sinks has requires_grad, wants torch.no_grad(); use varlen_attention")
    _check_int32(op, "block_table", block_table, q, "(batch, max_blocks)", lambda shape: len(shape) == 2)
    batch = block_table.shape[0]
    rows = f"block_table has {batch} rows"
    _check_int32(op, "cache_seqlens", cache_seqlens, q, f"({batch},): {rows}", lambda shape: shape == (batch,))
    if cu_seqlens_q is None:
        if q.shape[0] != batch:
            raise ValueError(f"{op}: q has {q.shape[0]} tokens, wants {batch}, one per row of block_table, or cu_seqlens_q")
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    _check_int32(op, "cu_seqlens_q", cu_seqlens_q, q, f"({batch + 1},): {rows}", lambda shape: shape == (batch + 1,))
    scale = _scale(op, q, softmax_scale)
    left, right = _window(True, window_size)
    out, lse = torch.ops.swiftk.paged_attention(
        q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, scale, float(softcap), left, right, numerics, isa
    )
    return (out, lse) if return_lse else out


def store_kv_(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Writes the keys and values of tokens into a paged cache, in place. No autograd.

    Args:
        k, v: (tokens, kv_heads, head_dim), bf16, fp32 or fp64; any strides (last one 1: no copy).
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) like k, head_dim contiguous.
        slot_mapping: int64 (tokens,): block * block_size + offset, or -1 to skip the token. Slots of two tokens differ.
    Raises: ValueError for a wrong shape, dtype, device or slot (then nothing is written; on CUDA a wrong slot is skipped, and
        seen under TRITON_DEBUG=1), or where autograd would record; on CUDA ImportError without Triton.
    """
    op = "store_kv_"
    check_floating(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if k.dim() != 3:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, wants (tokens, kv_heads, head_dim)")
    check_shape(op, "v", v, tuple(k.shape), f"k {tuple(k.shape)}")
    _check_cache(op, k_cache, v_cache, k.shape[1], k.shape[2], f"k {tuple(k.shape)}")
    check_dtype(op, "slot_mapping", slot_mapping, torch.int64, k.device, "k")
    check_shape(op, "slot_mapping", slot_mapping, (k.shape[0],), f"k {tuple(k.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, k_cache, v_cache)):
        raise ValueError(f"{op}: k, v, k_cache or v_cache has requires_grad, wants torch.no_grad()")
    torch.ops.swiftk.store_kv_(k, v, k_cache, v_cache, slot_mapping)

"""paged_attention: decoding (one query a sequence, bound by reading K and V) and a chunk of a prefill, against torch SDPA on
keys that lie gathered, one dense tensor for all sequences.

Decoding walks through as many caches as it takes to find each one cold, as the layers of a model do. Blocks are in random
order and the tokens of a head lie together (kernels/attention/paged.py says why); SDPA reads (batch, kv_heads, context, d).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from swiftk.benchmarks.harness import Case, Options
from swiftk.benchmarks.kernels.bench_linear import COLD_BYTES
from swiftk.kernels.attention.paged import gather_ref, paged_attention_out, paged_attention_ref
from swiftk.testing.accuracy import assert_accurate

BLOCK_SIZE = 16
HEADS = ((16, 8, 128), (8, 4, 64))  # query heads, KV heads, head_dim: of Qwen3-0.6B and of the 29 M training benchmark


GPU_HEADS = (32, 8, 128)  # of an 8B model


def cases(options: Options) -> Iterator[Case]:
    if options.device == "cuda" and not options.quick:
        for batch, context in ((32, 4096), (1, 4096), (64, 1024), (8, 32768)):
            yield case(batch, context, 1, GPU_HEADS, torch.bfloat16, options)
        yield case(1, 4096, 512, GPU_HEADS, torch.bfloat16, options)
        for batch in (32, 1):
            yield case(batch, 4096, 1, GPU_HEADS, torch.bfloat16, options, "invariant")
        return
    for dtype in (torch.float32, torch.bfloat16):
        if options.quick:
            yield case(2, 33, 1, (4, 2, 16), dtype, options)
            yield case(1, 40, 8, (4, 2, 16), dtype, options)
            continue
        for heads in HEADS:
            for batch, context in itertools.product((1, 32), (512, 4096)):
                yield case(batch, context, 1, heads, dtype, options)
            yield case(1, 2048, 512, heads, dtype, options)


def case(
    batch: int, context: int, queries: int, shape: tuple[int, int, int], dtype: torch.dtype, options: Options,
    numerics: str = "auto",
) -> Case:  # fmt: skip
    """The last `queries` tokens of `batch` sequences of `context` tokens."""
    heads, kv_heads, dim = shape
    device = options.device
    a_row = -(-context // BLOCK_SIZE)
    size = 2 * batch * context * kv_heads * dim * dtype.itemsize
    copies = max(1, -(-COLD_BYTES // size)) if queries == 1 and not options.quick else 1
    cache = torch.randn(copies, 2, batch * a_row, kv_heads, BLOCK_SIZE, dim, dtype=dtype, device=device).transpose(3, 4)
    q = torch.randn(batch * queries, heads, dim, dtype=dtype, device=device)
    out = torch.empty_like(q)
    table = torch.randperm(batch * a_row, device=device).view(batch, a_row).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    cu_q = torch.arange(batch + 1, dtype=torch.int32, device=device) * queries
    # causal, bottom-right: one query sees every key
    mask = torch.ones(queries, context, dtype=torch.bool, device=device).tril(context - queries) if queries > 1 else None
    dense = torch.empty(copies, 2, batch, kv_heads, context, dim, dtype=dtype, device=device)
    for one, blocks in zip(dense.flatten(0, 1), cache.flatten(0, 1), strict=True):
        one.copy_(gather_ref(blocks, table, lens).view(batch, context, kv_heads, dim).transpose(1, 2))
    turn, peer_turn = itertools.cycle(cache), itertools.cycle(dense)

    def ours():
        k, v = next(turn)
        paged_attention_out(q, k, v, table, lens, cu_q, None, dim**-0.5, 0.0, -1, 0, out, None, options.isa, numerics)
        return out

    def sdpa():
        k, v = next(peer_turn)
        rows = q.view(batch, queries, heads, dim).transpose(1, 2)
        return scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=True)

    def check(y):
        some = 1 if device == "cuda" else batch  # sequences: the reference at the goal's shapes takes seconds for each
        ref = partial(paged_attention_ref, block_table=table[:some], cache_seqlens=lens[:some], cu_seqlens_q=cu_q[: some + 1])
        x, first = q[: some * queries], cache[0]
        exact = ref(x.double(), *(t.double() for t in first))[0]
        assert_accurate(y[: len(x)], ref(x, *first)[0], exact)
        assert_accurate(y[: len(x)], sdpa().transpose(1, 2).reshape(q.shape)[: len(x)], exact, "beside sdpa")

    seen = sum(context - queries + i + 1 for i in range(queries))  # keys of all queries of a sequence
    work = ("decode" if queries == 1 else f"prefill {queries}") + (" invariant" if numerics == "invariant" else "")
    return Case(
        op="paged", name=f"{work} batch {batch} context {context} {heads}/{kv_heads} x {dim}", dtype=dtype,
        run=ours, check=check,
        bytes=size + 2 * q.numel() * dtype.itemsize,  # K and V once, q read, out written
        flops=0 if queries == 1 else 4 * dim * heads * batch * seen,  # two products of 2 d
        peers={"sdpa on gathered keys": sdpa}, goal="faster than sdpa",
    )  # fmt: skip

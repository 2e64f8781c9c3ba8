"""varlen_attention: packed causal documents, forward and forward + backward, against torch SDPA document by document.

FLOPs: 4 d per query head and visible pair forward (2 products of 2 d), 2.5 times that for the backward (5 products).
Where all documents are equally long, SDPA's dense batch is the second peer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.attention import varlen_attention
from swiftk.kernels.attention.varlen import varlen_attention_ref
from swiftk.testing.accuracy import assert_accurate

MIXED = (300, 180, 420, 250, 512, 97, 289)  # a packed row of 2,048 tokens


def sdpa_documents(q, k, v, lens):
    """One call per document; (tokens, heads, dim) as varlen_attention has it, so no copy is charged to it."""
    outs, start = [], 0
    for n in lens:
        qi, ki, vi = (x[start : start + n].transpose(0, 1)[None] for x in (q, k, v))
        outs.append(scaled_dot_product_attention(qi, ki, vi, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        start += n
    return torch.cat(outs)


def sdpa_dense(q, k, v, lens):
    qb, kb, vb = (x.view(len(lens), lens[0], *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(q.shape)


def grads(f, leaves, dout):
    return torch.autograd.grad(f(*leaves), leaves, dout)


def reference(q, k, v, cu):
    return varlen_attention_ref(q, k, v, cu, causal=True)[0]


def check_out(out, qkv, cu):
    q, k, v = qkv
    assert_accurate(out, reference(q, k, v, cu), reference(q.double(), k.double(), v.double(), cu))


def check_grads(got, qkv, cu, dout):
    results = []
    for cast in (dout.dtype, torch.float64):
        leaves = [x.to(cast).requires_grad_() for x in qkv]
        results.append(grads(partial(reference, cu=cu), leaves, dout.to(cast)))
    for ours, plain, exact in zip(got, *results, strict=True):
        assert_accurate(ours, plain, exact)


def cases(options: Options) -> Iterator[Case]:
    shapes = [(MIXED, 8, 4, 64), (MIXED, 8, 4, 128), ((512,) * 4, 8, 4, 64), ((2048,), 8, 4, 64), ((2048,), 8, 2, 128)]
    for dtype in (torch.float32, torch.bfloat16):
        for lens, heads, kv_heads, dim in [((33, 20), 4, 2, 16)] if options.quick else shapes:
            cu = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=options.device)
            sizes = [(sum(lens), h, dim) for h in (heads, kv_heads, kv_heads)]
            qkv = [torch.randn(size, dtype=dtype, device=options.device) for size in sizes]
            leaves, dout = [x.clone().requires_grad_() for x in qkv], torch.randn_like(qkv[0])
            flops = int(4 * dim * heads * sum(n * (n + 1) // 2 for n in lens))
            moved = sum(x.numel() * x.element_size() for x in (*qkv, dout))  # q, k, v read, out written; backward: twice that
            shape = f"{len(lens)} docs, {sum(lens)} tokens, {heads}/{kv_heads} x {dim}"
            ours = partial(varlen_attention, cu_seqlens_q=cu, causal=True, isa=options.isa)
            peers = {"sdpa per document": partial(sdpa_documents, lens=lens)}
            if len(lens) > 1 and len(set(lens)) == 1:
                peers["sdpa dense"] = partial(sdpa_dense, lens=lens)
            yield Case(
                op="varlen", name=f"fwd {shape}", dtype=dtype, run=partial(ours, *qkv),
                check=partial(check_out, qkv=qkv, cu=cu), bytes=moved, flops=flops, goal="faster than sdpa",
                peers={name: partial(f, *qkv) for name, f in peers.items()},
            )  # fmt: skip
            yield Case(
                op="varlen", name=f"fwd+bwd {shape}", dtype=dtype, run=partial(grads, ours, leaves, dout),
                check=partial(check_grads, qkv=qkv, cu=cu, dout=dout), bytes=3 * moved, flops=int(3.5 * flops),
                goal="faster than sdpa", peers={name: partial(grads, f, leaves, dout) for name, f in peers.items()},
            )  # fmt: skip

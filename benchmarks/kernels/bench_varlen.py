"""varlen_attention: packed causal documents, forward and forward + backward, against torch SDPA document by document.

FLOPs: 4 d per query head and visible pair forward (2 products of 2 d), 2.5 times that for the backward (5 products).
Where all documents are equally long, SDPA's dense batch is the second peer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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
        one = [x[start : start + n].transpose(0, 1)[None] for x in (q, k, v)]
        outs.append(scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        start += n
    return torch.cat(outs)


def sdpa_dense(q, k, v, lens):
    batch = [x.view(len(lens), lens[0], *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
    return scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(q.shape)


def cases(options: Options) -> Iterator[Case]:
    shapes = [((33, 20), 4, 2, 16)] if options.quick else [
        (MIXED, 8, 4, 64), (MIXED, 8, 4, 128), ((512,) * 4, 8, 4, 64), ((2048,), 8, 4, 64), ((2048,), 8, 2, 128),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for lens, heads, kv_heads, dim in shapes:
            cu = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=options.device)
            sizes = [(sum(lens), h, dim) for h in (heads, kv_heads, kv_heads)]
            qkv = [torch.randn(size, dtype=dtype, device=options.device) for size in sizes]
            leaves = [x.clone().requires_grad_() for x in qkv]
            dout = torch.randn_like(qkv[0])
            flops = int(4 * dim * heads * sum(n * (n + 1) // 2 for n in lens))
            shape = f"{len(lens)} docs, {sum(lens)} tokens, {heads}/{kv_heads} x {dim}"

            def ours(q, k, v, cu=cu):
                return varlen_attention(q, k, v, cu, causal=True, isa=options.isa)

            def check(out, qkv=qkv, cu=cu):
                exact = varlen_attention_ref(*(x.double() for x in qkv), cu, causal=True)[0]
                assert_accurate(out, varlen_attention_ref(*qkv, cu, causal=True)[0], exact)

            def grads(f, *extra, leaves=leaves, dout=dout):
                return torch.autograd.grad(f(*leaves, *extra), leaves, dout)

            def check_grads(got, qkv=qkv, cu=cu, dout=dout):
                results = []
                for cast in (dtype, torch.float64):
                    copies = [x.to(cast).requires_grad_() for x in qkv]
                    out = varlen_attention_ref(*copies, cu, causal=True)[0]
                    results.append(torch.autograd.grad(out, copies, dout.to(cast)))
                for ours_x, plain, exact in zip(got, *results, strict=True):
                    assert_accurate(ours_x, plain, exact)

            peers = {"sdpa per document": sdpa_documents}
            if len(lens) > 1 and len(set(lens)) == 1:
                peers["sdpa dense"] = sdpa_dense
            moved = sum(x.numel() * x.element_size() for x in (*qkv, dout))  # q, k, v read, out written
            yield Case(
                op="varlen", name=f"fwd {shape}", dtype=dtype, run=lambda ours=ours, qkv=qkv: ours(*qkv), check=check, bytes=moved,
                flops=flops, goal="faster than sdpa",
                peers={name: lambda f=f, qkv=qkv, lens=lens: f(*qkv, lens) for name, f in peers.items()},
            )  # fmt: skip
            yield Case(
                op="varlen", name=f"fwd+bwd {shape}", dtype=dtype, run=lambda grads=grads, ours=ours: grads(ours), check=check_grads,
                bytes=4 * moved, flops=int(3.5 * flops), goal="faster than sdpa",
                peers={name: lambda f=f, grads=grads, lens=lens: grads(f, lens) for name, f in peers.items()},
            )  # fmt: skip

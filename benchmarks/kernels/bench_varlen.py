"""varlen_attention: packed causal documents, forward and backward, against torch SDPA document by document; on a GPU at the
goal's shapes (dense causal 8k, packed causal 16k with documents of at most a quarter, 64/8 heads of 128) against flash_attn,
cuDNN and FlexAttention where they are installed.

FLOPs: 4 d per query head and visible pair forward (2 products of 2 d), 2.5 times that for the backward (5 products; ours on a
GPU does 7 and is charged 5). Where all documents are equally long, SDPA's dense batch is a peer.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.attention import varlen_attention
from swiftk.kernels.attention.varlen import varlen_attention_ref
from swiftk.testing.accuracy import assert_accurate

MIXED = (300, 180, 420, 250, 512, 97, 289)  # a packed row of 2,048 tokens
PACKED = (4096, 1500, 2300, 700, 3584, 1024, 2200, 980)  # 16,384 tokens
GOALS = {(8192,): ("430 TFLOP/s", "260 TFLOP/s"), PACKED: ("400 TFLOP/s", "230 TFLOP/s")}  # forward, backward; on one H200


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


def flex(cu, tokens, device):
    """FlexAttention, compiled, with a block mask of the documents that is made outside the timed call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.bucketize(torch.arange(tokens, device=device), cu[1:], right=True)

    def visible(_batch, _head, i, j):
        return (document[i] == document[j]) & (j <= i)

    mask, attend = create_block_mask(visible, None, None, tokens, tokens, device=device), torch.compile(flex_attention)

    def f(q, k, v):
        a, b, c = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(a, b, c, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return f


def gpu_peers(cu, lens, options: Options):
    """{name: f(q, k, v)} of what is installed and runs. cuDNN takes one document a call: a peer where there is one."""
    found: dict[str, Any] = {"flex_attention": flex(cu, sum(lens), options.device)} if options.wants("flex_attention") else {}
    for backend in ("flash_attn", "cudnn") if len(lens) == 1 else ("flash_attn",):
        if options.wants(backend):
            found[backend] = partial(varlen_attention, cu_seqlens_q=cu, causal=True, backend=backend)
    small = [torch.zeros(sum(lens), h, 128, dtype=torch.bfloat16, device=options.device) for h in (8, 1, 1)]
    peers = {}
    for name, call in found.items():
        try:
            call(*small)
            peers[name] = call
        except (ImportError, RuntimeError) as error:  # not installed, or its version refuses
            print(f"varlen: no peer {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return peers


def reference(q, k, v, cu):
    return varlen_attention_ref(q, k, v, cu, causal=True)[0]


def compared(tensors, cu, kv_heads):
    """What the reference looks at: everything, on a GPU the last document for one KV head and its group, which depends on
    nothing else."""
    if not tensors[0].is_cuda:
        return tensors, cu
    start, end = cu[-2:].tolist()
    return [x[start:end, : x.shape[1] // kv_heads] for x in tensors], torch.tensor([0, end - start], dtype=torch.int32)


def check_out(out, qkv, cu):
    (q, k, v, out), cu = compared([*qkv, out], cu, qkv[1].shape[1])
    assert_accurate(out, reference(q, k, v, cu), reference(q.double(), k.double(), v.double(), cu))


def check_grads(got, qkv, cu, dout):
    (*qkv, dout, dq, dk, dv), cu = compared([*qkv, dout, *got], cu, qkv[1].shape[1])
    results = []
    for cast in (dout.dtype, torch.float64):
        leaves = [x.to(cast).requires_grad_() for x in qkv]
        results.append(grads(partial(reference, cu=cu), leaves, dout.to(cast)))
    for ours, plain, exact in zip((dq, dk, dv), *results, strict=True):
        assert_accurate(ours, plain, exact)


def gpu_cases(options: Options) -> Iterator[Case]:
    """Forward and backward apart, in bf16."""
    heads, kv_heads, dim, dtype = 64, 8, 128, torch.bfloat16
    for lens, (forward_goal, backward_goal) in GOALS.items():
        cu = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=options.device)
        sizes = [(sum(lens), h, dim) for h in (heads, kv_heads, kv_heads)]
        qkv = [torch.randn(size, dtype=dtype, device=options.device) for size in sizes]
        leaves, dout = [x.clone().requires_grad_() for x in qkv], torch.randn_like(qkv[0])
        flops = int(4 * dim * heads * sum(n * (n + 1) // 2 for n in lens))
        moved = sum(x.nbytes for x in (*qkv, dout))
        shape = f"{len(lens)} docs, {sum(lens)} tokens, {heads}/{kv_heads} x {dim}"
        ours, peers = partial(varlen_attention, cu_seqlens_q=cu, causal=True), gpu_peers(cu, lens, options)

        def backward(f, leaves=leaves, dout=dout):
            return partial(torch.autograd.grad, f(*leaves), leaves, dout, retain_graph=True)

        yield Case(
            op="varlen", name=f"fwd {shape}", dtype=dtype, run=partial(ours, *qkv), check=partial(check_out, qkv=qkv, cu=cu),
            bytes=moved, flops=flops, goal=forward_goal, peers={name: partial(f, *qkv) for name, f in peers.items()},
        )  # fmt: skip
        yield Case(
            op="varlen", name=f"bwd {shape}", dtype=dtype, run=backward(ours),
            check=partial(check_grads, qkv=qkv, cu=cu, dout=dout), bytes=2 * moved, flops=int(2.5 * flops), goal=backward_goal,
            peers={name: backward(f) for name, f in peers.items()},
        )  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    if options.device == "cuda" and not options.quick:
        yield from gpu_cases(options)
        return
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

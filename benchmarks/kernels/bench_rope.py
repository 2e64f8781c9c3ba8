"""rope of the queries and the keys of one layer: forward, and forward + backward. Bandwidth-bound.

The peer is transformers' apply_rotary_pos_emb with its cos and sin already gathered and in the dtype of q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from swiftk.benchmarks.harness import Case, Options, liger
from swiftk.kernels.rope import rope, rope_ref, rope_table
from swiftk.testing.accuracy import assert_accurate


def cases(options: Options) -> Iterator[Case]:
    # tokens, heads of q, heads of k, head_dim
    shapes = [(2048, 16, 8, 128), (2048, 8, 4, 64), (1, 16, 8, 128)]
    if options.device == "cuda":
        shapes = [(16384, 32, 8, 128), (1, 32, 8, 128)]
    shapes = [(64, 2, 1, 64)] if options.quick else shapes
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            yield case(*shape, backward=False, dtype=dtype, options=options)
            yield case(*shape, backward=True, dtype=dtype, options=options)


def transformers_rope(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> Callable | None:
    try:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    except ImportError:
        return None
    table = [torch.cat((t, t), -1).to(dtype)[None] for t in (cos, sin)]

    def run(q, k):
        q, k = apply_rotary_pos_emb(q[None], k[None], *table, unsqueeze_dim=2)
        return q[0], k[0]

    return run


def case(
    tokens: int, q_heads: int, k_heads: int, head_dim: int, *, backward: bool, dtype: torch.dtype, options: Options
) -> Case:  # fmt: skip
    cos, sin = (t.to(options.device) for t in rope_table(head_dim, tokens))
    positions = torch.arange(tokens, device=options.device)
    qk, dqk = (
        [torch.randn(tokens, h, head_dim, dtype=dtype, device=options.device) for h in (q_heads, k_heads)] for _ in range(2)
    )

    def run(f, dtype=dtype):
        inputs = [t.detach().to(dtype).requires_grad_(backward) for t in qk]
        outputs = f(*inputs)
        return torch.autograd.grad(outputs, inputs, [t.to(dtype) for t in dqk]) if backward else outputs

    def ours(q, k):
        return rope(q, cos, sin, positions, isa=options.isa), rope(k, cos, sin, positions, isa=options.isa)

    def reference(q, k):
        c, s = (t.to(torch.promote_types(t.dtype, q.dtype)) for t in (cos, sin))
        return rope_ref(q, c, s, positions), rope_ref(k, c, s, positions)

    def check(results):
        for got, plain, exact in zip(results, run(reference), run(reference, torch.float64), strict=True):
            assert_accurate(got, plain, exact)

    theirs = transformers_rope(cos, sin, dtype) if options.wants("transformers") else None
    peers = {"transformers": lambda: run(theirs)} if theirs else {}
    other = liger(options)
    if other:
        table = [torch.cat((t, t), -1).to(dtype)[None] for t in (cos, sin)]
        copies = [t.clone() for t in qk]  # it writes over its inputs

        def liger_rope():
            inputs = [t.detach().requires_grad_(backward) for t in copies]
            with torch.set_grad_enabled(backward):
                outputs = other.liger_rope(*(t[None].transpose(1, 2) for t in inputs), *table)
            return torch.autograd.grad(outputs, inputs, [t[None].transpose(1, 2) for t in dqk]) if backward else outputs

        peers["liger"] = liger_rope
    moved = 2 * sum(t.numel() * t.element_size() for t in qk)  # q, k read and written; the backward as much of dq, dk
    return Case(
        op="rope", name=f"{'fwd+bwd' if backward else 'fwd'} {tokens} x ({q_heads} + {k_heads}) x {head_dim}", dtype=dtype,
        check=check,
        run=lambda: run(ours),
        bytes=2 * moved if backward else moved,
        peers=peers,
        goal="<= 1x transformers" if options.device == "cpu" else "90 % of HBM, at least liger",
    )  # fmt: skip

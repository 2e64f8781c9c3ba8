"""rope of the queries and the keys of one layer: forward, and forward + backward. Bandwidth-bound.

The peer is transformers' apply_rotary_pos_emb with its cos and sin already gathered and in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.rope import rope, rope_ref, rope_table
from swiftk.testing.accuracy import assert_accurate


def transformers_rope(cos, sin, positions, dtype) -> Callable | None:
    try:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    except ImportError:
        return None
    both = [torch.cat((t[positions], t[positions]), -1).to(dtype)[None] for t in (cos, sin)]

    def run(q, k):
        q, k = apply_rotary_pos_emb(q[None], k[None], *both, unsqueeze_dim=2)
        return q[0], k[0]

    return run


def with_gradients(f, inputs, gradients):
    def run():
        outputs = f(*inputs)
        return *outputs, *torch.autograd.grad(outputs, inputs, gradients)

    return run


def cases(options: Options) -> Iterator[Case]:
    # tokens, heads of q, heads of k, head_dim
    shapes = [(64, 2, 1, 64)] if options.quick else [(4096, 16, 8, 128), (2048, 8, 4, 64), (1, 16, 8, 128)]
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, q_heads, k_heads, head_dim in shapes:
            cos, sin = (t.to(options.device) for t in rope_table(head_dim, 4096))
            positions = torch.arange(tokens, device=options.device)
            tensors = [torch.randn(tokens, h, head_dim, dtype=dtype, device=options.device) for h in (q_heads, k_heads) * 2]
            inputs, gradients = [t.requires_grad_() for t in tensors[:2]], tensors[2:]
            moved = 2 * sum(t.numel() * t.element_size() for t in inputs)  # q, k read, written

            def ours(q, k, cos=cos, sin=sin, positions=positions):
                return rope(q, cos, sin, positions, isa=options.isa), rope(k, cos, sin, positions, isa=options.isa)

            def ref(q, k, cos=cos, sin=sin, positions=positions):
                return tuple(rope_ref(t, cos.to(torch.promote_types(t.dtype, cos.dtype)),
                                      sin.to(torch.promote_types(t.dtype, sin.dtype)), positions) for t in (q, k))  # fmt: skip

            def check(results, inputs=inputs, gradients=gradients, ref=ref):
                wide = [t.detach().double().requires_grad_() for t in inputs]
                exact = with_gradients(ref, wide, [g.double() for g in gradients])()
                plain = with_gradients(ref, inputs, gradients)()
                for got, same, want in zip(results, plain, exact, strict=False):
                    assert_accurate(got, same, want)

            theirs = transformers_rope(cos, sin, positions, dtype) if options.peers else None
            shape = f"{tokens} x ({q_heads} + {k_heads}) x {head_dim}"
            q, k = (t.detach() for t in inputs)
            yield Case(
                op="rope", name=f"fwd {shape}", dtype=dtype,
                run=lambda f=ours, q=q, k=k: f(q, k), check=check,
                bytes=moved,
                peers={"transformers": lambda f=theirs, q=q, k=k: f(q, k)} if theirs else {},
                goal="<= 1x transformers",
            )  # fmt: skip
            yield Case(
                op="rope", name=f"fwd+bwd {shape}", dtype=dtype,
                run=with_gradients(ours, inputs, gradients), check=check,
                bytes=2 * moved,  # the backward moves the gradients as the forward moves q and k
                peers={"transformers": with_gradients(theirs, inputs, gradients)} if theirs else {},
                goal="<= 1x transformers",
            )  # fmt: skip

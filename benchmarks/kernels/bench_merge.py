"""merge_attention: forward. Bandwidth-bound: 2 partial outputs read, 1 written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.attention import merge_attention
from swiftk.kernels.attention.merge import merge_attention_ref
from swiftk.testing.accuracy import assert_accurate


def check(merged, inputs):
    plain, exact = merge_attention_ref(*inputs), merge_attention_ref(*(x.double() for x in inputs))
    for ours, p, e in zip(merged, plain, exact, strict=True):
        assert_accurate(ours, p, e)


def cases(options: Options) -> Iterator[Case]:
    shapes = [(64, 4, 32)] if options.quick else [(4096, 8, 128), (2048, 32, 64)]
    for tokens, heads, dim in shapes:
        dtype = torch.float32  # the accumulate dtype: what partial results are kept in
        outs = [torch.randn(tokens, heads, dim, dtype=dtype, device=options.device) for _ in range(2)]
        lses = [torch.randn(heads, tokens, dtype=dtype, device=options.device) for _ in range(2)]
        inputs = (outs[0], lses[0], outs[1], lses[1])
        yield Case(
            op="merge", name=f"fwd {tokens} x {heads} x {dim}", dtype=dtype,
            run=partial(merge_attention, *inputs, isa=options.isa), check=partial(check, inputs=inputs),
            bytes=3 * outs[0].numel() * 4 + 3 * lses[0].numel() * 4,
            peers={"torch": partial(merge_attention_ref, *inputs)},
        )  # fmt: skip

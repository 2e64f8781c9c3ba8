"""Data parallel: each rank's gradient is a part of one sum, so the parts are added; nothing is divided here.

The divisor (the global token count) is in the loss before the backward. Gradients travel in flat buckets of a fixed
order and size, every parameter in every bucket on every rank: one that got no gradient on a rank counts as zero there.
Elements sent per rank and step: 2 P (d-1)/d for P parameters on d ranks. Overlap with the backward is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from swiftk.parallel.mesh import Mesh
from swiftk.parallel.spec import ParamSpec

BUCKET_ELEMENTS = 8 << 20  # 32 MiB of fp32: large against gloo's latency, small against the gradients


def _buckets(params: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for p in params:
        if bucket and (size + p.numel() > BUCKET_ELEMENTS or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def sum_gradients_(params: Mapping[str, torch.nn.Parameter], specs: Mapping[str, ParamSpec], mesh: Mesh) -> None:
    """Sums .grad of every trainable parameter over its spec's grad_axes, in place (its dual: identity in the forward)."""
    trainable = {name: p for name, p in params.items() if p.requires_grad}
    for p in trainable.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    groups = sorted({specs[name].grad_axes for name in trainable})
    for axes in groups:
        members = [p for name, p in trainable.items() if specs[name].grad_axes == axes]
        comms = [axis.comm for axis in (getattr(mesh, name) for name in axes) if axis.size > 1]
        for bucket in _buckets(members) if comms else ():
            grads = [p.grad for p in bucket]
            flat = torch.cat([g.reshape(-1) for g in grads])
            for comm in comms:
                comm.all_reduce_(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

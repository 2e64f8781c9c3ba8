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


def _buckets(grads: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for g in grads:
        if bucket and (size + g.numel() > BUCKET_ELEMENTS or g.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(g)
        size += g.numel()
    if bucket:
        yield bucket


def sum_gradients_(params: Mapping[str, torch.nn.Parameter], specs: Mapping[str, ParamSpec], mesh: Mesh) -> None:
    """Sums .grad of every trainable parameter over its spec's grad_axes, in place (its dual: identity in the forward)."""
    trainable = {name: p for name, p in params.items() if p.requires_grad}
    for p in trainable.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for axes in sorted({specs[name].grad_axes for name in trainable}):
        comms = [axis.comm for axis in (getattr(mesh, name) for name in axes) if axis.size > 1]
        members = [p.grad for name, p in trainable.items() if specs[name].grad_axes == axes and p.grad is not None]
        for bucket in _buckets(members) if comms else ():
            flat = torch.cat([g.reshape(-1) for g in bucket])
            for comm in comms:
                comm.all_reduce_(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))

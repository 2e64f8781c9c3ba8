"""Small tensors of the host on their way to the device, several in one copy that nobody waits for."""

from __future__ import annotations

import itertools

import torch

ALIGN = 16  # bytes: Triton compiles another kernel for an address that is no multiple


def send(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The CPU's tensors on the device: on the CPU they themselves. To a GPU in one copy, which from pageable memory the host
    would wait for; the pinned memory is fresh, and torch gives it to nobody else before the copy has left it."""
    if device.type == "cpu":
        return tensors
    starts = [*itertools.accumulate((-(-t.nbytes // ALIGN) * ALIGN for t in tensors), initial=0)]
    here = torch.empty(starts.pop(), dtype=torch.uint8, pin_memory=True)
    for at, t in zip(starts, tensors, strict=True):
        here[at : at + t.nbytes].view(t.dtype).copy_(t.flatten())
    there = here.to(device, non_blocking=True)
    return tuple(there[at : at + t.nbytes].view(t.dtype).view(t.shape) for at, t in zip(starts, tensors, strict=True))

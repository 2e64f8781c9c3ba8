"""adamw_8bit: one step over the LoRA tensors of an 8B model. Bandwidth-bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.adamw_8bit import Moments, Update, adamw_8bit_, adamw_8bit_ref, new_moments

# Llama-3.1-8B: (out, in) of q, k, v, o, gate, up, down; rank 16 on each of 32 layers: 448 tensors, 41.9 M parameters
LINEARS = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
RANK, LAYERS = 16, 32
RATES: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def cases(options: Options) -> Iterator[Case]:
    layers = 1 if options.quick else LAYERS
    shapes = [s for out, into in LINEARS for s in ((RANK, into), (out, RANK))] * layers
    for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
        yield step(shapes, dtype, options)


def step(shapes: list[tuple[int, int]], dtype: torch.dtype, options: Options) -> Case:
    params = [torch.randn(shape, device=options.device).mul(0.02).to(dtype) for shape in shapes]
    grads = [torch.randn_like(p).mul_(1e-3) for p in params]
    moments = [new_moments(p) for p in params]
    adamw_8bit_([Update(p, g, m, 1, **RATES) for p, g, m in zip(params, grads, moments, strict=True)])
    sample = Update(params[1].clone(), grads[1], Moments(*(t.clone() for t in moments[1] if t is not None)), 2, **RATES)
    want = adamw_8bit_ref(sample)

    def run() -> torch.Tensor:
        adamw_8bit_([Update(p, g, m, 2, **RATES) for p, g, m in zip(params, grads, moments, strict=True)], isa=options.isa)
        return params[1]

    def check(got: torch.Tensor) -> None:  # of the first call
        assert torch.equal(got, want[0]) and all(torch.equal(a, b) for a, b in zip(moments[1], want[1], strict=True))  # type: ignore[arg-type]

    elements = sum(p.numel() for p in params)
    # an element: g read, p read and written, two codes read and written; a block of 256: two absmax read and written
    size = elements * (3 * dtype.itemsize + 4) + elements // 256 * 16
    return Case(
        op="adamw_8bit", name=f"{len(params)} tensors, {elements / 1e6:.1f} M", dtype=dtype, check=check, run=run, bytes=size,
        peers=peers(params, grads, options), goal="<= 1.2x the time to move its bytes",
    )  # fmt: skip


def peers(params: list[torch.Tensor], grads: list[torch.Tensor], options: Options) -> dict[str, Any]:
    def optimizer_of(build: Any) -> Any:
        mine = [torch.nn.Parameter(p.clone()) for p in params]
        for p, g in zip(mine, grads, strict=True):
            p.grad = g
        return build(mine, **RATES)

    found: dict[str, Any] = {}
    if options.wants("torch fused"):  # fp32 moments: 28 bytes an element
        found["torch fused"] = optimizer_of(lambda p, **rates: torch.optim.AdamW(p, fused=True, **rates)).step
    if options.wants("bitsandbytes"):
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            return found
        found["bitsandbytes"] = optimizer_of(AdamW8bit).step
    return found

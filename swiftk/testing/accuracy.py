"""The one tolerance rule: an op's error is at most twice the error of plain torch in the same dtype, both against fp64.

The 2x and the floor leave room for another order of summation and for nothing else: a few ulps where sums are rounded in the
dtype itself, one for bf16 and fp16, whose sums are fp32 and rounded once.
"""

from __future__ import annotations

import torch

# relative to the largest magnitude of the fp64 result; 8 ulps of bf16 would be 6 %
FLOOR_ULPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 8, torch.float64: 8}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| over max |want|, in fp64; NaN anywhere is infinite."""
    got, want = got.detach().double(), want.detach().double()
    if got.numel() == 0:
        return 0.0
    worst = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
    return float("inf") if worst != worst else worst


def assert_accurate(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """`got` is ours, `plain` torch in the same dtype, `exact` fp64. Shapes and dtypes of got and plain agree."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, wants {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, wants {plain.dtype}"
    bound = 2 * error(plain, exact) + FLOOR_ULPS[got.dtype] * torch.finfo(got.dtype).eps
    assert bound < float("inf"), f"{what}: plain torch or the fp64 result has NaN or infinity, which bounds nothing"
    ours = error(got, exact)
    assert ours <= bound, f"{what}: error {ours:.3g} against fp64, wants at most {bound:.3g}"

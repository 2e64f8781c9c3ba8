"""The one tolerance rule: an op's error is at most twice the error of plain torch in the same dtype, both against fp64.

The 2x and the floor of a few ulps leave room for another order of summation and for nothing else.
"""

from __future__ import annotations

import torch

FLOOR_ULPS = 8  # of the dtype, relative to the largest magnitude of the fp64 result


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
    bound = 2 * error(plain, exact) + FLOOR_ULPS * torch.finfo(got.dtype).eps
    ours = error(got, exact)
    assert ours <= bound, f"{what}: error {ours:.3g} against fp64, wants at most {bound:.3g}"

"""The tolerance rule itself: what it must refuse."""

from __future__ import annotations

import pytest
import torch

from swiftk.testing.accuracy import assert_accurate

EXACT = torch.linspace(-1, 1, 50, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_twice_plain_and_the_floor(dtype):
    plain, eps = EXACT.to(dtype), torch.finfo(dtype).eps
    assert_accurate(plain, plain, EXACT)
    ulps = 2 if dtype == torch.bfloat16 else 10
    with pytest.raises(AssertionError, match="scale: error"):
        assert_accurate((EXACT * (1 + 2 * ulps * eps)).to(dtype), plain, EXACT, "scale")


def test_what_is_not_finite_bounds_nothing():
    bad = EXACT.float().index_fill(0, torch.tensor(3), float("nan"))
    good = EXACT.float()
    for got, plain, exact in ((bad, good, EXACT), (bad, bad, EXACT), (good, bad, EXACT), (bad, bad, bad.double())):
        with pytest.raises(AssertionError):
            assert_accurate(got, plain, exact)


def test_shape_and_dtype_count():
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(EXACT[:4].float(), EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(EXACT, EXACT.float(), EXACT)

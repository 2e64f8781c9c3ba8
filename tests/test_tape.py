"""Recorded native calls: nothing happens while they are recorded, and a run reads what the memory holds by then."""

from __future__ import annotations

import threading

import pytest
import torch

from swiftk.kernels._native import native
from swiftk.kernels.linear import linear, linear_out
from swiftk.kernels.rms_norm import rms_norm, rms_norm_out
from swiftk.kernels.rope import rope, rope_out, rope_table
from swiftk.kernels.swiglu import swiglu, swiglu_out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_run_equals_the_calls(dtype):
    x, residual, w = (torch.randn(3, 64, dtype=dtype) for _ in range(3))
    norm, weight, positions = torch.randn(64, dtype=dtype), torch.randn(128, 64, dtype=dtype), torch.tensor([4, 0, 7])
    cos, sin = rope_table(16, 8, dtype=torch.promote_types(dtype, torch.float32))
    rstd = torch.empty(3, dtype=cos.dtype)
    h, z, y = torch.full_like(x, torch.nan), x.new_full((3, 128), torch.nan), torch.full_like(x, torch.nan)
    tape = native().Tape()
    tape.start()
    rms_norm_out(x, norm, 1e-6, h, rstd, residual=residual)
    linear_out(h, weight, None, z)
    swiglu_out(z[:, :64], z[:, 64:], y)
    rope_out(y.view(3, 4, 16), cos, sin, positions, y.view(3, 4, 16))
    tape.stop()
    assert len(tape) == 4 and y.isnan().all() and h.isnan().all()
    for _ in range(2):
        want_x = x + residual
        want = linear(rms_norm(want_x, norm, 1e-6), weight)
        want = rope(swiglu(want[:, :64], want[:, 64:]).view(3, 4, 16), cos, sin, positions)
        tape.run()
        assert torch.equal(x, want_x) and torch.equal(y.view(3, 4, 16), want)
        x.copy_(w)
        positions.copy_(torch.tensor([1, 2, 3]))


def test_one_tape_records_at_a_time_and_only_its_thread():
    tape, other = native().Tape(), native().Tape()
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    tape.start()
    with pytest.raises(ValueError, match=r"^Tape: another one records on this thread, wants one at a time$"):
        other.start()
    worker = threading.Thread(target=swiglu_out, args=(x, x, y))
    worker.start()
    worker.join()
    tape.stop()
    assert len(tape) == 0 and y.any()
    other.stop()  # of one that does not record: nothing

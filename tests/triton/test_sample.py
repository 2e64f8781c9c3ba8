from __future__ import annotations

import pytest
import torch

from swiftk.kernels import _sample_triton
from swiftk.kernels._native import native
from swiftk.kernels.sample import (
    adjust_logits_,
    adjust_logits_ref,
    row_logprobs,
    row_logprobs_ref,
    row_threads,
    sample,
    sample_out,
    sample_ref,
)
from swiftk.testing.accuracy import assert_accurate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_sample_triton, "BLOCK", 64)


def mixed(rows, vocab, dtype):
    """Rows of every kind: spread out, with many ties, with banned tokens; every filter on and off; greedy and hardly warm."""
    z = (torch.randn(rows, vocab, dtype=torch.float64) * 6 * torch.rand(rows, 1)).to(dtype)
    z[::3] = z[::3].round()
    z[1::4, : vocab // 2] = -torch.inf
    temperature, top_p, min_p = 2 * torch.rand(rows), 0.01 + 0.99 * torch.rand(rows), 0.3 * torch.rand(rows)
    temperature[::5], temperature[1], temperature[2], temperature[3] = 0, 1e-6, 1e-30, 1e4
    top_k = torch.randint(0, vocab, (rows,), dtype=torch.int32)
    top_k[::2], top_k[4], top_k[9], top_k[11] = 0, vocab + 3, vocab // 2, 1
    top_p[::3], min_p[::4], min_p[7] = 1, 0, 1
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(2**40, (rows,))
    return z, (temperature, top_k, top_p, min_p, seeds, positions)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("vocab", "dtype", "rows"),
    # a row's filter takes half a second: one row of each kind, and in fp64 those whose filters differ
    [(1, torch.float32, [0, 1, 4]), (70, torch.float32, range(12)), (5, torch.float64, [1, 3, 5, 9, 11])]
    + [
        pytest.param(vocab, dtype, range(12), marks=LONG)
        for vocab in (1, 5, 64, 200, 1000)
        for dtype in (torch.float32, torch.float64)
    ],
)
def test_tokens_are_those_of_the_reference_and_of_the_cpu(vocab, dtype, rows, device):
    z, columns = mixed(12, vocab, dtype)
    z, columns = z[rows], [t[rows] for t in columns]
    got = sample(z.to(device), *(t.to(device) for t in columns)).cpu()
    assert torch.equal(got, sample_ref(z, *columns))
    ids = torch.empty(len(z), dtype=torch.int64)
    arrays = (t.data_ptr() for t in columns)
    native().sample(
        dtype == torch.float64, z.data_ptr(), z.stride(0), *z.shape, *arrays, ids.data_ptr(), row_threads(*z.shape), "auto"
    )
    assert torch.equal(got, ids)


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (3, 0.5)])
def test_ties_at_the_cut(top_k, top_p, device):
    """Of equal logits the lowest ids are kept, also below top-p what top-k has left."""
    rows, vocab = 4, 5
    z, one = torch.zeros(rows, vocab, device=device), torch.ones(rows, device=device)
    seeds = torch.arange(rows, device=device)
    ids = sample(z, one, torch.full_like(seeds, top_k, dtype=torch.int32), one * top_p, 0 * one, seeds, seeds)
    assert set(ids.tolist()) == {0, 1}


def test_top_p_of_0_is_the_most_likely_token(device):
    """As on the CPU; the reference's rule, that fewer than p come before it, keeps nothing."""
    z = torch.randn(2, 70, device=device)
    z[1] = z[1].round()
    one, rows = torch.ones(2, device=device), torch.arange(2, device=device)
    ids = torch.empty(2, dtype=torch.int64, device=device)
    sample_out(z, one, 0 * rows.int(), 0 * one, 0 * one, rows, rows, ids)
    assert torch.equal(ids, z.argmax(-1))


def test_a_row_depends_on_itself_alone(device):
    z, columns = mixed(12, 150, torch.float32)
    columns[3][7] = 0.01  # a row with every filter; the next one has top-p alone
    z, columns = z[7:9].to(device), [t[7:9].to(device) for t in columns]
    ids = sample(z, *columns)
    for row in (0, 1):
        wide = torch.full((1, 170), torch.nan, device=device)
        wide[:, :150] = z[row]
        assert torch.equal(sample(wide[:, :150], *(t[row : row + 1] for t in columns)), ids[row : row + 1])


def test_rows_without_a_token(device):
    z = torch.randn(5, 100, device=device)
    z[1, 70], z[2, 3], z[3] = torch.nan, torch.inf, -torch.inf
    rows = torch.arange(5, device=device)
    one, ids = torch.ones(5, device=device), torch.empty(5, dtype=torch.int64, device=device)
    sample_out(z, one, (rows % 3).int(), one * 0.9, 0 * one, rows, rows, ids)
    assert ((ids == -1) == torch.tensor([False, True, True, True, False], device=device)).all()


def test_empty(device):
    none = torch.empty(0, device=device)
    longs = torch.empty(0, dtype=torch.int64, device=device)
    assert sample(torch.empty(0, 9, device=device), none, none.int(), none, none, longs, longs).shape == (0,)


@DTYPES
def test_row_logprobs(dtype, device):
    z = torch.randn(6, 300, device=device, dtype=dtype) * 5
    z[2] = z[2].round()
    z[3, :250] = -torch.inf
    ids = torch.tensor([0, 299, 17, 260, 5, 6], device=device)
    got, plain, exact = row_logprobs(z, ids, 7), row_logprobs_ref(z, ids, 7), row_logprobs_ref(z.double(), ids, 7)
    assert torch.equal(got.rank, exact.rank) and torch.equal(got.top_ids, exact.top_ids)
    for name in ("logprob", "lse", "top_logprobs"):
        assert_accurate(getattr(got, name), getattr(plain, name), getattr(exact, name), name)
    first = row_logprobs(z, got.top_ids[:, 0].contiguous(), 1)
    assert torch.equal(first.logprob, got.top_logprobs[:, 0]) and (first.rank == 1).all()
    z[1, 4] = torch.nan
    bad = row_logprobs(z, ids, 2)
    assert (bad.top_ids[1] == -1).all() and bad.top_logprobs[1].isnan().all() and torch.equal(bad.logprob[2:], got.logprob[2:])


@DTYPES
def test_row_logprobs_where_the_first_steps_are_banned(dtype, device):
    """And where every token is: NaN, as of the CPU."""
    z = torch.randn(3, 4500, device=device, dtype=dtype)
    z[0, :4096], z[1, :2048], z[2] = -torch.inf, -torch.inf, -torch.inf
    ids = torch.tensor([4499, 7, 1], device=device)
    got, plain, exact = row_logprobs(z, ids, 2), row_logprobs_ref(z, ids, 2), row_logprobs_ref(z.double(), ids, 2)
    assert got.logprob[1] == -torch.inf and got.logprob[2].isnan() and torch.equal(got.rank[:2], exact.rank[:2])
    assert_accurate(got.logprob[:1], plain.logprob[:1], exact.logprob[:1])
    assert_accurate(got.lse[:2], plain.lse[:2], exact.lse[:2])
    assert_accurate(got.top_logprobs[:2], plain.top_logprobs[:2], exact.top_logprobs[:2])


@DTYPES
def test_adjust_logits(dtype, device):
    z = torch.randn(4, 300, device=device, dtype=dtype) * 3
    counts_of = [200, 0, 3, 1]
    offsets = torch.tensor([0, 200, 200, 203, 204], device=device)
    ids = torch.cat([torch.randperm(300, device=device)[:n] for n in counts_of])
    n = len(ids)
    counts = torch.randint(0, 3, (n,), dtype=torch.int32, device=device)
    in_prompt, bias = torch.rand(n, device=device) < 0.5, torch.randn(n, device=device)
    bias[-1] = -torch.inf
    rates = torch.rand(3, 4, device=device) + 0.5
    want = adjust_logits_ref(z, offsets, ids, counts, in_prompt, bias, *rates)
    got = z.clone()
    adjust_logits_(got, offsets, ids, counts, in_prompt, bias, *rates)
    rest = torch.ones_like(z, dtype=torch.bool)
    rest[torch.repeat_interleave(torch.arange(4, device=device), offsets.diff()), ids] = False
    assert torch.equal(got[rest], z[rest]) and torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want)
    cpu = z.cpu().clone()  # the CPU's own kernel: the same bits
    arrays = [t.cpu().contiguous() for t in (offsets, ids, counts, in_prompt, bias, *rates)]
    native().adjust_logits(dtype == torch.float64, cpu.data_ptr(), cpu.stride(0), 4, *(t.data_ptr() for t in arrays), 1)
    assert torch.equal(got.cpu(), cpu)

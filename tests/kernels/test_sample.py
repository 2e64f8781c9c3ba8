"""sample, row_logprobs, adjust_logits_: equal to the references, to the trainer's log-probabilities, to transformers' filters;
the sampled distribution, row invariance, errors."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from transformers.generation import logits_process as hf

from swiftk.kernels import sample as module
from swiftk.kernels.linear import linear_out
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.kernels.nf4 import nf4_quantize
from swiftk.kernels.nf4_linear import nf4_linear_out
from swiftk.kernels.sample import (
    adjust_logits_,
    adjust_logits_ref,
    kept_ref,
    noise_ref,
    row_logprobs,
    row_logprobs_ref,
    sample,
    sample_out,
    sample_ref,
)
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.float32, torch.float64]


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Columns of the same values; seeds seed, seed + 1, ..."""
    return (
        torch.full((rows,), temperature), torch.full((rows,), top_k, dtype=torch.int32), torch.full((rows,), top_p),
        torch.full((rows,), min_p), torch.arange(rows) + seed, torch.full((rows,), position),
    )  # fmt: skip


def mixed(rows, vocab, dtype):
    """Rows of every kind: spread out, with many ties, with banned tokens; every filter on and off; greedy and hardly warm."""
    z = (torch.randn(rows, vocab, dtype=torch.float64) * 6 * torch.rand(rows, 1)).to(dtype)
    z[::3] = z[::3].round()
    z[1::4, : vocab // 2] = -torch.inf
    temperature, top_p, min_p = 2 * torch.rand(rows), 0.01 + 0.99 * torch.rand(rows), 0.3 * torch.rand(rows)
    temperature[::5], temperature[1], temperature[2], temperature[3] = 0, 1e-6, 1e-30, 1e4
    top_k = torch.randint(0, 60, (rows,), dtype=torch.int32)
    top_k[::2], top_k[4], top_k[9], top_k[11] = 0, vocab + 3, min(vocab, 1000), 1
    top_p[::3], min_p[::4], min_p[7] = 1, 0, 1
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(2**40, (rows,))
    return z, (temperature, top_k, top_p, min_p, seeds, positions)


@functools.cache
def problems(vocab, dtype):
    """Logits, columns, and what the reference draws from them; the same for every instruction set."""
    z, columns = mixed(20 if vocab > 1000 else 60, vocab, dtype)
    return z, columns, sample_ref(z, *columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 1000, 4099])
def test_equals_the_reference(vocab, dtype, isa):
    z, columns, want = problems(vocab, dtype)
    before = z.clone()
    assert torch.equal(sample(z, *columns, isa=isa), want)
    assert torch.equal(z, before)


@functools.cache
def large():
    columns = [c.clone() for c in settings(6, seed=5)]
    columns[1][1:3] = torch.tensor([20, 2000])  # less and more than there are chunks
    columns[2][2:5] = torch.tensor([0.9, 0.5, 0.9])
    z = 3 * torch.randn(6, 151_936)
    z[3] *= 0.001  # all in one bucket of top-p
    z[4] += 15 * (torch.rand(151_936) < 1e-4)  # a few tokens stand out
    return z, columns, sample_ref(z, *columns)


def test_a_large_vocabulary(isa):
    z, columns, want = large()
    assert torch.equal(sample(z, *columns, isa=isa), want)


def test_noise_is_that_of_the_formula_and_its_ends_are_finite(monkeypatch):
    """The reference against plain integers; n = 0 and n = 2^52 - 1."""
    g = noise_ref(torch.tensor([-5]), torch.tensor([2**33 + 7]), 9)
    for token in (0, 6, 8):
        x = [philox_by_hand((token // 4, 7, 2, last), (2**32 - 5, 2**32 - 1))[token % 4] for last in (2**32 - 2, 2**32 - 1)]
        q = ((x[0] << 20 | x[1] >> 12) + 0.5) / 2**52
        assert g[0, token].item() == pytest.approx(-math.log(-math.log1p(-q)), rel=1e-15)
    for word, end in ((0, 53 * math.log(2)), (2**32 - 1, -math.log(53 * math.log(2)))):
        monkeypatch.setattr(module, "philox_ref", lambda counter, key, w=word: [torch.full_like(counter[0], w)] * 4)
        assert noise_ref(torch.tensor([0]), torch.tensor([0]), 1).item() == pytest.approx(end, rel=1e-12)
        assert end < 36.7369  # kMaxNoise in csrc/cpu/sample.inc


def philox_by_hand(counter, key):
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def test_noise_of_the_kernel_is_the_references(isa):
    """To 1e-12: two tokens whose scores differ by so little, one way and the other."""
    seeds, positions = torch.randint(-(2**62), 2**62, (200,)), torch.randint(2**40, (200,))
    g = noise_ref(seeds, positions, 300)
    a, b = torch.randint(150, (200,)), 150 + torch.randint(150, (200,))
    row = torch.arange(200)
    for above in (1e-12, -1e-12):
        z = torch.full((200, 300), -1e3, dtype=torch.float64)
        z[row, a], z[row, b] = 0, g[row, a] - g[row, b] + above
        ids = sample(z, *settings(200)[:4], seeds, positions, isa=isa)
        assert torch.equal(ids, b if above > 0 else a)


# --- the kept set, against transformers --------------------------------------------------------------------------


def kept_by_transformers(z, temperature, top_k, top_p, min_p):
    rows = []
    for i in range(len(z)):
        row = z[i : i + 1].double() / temperature[i].item()
        if 0 < top_k[i] < z.shape[1]:
            row = hf.TopKLogitsWarper(int(top_k[i]))(None, row)
        if top_p[i] < 1:
            row = hf.TopPLogitsWarper(float(top_p[i]))(None, row)
        if min_p[i] > 0:
            row = hf.MinPLogitsWarper(float(min_p[i]))(None, row)
        rows.append(row > -torch.inf)
    return torch.cat(rows)


def drawn(z, columns, draws, **options):
    """How often each token of each row is drawn, over `draws` positions."""
    rows, vocab = z.shape
    spread = [c.repeat_interleave(draws) for c in columns[:5]]
    ids = sample(z.repeat_interleave(draws, 0), *spread, torch.arange(draws).repeat(rows), **options)
    return torch.zeros(rows, vocab).index_put_(
        (torch.arange(rows).repeat_interleave(draws), ids), torch.ones(len(ids)), accumulate=True
    )


@pytest.mark.parametrize("filters", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 12, "top_p": 0.7, "min_p": 0.05}])
def test_kept_set_is_that_of_transformers(filters):
    z = 2 * torch.randn(12, 40)  # without ties, where transformers keeps others
    columns = settings(12, 0.7, **filters)
    columns[0][1::2] = 1.4
    want = kept_by_transformers(z, *columns[:4])
    assert torch.equal(kept_ref(z, *columns[:4]), want)
    counts = drawn(z, columns, 3000)
    probability = (z.double() / columns[0][:, None]).masked_fill(~want, -torch.inf).softmax(-1)
    assert (counts[~want] == 0).all()
    assert (counts[probability > 0.01] > 0).all()


def test_ties_keep_exactly_k_and_the_lowest_ids():
    z = torch.zeros(1, 300)
    z[0, 250] = 1.0
    counts = drawn(z, settings(1, top_k=5), 2000)[0]
    assert (counts > 0).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 250]
    counts = drawn(torch.zeros(1, 8), settings(1, top_p=0.5), 1000)[0]
    assert (counts > 0).tolist() == [True] * 4 + [False] * 4
    for columns in (settings(1, 0.0), settings(1, top_k=1), settings(1, top_p=1e-9)):
        assert sample(torch.zeros(1, 300), *columns).item() == 0
    assert sample(z, *settings(1, min_p=1.0)).item() == 250
    assert (drawn(torch.zeros(1, 8), settings(1, min_p=1.0), 1000) > 0).all()  # as likely as the first of them


# --- the distribution --------------------------------------------------------------------------------------------


def chi_square(counts, probability):
    """Standard deviations from what is expected."""
    expected = probability * counts.sum()
    kept = expected > 0
    assert (expected[kept] >= 5).all()
    degrees = int(kept.sum()) - 1
    return (((counts - expected)[kept].square() / expected[kept]).sum().item() - degrees) / (2 * degrees) ** 0.5


DRAWS = 100_000


@pytest.mark.parametrize("over", ["positions", "seeds", "distant seeds"])
def test_sampled_distribution(over):
    z = torch.randn(1, 11, dtype=torch.float64)
    probability = (z / 1.5).softmax(-1)[0]
    number = torch.arange(DRAWS)
    seeds, positions = {"positions": (torch.tensor([3]), number), "seeds": (number, torch.tensor([3])),
                        "distant seeds": (number << 32, torch.tensor([3]))}[over]  # fmt: skip
    columns = settings(DRAWS, 1.5)[:4]
    ids = sample(z.float().expand(DRAWS, 11), *columns, seeds.expand(DRAWS), positions.expand(DRAWS))
    assert abs(chi_square(torch.bincount(ids, minlength=11), probability)) < 4
    # neighbours: a pair of draws is two draws
    pairs = torch.bincount(ids[:-1] * 11 + ids[1:], minlength=121)
    assert abs(chi_square(pairs, (probability[:, None] * probability).flatten())) < 4


def test_filtered_distribution():
    z = torch.randn(1, 30)
    columns = settings(1, 1.3, top_k=9, top_p=0.9, min_p=0.05)
    kept = kept_by_transformers(z, *columns[:4])
    probability = (z.double() / columns[0].double()).masked_fill(~kept, -torch.inf).softmax(-1)
    assert 3 < kept.sum() < 9
    assert abs(chi_square(drawn(z, columns, DRAWS)[0].double(), probability[0])) < 4


def test_every_token_of_a_flat_row_is_as_likely():
    """Over more than a chunk, so that the skipped ones are told from the others."""
    counts = drawn(torch.zeros(1, 700), settings(1), DRAWS)[0].double()
    assert abs(chi_square(counts, torch.full((700,), 1 / 700, dtype=torch.float64))) < 4


@pytest.mark.parametrize("key", ["token", "position", "seed", "high seed"])
def test_noise_is_independent_along_each_key(key):
    """exp(-g) is exponential; neighbours along the key are uncorrelated; two keys give different noise."""
    n, number = 20_000, torch.arange(2)
    seeds, positions = {"token": (number[:1], number[:1]), "position": (number * 0, number), "seed": (number, number * 0),
                        "high seed": (number << 32, number * 0)}[key]  # fmt: skip
    e = torch.exp(-noise_ref(seeds, positions, n))
    a, b = (e[0, :-1], e[0, 1:]) if key == "token" else e
    u, v = (-torch.expm1(-t) for t in (a, b))
    for t in (u, v):
        counts = torch.bincount((t * 20).long(), minlength=20)
        assert abs(chi_square(counts, torch.full((20,), 0.05, dtype=torch.float64))) < 4
    assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 4 / n**0.5


# --- one row is one row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_that_row_alone(dtype, isa, thread_count):
    z, columns = mixed(30, 4099, dtype)
    whole = thread_count(2, lambda: sample(z, *columns, isa=isa))
    alone = thread_count(1, lambda: [sample(z[i : i + 1], *(c[i : i + 1] for c in columns), isa=isa) for i in range(30)])
    assert torch.equal(whole, torch.cat(alone))
    assert torch.equal(whole.flip(0), sample(z.flip(0), *(c.flip(0) for c in columns), isa=isa))
    ids = torch.randint(4099, (30,))
    whole = thread_count(2, lambda: row_logprobs(z, ids, 6, isa=isa))
    alone = thread_count(1, lambda: [row_logprobs(z[i : i + 1], ids[i : i + 1], 6, isa=isa) for i in range(30)])
    for name, together, single in zip(whole._fields, whole, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(single)), name


def test_strided_rows_and_nothing_read_beyond_them(isa):
    z, columns = mixed(20, 333, torch.float32)
    ids = torch.randint(333, (20,))
    frame = torch.full((22, 400), float("nan"))
    frame[1:-1, 5:338] = z
    for strided in (frame[1:-1, 5:338], z.t().contiguous().t()):
        assert torch.equal(sample(strided, *columns, isa=isa), sample(z, *columns, isa=isa))
        for a, b in zip(row_logprobs(strided, ids, 3, isa=isa), row_logprobs(z, ids, 3, isa=isa), strict=True):
            assert torch.equal(a, b)
    assert sample(z[:0], *(c[:0] for c in columns)).shape == (0,)
    assert row_logprobs(z[:0], ids[:0], 2).top_ids.shape == (0, 2)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6, 1.0, 3e38])
def test_huge_logits_do_not_overflow(temperature):
    for dtype, large in ((torch.float32, 3e38), (torch.float64, 1.7e308)):
        z = torch.full((1, 200), -large, dtype=dtype)
        z[0, 77] = large
        for filters in ({}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
            got = sample(z, *settings(1, temperature, **filters))
            assert got.item() == 77 or (temperature > 1 and 0 <= got.item() < 200)


# --- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 2048, 4099])
def test_row_logprobs_values(vocab, dtype, isa):
    z = (3 * torch.randn(9, vocab, dtype=torch.float64)).to(dtype)
    z[::2] = z[::2].round()
    ids = torch.randint(vocab, (9,))
    top = min(vocab, 9)
    ours = row_logprobs(z, ids, top, isa=isa)
    plain, exact = (row_logprobs_ref(cast, ids, top) for cast in (z, z.double()))
    assert torch.equal(ours.rank, exact.rank) and torch.equal(ours.top_ids, exact.top_ids)
    for name in ("logprob", "lse", "top_logprobs"):
        assert_accurate(getattr(ours, name), getattr(plain, name), getattr(exact, name), name)
    argmax = row_logprobs(z, z.argmax(-1), 1, isa=isa)
    assert torch.equal(argmax.logprob, argmax.top_logprobs[:, 0])
    first = row_logprobs(z, argmax.top_ids[:, 0], isa=isa)
    assert (first.rank == 1).all() and first.top_ids.shape == (9, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1000, 2048, 4099])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_row_logprobs_are_the_trainers(tokens, vocab, dtype, isa):
    x, w = torch.randn(tokens, 64).to(dtype), torch.randn(vocab, 64).to(dtype)
    ids = torch.randint(vocab, (tokens,))
    logits = torch.empty(tokens, vocab, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    linear_out(x, w, None, logits, isa)
    assert torch.equal(row_logprobs(logits, ids, isa=isa).logprob, token_logprobs(x, w, ids, isa=isa))
    if dtype == torch.bfloat16:
        quantised = nf4_quantize(w)
        nf4_linear_out(x, quantised, None, logits, isa)
        assert torch.equal(row_logprobs(logits, ids, isa=isa).logprob, token_logprobs(x, quantised, ids, isa=isa))


def test_a_row_without_an_order_has_no_most_likely_tokens():
    z = torch.randn(3, 50)
    z[1, 7] = float("nan")
    top = row_logprobs(z, torch.zeros(3, dtype=torch.int64), 2)
    assert (top.top_ids[1] == -1).all() and top.top_logprobs[1].isnan().all()
    assert torch.equal(top.top_ids[[0, 2]], z[[0, 2]].topk(2).indices)


# --- penalties ---------------------------------------------------------------------------------------------------


def sparse(rows, vocab, most):
    """Random entries of each row, the first row without any."""
    ids = [torch.randperm(vocab)[: 0 if i == 0 else 1 + i % most] for i in range(rows)]
    offsets = torch.tensor([0, *(len(r) for r in ids)]).cumsum(0)
    n = int(offsets[-1])
    bias = torch.randn(n)
    bias[::3], bias[1::7] = 0, -torch.inf
    per_row = (0.5 + torch.rand(rows), torch.randn(rows), torch.randn(rows))
    return (offsets, torch.cat(ids), torch.randint(4, (n,), dtype=torch.int32), torch.rand(n) < 0.5, bias, *per_row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adjust_logits_values(dtype):
    arrays = sparse(12, 300, 40)
    frame = torch.randn(12, 310, dtype=torch.float64).to(dtype)
    z = frame[:, 3:303]
    before, want = frame.clone(), adjust_logits_ref(z, *arrays)
    exact = adjust_logits_ref(z.double(), *arrays)
    adjust_logits_(z, *arrays)
    banned = exact == -torch.inf
    assert torch.equal(z == -torch.inf, banned)
    assert_accurate(z.where(~banned, 0), want.where(~banned, 0), exact.where(~banned, 0))
    touched = torch.zeros(12, 300, dtype=torch.bool)
    touched[torch.repeat_interleave(torch.arange(12), arrays[0].diff()), arrays[1]] = True
    assert torch.equal(z[~touched], before[:, 3:303][~touched])
    assert torch.equal(frame[:, :3], before[:, :3]) and torch.equal(frame[:, 303:], before[:, 303:])


def test_repetition_penalty_is_that_of_transformers():
    z = torch.randn(1, 50)
    prompt, output = [3, 4, 4, 9], [9, 20, 20]
    want = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), z.clone())
    ids = sorted({*prompt, *output})
    counts = torch.tensor([output.count(i) for i in ids], dtype=torch.int32)
    zero, one = torch.zeros(1), torch.ones(1)
    in_prompt = torch.tensor([i in prompt for i in ids])
    arrays = (torch.tensor([0, len(ids)]), torch.tensor(ids), counts, in_prompt, torch.zeros(len(ids)))
    got = z.clone()
    adjust_logits_(got, *arrays, 1.3 * one, zero, zero)
    assert torch.equal(got, want)
    adjust_logits_(got, *arrays, one, 0.5 * one, 0.25 * one)  # OpenAI's formula: of the output alone
    for i in range(50):
        n = output.count(i)
        assert got[0, i].item() == pytest.approx(want[0, i].item() - 0.25 * n - 0.5 * (n > 0), abs=1e-6)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(2, 5).half()}, "sample: logits has dtype torch.float16, wants torch.float32 or torch.float64"),
        ({0: torch.randn(5)}, r"sample: logits has shape \(5,\), wants \(rows, vocab\) with 1 <= vocab <= 524288"),
        ({0: torch.randn(2, 0)}, r"sample: logits has shape \(2, 0\), wants \(rows, vocab\)"),
        ({1: torch.ones(3)}, r"sample: temperature has shape \(3,\), logits \(2, 5\) needs \(2,\)"),
        ({1: torch.tensor([1.0, -0.5])}, "sample: temperature has -0.5 in row 1, wants a finite number >= 0"),
        ({1: torch.tensor([math.nan, 1.0])}, "sample: temperature has nan in row 0, wants"),
        ({1: torch.tensor([math.inf, 1.0])}, "sample: temperature has inf in row 0, wants"),
        ({2: torch.tensor([3, 3])}, "sample: top_k has dtype torch.int64, wants torch.int32 .top_k.int"),
        ({2: torch.tensor([3, -1], dtype=torch.int32)}, "sample: top_k has -1 in row 1, wants at least 0"),
        ({3: torch.tensor([0.0, 1.0])}, "sample: top_p has 0 in row 0, wants 0 < top_p <= 1"),
        ({4: torch.tensor([0.0, 1.5])}, "sample: min_p has 1.5 in row 1, wants 0 to 1"),
        ({6: torch.tensor([0, -3])}, "sample: positions has -3 in row 1, wants at least 0"),
        ({0: torch.tensor([[0.0] * 5, [1, math.nan, 2, 3, 4]])}, "sample: logits has NaN, .inf or no finite value in row 1"),
        ({0: torch.tensor([[math.inf, 0, 0, 0, 0], [0.0] * 5])}, "sample: logits has NaN, .inf or no finite value in row 0"),
        ({0: torch.full((2, 5), -math.inf)}, "sample: logits has NaN, .inf or no finite value in row 0, wants one"),
    ],
)
def test_errors_of_sample(change, message):
    arguments = [torch.randn(2, 5), *settings(2)]
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(ValueError, match=message):
        sample(*arguments)
    with pytest.raises(ValueError, match="sample: isa has 'sse9', wants one of"):
        sample(torch.randn(2, 5), *settings(2), isa="sse9")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_logit_is_found_wherever_it_is(bad, temperature, isa):
    """And the launcher says -1 for its row alone."""
    for at in (0, 8, 127, 128, 255, 260, 299):
        z, ids = torch.randn(3, 300), torch.empty(3, dtype=torch.int64)
        z[1, at] = bad
        sample_out(z, *settings(3, temperature), ids, isa)
        assert (ids == -1).tolist() == [False, True, False], at


def test_errors_of_the_others():
    z = torch.randn(2, 5)
    with pytest.raises(ValueError, match="row_logprobs: ids has 5 at position 1, wants 0 <= id < vocab = 5"):
        row_logprobs(z, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="row_logprobs: top has 6, wants 0 to vocab = 5"):
        row_logprobs(z, torch.tensor([0, 1]), 6)
    with pytest.raises(ValueError, match=r"row_logprobs: ids has shape \(1,\), logits \(2, 5\) needs \(2,\)"):
        row_logprobs(z, torch.tensor([0]))
    good = [torch.tensor([0, 1, 2]), torch.tensor([3, 3]), torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool),
            torch.zeros(2), torch.ones(2), torch.zeros(2), torch.zeros(2)]  # fmt: skip
    adjust_logits_(z.clone(), *good)
    for at, value, message in (
        (0, torch.tensor([0, 2, 2]), "adjust_logits_: ids has an id twice in a row"),
        (0, torch.tensor([0, 1, 3]), r"adjust_logits_: offsets has \[0, 1, 3\], wants to rise from 0 to 2, the number of ids"),
        (1, torch.tensor([3, 9]), "adjust_logits_: ids has 9 at position 1"),
        (5, torch.tensor([1.0, 0.0]), "adjust_logits_: repetition has 0, wants more than 0"),
        (2, torch.ones(2), "adjust_logits_: counts has dtype torch.float32, wants torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            adjust_logits_(z, *(value if i == at else t for i, t in enumerate(good)))
    with pytest.raises(ValueError, match="adjust_logits_: logits has strides"):
        adjust_logits_(torch.randn(5, 2).t(), *good)

"""Sampler: tokens and log-probabilities of mixed rows are those of each row by itself, written out plainly."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from swiftk.decoder import sampler as module
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.sampler import Row, Sampler
from swiftk.kernels.sample import row_logprobs, sample_ref

VOCAB = 300
END = frozenset({7})
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_k=20, logprobs=3),
    SamplingParams(temperature=1.3, top_p=0.9, min_p=0.02, logprobs=0),
    SamplingParams(repetition_penalty=1.4, temperature=0),
    SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5, logprobs=5),
    SamplingParams(min_tokens=4, stop_token_ids=(11, 12), logit_bias={7: 50.0, 11: 60.0, 12: 3.0}),
    SamplingParams(logit_bias={3: 80.0, 5: -math.inf}, temperature=0, repetition_penalty=0.8, min_tokens=2),
]


def row(i, output, prompt):
    return Row(PARAMS[i], prompt, output, len(prompt) + len(output), 100 + i, END)


def plain_adjusted(z, r):
    """One row, token by token."""
    p, z, count = r.params, z.clone(), Counter(r.output)
    for token in {*r.prompt, *r.output}:
        z[token] = z[token] / p.repetition_penalty if z[token] > 0 else z[token] * p.repetition_penalty
    for token, n in count.items():
        z[token] -= p.frequency_penalty * n + p.presence_penalty
    for token, bias in p.logit_bias.items():
        z[token] += bias
    if len(r.output) < p.min_tokens:
        z[list({*p.stop_token_ids, *r.end_ids})] = -math.inf
    return z


def plain(z, r):
    p = r.params

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype)

    columns = one(p.temperature), one(p.top_k, torch.int32), one(p.top_p), one(p.min_p), one(r.seed, torch.int64)
    return sample_ref(plain_adjusted(z, r)[None], *columns, one(r.position, torch.int64)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decode_of_mixed_rows(dtype):
    """20 steps; sequences come and go; each row's token is that of the formulas alone."""
    sampler = Sampler(VOCAB)
    prompts = [torch.randint(VOCAB, (5 + i,)).tolist() for i in range(len(PARAMS))]
    outputs: list[list[int]] = [[] for _ in PARAMS]
    for step in range(20):
        here = [i for i in range(len(PARAMS)) if (step + i) % 7]
        rows = [row(i, outputs[i], prompts[i]) for i in here]
        logits = (3 * torch.randn(len(rows), VOCAB)).to(dtype)
        before = logits.clone()
        tokens, logprobs = sampler(logits, rows)
        assert torch.equal(logits, before)
        assert tokens == [plain(z, r) for z, r in zip(before, rows, strict=True)]
        for z, r, token, found in zip(logits, rows, tokens, logprobs, strict=True):
            assert (found is None) == (r.params.logprobs is None)
            if found is not None:
                want = row_logprobs(z[None], torch.tensor([token]), r.params.logprobs)
                top = dict(zip(want.top_ids[0].tolist(), want.top_logprobs[0].tolist(), strict=True))
                assert found == (token, want.logprob.item(), want.rank.item(), top)
        for i, token in zip(here, tokens, strict=True):
            outputs[i].append(token)
    assert not {7, 11, 12} & set(outputs[6][:4]) and outputs[6][4] == 11


def test_guesses_that_are_refused_are_not_counted():
    sampler, prompt, params = Sampler(VOCAB), [1, 2, 3], SamplingParams(temperature=0, frequency_penalty=1.0)
    z = -0.4 * torch.arange(VOCAB)  # what is drawn tells how often the first tokens are counted
    for output, guesses in (([], [0, 0, 1]), ([0], [2]), ([0, 1], [1, 0, 1, 0]), ([0, 1, 1, 0], []), ([0, 1], [0])):
        rows = [Row(params, prompt, output + guesses[:k], 3, 0, END) for k in range(len(guesses) + 1)]
        assert sampler(z.repeat(len(rows), 1), rows)[0] == [plain(z, r) for r in rows]


def test_another_request_at_the_same_place_starts_anew():
    """Equal seeds, prompts that are equal or the same object, other parameters."""
    sampler, prompt = Sampler(VOCAB), [1, 2]
    z = torch.zeros(1, VOCAB)
    first = Row(SamplingParams(temperature=0, frequency_penalty=2), prompt, [0, 1, 2, 3], 6, 5, END)
    assert sampler(z, [first])[0] == [4]
    for same in (prompt, list(prompt)):
        other = Row(SamplingParams(temperature=0, frequency_penalty=1.0, logit_bias={9: 0.5}), same, [0], 3, 5, END)
        assert sampler(z, [other])[0] == [9]
        assert sampler(z, [first])[0] == [4]


def test_a_row_without_a_token_is_reported_and_the_others_go_on():
    params = SamplingParams(temperature=0, logprobs=1)
    banned = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -math.inf))
    logits = torch.randn(4, VOCAB)
    logits[1, 3] = math.nan
    rows = [Row(p, [1], [], 1, 0, END) for p in (params, params, banned, params)]
    tokens, logprobs = Sampler(VOCAB)(logits, rows)
    assert tokens == [logits[0].argmax(), -1, -1, logits[3].argmax()]
    assert [x is None for x in logprobs] == [False, True, True, False]
    assert logits[1, 3].isnan() and logits[2].isfinite().all()


def test_a_greedy_batch_is_one_native_call(monkeypatch):
    def refuse(*args):
        raise AssertionError("called")

    monkeypatch.setattr(module, "adjust_logits_out", refuse)
    monkeypatch.setattr(module, "row_logprobs_out", refuse)
    logits = torch.randn(3, VOCAB)
    rows = [Row(PARAMS[1], [1], [], 1, 0, END)] * 3
    assert Sampler(VOCAB)(logits, rows) == (logits.argmax(-1).tolist(), [None] * 3)
    with pytest.raises(AssertionError, match="called"):
        Sampler(VOCAB)(logits, [row(4, [], [1])] * 3)


def test_score_of_given_tokens():
    logits, ids = torch.randn(5, VOCAB), [3, 299, 0, 7, 7]
    for top in (0, 4):
        want = row_logprobs(logits, torch.tensor(ids), top)
        for k, found in enumerate(Sampler(VOCAB).score(logits, ids, top)):
            assert (found.token_id, found.logprob, found.rank) == (ids[k], want.logprob[k].item(), want.rank[k].item())
            assert list(found.top.items()) == list(zip(want.top_ids[k].tolist(), want.top_logprobs[k].tolist(), strict=True))

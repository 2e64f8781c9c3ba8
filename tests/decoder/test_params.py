"""SamplingParams: what passes, and one sentence for each value that does not."""

from __future__ import annotations

import math

import pytest

from swiftk.decoder.params import SamplingParams


def test_defaults_and_bounds_pass():
    SamplingParams().check(10)
    SamplingParams(
        max_tokens=5, min_tokens=5, temperature=0, top_k=100, top_p=1e-3, min_p=1, repetition_penalty=0.5, presence_penalty=-2,
        frequency_penalty=2, seed=-(2**63), stop=["a", "b"], stop_token_ids=[0, 9], ignore_eos=True, logprobs=10,
        prompt_logprobs=0, n=3, logit_bias={0: -math.inf, 9: 100, 3: -1.5}, include_stop_str_in_output=True,
    ).check(10)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: has 0, wants an integer of at least 1"),
        ({"max_tokens": 1.5}, "max_tokens: has 1.5, wants an integer"),
        ({"max_tokens": True}, "max_tokens: has True, wants an integer"),
        ({"min_tokens": 17}, r"min_tokens: has 17, wants 0 to max_tokens \(16\)"),
        ({"temperature": -0.1}, "temperature: has -0.1, wants a finite number >= 0"),
        ({"temperature": math.inf}, "temperature: has inf, wants a finite number"),
        ({"temperature": math.nan}, "temperature: has nan, wants a finite number"),
        ({"temperature": 10**400}, "temperature: has 1000.*, wants a finite number"),
        ({"temperature": "hot"}, "temperature: has 'hot', wants a finite number"),
        ({"top_k": -1}, r"top_k: has -1, wants an integer of at least 0 \(0: off\)"),
        ({"top_k": 2**31}, "top_k: has 2147483648, wants an integer"),
        ({"top_p": 0}, "top_p: has 0, wants 0 < top_p <= 1 .*for the most likely token set temperature 0"),
        ({"top_p": 1.01}, "top_p: has 1.01, wants 0 < top_p <= 1"),
        ({"min_p": -0.1}, "min_p: has -0.1, wants 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: has 0, wants more than 0"),
        ({"presence_penalty": 2.5}, "presence_penalty: has 2.5, wants -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: has nan, wants -2 to 2"),
        ({"seed": 2**63}, "seed: has 9223372036854775808, wants None or a 64-bit integer"),
        ({"stop": "END"}, "stop: has 'END', wants a tuple of strings, none of them empty"),
        ({"stop": ("a", "")}, r"stop: has \('a', ''\), wants a tuple of strings, none of them empty"),
        ({"stop_token_ids": 3}, "stop_token_ids: has 3, wants a tuple of integers"),
        ({"stop_token_ids": (10,)}, r"stop_token_ids: has token 10, wants 0 to 9 \(vocab_size - 1\)"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias: has token -1, wants 0 to 9"),
        ({"logit_bias": {1: math.inf}}, "logit_bias: has inf for token 1, wants a finite number, or -inf"),
        ({"logit_bias": {1: -(10**400)}}, "logit_bias: has -1000.* for token 1, wants a finite number, or -inf"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: has nan for token 1, wants"),
        ({"logprobs": 11}, r"logprobs: has 11, wants None, or 0 to 10 \(vocab_size\)"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: has -1, wants None, or 0 to 10"),
        ({"n": 0}, "n: has 0, wants an integer of at least 1"),
        ({"ignore_eos": 1}, "ignore_eos: has 1, wants True or False"),
    ],
)
def test_each_wrong_value_has_its_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values).check(10)

"""Small engines, and what their requests got, for the tests of the engine's contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.results import Update
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.model import Model
from tests.model.families import pack

SMALL = dict(num_blocks=80, block_size=4, max_batched_tokens=24, max_num_seqs=6, max_model_len=64)
LONG = SamplingParams(max_tokens=12, ignore_eos=True)


def engine_of(model, **options) -> Engine:
    return Engine(model, **{**SMALL, **options})


def prompts(*lengths: int) -> list[list[int]]:
    return [pack(n)[0].tolist() for n in lengths]


def run(engine: Engine, ids: dict[int, int], each=lambda engine: None) -> dict[tuple[int, int], list[Update]]:
    """Steps to the end: (number, index) -> updates; ids: engine's id -> number."""
    found: dict[tuple[int, int], list[Update]] = {}
    while engine.has_work:
        for update in engine.step():
            found.setdefault((ids[update.id], update.index), []).append(update)
        engine.scheduler.check()
        each(engine)
    return found


def tokens_of(updates: list[Update]) -> list[int]:
    return [t for u in updates for t in u.token_ids]


def logprobs_of(updates: list[Update]) -> list[float]:
    return [x.logprob for u in updates for x in u.logprobs or []]


def trainer_logprobs(model: Model, tokens: list[int]) -> torch.Tensor:
    """Of tokens[1:], by the trainer: one pack, one call of the loss's kernel."""
    with torch.no_grad():
        ids = torch.tensor(tokens)
        hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
        weight, adapter, _ = model.head()
        return token_logprobs(hidden[:-1], weight, ids[1:], adapter=adapter, isa=model.isa)


def outcome(updates: list[Update]) -> tuple:
    prompt = next((u.prompt_logprobs for u in updates if u.prompt_logprobs is not None), None)
    last = updates[-1]
    return (
        tokens_of(updates), logprobs_of(updates), [sorted(x.top.items()) for u in updates for x in u.logprobs or []],
        last.finish_reason, last.stop_reason, None if prompt is None else [None if x is None else x.logprob for x in prompt],
    )  # fmt: skip


def cached_logprobs_equal_the_trainers(engine: Engine, model: Model, prompt: list[int]) -> bool:
    """Of a prompt that the cache may hold from before."""
    done = engine.generate([prompt], replace(LONG, logprobs=0))[0]
    want = trainer_logprobs(model, done.prompt_token_ids + done.outputs[0].token_ids)[len(prompt) - 1 :]
    return torch.equal(torch.tensor([x.logprob for x in done.outputs[0].logprobs or []], dtype=want.dtype), want)

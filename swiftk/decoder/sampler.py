"""Logits to tokens, for the rows of a step: which parameters, penalties and bans each row has, and what is reported of it.

All arithmetic is swiftk.kernels.sample, one native call for all rows each: one where nobody asks for penalties or
log-probabilities. Log-probabilities are *raw*: of the logits as the model gives them, before penalties, bias and temperature,
so they equal the trainer's bit for bit. (Those of the distribution that is drawn from are not there yet.)
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from swiftk.decoder.copies import send
from swiftk.decoder.params import SamplingParams
from swiftk.kernels.sample import adjust_logits_out, empty_logprobs, row_logprobs_out, sample_out


class Row(NamedTuple):
    """One token that is to be drawn."""

    params: SamplingParams
    prompt: list[int]  # the same object from step to step
    output: list[int]  # so far, guesses included where the row stands behind them
    position: int  # of the token to be drawn, len(prompt) + len(output)
    seed: int
    end_ids: frozenset[int]  # that end the sequence, beside params.stop_token_ids


class TokenLogprob(NamedTuple):
    token_id: int
    logprob: float  # nats
    rank: int  # 1: the most likely one
    top: dict[int, float]  # as many of the most likely tokens as were asked for, in order


class Sampler:
    """Draws a token per row. A row's token and log-probabilities depend on that row alone."""

    def __init__(self, vocab_size: int, isa: str = "auto") -> None:
        self.vocab_size, self.isa = vocab_size, isa
        self._settings: list[tuple[SamplingParams, int]] = []  # of the rows that _columns is for
        self._columns: tuple[torch.Tensor, ...] = ()
        self._penalties: dict[tuple[int, int], _Penalties] = {}

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row]) -> tuple[list[int], list[TokenLogprob | None]]:
        """A token for each row of logits (rows, vocab), which are fp32 or fp64 and unchanged on return; -1 for a row that has
        NaN, +inf, or no token that is allowed. A TokenLogprob where the row's params.logprobs asks for one."""
        settings = [(r.params, r.seed) for r in rows]
        if settings != self._settings:
            self._settings, self._columns = settings, _columns(settings, logits.device)
        (positions,) = send(logits.device, torch.tensor([r.position for r in rows]))
        ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        restore = self._adjust(logits, rows)
        temperature, top_k, top_p, min_p, seeds = self._columns[:5]
        sample_out(logits, temperature, top_k, top_p, min_p, seeds, positions, ids, self.isa)
        if restore is not None:
            logits[restore[0], restore[1]] = restore[2]
        tokens = ids.tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        wanted = [i for i, r in enumerate(rows) if r.params.logprobs is not None and tokens[i] >= 0]
        if wanted:
            part = logits if len(wanted) == len(rows) else logits[send(logits.device, torch.tensor(wanted))[0]]
            tops = [rows[i].params.logprobs or 0 for i in wanted]
            for i, found in zip(wanted, self._score(part, [tokens[i] for i in wanted], tops), strict=True):
                logprobs[i] = found
        return tokens, logprobs

    def score(self, logits: torch.Tensor, ids: Sequence[int], top: int = 0) -> list[TokenLogprob]:
        """What is reported of given tokens, one per row of logits: of a prompt's, say."""
        return self._score(logits, ids, [top] * len(ids))

    def _score(self, logits: torch.Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
        out = empty_logprobs(logits, max(tops, default=0))
        (given,) = send(logits.device, torch.tensor(ids, dtype=torch.int64))
        row_logprobs_out(logits, given, out, self.isa)
        columns = (t.tolist() for t in (out.logprob, out.rank, out.top_ids, out.top_logprobs))
        return [
            TokenLogprob(token, logprob, rank, dict(zip(top_ids[:n], top_logprobs[:n], strict=True)))
            for token, n, logprob, rank, top_ids, top_logprobs in zip(ids, tops, *columns, strict=True)
        ]

    def _adjust(self, logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Penalties, biases and bans, in place; row, column and old value of what has changed, None where nothing has."""
        if not any(_is_adjusted(r) for r in rows):
            return None
        offsets, entries = array("q", [0]), _Entries()
        used: dict[tuple[int, int], _Penalties] = {}
        for r in rows:
            if _is_adjusted(r):
                key = id(r.prompt), r.seed
                state = self._penalties.get(key)
                if state is None or not state.belongs_to(r):
                    state = _Penalties(r)
                used[key] = state
                state.follow(r.output)
                entries.extend(state.entries)
            offsets.append(len(entries.ids))
        self._penalties = used  # a sequence that pauses is counted again
        if not entries.ids:
            return None
        first = torch.frombuffer(offsets, dtype=torch.int64)
        at = torch.repeat_interleave(torch.arange(len(rows)), first.diff())
        at, first, ids, *others = send(logits.device, at, first, *entries.tensors())
        old = logits[at, ids]
        adjust_logits_out(logits, first, ids, *others, *self._columns[5:])
        return at, ids, old


def _is_adjusted(r: Row) -> bool:
    p = r.params
    return bool(
        p.logit_bias or p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty or len(r.output) < p.min_tokens
    )


def _columns(settings: Sequence[tuple[SamplingParams, int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """As sample_out and adjust_logits_out take them."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p, _ in settings], dtype=dtype)

    seeds = torch.tensor([seed for _, seed in settings], dtype=torch.int64)
    return send(
        device, column("temperature"), column("top_k", torch.int32), column("top_p"), column("min_p"), seeds,
        column("repetition_penalty"), column("presence_penalty"), column("frequency_penalty"),
    )  # fmt: skip


class _Entries:
    """Tokens of a row that have a penalty or a bias, in arrays that the kernel reads."""

    def __init__(self) -> None:
        self.ids, self.counts, self.in_prompt, self.bias = array("q"), array("i"), array("b"), array("f")

    def append(self, id: int, count: int, in_prompt: bool, bias: float) -> None:
        self.ids.append(id)
        self.counts.append(count)
        self.in_prompt.append(in_prompt)
        self.bias.append(bias)

    def extend(self, other: _Entries) -> None:
        self.ids.extend(other.ids)
        self.counts.extend(other.counts)
        self.in_prompt.extend(other.in_prompt)
        self.bias.extend(other.bias)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        arrays = (self.ids, torch.int64), (self.counts, torch.int32), (self.in_prompt, torch.bool), (self.bias, torch.float32)
        return tuple(torch.frombuffer(a, dtype=dtype) for a, dtype in arrays)


class _Penalties:
    """The entries of one sequence, kept from step to step."""

    def __init__(self, row: Row) -> None:
        p = self.params = row.params
        self.prompt, self.end_ids = row.prompt, row.end_ids
        self.entries, self._banned = _Entries(), False
        self._slots: dict[int, int] = {}  # token -> its place in entries
        self._seen: list[int] = []  # output that is counted
        self._counts = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        for id in dict.fromkeys(row.prompt) if p.repetition_penalty != 1 else ():
            self._slot(id, True)
        for id in p.logit_bias:
            self._slot(id)

    def belongs_to(self, row: Row) -> bool:
        return self.prompt is row.prompt and self.params is row.params and self.end_ids == row.end_ids

    def _slot(self, id: int, in_prompt: bool = False) -> int:
        slot = self._slots.get(id)
        if slot is None:
            slot = self._slots[id] = len(self.entries.ids)
            self.entries.append(id, 0, in_prompt, self.params.logit_bias.get(id, 0.0))
        return slot

    def follow(self, output: list[int]) -> None:
        """Makes the entries those of `output`, which mostly is the last one and a token more."""
        banned = len(output) < self.params.min_tokens
        if banned != self._banned:
            self._banned = banned
            for id in {*self.params.stop_token_ids, *self.end_ids}:
                self.entries.bias[self._slot(id)] = -math.inf if banned else self.params.logit_bias.get(id, 0.0)
        if not self._counts:
            return
        seen = self._seen
        same = len(seen)
        if output[:same] != seen:  # guesses that were refused
            same = next(i for i, (a, b) in enumerate(itertools.zip_longest(seen, output)) if a != b)
        for id in seen[same:]:
            self.entries.counts[self._slots[id]] -= 1
        for id in output[same:]:
            self.entries.counts[self._slot(id)] += 1
        seen[same:] = output[same:]

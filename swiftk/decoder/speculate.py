"""Guesses of the next tokens, checked by the model in one step: the text is the same with them and without.

The sampler's noise is a function of (seed, position, token), so the token after a prefix is known the moment its logits are:
a draft is kept as far as it equals what would have been sampled. (For a draft of single tokens that is rejection sampling,
Leviathan et al. 2023, with the noise drawn beforehand.) Guesses cost rows, never the distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from swiftk.decoder.forward import Forward, Rows
from swiftk.decoder.request import Request, State
from swiftk.decoder.scheduler import Scheduler

Pick = Callable[[torch.Tensor, Sequence[Request], Sequence[Sequence[int]]], list[int]]


class Drafter(Protocol):
    def propose(self, scheduler: Scheduler, most: int) -> None:
        """Sets `draft` of running requests that lack one token, up to `most` tokens each."""

    def forget(self, id: int) -> None:
        """The request has ended."""


def drafted(scheduler: Scheduler) -> list[Request]:
    """Requests that a draft is of use to: all but one of their tokens are computed, and more than one is still wanted."""
    return [
        r for r in scheduler.running
        if len(r.tokens) - r.num_computed_tokens == 1 and len(r.output) + 1 < r.params.max_tokens
    ]  # fmt: skip


class PromptLookup:
    """What followed the last time that the sequence's last `n` tokens stood in it (Saxena 2023), the longest n that did."""

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self._index: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}  # id -> tokens seen, n-gram -> where it ended last

    def propose(self, scheduler: Scheduler, most: int) -> None:
        for request in drafted(scheduler):
            tokens = request.tokens
            seen, index = self._index.get(request.id, (0, {}))
            for end in range(seen, len(tokens)):  # n-grams that end before the last token: what follows them is known
                for n in self.sizes:
                    if end >= n:
                        index[tuple(tokens[end - n : end])] = end
            self._index[request.id] = (len(tokens), index)
            at = next((index[key] for n in self.sizes if (key := tuple(tokens[-n:])) in index and len(key) == n), None)
            request.draft = [] if at is None else tokens[at : at + most]

    def forget(self, id: int) -> None:
        self._index.pop(id, None)


class DraftModel:
    """A smaller model of the same vocabulary, with a cache of its own under the same block tables. It picks its guesses with
    the noise of the positions they are for: two models that agree on a distribution agree on the token."""

    def __init__(self, forward: Forward, pick: Pick) -> None:
        self.forward, self.pick = forward, pick
        self._done: dict[int, tuple[int, int]] = {}  # id -> preemptions when it was noted, tokens whose KV is in the cache

    def propose(self, scheduler: Scheduler, most: int) -> None:
        if self.forward.follow():
            self._done.clear()
        requests = drafted(scheduler)
        wanted = {r.id: scheduler.reserve(r, most) for r in requests}
        guesses: dict[int, list[int]] = {r.id: [] for r in requests}
        while open_ := [r for r in requests if len(guesses[r.id]) < wanted[r.id] and r.state is State.RUNNING]:
            step, ready, room = [], [], self.forward.max_tokens
            for r in open_:
                sequence = r.tokens + guesses[r.id]
                past, done = self._done.get(r.id, (-1, 0))
                start = min(done if past == r.num_preemptions else 0, len(sequence) - 1)
                count = min(len(sequence) - start, room)
                if count:
                    step.append(Rows(sequence[start : start + count], start, r.block_table))
                    self._done[r.id] = (r.num_preemptions, start + count)
                    ready.append((r, start + count == len(sequence)))
                    room -= count
            rows, ends, at = self.forward(step), [], 0
            for part, (_, whole) in zip(step, ready, strict=True):
                at += len(part.tokens)
                if whole:
                    ends.append(at - 1)
            chosen = [r for r, whole in ready if whole]
            if chosen:
                picked = self.pick(self.forward.logits(ends, rows), chosen, [guesses[r.id] for r in chosen])
                for r, token in zip(chosen, picked, strict=True):
                    if token < 0:  # NaN, or nothing that is allowed: no more guesses
                        wanted[r.id] = len(guesses[r.id])
                    else:
                        guesses[r.id].append(token)
        for r in requests:
            r.draft = guesses[r.id]
            past, done = self._done.get(r.id, (r.num_preemptions, 0))
            self._done[r.id] = (past, min(done, len(r.tokens)))  # guesses that are refused are written again

    def forget(self, id: int) -> None:
        self._done.pop(id, None)

"""One sequence that is being decoded: its tokens and how far the cache has got with them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftk.decoder.params import SamplingParams


class State(enum.Enum):
    WAITING = "waiting"  # holds no block
    RUNNING = "running"  # holds blocks for all its tokens
    FINISHED = "finished"  # the scheduler has forgotten it


@dataclass(slots=True, eq=False)
class Request:
    """tokens = prompt + output; the KV of the first num_computed_tokens of them lies in the blocks of block_table.

    There is no prefill and no decode, only num_computed_tokens behind num_tokens: by one where a token has just been sampled,
    by more at the start and after a preemption, when the output is fed like a prompt. The caller sets the fields of the
    first group and, before each plan, draft; the scheduler alone changes the others.
    """

    id: int  # unique among the requests of a scheduler
    prompt: list[int]  # at least one token
    params: SamplingParams
    adapter: int = -1  # which adapter's KV this is; -1: the base's
    salt: str = ""  # requests share cached prefixes only with those of the same salt
    priority: int = 0  # smaller goes first and is preempted last, as in vLLM; equal ones by arrival
    draft: list[int] = field(default_factory=list)  # guesses of the next tokens, for one step

    state: State = State.WAITING
    finish_reason: str | None = None
    arrival: int = -1  # the scheduler's count of requests
    output: list[int] = field(default_factory=list)
    tokens: list[int] = field(init=False, repr=False)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0  # prompt tokens that were read from the prefix cache when it first ran
    num_preemptions: int = 0
    hashes: list[bytes] = field(default_factory=list, repr=False)  # names of its first full blocks
    num_missing_blocks: int = 0  # free blocks that its admission wanted when it was last refused

    def __post_init__(self) -> None:
        self.tokens = [*self.prompt, *self.output]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts requests from the first to be served to the first to be preempted."""
        return self.priority, self.arrival

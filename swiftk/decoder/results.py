"""What an engine gives: an update of a sequence per step; joined, the completions of a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from swiftk.decoder.sampler import TokenLogprob


@dataclass(frozen=True, slots=True)
class Update:
    """What a step gave to one sequence. Joined, the texts of a sequence are its output: they end between characters."""

    id: int
    index: int  # of n
    token_ids: list[int]  # new; with several where drafts were right
    text: str  # new
    logprobs: list[TokenLogprob] | None  # of token_ids
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: str | int | None = None  # the stop string or the id of stop_token_ids that ended it; the error's text
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with the first token of index 0; None for the prompt's first
    num_cached_tokens: int = 0  # of the prompt, read from the prefix cache
    weight_version: int = 0  # of these tokens: a request whose weights change goes on with the new ones


@dataclass
class Output:
    """One of the n sequences of a request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.token_ids += update.token_ids
        if update.logprobs is not None:
            self.logprobs = (self.logprobs or []) + update.logprobs
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason


@dataclass
class Completion:
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Output]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    weight_version: int = 0

    def add(self, update: Update) -> None:
        self.outputs[update.index].add(update)
        self.weight_version = update.weight_version
        if update.index == 0:
            self.num_cached_tokens = update.num_cached_tokens
            self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs

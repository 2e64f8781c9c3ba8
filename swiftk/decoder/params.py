"""What a request says about its output: lengths, sampling, stops, what is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(frozen=True)
class SamplingParams:
    """The names and meanings of vLLM's; applied in the order penalties, bias, temperature, top-k, top-p, min-p, with the
    formulas of swiftk.kernels.sample."""

    max_tokens: int = 16
    min_tokens: int = 0  # no end or stop token before so many; stop strings are not looked for either
    temperature: float = 1.0  # 0: the most likely token, the lowest id of equal ones
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # of the most likely token's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens of prompt and output, multiplies negative ones
    presence_penalty: float = 0.0  # subtracted once from logits of tokens of the output
    frequency_penalty: float = 0.0  # subtracted as often as the token stands in the output
    seed: int | None = None  # None: one that the engine draws; the same seed gives the same text, whatever runs beside it
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # of each output token, and so many most likely ones; None: none at all
    prompt_logprobs: int | None = None
    n: int = 1  # outputs of one prompt, their seeds derived from seed
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token; -inf bans it
    include_stop_str_in_output: bool = False

    def check(self, vocab_size: int) -> None:
        """Raises ValueError "name: has X, wants Y" for the first value that is out of range or of another kind."""
        self._integer("max_tokens", 1)
        self._integer("min_tokens", 0, self.max_tokens, f"0 to max_tokens ({self.max_tokens})")
        self._number("temperature", 0, 3e38, "a finite number >= 0 (0: the most likely token)")
        self._integer("top_k", 0, 2**31 - 1, "an integer of at least 0 (0: off)")
        self._number("top_p", 0, 1, "0 < top_p <= 1 (1: off)")
        if self.top_p == 0:
            self._refuse("top_p", "0 < top_p <= 1 (1: off); for the most likely token set temperature 0")
        self._number("min_p", 0, 1, "0 to 1 (0: off)")
        self._number("repetition_penalty", 1e-30, 3e38, "more than 0 (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, -2, 2, "-2 to 2 (0: off)")
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**63 - 1, "None or a 64-bit integer")
        for name, kind, want in (("stop", str, "strings, none of them empty"), ("stop_token_ids", int, "integers")):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(_is(v, kind) and v != "" for v in values):
                self._refuse(name, f"a tuple of {want}")
        for name in ("stop_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if not _is(token, int) or not 0 <= token < vocab_size:
                    raise ValueError(f"{name}: has token {token!r}, wants 0 to {vocab_size - 1} (vocab_size - 1)")
        for token, bias in self.logit_bias.items():
            if not _is(bias, int | float) or not (-3e38 <= bias <= 3e38 or bias == -math.inf):  # NaN too
                raise ValueError(f"logit_bias: has {bias!r} for token {token}, wants a finite number, or -inf for a banned one")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0, vocab_size, f"None, or 0 to {vocab_size} (vocab_size)")
        self._integer("n", 1)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")

    def _integer(self, name: str, low: int, high: int | None = None, want: str | None = None) -> None:
        value = getattr(self, name)
        if not _is(value, int) or value < low or (high is not None and value > high):
            self._refuse(name, want or f"an integer of at least {low}")

    def _number(self, name: str, low: float, high: float, want: str) -> None:
        value = getattr(self, name)
        if not _is(value, int | float) or not low <= value <= high:  # NaN is not
            self._refuse(name, want)

    def _refuse(self, name: str, want: str) -> NoReturn:
        raise ValueError(f"{name}: has {getattr(self, name)!r}, wants {want}")


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

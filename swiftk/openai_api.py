"""OpenAI's wire format: requests read into sampling parameters, answers and chunks of them written. Fields: docs/serving.md."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swiftk.decoder.params import SamplingParams
from swiftk.decoder.results import Output, Update
from swiftk.decoder.sampler import TokenLogprob
from swiftk.decoder.text import Offsets, TokenStrings
from swiftk.decoder.worker import Ticket
from swiftk.decoder_arguments import SAMPLING, finite, read_sampling

MOST_CHOICES = 128  # n, as at OpenAI
COMMON = {name for name in SAMPLING if name not in ("logprobs", "prompt_logprobs")} | {
    "model", "stream", "stream_options", "user", "priority", "cache_salt", "return_token_ids", "max_completion_tokens"
}  # fmt: skip
COMPLETION = COMMON | {"prompt", "echo", "logprobs"}
CHAT = COMMON | {"messages", "logprobs", "top_logprobs", "chat_template_kwargs"}
ONLY: dict[str, tuple[Any, ...]] = {  # fields of OpenAI's that are accepted as long as they ask for nothing
    "suffix": ("",), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],),
}  # fmt: skip


class Refused(Exception):
    """An answer with OpenAI's error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        message, param = (  # what they quote of a request may be half a character (\ud800 in JSON), which UTF-8 has not
            text and text.encode(errors="backslashreplace").decode() for text in (self.message, self.param)
        )  # fmt: skip
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


# --- requests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request, checked as far as that goes without the engine."""

    chat: bool
    model: str
    adapter: str | None
    params: SamplingParams
    max_tokens_given: bool
    stream: bool
    include_usage: bool
    echo: bool
    no_output: bool  # max_tokens 0 with echo: the prompt's log-probabilities are all that is wanted
    return_token_ids: bool
    body: dict[str, Any]


def of_kind(body: dict[str, Any], name: str, kind: type, default: Any, wants: str) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(400, f"{name}: has {value!r}, wants {wants}", name)
    return value


def read_request(body: Any, chat: bool, names: dict[str, str | None], default: str) -> Asked:
    """Raises: Refused that names the field."""
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {type(body).__name__}, wants an object")
    body = {name: value for name, value in body.items() if value is not None}
    known, n = CHAT if chat else COMPLETION, body.get("n", 1)
    allowed = ONLY | {"best_of": (n,)}
    if unknown := [name for name in body if name not in known and body[name] not in allowed.get(name, ())]:
        raise Refused(400, f"{', '.join(unknown)}: not supported; docs/serving.md has what is", unknown[0])
    model = of_kind(body, "model", str, default, "a name")
    if model not in names:
        raise Refused(404, f"model: has {model!r}, wants {' or '.join(names)}", "model", "model_not_found")
    truth = {name: of_kind(body, name, bool, False, "true or false") for name in ("stream", "echo", "return_token_ids")}
    options = of_kind(body, "stream_options", dict, {}, "an object")
    if options and (options.keys() - {"include_usage"} or not isinstance(options.get("include_usage", False), bool)):
        raise Refused(400, f'stream_options: has {options!r}, wants {{"include_usage": true}}', "stream_options")
    raw = {name: body[name] for name in SAMPLING if name in body and not name.endswith("logprobs")}
    if "max_completion_tokens" in body:
        raw["max_tokens"] = body["max_completion_tokens"]
    no_output = truth["echo"] and raw.get("max_tokens") == 0
    if no_output:
        raw["max_tokens"] = 1
    if chat:
        wanted, top = of_kind(body, "logprobs", bool, False, "true or false"), body.get("top_logprobs")
        if top is not None and not wanted:
            raise Refused(400, f"top_logprobs: has {top!r}, wants logprobs true beside it", "top_logprobs")
        raw["logprobs"] = (top or 0) if wanted else None
    elif "logprobs" in body:
        raw["logprobs"] = body["logprobs"]
        raw["prompt_logprobs"] = body["logprobs"] if truth["echo"] else None
    try:
        params = read_sampling(raw, SamplingParams())
    except ValueError as error:
        name = str(error).split(":")[0]
        raise Refused(400, str(error), name) from None
    if params.n > MOST_CHOICES:
        raise Refused(400, f"n: has {params.n}, wants at most {MOST_CHOICES}", "n")
    if truth["echo"] and truth["stream"] and params.n > 1:
        raise Refused(400, f"echo: has true with stream and n {params.n}, wants n 1, or no stream", "echo")
    return Asked(
        chat, model, names[model], params, "max_tokens" in raw, truth["stream"], bool(options.get("include_usage")),
        truth["echo"], no_output, truth["return_token_ids"], body,
    )  # fmt: skip


def read_prompts(prompt: Any) -> list[str | list[int]]:
    def is_tokens(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

    if isinstance(prompt, str) or is_tokens(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and (all(isinstance(p, str) for p in prompt) or all(map(is_tokens, prompt))):
        return prompt
    raise Refused(400, "prompt: wants text, token ids, or a list of texts or of lists of token ids, none empty", "prompt")


# --- answers -------------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One sequence's answer as it grows."""

    index: int
    ticket: Ticket
    offsets: Offsets
    output: Output = field(default_factory=Output)
    begun: bool = False


class Answers:
    """The bodies of one request's answer, in whole or in chunks."""

    def __init__(self, asked: Asked, tickets: Sequence[Ticket], strings: TokenStrings) -> None:
        self.asked, self.tickets, self.strings, n = asked, tickets, strings, asked.params.n
        self.choices = [Choice(i, tickets[i // n], Offsets(strings)) for i in range(n * len(tickets))]
        self.cached = [0] * len(tickets)
        self.prompt_logprobs: list[list[TokenLogprob | None]] = [[] for _ in tickets]
        self.weight_version = 0
        kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        id = f"{kind[0]}-{uuid.uuid4().hex}"
        self.head = {"id": id, "object": kind[1], "created": int(time.time()), "model": asked.model}

    def take(self, ticket: Ticket, update: Update) -> Choice:
        """Notes what is told once a prompt."""
        if update.index == 0:  # the others of n find what it has computed
            self.cached[ticket.number] = update.num_cached_tokens
        self.weight_version = update.weight_version
        if update.prompt_logprobs is not None:
            self.prompt_logprobs[ticket.number] = update.prompt_logprobs
        return self.choices[ticket.number * self.asked.params.n + update.index]

    def body(self) -> dict[str, Any]:
        choices = []
        for choice in self.choices:
            one, prompt = choice.output, choice.ticket.tokens
            found: dict[str, Any] = {"index": choice.index, "finish_reason": one.finish_reason, "stop_reason": one.stop_reason}
            if self.asked.return_token_ids:
                found |= {"prompt_token_ids": prompt, "token_ids": one.token_ids}
            if self.asked.chat:
                found |= {"message": {"role": "assistant", "content": one.text}, "logprobs": self.chat_logprobs(one.logprobs)}
            else:
                found |= {"text": self.echoed(choice) + one.text, "logprobs": self.logprobs(choice, one.logprobs, first=True)}
            choices.append(found)
        return self.head | {"choices": choices, "usage": self.usage(), "weight_version": self.weight_version}

    def chunk(self, choice: Choice, update: Update) -> dict[str, Any] | None:
        """None where there is nothing to say yet."""
        first, choice.begun = not choice.begun, True
        text = (self.echoed(choice) if first else "") + update.text
        if not (first or text or update.finish_reason is not None or update.logprobs):
            return None
        found: dict[str, Any] = {"index": choice.index, "finish_reason": update.finish_reason, "logprobs": None}
        if update.finish_reason is not None:
            found["stop_reason"] = update.stop_reason
        if self.asked.return_token_ids:
            found |= {"token_ids": update.token_ids} | ({"prompt_token_ids": choice.ticket.tokens} if first else {})
        if self.asked.chat:
            found["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            found["logprobs"] = self.chat_logprobs(update.logprobs)
        else:
            found |= {"text": text, "logprobs": self.logprobs(choice, update.logprobs, first=first)}
        kind = {"object": "chat.completion.chunk"} if self.asked.chat else {}
        return self.head | kind | {"choices": [found]} | ({"usage": None} if self.asked.include_usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self.asked.chat else {}
        return self.head | kind | {"choices": [], "usage": self.usage(), "weight_version": self.weight_version}

    def usage(self) -> dict[str, Any]:
        prompt, output = sum(len(t.tokens) for t in self.tickets), sum(len(c.output.token_ids) for c in self.choices)
        return {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached)},
        }  # fmt: skip

    def echoed(self, choice: Choice) -> str:
        if not self.asked.echo:
            return ""
        if choice.ticket.text is not None:
            return choice.ticket.text
        return b"".join(map(self.strings.bytes, choice.ticket.tokens)).decode(errors="replace")

    def logprobs(self, choice: Choice, entries: list[TokenLogprob] | None, *, first: bool) -> dict[str, Any] | None:
        """As /v1/completions has them. top_logprobs may have one more than asked for: the token itself."""
        if self.asked.params.logprobs is None:
            return None
        found: list[tuple[int, TokenLogprob | None]] = [(x.token_id, x) for x in entries or []]
        if self.asked.echo and first:
            prompt = self.prompt_logprobs[choice.ticket.number]
            found = [*zip(choice.ticket.tokens, prompt, strict=True), *found]
        tops: list[dict[str, float | None] | None] = []
        for _, x in found:
            top: dict[str, float | None] = {}
            for token, value in ([*x.top.items(), (x.token_id, x.logprob)] if x is not None else []):
                top.setdefault(self.strings.text(token), finite(value))  # the largest of tokens that are written alike
            tops.append(top if x is not None else None)
        return {
            "tokens": [self.strings.text(token) for token, _ in found],
            "token_logprobs": [None if x is None else finite(x.logprob) for _, x in found],
            "top_logprobs": tops,
            "text_offset": choice.offsets.push(token for token, _ in found),
        }

    def chat_logprobs(self, entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if self.asked.params.logprobs is None:
            return None

        def one(token: int, value: float) -> dict[str, Any]:
            return {"token": self.strings.text(token), "logprob": finite(value), "bytes": list(self.strings.bytes(token))}

        most = self.asked.params.logprobs
        tops = [[one(*pair) for pair in list(x.top.items())[:most]] for x in entries or []]
        rows = zip(entries or [], tops, strict=True)
        return {"content": [one(x.token_id, x.logprob) | {"top_logprobs": top} for x, top in rows]}

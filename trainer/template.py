"""Messages to tokens and a loss mask that is proven, row by row, for whatever chat template the tokenizer has.

Templates carry no reliable mark of what the model is to say, and some write a turn differently once others follow it
(Qwen3 drops earlier <think> blocks), so neither markers nor prefixes can be trusted. Instead each conversation is rendered
twice: as it is, and with every reply replaced by a sentinel that no text contains. The second rendering cut at its
sentinels is what the template wrote; the first one must be exactly those pieces with the replies between them, or the
row is refused. So a trained character is a character of a reply, and replies decide nothing outside their own span.

  rendered with sentinels:   t0 S1 t1 S2 t2           t: users, system, headers, what the template adds
  rendered as it is:         t0 x1 t1 x2 t2           x: the reply, as given or without white space at its ends

Trained are x (with its <think> block where the template keeps it) and the end-of-turn token that t begins with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from swiftk.trainer.rows import Message, RowError

GENERATION_CONFIG = "generation_config.json"
THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Encoded:
    """input_ids int32 (n,); loss_mask bool (n,): the tokens to predict; source: where the row comes from."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: str = ""


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendering are what the model says in message `number`; `stop` is the token after it."""

    number: int
    start: int
    end: int
    stop: str
    trained: bool


# --- characters --------------------------------------------------------------------------------------------------


def reply_spans(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, stops: frozenset[str]
) -> tuple[str, list[Span]]:
    """The rendering, and the span of each reply in it. stops: tokens that may end a turn (`end_of_turn`).

    Raises: RowError that names the message whose span cannot be proven, and why.
    """
    text = _render(messages, tokenizer)
    mark = next((chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text), None)  # a private-use character
    if mark is None:
        raise RowError("uses every private-use character of Unicode, so none is left to mark its replies")
    thinks = [THINK.fullmatch(message["content"]) for message in messages if message["role"] == "assistant"]
    try:
        return text, _match(text, messages, tokenizer, stops, mark, keep_think=True)
    except RowError:
        if not any(thinks) or (thinks[-1] and thinks[-1][1].strip()):
            raise
    return text, _match(text, messages, tokenizer, stops, mark, keep_think=False)  # templates that drop empty blocks


def _match(
    text: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[str],
    mark: str,
    *,
    keep_think: bool,
) -> list[Span]:
    """Spans where <think> blocks get a sentinel of their own (keep_think), or are left out of the replies."""
    probes: list[Message] = []
    parts: list[tuple[int, bool, str]] = []  # message number, is it reasoning, the text
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            probes.append(message)
            continue
        think = THINK.fullmatch(message["content"])
        sentinel = f"{mark}{number}{mark}"
        if think is None:
            parts.append((number, False, message["content"]))
        elif keep_think:
            parts += [(number, True, think[1]), (number, False, think[2])]
            sentinel = f"<think>{mark}{number}r{mark}</think>{sentinel}"
        else:
            parts.append((number, False, think[2]))
        probes.append({"role": "assistant", "content": sentinel})
    written = _render(probes, tokenizer)
    last = max((number for number, _, _ in parts), default=0)
    kept: list[tuple[int, bool, str]] = []
    pieces: list[str] = []
    at = 0
    for number, reasoning, part in parts:
        sentinel = f"{mark}{number}{'r' if reasoning else ''}{mark}"
        if written.count(sentinel) == 0 and reasoning:
            if number == last and part.strip():
                raise _unproven(number, "the template drops its <think> block, so that would not be trained")
            continue  # earlier reasoning is not shown to the model either
        found = written.find(sentinel, at)
        if found < 0 or written.count(sentinel) > 1:
            how = "leaves it out" if found < 0 else "writes it more than once"
            raise _unproven(number, f"the template {how}")
        pieces.append(written[at:found])
        kept.append((number, reasoning, part))
        at = found + len(sentinel)
    pieces.append(written[at:])
    if not text.startswith(pieces[0]):
        raise _unproven(kept[0][0], "the text before it depends on a reply")
    at = len(pieces[0])
    spans: list[Span] = []
    begin: int | None = None  # where the current message's span begins
    for (number, reasoning, part), before, after in zip(kept, pieces, pieces[1:], strict=False):
        shown = next((x for x in _stripped(part) if text.startswith(x + after, at)), None)
        if shown is None:
            raise _unproven(number, "the template changes the text of the reply, or the text after it depends on a reply")
        if begin is None:
            begin = at
            if reasoning and before.rstrip().endswith("<think>"):
                begin = at - (len(before) - before.rindex("<think>"))  # the tag is part of what the reply says
        at += len(shown)
        if not reasoning:
            trained = bool(messages[number - 1].get("loss", True))
            spans.append(Span(number, begin, at, _stop(number, after, stops) if trained else "", trained))
            begin = None
        at += len(after)
    if at != len(text):
        raise _unproven(last, "the end of the text depends on a reply")
    return spans


def _stripped(text: str) -> list[str]:
    """The text as given and without white space (or newlines) at either or both ends, the longest first."""
    ways = [text] + [f(chars) for chars in (None, "\n") for f in (text.strip, text.lstrip, text.rstrip)]
    return sorted(dict.fromkeys(ways), key=len, reverse=True)


def _stop(number: int, after: str, stops: frozenset[str]) -> str:
    following = after.lstrip()
    stop = max((s for s in stops if following.startswith(s)), key=len, default=None)
    if stop is None:
        wants = " or ".join(sorted(map(repr, stops)))
        raise _unproven(number, f"no end-of-turn token follows the reply (seen {after[:20]!r}, wants {wants})")
    return stop


def _unproven(number: int, why: str) -> RowError:
    return RowError(f"message {number} (assistant): the loss mask cannot be proven, {why}")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The special tokens that can end a reply: the one that the template writes after a lone reply, and eos.

    Raises: ValueError where there is no template, or none of its tokens ends a reply (such a model would never stop).
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "template: the tokenizer has no chat template, stage sft needs one; put a chat_template.jinja beside "
            "tokenizer.json, or train plain text with --stage pt"
        )
    if not tokenizer.is_fast:
        raise ValueError("template: the tokenizer has no character offsets, wants a fast one (tokenizer.json)")
    mark = "\ue0001\ue000"
    try:
        written = _render([{"role": "user", "content": "u"}, {"role": "assistant", "content": mark}], tokenizer)
    except RowError as error:
        raise ValueError(f"template: the simplest chat, a question and its reply, {error}") from None
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    following = written.rpartition(mark)[2].lstrip()
    stop = max((s for s in special if following.startswith(s)), key=len, default=None)
    if stop is None:
        raise ValueError(
            f"template: message 2 (assistant) is followed by {following[:20]!r}, wants a special token that ends the turn; "
            "without one the model would never learn to stop"
        )
    return frozenset({stop, tokenizer.eos_token} - {None})


def generation_config(tokenizer: PreTrainedTokenizerBase, base: Path | None) -> dict[str, Any]:
    """generation_config.json for a model that was trained whole: the base's, and every token that ends a reply, so that
    whoever generates with it stops there; eos alone where there is no chat template."""
    path = None if base is None else base / GENERATION_CONFIG
    found = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    known = found.get("eos_token_id")
    ids = {i for i in (known if isinstance(known, list) else [known]) if i is not None}
    try:
        tokens = end_of_turn(tokenizer)
    except ValueError:  # no template, or one that sft refuses
        tokens = frozenset({tokenizer.eos_token} - {None})
    ids |= {tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return found | {"eos_token_id": sorted(ids)}


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False))
    except jinja2.TemplateError as error:
        raise RowError(f"is refused by the chat template: {error}") from None


# --- tokens ------------------------------------------------------------------------------------------------------


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, stage: str) -> Encoded:
    """One row of messages (stage pt: a single assistant message, the document) as tokens and their loss mask.

    sft: the tokens of the replies and of the token that ends each; messages with "loss": False are not trained.
    pt: all tokens, with the tokenizer's own special tokens (a bos, where it has one) and eos at the end.
    Raises: RowError (a ValueError) that says which message's mask cannot be proven.
    """
    (encoded,) = encode_batch([messages], tokenizer, stage)
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


def encode_batch(rows: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, stage: str) -> list[Encoded | RowError]:
    """`encode` of many rows, tokenized in one call; a row that fails gives its error in its place."""
    if stage == "pt":
        return list(_documents([row[0]["content"] for row in rows], tokenizer))
    stops = end_of_turn(tokenizer)
    spans: list[tuple[str, list[Span]] | RowError] = []
    for messages in rows:
        try:
            spans.append(reply_spans(messages, tokenizer, stops))
        except RowError as error:
            spans.append(error)
    encodings = iter(_tokenize([s[0] for s in spans if not isinstance(s, RowError)], tokenizer, add_special_tokens=False))
    return [s if isinstance(s, RowError) else _masked(next(encodings), *s, tokenizer) for s in spans]


def _documents(texts: list[str], tokenizer: PreTrainedTokenizerBase):
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("template: the tokenizer has no eos token, stage pt needs one to end its documents")
    for encoding in _tokenize(texts, tokenizer, add_special_tokens=True):
        ids = encoding.ids if encoding.ids[-1:] == [eos] else [*encoding.ids, eos]
        yield Encoded(np.array(ids, np.int32), np.ones(len(ids), bool))


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[Any]:
    if not texts:
        return []
    encodings = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False, verbose=False
    ).encodings
    assert encodings is not None  # fast tokenizers have them
    return encodings


def _masked(encoding: Any, text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> Encoded | RowError:
    """Trains the tokens of the spans. The first of a span may also hold white space of the template, nothing else."""
    mask = np.zeros(len(encoding.ids), bool)
    for span in spans:
        if not span.trained:
            continue
        stop = _token_at(encoding, text.index(span.stop, span.end))
        first = _token_at(encoding, span.start) if span.start < span.end else stop
        if encoding.ids[stop] != tokenizer.convert_tokens_to_ids(span.stop):
            return _unproven(span.number, f"{span.stop!r} after it is not read as one token")
        shared = text[encoding.token_to_chars(first)[0] : span.start]
        if shared.strip():
            return _unproven(span.number, f"its first token also holds {shared!r} of the text before it")
        mask[first : stop + 1] = True
    return Encoded(np.array(encoding.ids, np.int32), mask)


def _token_at(encoding: Any, position: int) -> int:
    """The token that holds a character; white space that a tokenizer leaves out of its offsets belongs to the next token."""
    token = encoding.char_to_token(position)
    if token is None:
        token = next((i for i, (_, end) in enumerate(encoding.offsets) if end > position), len(encoding.ids) - 1)
    return token

"""Tokens to text as they come: never half a character, and no more held back than must be.

A token may end inside a character (bytes of a byte-level or byte-fallback vocabulary), so text is *final* once no later
token can change it. Only the tail of the tokens is decoded again, so a token costs the same at the start and after 100,000.
"""

from __future__ import annotations

import codecs
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)
CONTEXT = 8  # tokens kept before new ones: decoders treat the first token of a text differently (its leading space)


@functools.lru_cache(maxsize=8)
def _special_and_byte_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = tokenizer.get_vocab()
    return special, frozenset(vocab[name] for name in names if name in vocab)


class Detokenizer:
    """The text of one sequence of tokens. All pushes and the flush, joined, are what the tokenizer decodes from all tokens.

    That is `tokenizer.decode(ids, skip_special_tokens=..., clean_up_tokenization_spaces=False)`: the clean-up would take out
    spaces that the model has written. Of a byte-level vocabulary at most one unfinished character is held back; of one with
    byte-fallback tokens (<0xE2>) a run of them until it ends, since one wrong byte makes the whole run invalid.

    Args:
        tokenizer: of transformers.
        skip_special_tokens: leaves out the special tokens, as `decode` does.
        context: tokens before the first one, the prompt's last ones say: they decide about its leading space, and whether it
            completes a character. Their text is not returned. Empty: the text is decoded by itself.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True, *, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        special, self._bytes = _special_and_byte_tokens(tokenizer)
        self._skipped: frozenset[int] = special if skip_special_tokens else frozenset()
        context = self._with_text(context)
        start = max(0, len(context) - CONTEXT)
        while start > 0 and context[start] in self._bytes:  # a run of bytes is decoded as a whole
            start -= 1
        self._window = context[start:]
        text = self._decode(self._window)
        self._completes = 0  # where the context ends in half a character: its place, which is output if the output completes it
        if self._window and self._window[-1] in self._bytes:
            text = text.rstrip(REPLACEMENT)
        elif text.endswith(REPLACEMENT):
            self._completes = len(text)
        self._sent = len(text)  # characters of the window's text that have been returned

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become final with these tokens; may be empty."""
        fresh = self._with_text(ids)
        self._window += fresh
        if not fresh or fresh[-1] in self._bytes:
            return ""
        text = self._decode(self._window)
        final = len(text) - text.endswith(REPLACEMENT)  # an unfinished character is one replacement character, the last
        new = self._take(text, final)
        if len(self._window) > 4 * CONTEXT:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """The rest, after the last token: what is unfinished stays so, as the replacement character."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _with_text(self, ids: Iterable[int]) -> list[int]:
        """Without those that `decode` leaves out: special tokens, and ids beyond the tokenizer (padding of the vocabulary)."""
        return [i for i in ids if i not in self._skipped and self._tokenizer.convert_ids_to_tokens(i) is not None]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _take(self, text: str, final: int) -> str:
        if self._completes and len(text) >= self._completes and text[self._completes - 1] != REPLACEMENT:
            self._sent, self._completes = min(self._sent, self._completes - 1), 0
        new = text[self._sent : final]
        self._sent = max(self._sent, final)
        return new

    def _shorten(self, text: str) -> None:
        """Drops the front of the window. Its tail's text may begin with pieces of a character, but a character has at most four
        bytes and each token at least one, so both texts end alike, whatever comes."""
        tail = self._decode(self._window[-CONTEXT:])
        self._window = self._window[-CONTEXT:]
        self._sent -= len(text) - len(tail)
        self._completes = 0


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Raises: ValueError for half a character (JSON may hold one, as \\ud83d): no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: has half a character at {error.start} ({text[error.start]!r}), wants text") from None
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


class StopStrings:
    """Ends a text at the stop string that is complete first; of several that end together, at the longest.

    What may be the beginning of a stop string is held back until it is known. The result depends on the text alone, not on
    how it is cut into pieces.

    Args:
        stop: non-empty strings; none: everything passes.
        include: the stop string is part of the text.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be sent, and the stop string if one is complete: then it is the last text."""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return text[: end if self._include else start], stop
        longest = max(map(len, self._stop), default=1)
        for at in range(max(0, len(text) - longest + 1), len(text)):
            if any(s.startswith(text[at:]) for s in self._stop):
                self._held = text[at:]
                return text[:at], None
        self._held = ""
        return text, None

    def flush(self) -> str:
        """What is still held back, where the text ends without a stop string."""
        text, self._held = self._held, ""
        return text


class TokenStrings:
    """What single tokens are, for lists of log-probabilities: their bytes, and a string that tells them apart.

    A token that is no text by itself (part of a character) is written "bytes:\\xe2\\x82", as OpenAI's API does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]  # a token's own leading space shows after another

    def bytes(self, id: int) -> bytes:
        """Of any token, special ones too; empty for ids beyond the tokenizer."""
        if id not in self._known:
            decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text = str(decode([*self._before, id]))[len(str(decode(self._before))) :]
            name = str(self._tokenizer.convert_ids_to_tokens(id) or "")
            if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
                self._known[id] = bytes.fromhex(byte[1])
            elif REPLACEMENT in text and all(c in _byte_characters() for c in name):
                self._known[id] = bytes(_byte_characters()[c] for c in name)
            else:
                self._known[id] = text.encode()
        return self._known[id]

    def text(self, id: int) -> str:
        try:
            return self.bytes(id).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(id))


class Offsets:
    """Where tokens begin in the text: the characters that are complete before each."""

    def __init__(self, strings: TokenStrings) -> None:
        self._strings, self._at = strings, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> list[int]:
        found = []
        for id in ids:
            found.append(self._at)
            self._at += len(self._decoder.decode(self._strings.bytes(id)))
        return found


@functools.cache
def _byte_characters() -> dict[str, int]:
    """The letters that byte-level vocabularies write for bytes (GPT-2): printable Latin-1 as it is, the others from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
) -> list[int]:
    """Messages as the tokenizer's chat template writes them, up to where the reply begins.

    Args:
        messages: of {"role", "content"}; content is text, or a list of {"type": "text", "text"}.
        options: further variables of the template, enable_thinking say.
    Raises: ValueError for messages of another form, and where there is no template or it refuses them.
    """
    if not tokenizer.chat_template:
        raise ValueError("messages: the tokenizer has no chat template, wants one; or give a prompt instead")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: has {messages!r}, wants a list of at least one message")
    options = options or {}
    if own := sorted(options.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()):
        raise ValueError(f"chat_template_kwargs: has {own[0]!r}, wants variables of the template only")
    plain = []
    for number, message in enumerate(messages):
        where = f"messages: number {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where} has {message!r}, wants {{"role": ..., "content": ...}}')
        extra = [key for key, value in message.items() if key not in ("role", "content", "name") and value is not None]
        if extra and (extra != ["type"] or message["type"] != "text"):  # which lm-eval writes
            raise ValueError(f"{where} has {extra[0]!r}, wants role and content only: it is not supported")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise ValueError(f"{where} has content {content!r}, wants text: other kinds are not supported")
        plain.append({"role": message["role"], "content": "".join(str(p["text"]) for p in parts)})
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"messages: the chat template refuses them ({error})") from error
    return tokens_of(tokenizer, str(text), add_special_tokens=False)

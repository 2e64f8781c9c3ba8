"""Text that comes in pieces is the text that comes at once."""

from __future__ import annotations

import functools
import random
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from swiftk.decoder.text import Detokenizer, Offsets, StopStrings, TokenStrings, chat_tokens
from swiftk.trainer.tokenizer import train_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog, isn't it? Yes. No ! ", "Grüße aus Köln; naïve café", "漢字とひらがな、한국어",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 😀😃", "e\u0301a\u0300 o\u0308 combining",
    "  two  spaces\n\ttabs\r\n", "שלום عالم", "\ufffd real \ufffd\ufffd marks",
]  # fmt: skip
LETTERS = sorted(set("".join(TEXTS[:2]) + "、漢"))


def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS[:2] * 4, 320)


def byte_fallback(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """As Llama 2 has it: letters, ▁ for the space, a token per byte for the rest, ▁ before the text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(c for c in LETTERS if c > " ")]
    words = ["th", "the", "▁th", "▁the", "qu"]
    merges = [("t", "h"), ("th", "e"), ("▁", "th"), ("▁th", "e"), ("q", "u")]
    vocab = {name: i for i, name in enumerate(dict.fromkeys([*names, *words]))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    names = ["[UNK]", "the", "##s", "quick", "##er", ".", ",", "n't", "is", "漢", "##字", "?"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


LLAMA2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
TOKENIZERS = {
    "byte-level": byte_level,
    "byte-fallback": lambda: byte_fallback(decoders.Sequence(LLAMA2)),
    "metaspace": lambda: byte_fallback(decoders.Metaspace()),
    "word-pieces": word_pieces,
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return TOKENIZERS[name]()


def whole(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def pieces(detokenizer: Detokenizer, ids: list[int], draw: random.Random) -> list[str]:
    """Pushed one by one, or a few at a time."""
    out, at = [], 0
    while at < len(ids):
        step = draw.choice([1, 1, 1, 2, 5])
        out.append(detokenizer.push(ids[at : at + step]))
        at += step
    return [*out, detokenizer.flush()]


def sequences(name: str, draw: random.Random) -> list[list[int]]:
    """Texts, and random tokens: halves of characters, special tokens, ids that the tokenizer does not have."""
    tokenizer = tokenizer_of(name)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*TEXTS, "".join(TEXTS) * 3]]
    few = draw.sample(range(len(tokenizer)), min(12, len(tokenizer)))
    for length in (1, 2, 3, 10, 60, 60, 300, 300):
        found += [[draw.randrange(len(tokenizer) + 3) for _ in range(length)], [draw.choice(few) for _ in range(length)]]
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_whole(name):
    tokenizer, draw = tokenizer_of(name), random.Random(0)
    for _ in range(6):
        for ids in sequences(name, draw):
            for skip in (True, False):
                assert "".join(pieces(Detokenizer(tokenizer, skip), ids, draw)) == whole(tokenizer, ids, skip)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_no_piece_has_half_a_character(name):
    """Texts of whole characters, one token at a time: every prefix that has been returned is one of the text."""
    tokenizer = tokenizer_of(name)
    for text in TEXTS[:-1]:
        ids, sent = tokenizer(text, add_special_tokens=False)["input_ids"], ""
        text = whole(tokenizer, ids, True)
        detokenizer = Detokenizer(tokenizer)
        for i in ids:
            piece = detokenizer.push([i])
            sent += piece
            assert "\ufffd" not in piece and text.startswith(sent)
        assert sent + detokenizer.flush() == text


def test_text_comes_at_once():
    """Nothing is held back that is final: the piece is there with the token that completes it."""
    tokenizer = tokenizer_of("byte-level")
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "aÃ©b"]  # a, two bytes of é, b
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "é", "b"]
    lonely = Detokenizer(tokenizer)
    assert [lonely.push([i]) for i in (ids[1], ids[0], ids[2])] == ["", "\ufffda", ""] and lonely.flush() == "\ufffd"


def test_invalid_bytes_do_not_pile_up():
    """An untrained model writes bytes that are no text, for ever: the last one alone waits, and the window stays short."""
    tokenizer = tokenizer_of("byte-level")
    lead = tokenizer.convert_tokens_to_ids("Ã")
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([lead]) for _ in range(200)] == ["", *["\ufffd"] * 199]
    assert len(detokenizer._window) <= 33 and detokenizer.flush() == "\ufffd"


def test_a_token_costs_the_same_after_many():
    cases = [("byte-level", "the quick brown fox"), ("byte-level", "😀"), ("byte-fallback", "the fox"), ("byte-fallback", "😀")]
    for name, text in cases:
        ids = tokenizer_of(name)(text, add_special_tokens=False)["input_ids"][name == "byte-fallback" :]  # without the first ▁
        detokenizer, start = Detokenizer(tokenizer_of(name)), time.process_time()
        out = [detokenizer.push([ids[n % len(ids)]]) for n in range(20000)]
        assert len(detokenizer._window) <= 33 or ids[-1] in detokenizer._bytes  # a run of bytes, decoded once, at its end
        assert time.process_time() - start < 5  # 20,000 decodings of all tokens take minutes
        assert len("".join(out) + detokenizer.flush()) >= 5000


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_context_decides_about_the_leading_space(name):
    """Prompt and output read as one text, wherever a text is cut; half a character of the prompt is completed by the output."""
    tokenizer, draw = tokenizer_of(name), random.Random(1)
    for text in TEXTS[:-1]:
        ids = tokenizer(text * 4, add_special_tokens=False)["input_ids"]
        text = whole(tokenizer, ids, True)
        for cut in {1, 2, len(ids) // 2, len(ids) - 1, *(draw.randrange(1, len(ids)) for _ in range(20))}:
            out = "".join(pieces(Detokenizer(tokenizer, context=ids[:cut]), ids[cut:], draw))
            before = whole(tokenizer, ids[:cut], True)
            assert text in (before + out, before.rstrip("\ufffd") + out), cut


def test_stop_strings_over_every_split():
    text = "one two three, abcab abcabd end"
    cases: dict[tuple[str, ...], tuple[str, str | None]] = {
        (): (text, None),
        ("nothing", "enq"): (text, None),
        ("one",): ("", "one"),
        ("two",): ("one ", "two"),
        (" three", "two"): ("one ", "two"),
        ("hree,", "three,"): ("one two ", "three,"),
        ("abcabz", "cab"): ("one two three, ab", "cab"),
        ("abcabd",): ("one two three, abcab ", "abcabd"),
        ("d", "bd"): ("one two three, abcab abca", "bd"),
        ("end",): ("one two three, abcab abcabd ", "end"),
    }
    for stop, (before, match) in cases.items():
        for include in (False, True):
            wanted = before + (match if include and match else "")
            for first in range(len(text) + 1):
                for second in range(first, len(text) + 1):
                    stops, sent, got = StopStrings(stop, include), "", None
                    for piece in (text[:first], text[first:second], text[second:]):
                        new, got = stops.push(piece)
                        sent += new
                        assert wanted.startswith(sent)
                        if got:
                            break
                    assert (sent + ("" if got else stops.flush()), got) == (wanted, match)


def test_stop_strings_hold_back_no_more_than_must_be():
    stops = StopStrings(("</s>", "\n\n"))
    sent = [stops.push(piece)[0] for piece in ("a<", "b</", "s", "\n", "c")]
    assert sent == ["a", "<b", "", "</s", "\nc"]
    assert stops.push("</")[0] == "" and stops.flush() == "</" and stops.flush() == ""


def test_stop_strings_are_the_same_however_a_text_is_cut():
    draw = random.Random(2)
    for _ in range(400):
        stop = tuple("".join(draw.choices("ab", k=draw.randrange(1, 6))) for _ in range(draw.randrange(1, 4)))
        text = "".join(draw.choices("abc", k=40))
        results = set()
        for size in (1, 2, 3, 7, 40):
            stops, sent, got = StopStrings(stop), "", None
            for at in range(0, len(text), size):
                new, got = stops.push(text[at : at + size])
                sent += new
                if got:
                    break
            results.add((sent + ("" if got else stops.flush()), got))
        assert len(results) == 1, (stop, text, results)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_bytes_of_tokens_make_the_text(name):
    tokenizer = tokenizer_of(name)
    strings = TokenStrings(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        together = b"".join(strings.bytes(i) for i in ids).decode()
        assert whole(tokenizer, ids, False) in (together, together[1:])  # the first token's space is shown here
        offsets = Offsets(strings).push(ids)
        for at, i, nxt in zip(offsets, ids, [*offsets[1:], len(together)], strict=True):
            assert together[at:nxt] == strings.text(i) or strings.text(i).startswith("bytes:\\x") or nxt - at <= 1
    if name == "byte-level":  # with byte fallback a letter has a token as such and one as a byte
        assert len({strings.text(i) for i in range(len(tokenizer))}) == len(tokenizer)
    assert strings.bytes(len(tokenizer) + 1) == b""
    assert strings.text(tokenizer.convert_tokens_to_ids("Ã" if name == "byte-level" else "<0xC3>")) == "bytes:\\xc3"


def test_chat_tokens():
    tokenizer = tokenizer_of("byte-level")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ids = chat_tokens(tokenizer, [{"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "me"}])
    assert tokenizer.decode(ids) == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    user = {"role": "user", "content": "x"}
    assert chat_tokens(tokenizer, [user | {"type": "text"}]) == chat_tokens(tokenizer, [user])  # as lm-eval writes it
    bad: dict[str, object] = {
        "wants a list of at least one": [],
        "wants a list": "hello",
        "number 0 has 'hi'": ["hi"],
        "'tool_calls'": [user | {"tool_calls": [1]}],
        "number 1 has content None": [user, {"role": "assistant"}],
        "other kinds are not supported": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    }
    for error, messages in bad.items():
        with pytest.raises(ValueError, match=error):
            chat_tokens(tokenizer, messages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no chat template"):
        chat_tokens(tokenizer_of("byte-fallback"), [user])
    with pytest.raises(ValueError, match="chat_template_kwargs: has 'tokenize'"):
        chat_tokens(tokenizer, [user], {"tokenize": True})
    refusing = train_tokenizer(TEXTS[:2] * 4, 300)
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        chat_tokens(refusing, [user])

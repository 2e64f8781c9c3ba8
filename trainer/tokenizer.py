"""Tokenizers: read one from a folder, or train a byte-level BPE with ChatML turns on one's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from swiftk.model.tokenizer import read_tokenizer

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALLEST = 256 + len(SPECIAL_TOKENS)  # every byte has a token of its own, so there is no unknown text


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016) with the tokens and the chat template of ChatML.

    The same texts give the same tokenizer. eos and pad are <|endoftext|>, which ends documents; <|im_end|> ends turns.
    `tokenizer.save_pretrained(folder)` writes it in Hugging Face's format.

    Args:
        texts: the text to learn merges from; once through.
        vocab_size: tokens with the special ones, at least 259. Short texts may give fewer: then it raises.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"train_tokenizer: vocab_size has {vocab_size}, wants at least {SMALLEST} (256 bytes, special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"train_tokenizer: the texts give {got} tokens, vocab_size wants {vocab_size}; lower it or add text")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises: ValueError where the folder holds none, or one without character offsets (a "slow" one: loss masks need them).
    """
    tokenizer = read_tokenizer(directory)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {directory} has no tokenizer.json, wants one: loss masks need its character offsets")
    return tokenizer


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises ValueError where a token has an id that the model has no embedding for."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"check_vocab: token {token!r} has id {largest}, the model's vocab_size is {vocab_size} and the tokenizer's "
            f"{largest + 1}; use the model's own tokenizer or build the model with vocab_size >= {largest + 1}"
        )

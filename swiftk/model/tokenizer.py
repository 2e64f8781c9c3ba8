"""The tokenizer of a checkpoint, by transformers, without the network."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is in every folder with a tokenizer


def has_tokenizer(directory: str | Path) -> bool:
    return any((Path(directory) / name).is_file() for name in FILES)


def read_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Raises: ValueError where the folder holds none that loads."""
    if not Path(directory).is_dir():
        raise ValueError(f"tokenizer: {directory} is not a folder, wants one with tokenizer.json")
    if not has_tokenizer(directory):  # transformers may make an empty one up
        raise ValueError(f"tokenizer: {directory} has none of {', '.join(FILES)}; copy those of the model there")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: {directory} holds none that loads ({str(error).splitlines()[0]})") from error

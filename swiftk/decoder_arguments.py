"""What swiftk.generate and swiftk.serve have in common: their command line's keys for the engine and for sampling, an engine
made of them, and sampling parameters from JSON."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the kernels' threads need the cores

import torch
from transformers import PreTrainedTokenizerBase

from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.model.peft_files import read_adapter_config, run_arguments
from swiftk.model.tokenizer import read_tokenizer
from swiftk.trainer.template import end_of_turn

BASE = "base"  # in place of an adapter's name: none


# --- values --------------------------------------------------------------------------------------------------------


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an integer")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:  # NaN, 10**400
        raise ValueError("a number")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(p, str) and p for p in parts):
        raise ValueError("a string, or a list of strings, none of them empty")
    return tuple(parts)


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("a list of token ids")
    return tuple(map(_integer, value))


def _bias(value: Any) -> dict[int, float]:
    try:
        return {int(token): _number(bias) for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError('a mapping of token ids to numbers, {"42": -100}') from None


SAMPLING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "max_tokens": (_integer, "most tokens of an output"),
    "min_tokens": (_integer, "fewest: no end token and no stop string before"),
    "temperature": (_number, "0: the most likely token"),
    "top_k": (_integer, "only the k most likely tokens; 0: all"),
    "top_p": (_number, "only the fewest most likely tokens that have this probability together"),
    "min_p": (_number, "only tokens of at least this share of the most likely one's probability"),
    "repetition_penalty": (_number, "logits of tokens in prompt and output are divided by it (multiplied where negative)"),
    "presence_penalty": (_number, "taken off the logits of tokens in the output"),
    "frequency_penalty": (_number, "the same, times how often they are there"),
    "seed": (_integer, "the same seed gives the same output; default: another one each time"),
    "stop": (_strings, "strings that end the output"),
    "stop_token_ids": (_integers, "tokens that end it, besides the model's own"),
    "ignore_eos": (_truth, "true: the model's own end tokens do not end it"),
    "logprobs": (_integer, "log-probabilities of the output's tokens, and of so many most likely ones"),
    "prompt_logprobs": (_integer, "the same for the prompt's tokens"),
    "n": (_integer, "outputs per prompt"),
    "logit_bias": (_bias, 'added to logits, as JSON: {"42": -100}'),
    "include_stop_str_in_output": (_truth, "true: what ended the output is part of it"),
}


def finite(logprob: float) -> float | None:
    """JSON has neither -inf nor NaN; -9999 is what other servers write for the one, null is there for the other."""
    return None if math.isnan(logprob) else max(logprob, -9999.0)


def read_sampling(raw: Mapping[str, Any], base: SamplingParams) -> SamplingParams:
    """`base` with the values of JSON `raw`; None is the same as absent.

    Raises: ValueError for a value of the wrong kind; ranges are checked by the engine.
    """
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if value is not None:
            try:
                values[name] = SAMPLING[name][0](value)
            except ValueError as error:
                raise ValueError(f"{name}: has {value!r}, wants {error}") from None
    return dataclasses.replace(base, **values)


# --- the command line ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors in one sentence, exit code 2; an unknown key names the nearest one."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {module}", description=description, allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
            usage=f"python -m {module} --model DIR [--key value ...]",
        )  # fmt: skip
        self.module = module

    def error(self, message: str) -> NoReturn:
        print(f"{self.module}: {message} (--help: all keys)", file=sys.stderr)
        sys.exit(2)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, rest = self.parse_known_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].split("=")[0].replace("-", "_").replace("__", "--", 1), known, 1)
            self.error(f"{rest[0]} is no key" + (f"; did you mean {near[0]}?" if near else ""))
        return args


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, wants true or false")
    return text.lower() == "true"


def _mapping(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, wants JSON ({error})") from None


def add_engine_keys(parser: Parser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint; default: the first adapter's base")
    group.add_argument("--adapters", nargs="+", default=[], metavar="DIR", help="PEFT's format; or NAME=DIR")
    group.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    group.add_argument("--torch_dtype", choices=["bfloat16", "float32", "float64"], help="default: bf16 where the chip has it")
    group.add_argument("--quant_bits", choices=["4", "none"],
                       help="4: the linears of the blocks in NF4; default: as the adapters were trained")  # fmt: skip
    group.add_argument("--quant_head", type=boolean, metavar="true|false", help="the head in NF4 too")
    group.add_argument("--max_model_len", type=int, metavar="N", help="longest prompt and output; default: the model's")
    group.add_argument("--cache_gib", type=float, metavar="X", help="of the cache; default: as needed, 4 at most")
    group.add_argument("--max_num_seqs", type=int, metavar="N", help="sequences that are decoded at once")
    group.add_argument("--max_batched_tokens", type=int, metavar="N", help="tokens of a step")
    group.add_argument("--prefix_caching", type=boolean, metavar="true|false", help="common prefixes are computed once")
    group.add_argument("--speculate", metavar="ngram|DIR", help="guesses from the text itself, or by a smaller model")
    group.add_argument("--num_draft_tokens", type=int, metavar="N", help="guesses per step")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: a GPU where torch sees one")
    group.add_argument("--numerics", choices=["auto", "invariant"], help="invariant: on a GPU too no row sees its batch")
    group.add_argument("--isa", choices=["auto", "avx512", "avx2", "portable"])
    group.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")


ENGINE_KEYS = (
    "torch_dtype", "quant_head", "max_model_len", "cache_gib", "max_num_seqs", "max_batched_tokens", "prefix_caching",
    "speculate", "num_draft_tokens", "device", "numerics", "isa",
)  # fmt: skip


def add_sampling_keys(parser: Parser) -> None:
    group = parser.add_argument_group("sampling")
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    for name, (kind, text) in SAMPLING.items():
        if isinstance(defaults[name], int | float) and name != "max_tokens":
            text = f"{text}; default: {str(defaults[name]).lower()}"
        options: dict[str, Any] = {"help": text}
        if kind is _truth:
            options |= {"type": boolean, "metavar": "true|false"}
        elif kind in (_strings, _integers):
            options |= {"nargs": "+"} | ({"metavar": "TEXT"} if kind is _strings else {"metavar": "ID", "type": int})
        else:
            options |= {"type": int if kind is _integer else float if kind is _number else _mapping}
            options |= {"metavar": "JSON" if kind is _bias else "N" if kind is _integer else "X"}
        group.add_argument(f"--{name}", **options)


def name_of(directory: str | Path) -> str:
    """That of its folder; of a run's checkpoints (last, checkpoint-60) the run's."""
    path = Path(directory).absolute()
    return path.parent.name if path.name == "last" or re.fullmatch(r"checkpoint-\d+", path.name) else path.name


def named_adapters(entries: Sequence[str]) -> dict[str, str]:
    """NAME=DIR, or DIR by name_of."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, directory = entry.partition("=")
        if not equals or Path(entry).exists():
            name, directory = name_of(entry), entry
        if name in found or name in ("", BASE):
            taken = f"two are called {name!r}" if name in found else f"{name!r} is no name for one"
            raise ValueError(f"adapters: {taken}; give each a name of its own, --adapters NAME=DIR ...")
        if not Path(directory).is_dir():
            raise ValueError(f"adapters: {directory} is not a folder, wants one with adapter_config.json")
        found[name] = directory
    return found


def make_engine(args: argparse.Namespace, say: Callable[[str], None]) -> Engine:
    """Raises: ValueError that says what does not fit together."""
    for name in ("threads", "max_num_seqs", "max_batched_tokens", "max_model_len", "num_draft_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: has {value}, wants at least 1")
    if args.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    adapters = named_adapters(args.adapters)
    model = args.model
    if model is None and adapters:
        model = read_adapter_config(next(iter(adapters.values())))[1]
    if model is None:
        raise ValueError("model: is not given, wants --model DIR" + (": the adapter names none" if adapters else ""))
    if not (Path(model) / "config.json").is_file():
        what = "has no config.json" if Path(model).is_dir() else "is not a folder"
        raise ValueError(f"model: {model} {what}, wants a Hugging Face checkpoint")
    args.model = model
    for name, directory in adapters.items():
        base = read_adapter_config(directory)[1]
        moved = base is not None and Path(base).resolve() != Path(model).resolve()
        if base and moved and (Path(base).is_dir() or Path(base).name != Path(model).name):  # of a hub's name its end tells
            say(f"careful: the adapter {name} names {base} as its base, and is put over {model}")
    quant_bits = 4 if args.quant_bits == "4" else None
    if args.quant_bits is None and adapters:
        trained = {(run_arguments(directory) or {}).get("quant_bits") == 4 for directory in adapters.values()}
        quant_bits = 4 if trained == {True} else None
        if True in trained:
            say(
                "the base is held in NF4, as the adapters were trained (--quant_bits none: as it is stored)" if quant_bits else
                "careful: some of the adapters were trained over NF4 and others not; --quant_bits 4 or none says which it is"
            )  # fmt: skip
    options = {name: value for name in ENGINE_KEYS if (value := getattr(args, name)) is not None}
    return Engine(model, tokenizer=read_tokenizer(args.tokenizer or model), adapters=adapters, quant_bits=quant_bits, **options)


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a reply by the chat template: not every checkpoint names them among its end tokens."""
    with suppress(ValueError):
        vocab = tokenizer.get_vocab()
        return tuple(sorted(vocab[token] for token in end_of_turn(tokenizer)))
    return ()

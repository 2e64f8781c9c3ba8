"""argv and YAML -> the frozen dataclasses of config.py. The same keys in both; the command line wins.

Older ms-swift, Megatron and Hugging Face spellings are accepted with one warning each (ALIASES, CONVERTED). A key that
belongs to something which is not there yet is an error that says so (NOT_YET), never ignored. Nested YAML blocks are
flattened: the name of a block is for the reader, except where it is itself a key that takes a mapping.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from swiftk.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TunerConfig
from swiftk.model import freezing
from swiftk.model.adapter import INIT_WEIGHTS, resolve
from swiftk.model.config import ModelConfig
from swiftk.model.peft_files import FIELDS, read_adapter_config, run_arguments

CONFIGS = (RunConfig, TunerConfig, DataConfig, OptimConfig, ParallelConfig)
Part = TypeVar("Part", RunConfig, TunerConfig, DataConfig, OptimConfig, ParallelConfig)

ALIASES = {
    "model_id_or_path": "model", "model_id": "model", "model_name_or_path": "model", "sft_type": "tuner_type",
    "r": "lora_rank", "lora_target_modules": "target_modules", "quantization_bit": "quant_bits",
    "train_dataset": "dataset", "max_seq_len": "max_length", "pack_to_max_length": "packing",
    "per_device_train_batch_size": "micro_batch_size", "batch_size": "micro_batch_size",
    "lr": "learning_rate", "lr_warmup_fraction": "warmup_ratio", "lr_decay_style": "lr_scheduler_type",
    "lr_decay_iters": "lr_decay_steps", "clip_grad": "max_grad_norm", "adam_epsilon": "adam_eps",
    "tensor_parallel_size": "tensor_model_parallel_size", "tp_size": "tensor_model_parallel_size",
    "pp_size": "pipeline_model_parallel_size", "cp_size": "context_parallel_size", "ep_size": "expert_model_parallel_size",
    "zero_optimization": "zero_stage", "save": "output_dir", "save_interval": "save_steps", "log_interval": "logging_steps",
}  # fmt: skip

VALUE_ALIASES = {
    "optim": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit", "galore_adamw": "galore"},
}

# key -> (values that change nothing, what is missing)
OFF = (None, "none", "None", False, "false", 0, "0")
NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_stage": (OFF, "a sharded optimizer"),
    "sequence_parallel": (OFF, "sequence parallelism"),
    "virtual_pipeline_model_parallel_size": ((*OFF, 1, "1"), "pipeline parallelism"),
}  # fmt: skip
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # key -> (accepted, known but not there yet)
    "stage": (("pt", "sft"), ("dpo", "grpo", "kto", "rm", "ppo", "orpo", "simpo", "cpo")),
    "tuner_type": (("full", "lora", "qlora"), ("adalora", "longlora", "vera", "boft")),
    "init_weights": (("true", "gaussian", "pissa", "pissa_niter_N"), ("olora", "loftq", "lora-ga")),
    "quant_method": (("bnb",), ("hqq", "eetq", "awq", "gptq", "fp8")),
    "truncation_strategy": (("delete", "left", "right", "split"), ()),
    "lr_scheduler_type": (("cosine", "linear", "constant"), ()),
    "optim": (("adamw", "adamw_8bit", "galore", "q_galore"), ("adafactor", "sgd", "lion", "muon", "paged_adamw_8bit")),
    "recompute_granularity": (("none", "selective", "full"), ()),
    "torch_dtype": (("bfloat16", "float32", "float64"), ("float16",)),
    "device": (("auto", "cpu", "cuda"), ()),
    "isa": (("auto", "avx512", "avx2", "portable"), ()),
    "numerics": (("auto", "invariant"), ()),
    "report_to": (("tensorboard", "none"), ("wandb", "swanlab", "mlflow")),
}
ONE_SO_FAR = {
    "tensor_model_parallel_size": "tensor parallelism", "pipeline_model_parallel_size": "pipeline parallelism",
    "context_parallel_size": "context parallelism", "expert_model_parallel_size": "expert parallelism",
}  # fmt: skip
WHAT = ("model", "model_config", "adapters", "tokenizer", "dataset", "val_dataset")  # without any of these: the preset
POSITIVE = ("micro_batch_size", "global_batch_size", "logging_steps", "max_length", "packing_length", "num_train_epochs",
            "lr_decay_steps", "save_total_limit", "lora_rank", "lora_alpha", "ddp_timeout", "heartbeat_timeout", "peak_tflops",
            "galore_rank", "galore_update_proj_gap", "galore_scale", "lorap_lr_ratio", "lorap_emb_lr")  # fmt: skip
NOT_NEGATIVE = ("learning_rate", "min_lr", "warmup_ratio", "weight_decay", "adam_eps", "max_grad_norm", "save_steps",
                "eval_steps", "split_dataset_ratio", "preview", "freeze_parameters_ratio")  # fmt: skip
LORA_LEARNING_RATE = 1e-4  # where none is given; full tuning's is trainer/optimizer.py's


class ArgumentError(ValueError):
    """A key or value that cannot be used; the message names both and what is wanted."""


@dataclass(frozen=True)
class Arguments:
    run: RunConfig
    tuner: TunerConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    yaml_path: str | None  # the YAML that was read, to be copied to the output
    warnings: tuple[str, ...]  # to be printed once, by one rank
    preset: bool  # nothing says what to train: the preset with the other keys on top

    def flat(self) -> dict[str, Any]:
        """Every key with its value, as args.json has it."""
        merged: dict[str, Any] = {}
        for config in (self.run, self.tuner, self.data, self.optim, self.parallel):
            merged.update(dataclasses.asdict(config))
        return merged


# --- the keys, generated from the dataclasses ----------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    name: str
    type: Any
    default: Any
    help: str


def keys() -> dict[str, Key]:
    """All keys in the order of the dataclasses; the help is the comment behind the field."""
    found: dict[str, Key] = {}
    for config in CONFIGS:
        hints = typing.get_type_hints(config)
        comments = dict(re.findall(r"^    (\w+):[^#\n]*(?:#\s*(.*))?$", inspect.getsource(config), re.MULTILINE))
        for f in dataclasses.fields(config):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            found.setdefault(f.name, Key(f.name, hints[f.name], default, comments.get(f.name, "")))
    return found


def type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of strings"
    if typing.get_origin(kind) is dict:
        return "a mapping (JSON on the command line)"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]


def help_text() -> str:
    """The table of keys with their defaults, from the dataclasses."""
    lines = [
        "usage: torchrun [--nproc-per-node N] -m swiftk.train [config.yaml] [--key value ...]",
        "       python -m swiftk.train ...                     (one process)",
        "",
        "Without arguments: the preset tiny.yaml. The same keys in YAML and on the command line, which wins; lists are",
        "separated by spaces, booleans are true/false, mappings are JSON.",
        "",
    ]
    for key in keys().values():
        default = " ".join(key.default) if isinstance(key.default, tuple) else json.dumps(key.default)
        lines.append(f"  --{key.name:<34} {default if default else '[]':<14} {key.help}".rstrip())
    lines += ["", "Other spellings: " + ", ".join(f"{old} = {new}" for old, new in ALIASES.items())]
    for name, values in VALUE_ALIASES.items():
        lines += [f"Other values of {name}: " + ", ".join(f"{old} = {new}" for old, new in values.items())]
    return "\n".join(lines)


# --- one value -----------------------------------------------------------------------------------------------------


def parse_value(name: str, value: Any, kind: Any) -> Any:
    """`value` from YAML (typed) or the command line (list of strings) as `kind`, or an error with key, value, wanted."""

    def wrong() -> ArgumentError:
        return ArgumentError(f"{name}: has {value!r}, wants {type_name(kind)}")

    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and (value is None or value in (["null"], ["None"])):
        return None
    kind = next(o for o in options if o is not type(None))
    origin = typing.get_origin(kind)
    if origin is tuple:
        parts = value if isinstance(value, list | tuple) else [value]
        if any(not isinstance(p, str) for p in parts):
            raise wrong()
        return tuple(parts)
    if isinstance(value, list):
        if len(value) != 1:
            raise wrong()
        value = value[0]
    if origin is dict:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ArgumentError(f"{name}: has {value!r}, wants a mapping as JSON ({error})") from error
        if not isinstance(value, dict) or any(not isinstance(k, str) for k in value):
            raise wrong()
        if typing.get_args(kind)[1] is str and any(not isinstance(v, str) for v in value.values()):
            raise wrong()
        if typing.get_args(kind)[1] is float:
            return {k: parse_value(f"{name}: {k}", v, float) for k, v in value.items()}
        return dict(value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise wrong()
    if kind is str:
        if not isinstance(value, str):
            raise wrong()
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong()
    try:  # a string also comes from YAML: 1e-4 without a dot is one there
        number = float(value) if kind is float else int(value) if not isinstance(value, float) else value
    except ValueError as error:
        raise wrong() from error
    if kind is int and not isinstance(number, int):
        raise wrong()
    if kind is float and not math.isfinite(number):
        raise wrong()
    return number


# --- other spellings -----------------------------------------------------------------------------------------------


def _truth(name: str, value: Any) -> bool:
    return parse_value(name, value, bool)


def _text(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and value else value)


CONVERTED: dict[str, Callable[[str, Any], tuple[str, Any]]] = {
    "train_type": lambda n, v: ("stage" if _text(v) in sum(CHOICES["stage"], ()) else "tuner_type", v),
    "use_lora": lambda n, v: ("tuner_type", "lora" if _truth(n, v) else "full"),
    "init_weights": lambda n, v: (n, str(v).lower() if isinstance(v, bool) else v),  # YAML's true is not a string
    "gradient_checkpointing": lambda n, v: ("recompute_granularity", "full" if _truth(n, v) else "none"),
}


def normalise(raw: dict[str, Any], where: str, known: dict[str, Key], warnings: list[str]) -> dict[str, Any]:
    """Other spellings to ours; unknown keys and keys of missing features are errors. Values are not parsed yet."""
    result: dict[str, Any] = {}
    for given, value in raw.items():
        name = given.replace("-", "_")
        if name in CONVERTED:
            name, value = CONVERTED[name](name, value)
        name = ALIASES.get(name, name)
        if name in NOT_YET:
            off, feature = NOT_YET[name]
            if (value[0] if isinstance(value, list) and len(value) == 1 else value) in off:
                continue
            raise ArgumentError(f"{given}: {feature} is not there yet; remove the key")
        if name not in known and name != "gradient_accumulation_steps":
            candidates = [*known, *ALIASES, *CONVERTED, *NOT_YET, "gradient_accumulation_steps"]
            near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
            hint = f"the nearest is {near[0]!r}" if near else "python -m swiftk.train --help lists them"
            raise ArgumentError(f"{where}: unknown key {given!r}; {hint}")
        if name != given.replace("-", "_"):
            warnings.append(f"{given} is read as {name}")
        if name in result:
            raise ArgumentError(f"{where}: {name} is given twice (once as {given!r})")
        result[name] = value
    return result


def flatten(block: dict[str, Any], known: dict[str, Key], where: str) -> Iterator[tuple[str, Any]]:
    for name, value in block.items():
        if not isinstance(name, str):
            raise ArgumentError(f"{where}: has the key {name!r}, wants strings")
        takes_mapping = name in known and typing.get_origin(known[name].type) is dict
        if isinstance(value, dict) and not takes_mapping:
            yield from flatten(value, known, where)
        else:
            yield name, value


def unique(pairs: Iterator[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ArgumentError(f"{where}: {name} is given twice")
        found[name] = value
    return found


# --- the whole -----------------------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    """YAML silently keeps the last of two equal keys; here that is an error."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ArgumentError(f"line {node.start_mark.line + 1}: {name} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str, known: dict[str, Key]) -> dict[str, Any]:
    file = Path(path)
    if file.is_dir():
        raise ArgumentError(f"{path}: is a directory, wants a configuration file; did you mean --model {path}?")
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.y*ml")], n=1)
        hint = f"; the nearest in {file.parent} is {near[0]}" if near else ""
        raise ArgumentError(f"{path}: no such configuration file{hint}")
    try:
        block = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ArgumentError(f"{path}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: cannot be read as text: {error}") from error
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise ArgumentError(f"{path}: has {type(block).__name__}, wants keys and values")
    return unique(flatten(block, known, path), path)


def split_argv(argv: list[str]) -> tuple[str | None, dict[str, list[str]]]:
    """[config.yaml] --key value ... -> (path or None, {key: values}); --key=value too."""
    path: str | None = None
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in argv:
        if token.startswith("--"):
            name, equals, rest = token[2:].partition("=")
            if name in given:
                raise ArgumentError(f"command line: --{name} is given twice")
            values = given[name] = [rest] if equals else []
        elif values is not None:
            values.append(token)
        elif path is None:
            path = token
        else:
            raise ArgumentError(f"command line: has {token!r} after {path!r}, wants one configuration file, then --key value")
    for name, found in given.items():
        if not found:
            raise ArgumentError(f"command line: --{name} has no value")
    return path, given


def check(values: dict[str, Any]) -> None:
    """Values that no type can refuse."""
    for name, (accepted, later) in CHOICES.items():
        chosen = values.get(name)
        if name == "init_weights" and chosen is not None and INIT_WEIGHTS.fullmatch(chosen):
            continue
        for one in chosen if isinstance(chosen, tuple) else (chosen,):
            if one in later:
                raise ArgumentError(f"{name}: {one} is not there yet, wants {' or '.join(accepted)}")
            if one is not None and one not in accepted:
                near = difflib.get_close_matches(one, accepted, n=1)
                hint = f" (the nearest is {near[0]})" if near else ""
                raise ArgumentError(f"{name}: has {one!r}, wants {' or '.join(accepted)}{hint}")
    for name, feature in ONE_SO_FAR.items():
        if values.get(name, 1) != 1:
            raise ArgumentError(f"{name}: has {values[name]}, wants 1: {feature} is not there yet")
    for name in POSITIVE:
        if values.get(name) is not None and values[name] <= 0:
            raise ArgumentError(f"{name}: has {values[name]}, wants more than 0")
    for name in NOT_NEGATIVE:
        if values.get(name) is not None and values[name] < 0:
            raise ArgumentError(f"{name}: has {values[name]}, wants at least 0")
    for pattern, rate in values.get("parameter_lr", {}).items():
        if rate <= 0:
            raise ArgumentError(f"parameter_lr: {pattern!r} has {rate}, wants more than 0; freeze_parameters_regex freezes")
    if values.get("learning_rate") == 0 and (values.get("parameter_lr") or values.get("lorap_lr_ratio")):
        raise ArgumentError("learning_rate: has 0, wants more than 0: parameter_lr and LoRA+ are multiples of its curve")
    for name in ("adam_beta1", "adam_beta2", "split_dataset_ratio", "lora_dropout"):
        if name in values and not 0 <= values[name] < 1:
            raise ArgumentError(f"{name}: has {values[name]}, wants 0 <= x < 1")
    for name in ("warmup_ratio", "freeze_parameters_ratio"):
        if values.get(name, 0) > 1:
            raise ArgumentError(f"{name}: has {values[name]}, wants at most 1")
    if values.get("padding_free") is False:
        raise ArgumentError("padding_free: has False, wants true: there is no padding here")
    if values.get("max_steps", -1) == 0:
        raise ArgumentError("max_steps: has 0, wants at least 1 (or -1 for num_train_epochs)")
    if values.get("model") and values.get("model_config"):
        raise ArgumentError("model_config: cannot be given together with model, which has its own config.json")
    if values.get("dataset") and not values.get("model") and not values.get("model_config"):
        raise ArgumentError(
            f"dataset is given ({' '.join(values['dataset'])}) without model; wants --model <directory of a Hugging Face "
            "checkpoint>, --adapters <checkpoint of an adapter>, or a model_config block and tokenizer in the YAML to start "
            "from random weights"
        )
    if not values.get("dataset"):
        raise ArgumentError("dataset: has nothing, wants at least one file or builtin name (--dataset data.jsonl)")
    if values.get("model_config") and not values.get("tokenizer"):
        raise ArgumentError("tokenizer: has nothing, wants a directory or `train`: model_config brings none")
    if values.get("tokenizer") == "train" and not values.get("model_config"):
        raise ArgumentError("tokenizer: has 'train', wants model_config: a checkpoint's vocabulary is fixed")


def from_adapters(values: dict[str, Any], warnings: list[str]) -> None:
    """What --adapters DIR says and the arguments do not: the adapter's settings, its base and how that was held."""
    if not values.get("adapters"):
        return
    if len(values["adapters"]) > 1:
        raise ArgumentError(f"adapters: has {len(values['adapters'])} directories, wants one")
    directory = Path(values["adapters"][0])
    try:
        tuner, base = read_adapter_config(directory)
        saved = run_arguments(directory) or {"model": base}
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    # base is absolute; the run's own path may name another directory from here
    found = next((path for path in (base, saved.get("model")) if path and Path(path).is_dir()), None)
    if "model" not in values:
        if found is None:
            missing = f"the base of {directory}, {saved.get('model')}, is not there"
            raise ArgumentError(f"adapters: {missing}; wants --model <directory>")
        values["model"] = found
    elif base and Path(base).name != Path(values["model"]).absolute().name:
        warnings.append(f"careful: {directory} names {base} as its base, and goes on over {values['model']}")
    for name in FIELDS:
        here, there = values.setdefault(name, getattr(tuner, name)), getattr(tuner, name)
        if name == "lora_dropout" or here == there:
            continue
        if not isinstance(here, tuple) or not _same_modules(values["model"], name, here, there):
            raise ArgumentError(f"{name}: has {here!r}, wants {there!r} like {directory}; leave it out, or start a new adapter")
    values.setdefault("tuner_type", "lora")
    if saved.get("quant_bits") and values.get("quant_bits", ...) in OFF:
        warnings.append(
            f"careful: {directory} was trained over NF4; over 16 or 32 bits it is off by the quantisation error: leave "
            "quant_bits out to go on from the model that was trained"
        )
    elif saved.get("quant_bits"):
        if str(saved.get("init_weights")).startswith("pissa"):
            warnings.append(
                f"careful: {directory} was trained by PiSSA over NF4, of weights that no base has: the run goes on from a "
                "model that is off by the quantisation error"
            )
        values.setdefault("quant_bits", saved["quant_bits"])
        values.setdefault("quant_method", saved.get("quant_method"))


def _same_modules(model: str, key: str, *names: tuple[str, ...]) -> bool:
    """Whether two ways to name modules mean the same ones of a model: all-linear, or its seven names."""
    try:
        config = ModelConfig.from_hf(model)
        both: list[dict[str, Any]] = [{"tuner_type": "lora", "lora_rank": 1, key: one} for one in names]
        found = [resolve(config, TunerConfig(**settings)) for settings in both]
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    return found[0].adapted == found[1].adapted and found[0].saved == found[1].saved


def settle_tuner(values: dict[str, Any]) -> None:
    """The tuner's keys made explicit, and those that contradict each other refused."""
    if values.get("tuner_type") is None:
        values["tuner_type"] = "full" if values.get("model_config") else "lora"
    if values["tuner_type"] == "qlora":
        values["tuner_type"] = "lora"
        values.setdefault("quant_bits", 4)
    if values.get("quant_bits"):
        values.setdefault("quant_method", "bnb")
    lora = values["tuner_type"] == "lora"
    if values.get("quant_bits") not in (None, 4):
        raise ArgumentError(f"quant_bits: has {values['quant_bits']}, wants 4")
    if values.get("quant_method") and not values.get("quant_bits"):
        raise ArgumentError("quant_method: has bnb without quant_bits, wants --quant_bits 4")
    if values.get("quant_bits") and not lora:
        raise ArgumentError("quant_bits: has 4 with tuner_type full, wants tuner_type lora: NF4 weights cannot be trained")
    for name in (*FIELDS, "init_weights", "adapters", "lorap_lr_ratio", "lorap_emb_lr"):
        if name in values and not lora:
            raise ArgumentError(f"{name}: is given with tuner_type full, wants tuner_type lora; or remove the key")
    if values.get("adapters") and values.get("init_weights", "true") != "true":
        raise ArgumentError(
            f"init_weights: has {values['init_weights']} with adapters, wants it left out: that adapter has its values"
        )
    for name in freezing.KEYS:
        if values.get(name) and lora:
            raise ArgumentError(f"{name}: is given with tuner_type lora, {freezing.WITH_LORA}")
    if values.get("lorap_emb_lr") and not values.get("lorap_lr_ratio"):
        raise ArgumentError("lorap_emb_lr: is given without lorap_lr_ratio, wants both (LoRA+) or neither")
    if lora and values.get("model_config"):
        raise ArgumentError("tuner_type: has lora with model_config, wants full, or --model: adapters belong to a checkpoint")
    for name in ("galore_rank", "galore_update_proj_gap", "galore_scale"):
        if name in values and values.get("optim") not in ("galore", "q_galore"):
            optim = values.get("optim", OptimConfig.optim)
            raise ArgumentError(f"{name}: is given with optim {optim}, wants optim galore or q_galore; or remove the key")
    if values.get("optim") in ("galore", "q_galore") and lora:
        raise ArgumentError(
            f"optim: has {values['optim']}, wants --tuner_type full: it projects the gradients of whole matrices, and an "
            "adapter's are of a low rank already; wants adamw or adamw_8bit otherwise"
        )
    if lora:
        values.setdefault("learning_rate", LORA_LEARNING_RATE)


def parse(argv: list[str], *, world_size: int = 1, preset: str) -> Arguments:
    """argv without the program -> Arguments. `preset` is the YAML that stands for no arguments, or none of WHAT."""
    known = keys()
    warnings: list[str] = []
    path, given = split_argv(argv)
    line = normalise(given, "command line", known, warnings)
    is_preset = path is None and line.keys().isdisjoint(WHAT)
    if is_preset:
        path = preset
        if argv:
            warnings.append(f"none of {', '.join(WHAT)} is given: the preset {Path(preset).name} with the given keys on top")
    raw = normalise(read_yaml(path, known), path, known, warnings) if path else {}
    if "gradient_accumulation_steps" in line and "global_batch_size" not in line:
        raw.pop("global_batch_size", None)
    raw |= line
    accumulation = raw.pop("gradient_accumulation_steps", None)
    values = {name: parse_value(name, value, known[name].type) for name, value in raw.items()}
    if accumulation is not None:
        if "global_batch_size" in values:
            raise ArgumentError("gradient_accumulation_steps and global_batch_size are both given, wants one of them")
        steps = parse_value("gradient_accumulation_steps", accumulation, int)
        if steps < 1:
            raise ArgumentError(f"gradient_accumulation_steps: has {steps}, wants at least 1")
        values["global_batch_size"] = steps * values.get("micro_batch_size", RunConfig.micro_batch_size) * world_size
    for name, others in VALUE_ALIASES.items():
        if values.get(name) in others:
            warnings.append(f"{name} {values[name]} is read as {others[values[name]]}")
            values[name] = others[values[name]]
    from_adapters(values, warnings)
    for name in ("quant_method", "quant_bits"):
        if values.get(name) in OFF:
            values.pop(name, None)
    check(values)
    settle_tuner(values)

    def part(config: type[Part]) -> Part:
        return config(**{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values})  # type: ignore[arg-type]

    return Arguments(
        part(RunConfig), part(TunerConfig), part(DataConfig), part(OptimConfig), part(ParallelConfig),
        yaml_path=path, warnings=tuple(warnings), preset=is_preset,
    )  # fmt: skip

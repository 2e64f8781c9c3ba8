"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, written and read.

    base_model.model.<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector; of the embedding .lora_embedding_A, _B;
    base_model.model.<parameter> for what modules_to_save trains whole

`peft.PeftModel.from_pretrained(the transformers model, directory)` computes the same logits. PiSSA's adapter (A, B), which
started as (A0, B0) and stands on W - s B0 A0, is written as an adapter of W, as peft converts it: A' = [A; A0], B' = [B, -B0],
twice the rank, the same scale. Tensors are stored as they are
trained (fp32). Names of targets and of modules to save are written in full where PEFT, which compares the ends of names,
would otherwise find more. Of PEFT's settings those are read that swiftk has; one that would change the numbers is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from swiftk.config import TunerConfig
from swiftk.kernels.nf4 import NF4Tensor
from swiftk.model.adapter import EMBED, LM_HEAD, Tuning, is_adapter
from swiftk.model.checkpoint import open_tensors, refuse, write_file, write_json
from swiftk.model.config import ModelConfig
from swiftk.model.parameters import EMBEDDING, HEAD
from swiftk.model.transformer import Model
from swiftk.parallel.spec import ParamSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# field -> key of adapter_config.json
FIELDS = {
    "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules",
    "use_rslora": "use_rslora", "use_dora": "use_dora", "modules_to_save": "modules_to_save",
}  # fmt: skip
# keys that do not change what a loaded adapter computes here; all others have to be off
IGNORED = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "init_lora_weights",
    "peft_version", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config",
    "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
OFF: tuple[Any, ...] = (None, False, "none", [], {})
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # others take something out of the base


# --- the configuration -------------------------------------------------------------------------------------------


def read_adapter_config(directory: str | Path) -> tuple[TunerConfig, str | None]:
    """adapter_config.json as the settings of a tuner, and its base_model_name_or_path. ValueError for one that is missing,
    broken, or says what swiftk does not compute."""
    path, raw = Path(directory) / CONFIG, _raw(Path(directory) / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"adapters: {path}: peft_type has {raw.get('peft_type')!r}, wants 'LORA'")
    for key, value in raw.items():
        if key not in IGNORED and key not in FIELDS.values() and value not in OFF:
            raise ValueError(f"adapters: {path}: {key} has {value!r}, wants it off: swiftk has no such adapters yet")
    if raw.get("init_lora_weights") not in PLAIN_INITS:
        raise ValueError(
            f"adapters: {path}: init_lora_weights has {raw['init_lora_weights']!r}: it belongs to what that initialisation "
            "left of the base, wants an adapter of all of it; in peft, save it with path_initial_model_for_weight_conversion"
        )
    try:
        values = {field: raw[key] for field, key in FIELDS.items() if raw.get(key) is not None}
        for field in ("target_modules", "modules_to_save"):
            if field in values:  # a single string is a regex in PEFT, and all-linear
                values[field] = (values[field],) if isinstance(values[field], str) else tuple(sorted(values[field]))
        config = TunerConfig(tuner_type="lora", **values)
    except TypeError as error:
        raise ValueError(f"adapters: {path} cannot be read: {error}") from None
    rank, alpha, dropout, number = config.lora_rank, config.lora_alpha, config.lora_dropout, (int, float)
    for key, fits, wants in (
        ("r", isinstance(rank, int) and rank >= 1, "an integer of at least 1"),
        ("lora_alpha", isinstance(alpha, number) and 0 < alpha < math.inf, "a number above 0"),
        ("lora_dropout", isinstance(dropout, number) and 0 <= dropout < 1, "0 <= x < 1"),
        ("use_rslora", isinstance(config.use_rslora, bool), "true or false"),
        ("use_dora", isinstance(config.use_dora, bool), "true or false"),
    ):
        if not fits:
            raise ValueError(f"adapters: {path}: {key} has {raw[key]!r}, wants {wants}")
    return config, raw.get("base_model_name_or_path")


def run_arguments(directory: str | Path) -> dict[str, Any] | None:
    """The arguments of the run that wrote the adapter, from the args.json beside it; None where there is none (PEFT's own)."""
    path = Path(directory) / "args.json"
    try:
        return dict(json.loads(path.read_text())["arguments"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, no UTF-8, no mapping
        raise ValueError(f"adapters: {path} is damaged ({error!r}); give --model and remove it") from error


def _raw(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
        assert isinstance(raw, dict)
    except FileNotFoundError:
        raise ValueError(f"adapters: there is no {path}; wants a directory with an adapter in PEFT's format") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError) as error:
        raise ValueError(f"adapters: {path} is not a JSON object ({error}); it is half-written or damaged") from None
    return raw


def adapter_config(model: Model, base: str) -> dict[str, Any]:
    """adapter_config.json's dict. base: directory of the base's checkpoint."""
    tuner, tuning = model.tuning.config, model.tuning
    values: dict[str, Any] = {FIELDS[f.name]: getattr(tuner, f.name) for f in dataclasses.fields(tuner) if f.name in FIELDS}
    if tuning.pissa:
        values["r"] *= 2
        values["lora_alpha"] *= math.sqrt(2) if tuner.use_rslora else 2
    if float(values["lora_alpha"]).is_integer():
        values["lora_alpha"] = int(values["lora_alpha"])  # other readers want it so
    saved = sorted(tuning.saved)
    if model.config.tie_word_embeddings and EMBED in saved:
        saved.remove(LM_HEAD)  # PEFT ties the head to the embedding's copy: ensure_weight_tying
    return values | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "target_modules": _short(model), "modules_to_save": saved or None,
        "ensure_weight_tying": model.config.tie_word_embeddings and EMBED in saved,
    }  # fmt: skip


def _short(model: Model) -> list[str]:
    """Last parts of the names of the adapted modules where that names no other module, else the whole name."""
    modules = {name for name, leaf in model.named_modules() if getattr(leaf, "weight", None) is not None or name == LM_HEAD}
    modules |= model.tuning.quantised
    adapted = model.tuning.adapted

    def alone(end: str) -> bool:
        return all(name in adapted for name in modules if name == end or name.endswith(f".{end}"))

    return sorted({end if alone(end := name.rsplit(".", 1)[-1]) else name for name in adapted})


# --- the tensors -------------------------------------------------------------------------------------------------


def peft_name(name: str) -> str:
    return f"{PREFIX}{name}.weight" if name.endswith((".lora_A", ".lora_B")) else f"{PREFIX}{name}"


def save_adapter(model: Model, directory: str | Path, base: str) -> None:
    """Writes the adapter and what modules_to_save trains; each file is complete or absent.

    Args:
        model: whole parameters, with tuner_type lora.
        directory: made where missing.
        base: directory of the base's checkpoint, for adapter_config.json.
    """
    if not model.tuning.lora:
        raise ValueError("save_adapter: the model has tuner_type full, wants lora; save_checkpoint writes the whole")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {name: p for name, p in model.named_parameters() if is_adapter(name) or model.tuning.trains(name)}
    for name in parameters:
        spec = model.specs[name]
        if spec.local_shape != spec.shape:
            raise ValueError(f"save_adapter: {name} holds {spec.local_shape} of {spec.shape}, wants the whole parameter")
    tensors = {peft_name(name): p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, start in model.pissa_start().items():
        rows = name.endswith("lora_A")
        tensors[peft_name(name)] = torch.cat((parameters[name].detach(), start if rows else -start), 0 if rows else 1).cpu()
    if EMBEDDING in parameters and HEAD not in model.specs:
        tensors[peft_name(HEAD)] = tensors[peft_name(EMBEDDING)].clone()  # PEFT ties them and wants both
    write_file(directory / WEIGHTS, functools.partial(save_file, tensors, metadata={"format": "pt"}))
    write_json(directory / CONFIG, adapter_config(model, base))


def load_adapter(model: Model, directory: str | Path) -> None:
    """Fills the adapter and what modules_to_save trains, after the base; the model has the settings of adapter_config.json.

    Raises: as `read_adapter` does.
    """
    base = {EMBED: model.model.embed_tokens.weight, LM_HEAD: model.head_base}
    values = read_adapter(directory, model.config, model.tuning, model.specs, base.__getitem__)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def read_adapter(
    directory: str | Path, config: ModelConfig, tuning: Tuning, specs: Mapping[str, ParamSpec],
    base: Callable[[str], torch.Tensor | NF4Tensor],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Parameter name -> value, of the adapter and of what modules_to_save trains.

    Args:
        directory: of the adapter; config, tuning, specs: the model's, `tuning` by the settings of adapter_config.json.
        base: the weight of EMBED or LM_HEAD without its adapter; asked for only where the file has a copy of it, which NF4
            cannot be compared with.
    Raises: ValueError that lists each tensor that is missing, left over or mis-shaped (an adapter of another base), or
        that names a file which is missing or truncated.
    """
    directory = Path(directory)
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"load_adapter: there is no {directory / WEIGHTS}: the adapter is half-written, or not in safetensors")
    tying = bool(_raw(directory / CONFIG).get("ensure_weight_tying"))
    if config.tie_word_embeddings:
        whole = EMBED in tuning.saved  # then one weight is trained, which PEFT does only if it is told to
        if tying != whole and (whole or {EMBED, LM_HEAD} & tuning.adapted):
            raise ValueError(
                f"load_adapter: {directory / CONFIG}: ensure_weight_tying has {tying}, wants {whole}: tied embeddings are "
                "trained whole as one weight, and adapted as two"
            )
    file, problems = open_tensors(directory / WEIGHTS), []
    wanted = {name: spec.shape for name, spec in specs.items() if is_adapter(name) or tuning.trains(name)}
    held = set(file.keys())
    values: dict[str, torch.Tensor] = {}
    for name, shape in wanted.items():
        there = peft_name(name)
        if there not in held:
            problems.append(f"{there} is missing, wants shape {shape}")
            continue
        values[name] = value = file.get_tensor(there)
        if tuple(value.shape) != shape:
            problems.append(f"{there} has shape {tuple(value.shape)}, wants {shape}")
        elif not value.isfinite().all():
            problems.append(f"{there} has NaN or infinity")
    # PEFT writes the base's embeddings beside their adapters, and tied ones that are trained whole twice
    known: dict[str, Callable[[], torch.Tensor | NF4Tensor | None]] = {
        f"{PREFIX}{module}.base_layer.weight": functools.partial(base, module) for module in (EMBED, LM_HEAD)
    }
    if EMBED in tuning.saved and HEAD not in specs:
        known[peft_name(HEAD)] = lambda: values.get(EMBEDDING)
    for there in sorted(held - {peft_name(name) for name in wanted}):
        if there not in known:
            problems.append(f"{there} is not in the model, wants it absent")
        elif isinstance(twin := known[there](), torch.Tensor) and not torch.equal(file.get_tensor(there).to(twin.dtype), twin):
            problems.append(f"{there} differs from the model's, wants it equal: the adapter is of another base")
    refuse("load_adapter", directory, problems)
    return values

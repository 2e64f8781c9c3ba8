"""Merges a LoRA adapter into the weights it was trained beside, and writes a plain Hugging Face checkpoint.

    linear      W' = W + s B A                    s = alpha / rank, rsLoRA: alpha / sqrt(rank)
    DoRA        W' = m (W + s B A) / ||W + s B A||  per row (a row of zeros stays zero)
    embedding   W' = W + s (B A)^T                modules_to_save: W' is what was trained

in at least fp32, A and B as they are stored, rounded once to the dtype of the file. W is the checkpoint's weight
(onto="source") or, for the linears of the blocks, bf16(NF4(W)) (onto="nf4"): what a QLoRA adapter was trained on, and all
that there is of a base which is stored in bitsandbytes' NF4 (the result has bf16 there, and no quantization_config). Such an
adapter has also learned to undo some of the error W - NF4(W), so onto the source it makes another model than the one that
was evaluated; `Layer` has both sizes. The merged weights are rounded again, to bf16 by up to 2^-9 of each, which a small
delta may not survive.

Tensors are read, merged and written ELEMENTS at a time: beside the adapter and a weight's codes nothing is held whole. With
tied embeddings an adapter of one of the two makes them two: the result is then untied.
Not supported: more than one adapter; the base that PiSSA trained on where that was in NF4 (the source is the nearest).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from swiftk.config import TunerConfig
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize, plain_absmax, take_rows
from swiftk.model.adapter import EMBED, LM_HEAD, Tuning, is_adapter, linear_shapes, resolve
from swiftk.model.checkpoint import (
    FLOATS,
    INDEX,
    SINGLE,
    Stored,
    load_checkpoint,
    quantise,
    refuse,
    stored_nf4,
    tensor_files,
    write_file,
    write_json,
)  # fmt: skip
from swiftk.model.config import ModelConfig
from swiftk.model.parameters import EMBEDDING, HEAD, param_specs
from swiftk.model.peft_files import load_adapter, read_adapter, read_adapter_config
from swiftk.model.transformer import Model
from swiftk.parallel.mesh import Mesh
from swiftk.parallel.spec import ParamSpec

ONTO = ("source", "nf4")
ELEMENTS = 1 << 22  # of a weight, merged and written at a time: 16 MiB a copy in fp32
DTYPES = dict(zip(FLOATS, (torch.bfloat16, torch.float16, torch.float32, torch.float64), strict=True))
NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
          "chat_template*", "LICENSE*", "NOTICE*")  # fmt: skip


class Layer(NamedTuple):
    """What the merge did to one tensor; Frobenius norms."""

    name: str
    weight: float  # |W|
    delta: float  # |W' - W|
    rounding: float  # |round(W') - W'|, to the dtype of the file
    nf4_error: float | None  # |source - bf16(NF4(source))|; None where QLoRA keeps 16 bits


class Merged(NamedTuple):
    layers: list[Layer]  # of the tensors that the adapter changes
    onto: str
    untied: bool
    dtypes: tuple[str, ...]  # that the files hold


class LogitCheck(NamedTuple):
    """Over the same random tokens, in fp32; largest absolute values."""

    tokens: int
    difference: float  # merged - unmerged
    adapter: float  # unmerged - base: what the adapter does
    logit: float  # unmerged
    same_top: float  # share of positions whose largest logit is of the same token


class _Job(NamedTuple):
    base: Path
    config: ModelConfig
    tuning: Tuning
    specs: dict[str, ParamSpec]
    where: dict[str, Path]
    values: dict[str, torch.Tensor]
    onto: str


def merge_adapter(
    base: str | Path, adapter: str | Path, output: str | Path, *, onto: str | None = None, dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9, say: Callable[[str], None] = lambda _: None,
) -> Merged:  # fmt: skip
    """Writes `output`: weights, config.json, tokenizer. It is complete or absent: written aside as .<name>.merging, synced,
    renamed; remains of a merge that was killed go at the next one.

    Args:
        base: directory of the checkpoint that the adapter was trained on.
        adapter: directory with adapter_config.json and adapter_model.safetensors.
        output: must not be there, or be empty.
        onto: "source": the base's weights; "nf4": the linears of the blocks quantised and dequantised, or as they are in a base
            in NF4. None: nf4 for such a base, else source.
        dtype: of the files; None: each tensor's own in the base.
        max_shard_size: bytes of tensors in a file; a larger tensor has a file of its own.
        say: called with the name of each file before it is written.
    Raises: ValueError for an adapter of another base, a damaged file, values that are not finite, an output that is there.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    if onto is not None and onto not in ONTO:
        raise ValueError(f"merge: onto has {onto!r}, wants one of {', '.join(ONTO)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"merge: output {output} is there already, wants it absent or empty: choose another, or remove it")
    config = ModelConfig.from_hf(base)
    if config.quantised and onto == "source":
        raise ValueError(
            f"merge: onto has 'source', wants 'nf4': {base} is stored in NF4, other values of its weights are not there; or "
            "name the checkpoint in 16 or 32 bits that it was made from"
        )
    onto = onto or ("nf4" if config.quantised else "source")
    tuning = resolve(config, read_adapter_config(adapter)[0])
    specs, where = param_specs(config, Mesh.single(), tuning), tensor_files(base)
    _check_base(base, config, specs, where)
    names = {EMBED: EMBEDDING, LM_HEAD: EMBEDDING if config.tie_word_embeddings else HEAD}
    values = read_adapter(adapter, config, tuning, specs, lambda m: _part(where, names[m])[:])
    job = _Job(base, config, tuning, specs, where, values, onto)

    untied = config.tie_word_embeddings and bool({EMBED, LM_HEAD} & tuning.adapted)
    out = [name for name in specs if not is_adapter(name)] + [HEAD] * untied
    dtypes = {name: dtype or DTYPES[_source(job, name).get_dtype()] for name in out}
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name in out:
        size = math.prod(_shape(job, name)) * dtypes[name].itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.merging")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        layers: list[Layer] = []
        for file, inside in zip(files, shards, strict=True):
            say(f"{file}: {len(inside)} tensors")
            write_file(aside / file, functools.partial(_write, job, inside, dtypes, layers))
        if len(files) > 1:
            total = sum(math.prod(_shape(job, name)) * dtypes[name].itemsize for name in out)
            weight_map = {name: file for file, inside in zip(files, shards, strict=True) for name in inside}
            write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        raw = json.loads((base / "config.json").read_text())
        raw.pop("quantization_config", None)
        if dtype is not None:
            raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(aside / "config.json", raw | ({"tie_word_embeddings": False} if untied else {}))
        for source in (base, adapter):  # the adapter's tokenizer, with its chat template, is the one that was trained with
            for path in sorted({p for pattern in COPIED for p in source.glob(pattern) if p.is_file()}):
                write_file(aside / path.name, functools.partial(shutil.copyfile, path))
        os.replace(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Merged(layers, onto, untied, tuple(sorted({str(d).removeprefix("torch.") for d in dtypes.values()})))


def _check_base(base: Path, config: ModelConfig, specs: dict[str, ParamSpec], where: dict[str, Path]) -> None:
    problems = []
    for name, spec in specs.items():
        if is_adapter(name):
            continue
        if name == EMBEDDING and name not in where and config.tie_word_embeddings:
            name = HEAD  # tied, and stored under its other name
        if name not in where:
            problems.append(f"{name} is missing, wants shape {spec.shape}")
        elif tuple((part := _part(where, name)).get_shape()) != spec.shape:
            problems.append(f"{name} has shape {tuple(part.get_shape())}, wants {spec.shape}")
        elif part.get_dtype() not in FLOATS:
            problems.append(f"{name} has dtype {part.get_dtype()}, wants one of {', '.join(FLOATS)}")
    refuse("merge", base, problems)


def _part(where: dict[str, Path], name: str) -> Any:
    """A tensor in its file, not read yet; the tied embedding under either name."""
    if name == EMBEDDING and name not in where:
        name = HEAD
    if f"{name}.absmax" in where:
        return _StoredNF4(where, name)
    return Stored(where[name], name)


class _StoredNF4:
    """A weight in bitsandbytes' NF4, as a tensor in a file: of the values that the forward multiplies by."""

    def __init__(self, where: dict[str, Path], name: str) -> None:
        self.where, self.name = where, name

    @functools.cached_property
    def weight(self) -> NF4Tensor:
        return plain_absmax(stored_nf4(self.where, self.name))

    def get_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return nf4_dequantize(take_rows(self.weight, rows))


def _source(job: _Job, name: str) -> Any:
    """The tensor of the base behind a tensor of the result: tied embeddings have one."""
    return _part(job.where, EMBEDDING if name == HEAD and job.config.tie_word_embeddings else name)


def _shape(job: _Job, name: str) -> tuple[int, ...]:
    return job.specs[EMBEDDING if name == HEAD and job.config.tie_word_embeddings else name].shape


# --- one file ----------------------------------------------------------------------------------------------------


def _write(job: _Job, names: list[str], dtypes: dict[str, torch.dtype], layers: list[Layer], path: Path) -> None:
    """A safetensors file, piece by piece: its header needs shapes and dtypes only. Wide dtypes first keeps all aligned."""
    names = sorted(names, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(_shape(job, name)) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": _shape(job, name), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            layer = _merge(job, name, dtypes[name], file)
            if layer is not None:
                layers.append(layer)


def _merge(job: _Job, name: str, dtype: torch.dtype, file: BinaryIO) -> Layer | None:
    """Writes one tensor of the result; its row of the table where the adapter changes it."""
    module, kind = name.rsplit(".", 1)
    part, shape = _source(job, name), _shape(job, name)
    nf4 = _nf4(job, module, name, part) if kind == "weight" else None
    changed = name in job.values or (kind == "weight" and module in job.tuning.adapted)
    acc = torch.promote_types(DTYPES[part.get_dtype()], torch.float32)
    squares = torch.zeros(4, dtype=torch.float64)
    step = max(1, ELEMENTS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        rows = slice(start, min(shape[0], start + step))
        source = part[rows].to(acc)
        decoded = None if nf4 is None else nf4_dequantize(take_rows(nf4, rows)).to(acc)
        weight = decoded if job.onto == "nf4" and decoded is not None else source
        merged = job.values[name][rows].to(acc) if name in job.values else _plus_adapter(job, module, kind, weight, rows)
        rounded = merged.to(dtype)
        if not rounded.isfinite().all():
            raise ValueError(f"merge: {name} has values that are not finite in {dtype}, rows {rows.start} to {rows.stop - 1}")
        file.write(rounded.contiguous().view(torch.uint8).numpy().data)
        if changed:
            error = torch.zeros(()) if decoded is None else source - decoded
            pieces = (weight, merged - weight, rounded.to(acc) - merged, error)
            squares += torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in pieces]).square()
    if not changed:
        return None
    size, delta, rounding, nf4_error = squares.sqrt().tolist()
    return Layer(name, size, delta, rounding, None if nf4 is None else nf4_error)


def _nf4(job: _Job, module: str, name: str, part: Any) -> NF4Tensor | None:
    """What QLoRA holds of a weight; None where it holds the weight itself, or nobody wants to know."""
    if module not in linear_shapes(job.config) or module in job.tuning.saved or isinstance(part, _StoredNF4):
        return None
    if job.onto == "source" and module not in job.tuning.adapted:
        return None
    try:
        return quantise(part, ParamSpec.replicated(name, job.specs[name].shape))
    except ValueError as error:
        raise ValueError(f"merge: {name} cannot be quantised: {error}") from None


def _plus_adapter(job: _Job, module: str, kind: str, weight: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of W' from the same rows of W."""
    if kind != "weight" or module not in job.tuning.adapted:
        return weight

    def value(name: str) -> torch.Tensor:
        return job.values[f"{module}.{name}"].to(weight.dtype)

    if module == EMBED:
        return weight + job.tuning.scale * (value("lora_embedding_A")[:, rows].t() @ value("lora_embedding_B").t())
    merged = weight + job.tuning.scale * (value("lora_B")[rows] @ value("lora_A"))
    if job.tuning.config.use_dora:
        norm = torch.linalg.vector_norm(merged, dim=1)
        merged *= torch.where(norm > 0, value("lora_magnitude_vector")[rows] / norm, 0)[:, None]
    return merged


# --- what it did -------------------------------------------------------------------------------------------------


def check_logits(
    base: str | Path, adapter: str | Path, output: str | Path, *, onto: str | None = None, documents: int = 4, length: int = 32,
) -> LogitCheck:  # fmt: skip
    """Logits of the merged checkpoint against those of the base with the adapter beside it (swiftk's forward with adapters),
    both in fp32 on the same random tokens. Holds one whole model in fp32 at a time: `check_bytes` of it."""
    config, tuner = ModelConfig.from_hf(base), read_adapter_config(adapter)[0]
    if config.quantised:
        tuner = dataclasses.replace(tuner, quant_method="bnb", quant_bits=4)
    length = min(length, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (documents * length,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(documents)
    cu_seqlens = torch.arange(0, documents * length + 1, length, dtype=torch.int32)

    @torch.no_grad()
    def logits(model: Model) -> torch.Tensor:
        return model.logits(model(ids, positions, cu_seqlens))

    model = Model(config, Mesh.single(), seed=None, tuner=tuner)
    load_checkpoint(model, base)
    if onto == "nf4" and not config.quantised:
        _hold_as_nf4(model, tensor_files(Path(base)))
    plain = logits(model)  # an adapter starts as nothing
    load_adapter(model, adapter)
    unmerged = logits(model)
    del model
    model = Model(ModelConfig.from_hf(output), Mesh.single(), seed=None)
    load_checkpoint(model, output)
    merged = logits(model)
    difference, adapter_moves, largest = (float(t.abs().max()) for t in (merged - unmerged, unmerged - plain, unmerged))
    same_top = float((merged.argmax(-1) == unmerged.argmax(-1)).double().mean())
    return LogitCheck(len(ids), difference, adapter_moves, largest, same_top)


def check_bytes(output: str | Path) -> int:
    """Bytes of the merged checkpoint's weights in fp32."""
    config = ModelConfig.from_hf(output)
    specs = param_specs(config, Mesh.single(), resolve(config, TunerConfig(tuner_type="full")))
    return 4 * sum(math.prod(spec.shape) for spec in specs.values())


@torch.no_grad()
def _hold_as_nf4(model: Model, where: dict[str, Path]) -> None:
    """Gives the frozen linears of the blocks the values that NF4 has for them."""
    for module in linear_shapes(model.config).keys() - model.tuning.saved:
        name = f"{module}.weight"
        model.get_parameter(name).copy_(nf4_dequantize(quantise(_part(where, name), model.specs[name])))
    model.base_loaded()


def table(merged: Merged) -> list[str]:
    """`Layer`s as lines, with what they mean."""
    width = max([len(layer.name) for layer in merged.layers] + [6])
    lines = [f"{'tensor':{width}}  {'|W|':>10}  {'|delta|':>10}  {'rounding':>10}  {'NF4 error':>10}"]
    for layer in merged.layers:
        numbers = (layer.weight, layer.delta, layer.rounding)
        last = f"{layer.nf4_error:10.4g}" if layer.nf4_error is not None else f"{'-':>10}"
        lines.append(f"{layer.name:{width}}  " + "  ".join(f"{n:10.4g}" for n in numbers) + f"  {last}")
    lost = sum(0 < layer.delta < layer.rounding for layer in merged.layers)
    if lost:
        lines.append(
            f"{lost} of {len(merged.layers)} tensors: rounding takes more than the adapter adds; a wider --dtype keeps it"
        )
    linears = [(layer.delta, layer.nf4_error) for layer in merged.layers if layer.nf4_error is not None]
    delta, error = (math.sqrt(sum(x * x for x in xs)) for xs in zip(*linears, strict=True)) if linears else (0.0, 0.0)
    if delta and error:
        other = "in 16 or 32 bits wants --base source" if merged.onto == "nf4" else "over NF4 (QLoRA) wants --base nf4"
        lines.append(
            f"linears of the blocks: the NF4 error |W - NF4(W)| is {error / delta:.3g} times |delta|. An adapter "
            f"that was trained\n  on one of the two and merged onto the other is off by that error: one trained {other}"
        )
    return lines

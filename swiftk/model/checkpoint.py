"""Reads and writes Hugging Face checkpoints: config.json, model.safetensors or model-*-of-*.safetensors with their index.

Files are memory mapped and each parameter reads its own slices only, so a process never holds more than it keeps; a weight
that is held in NF4 is quantised PIECE_ELEMENTS at a time, or taken over exactly where the checkpoint has bitsandbytes' NF4.
Tied embeddings: lm_head.weight may be absent, or present and equal to the embedding; it is not written.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from swiftk.kernels.nf4 import NF4Tensor, nf4_from_bitsandbytes, nf4_quantize
from swiftk.model.adapter import is_adapter
from swiftk.model.parameters import EMBEDDING, HEAD
from swiftk.model.transformer import Linear, Model
from swiftk.parallel.spec import ParamSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE_ELEMENTS = 1 << 22  # of a tensor, read (and quantised) at a time
BLOCKSIZE = 64
NF4_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
FLOATS = ("BF16", "F16", "F32", "F64")  # safetensors' names; the others are codes of something


# --- reading -----------------------------------------------------------------------------------------------------


def load_checkpoint(model: Model, directory: str | Path, *, started: bool = False) -> None:
    """Fills every parameter of the base with its slices of the checkpoint, cast to the parameter's dtype; quantises what
    the model holds in NF4. Adapters stay as they are, but for PiSSA's: they take their first values from the weights, one of
    which is then held whole at a time, in fp32.

    Args:
        model: made with seed None, to be filled.
        directory: of the checkpoint.
        started: PiSSA: `model.pissa_start()` has been filled with that of a run which goes on, and is taken from the weights
            as it is, so that they are the same again.
    Raises: ValueError that lists each tensor that is missing, left over, mis-shaped, not floating point, not finite (NF4) or
    quantised in another way than the model; or that names a file which is missing or truncated. The model is then partly
    filled: do not use it.
    """
    directory = Path(directory)
    where = tensor_files(directory)
    held = {path: set(open_tensors(path).keys()) for path in sorted(set(where.values()))}
    for name, path in where.items():
        if name not in held[path]:
            raise ValueError(f"load_checkpoint: {path} has no {name}, {INDEX} says that it has; download it again")
    problems: list[str] = []
    specs = {name: spec for name, spec in model.specs.items() if not is_adapter(name)}
    nf4 = {name for name in where if f"{name}.absmax" in where}  # weights in bitsandbytes' format
    extra = {name for name in where if name not in specs and not name.endswith(".rotary_emb.inv_freq")}
    extra -= {f"{name}.{key}" for name in nf4 for key in NF4_KEYS}

    def floating(name: str, spec: ParamSpec) -> Any:
        """The tensor in its file, not read yet; None if it is none that the model can take."""
        part = Stored(where[name], name)
        if name in nf4:
            problems.append(f"{name} is NF4, wants it in 16 or 32 bits: the model trains it, or has it outside its blocks")
        elif tuple(part.get_shape()) != spec.shape:
            problems.append(f"{name} has shape {tuple(part.get_shape())}, wants {spec.shape}")
        elif part.get_dtype() not in FLOATS:
            problems.append(f"{name} has dtype {part.get_dtype()}, wants one of {', '.join(FLOATS)} (is it quantised?)")
        else:
            return part
        return None

    def pieces(name: str, spec: ParamSpec) -> Iterator[tuple[slice, torch.Tensor]]:
        """This process's slices, some rows at a time, and where they go in them."""
        part = floating(name, spec)
        (first, last), *others = spec.slices
        rows = max(1, PIECE_ELEMENTS // max(1, math.prod(stop - start for start, stop in others)))
        for start in range(first, last, rows) if part is not None else ():
            stop = min(last, start + rows)
            yield slice(start - first, stop - first), part[(slice(start, stop), *(slice(*other) for other in others))]

    def quantised(leaf: Linear, name: str, spec: ParamSpec) -> NF4Tensor | None:
        try:
            if name in nf4:
                weight = stored_nf4(where, name)
                if tuple(weight.shape) == spec.shape:
                    return weight
                problems.append(f"{name} has shape {tuple(weight.shape)}, wants {spec.shape}")
                return None
            part = floating(name, spec)
            if part is not None and leaf.start_A is not None:
                part = leaf.begin(part[:], started=started)
            return None if part is None else quantise(part, spec)
        except ValueError as error:
            problems.append(f"{name} cannot be taken: {error}")
        return None

    with torch.no_grad():
        for module, leaf in model.linears().items():
            name = f"{module}.weight"
            if module in model.tuning.quantised and name in where:
                weight = quantised(leaf, name, specs[name])
                if weight is not None:
                    leaf.set_nf4(weight)
        parameters = dict(model.named_parameters())
        for name, spec in specs.items():
            source = name
            if name not in where and name == EMBEDDING and HEAD in where and model.config.tie_word_embeddings:
                source = HEAD  # tied, and stored under its other name
            if source not in where:
                hint = " (the checkpoint ties it: set tie_word_embeddings)" if name == HEAD else ""
                problems.append(f"{name} is missing, wants shape {spec.shape}{hint}")
            elif name in parameters:
                for rows, value in pieces(source, spec):
                    parameters[name][rows].copy_(value)
        if model.config.tie_word_embeddings and HEAD in extra:
            extra.discard(HEAD)
            if EMBEDDING in where:
                pairs = zip(pieces(HEAD, specs[EMBEDDING]), pieces(EMBEDDING, specs[EMBEDDING]), strict=False)
                if not all(torch.equal(head, embedding) for (_, head), (_, embedding) in pairs):
                    problems.append(f"{HEAD} differs from {EMBEDDING}, wants it equal or absent: config.json ties them")
    problems += [f"{name} is not a parameter of the model, wants it absent" for name in sorted(extra)]
    refuse("load_checkpoint", directory, problems)
    model.base_loaded(started=started)


def stored_nf4(where: Mapping[str, Path], name: str) -> NF4Tensor:
    """A weight that the files have in bitsandbytes' NF4 (`name`.absmax is among them), as it is."""
    keys = [name, *(f"{name}.{key}" for key in NF4_KEYS if f"{name}.{key}" in where)]
    state = {key.removeprefix(name.removesuffix("weight")): open_tensors(where[key]).get_tensor(key) for key in keys}
    return nf4_from_bitsandbytes(state)


def quantise(part: Any, spec: ParamSpec) -> NF4Tensor:
    """This process's slices of a tensor (in a file) as NF4, some rows at a time: the whole is never in memory. fp16 counts
    as fp32, whose absmax loses nothing."""
    (first, last), (left, right) = spec.slices
    rows = max(1, PIECE_ELEMENTS // max(1, right - left))
    codes: torch.Tensor | None = None
    for start in range(first, last, rows):
        stop = min(last, start + rows)
        piece = part[start:stop, left:right]
        try:
            weight = nf4_quantize(piece.float() if piece.dtype == torch.float16 else piece, blocksize=BLOCKSIZE)
        except ValueError:
            bad = (~piece.float().isfinite()).nonzero()
            if not len(bad):
                raise
            row, column = bad[0].tolist()  # of the piece
            raise ValueError(
                f"row {start + row}, block {column // BLOCKSIZE} has NaN or infinity, wants finite values; check the file"
            ) from None
        if codes is None:
            codes = weight.codes.new_empty(last - first, weight.codes.shape[1])
            absmax = weight.absmax.new_empty(last - first, weight.absmax.shape[1])
        codes[start - first : stop - first], absmax[start - first : stop - first] = weight.codes, weight.absmax
    assert codes is not None
    return NF4Tensor(codes, absmax, right - left, weight.blocksize)


def refuse(op: str, directory: Path, problems: list[str]) -> None:
    """One error that lists what does not fit, if anything does not."""
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(f"{op}: {directory} does not fit the model: " + "\n  ".join(shown))


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file; model.safetensors before the index where both lie there, as transformers does."""
    if (directory / SINGLE).is_file():
        return dict.fromkeys(open_tensors(directory / SINGLE).keys(), directory / SINGLE)
    if not (directory / INDEX).is_file():
        found = sorted(p.name for p in directory.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
        raise ValueError(
            f"load_checkpoint: {directory} has {', '.join(found) or 'no weights'}, wants {SINGLE} or {INDEX}; "
            "other formats: load them with transformers and save_pretrained"
        )
    try:
        names = json.loads((directory / INDEX).read_text())["weight_map"]
        return {name: directory / file for name, file in names.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load_checkpoint: {directory / INDEX} has no readable weight_map ({error!r}); download it again"
        ) from None


@dataclass(frozen=True)
class Stored:
    """A tensor in its file. Each piece has a mapping of its own: pages that were read stay resident until theirs goes."""

    path: Path
    name: str

    def get_shape(self) -> list[int]:
        return open_tensors(self.path).get_slice(self.name).get_shape()

    def get_dtype(self) -> str:
        return open_tensors(self.path).get_slice(self.name).get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return open_tensors(self.path).get_slice(self.name)[index]


def open_tensors(path: Path) -> Any:
    """The file, memory mapped."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"load_checkpoint: {path} is missing, {INDEX} names it; download it again") from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"load_checkpoint: {path} is truncated or not a safetensors file ({size:,} bytes; {error}); take another copy of it"
        ) from None


# --- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: Model, directory: str | Path, *, max_shard_size: int = 5 * 10**9, dtype: torch.dtype | None = None
) -> None:
    """Writes config.json and the parameters under their Hugging Face names; transformers loads the directory.

    Args:
        model: holding whole parameters (a model cut along the tensor axis has to be gathered first: not there yet).
        directory: made where missing. Each file is complete or absent (written aside, synced, renamed); a reader that
            wants all files or none needs a directory of its own and a rename. One process per directory.
        max_shard_size: bytes of tensors in a file; a larger tensor has a file of its own.
        dtype: of the stored tensors; None is the compute dtype, which is what the forward multiplies by.
    """
    directory, dtype = Path(directory), dtype or model.compute_dtype
    if model.tuning.lora:
        raise ValueError("save_checkpoint: the model has adapters, wants one without; save_adapter writes them")
    directory.mkdir(parents=True, exist_ok=True)
    for name, spec in model.specs.items():
        if spec.local_shape != spec.shape:
            raise ValueError(f"save_checkpoint: {name} holds {spec.local_shape} of {spec.shape}, wants the whole parameter")
    parameters = dict(model.named_parameters())
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name in model.specs:
        size = parameters[name].numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: parameters[name].detach().to("cpu", dtype).contiguous() for name in names}
        write_file(directory / file, functools.partial(save_file, tensors, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_json(directory / INDEX, index)
    for stale in {directory / SINGLE, directory / INDEX, *directory.glob("model-*-of-*.safetensors")}:
        if stale.name not in files and not (stale.name == INDEX and len(shards) > 1):
            stale.unlink(missing_ok=True)  # of an earlier save: transformers would prefer model.safetensors to the index
    write_json(directory / "config.json", {**model.config.to_hf(), "torch_dtype": str(dtype).removeprefix("torch.")})


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_file(path, lambda aside: aside.write_text(text))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes aside, syncs, renames; what a failed write (a full disk) left behind is removed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.unlink(missing_ok=True)
        aside.touch()
        mode = aside.stat().st_mode  # 0666 less the umask; safetensors would leave 0600, which no other user can serve
        write(aside)
        aside.chmod(mode)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

"""What a decoder reads from disk, after it has seen that it fits in memory: a checkpoint, in 16 bits, 32 bits or NF4, with one
adapter as its own (all that the trainer can make) or several beside it (LoRA and rsLoRA on linears)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from swiftk.config import TunerConfig
from swiftk.decoder.forward import LoadedAdapter
from swiftk.decoder.pages import huge_pages
from swiftk.model import Model, ModelConfig, load_adapter, load_checkpoint, read_adapter_config
from swiftk.model.adapter import EMBED, is_adapter, resolve
from swiftk.model.compute import CPU
from swiftk.model.parameters import param_specs
from swiftk.model.peft_files import read_adapter
from swiftk.parallel.mesh import Mesh

GIB = 1 << 30
DEFAULT_CACHE = 4 * GIB
NF4_BYTES = 0.5 + 4 / 64  # per weight: a code and its share of an fp32 absmax


def available_bytes(device: torch.device = CPU) -> int:
    """Memory that can be had without swapping, of the machine and the control group (a container's); of a GPU the free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text) - int(used.read_text()))
    return min(found)


def weight_bytes(config: ModelConfig, tuner: TunerConfig, dtype: torch.dtype, quant_head: bool) -> int:
    """Of a model that is loaded to decode."""
    tuning, total = resolve(config, tuner), 0.0
    for name, spec in param_specs(config, Mesh.single(), tuning).items():
        quantised = name.removesuffix(".weight") in tuning.quantised or (quant_head and name == "lm_head.weight")
        total += math.prod(spec.shape) * (NF4_BYTES if quantised else 4 if is_adapter(name) else dtype.itemsize)
    if quant_head and config.tie_word_embeddings:
        total += config.vocab_size * config.hidden_size * NF4_BYTES
    return int(total)


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of the cache, per token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def draft_of(speculate: str | Path | Model | None, dtype: torch.dtype) -> tuple[ModelConfig | None, int]:
    """Config of the draft model that an engine is given as `speculate`, and the bytes of it that are still to be loaded."""
    if speculate is None or speculate == "ngram":
        return None, 0
    if isinstance(speculate, Model):
        return speculate.config, 0
    config = ModelConfig.from_hf(speculate)
    return config, weight_bytes(config, tuner_of(None, 4 if config.quantised else None), dtype, quant_head=False)


def cache_blocks(
    config: ModelConfig, dtype: torch.dtype, *, block_size: int, max_seqs: int, max_len: int | None, cache_gib: float | None,
    num_blocks: int | None, weights: int, draft: ModelConfig | None = None, device: torch.device = CPU,
    live: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Blocks of the cache (the dummy among them) and the longest sequence. Without a size: room for all sequences at their
    longest, but at most 4 GiB and a quarter of what is free beside the weights, on a GPU three quarters of it (a quarter where
    the model is live). A draft model has a cache of as many blocks.

    Raises: ValueError for a cache that does not fit beside `weights` bytes still to be loaded.
    """
    longest = config.max_position_embeddings
    if max_len is not None and not 1 <= max_len <= longest:
        raise ValueError(f"max_model_len: has {max_len}, wants 1 to max_position_embeddings {longest}")
    each = block_size * sum(token_bytes(c, dtype) for c in (config, draft) if c is not None)
    free = available_bytes(device) - weights
    if free < each * 2:
        raise ValueError(
            f"model: its weights take {weights / GIB:.2f} GiB, {(free + weights) / GIB:.2f} GiB of memory are free; wants a "
            "smaller model, --torch_dtype bfloat16, or --quant_bits 4"
        )
    if cache_gib is not None and not 0 < cache_gib < math.inf:
        raise ValueError(f"cache_gib: has {cache_gib}, wants a finite number above 0")
    if num_blocks is None and cache_gib is not None:
        num_blocks = int(cache_gib * GIB / each)
    if num_blocks is None:
        wanted = max_seqs * -(-(max_len or longest) // block_size)
        share = 1 / 4 if live else 3 / 4  # a trainer needs the memory for its next step
        most = free * share if device.type == "cuda" else min(free / 4, DEFAULT_CACHE)
        num_blocks = 1 + min(wanted, int(most / each))
    if num_blocks < 2:
        raise ValueError(f"cache_gib: has room for {num_blocks} blocks, wants at least 2 ({2 * each / GIB:.3g} GiB)")
    if num_blocks * each > free:
        raise ValueError(
            f"cache_gib: wants {num_blocks * each / GIB:.2f} GiB for {num_blocks} blocks of {block_size} tokens beside "
            f"{weights / GIB:.2f} GiB of weights, and {(free + weights) / GIB:.2f} GiB of memory are free; the largest that "
            f"fits is --cache_gib {math.floor(free / GIB * 100) / 100:g}"
        )
    return num_blocks, min(max_len or longest, (num_blocks - 1) * block_size)


def load_model(
    directory: str | Path, config: ModelConfig, tuner: TunerConfig, dtype: torch.dtype, *, quant_head: bool = False,
    adapter: str | Path | None = None, isa: str = "auto", numerics: str = "auto", device: torch.device = CPU,
) -> Model:  # fmt: skip
    """The checkpoint, nothing of it trainable; tuner: the settings of `adapter`, or tuner_type none."""
    model = Model(
        config, Mesh.single(), compute_dtype=dtype, seed=None, isa=isa, numerics=numerics, tuner=tuner,
        trainable=lambda name: False,
    )  # fmt: skip
    huge_pages(model.parameters(), written=False)
    load_checkpoint(model, directory)
    if adapter is not None:
        load_adapter(model, adapter)
    if quant_head:
        model.quantise_head()
    return model.to(device)


def tuner_of(adapter: str | Path | None, quant_bits: int | None) -> TunerConfig:
    """The settings of an adapter, or of none, over a base in NF4 or not."""
    tuner = TunerConfig(tuner_type="none") if adapter is None else read_adapter_config(adapter)[0]
    if quant_bits not in (None, 4):
        raise ValueError(f"quant_bits: has {quant_bits}, wants 4, or None for 16 or 32 bits")
    return dataclasses.replace(tuner, quant_method="bnb" if quant_bits else None, quant_bits=quant_bits)


def needs_own(adapter: str | Path) -> bool:
    """Whether an adapter has parts that several in one batch cannot have: DoRA, embeddings, whole weights."""
    tuner = read_adapter_config(adapter)[0]
    return bool(tuner.use_dora or tuner.modules_to_save or any(t.endswith("embed_tokens") for t in tuner.target_modules))


def read_adapters(model: Model, adapters: Mapping[str, str | Path]) -> list[LoadedAdapter]:
    """Several adapters over a model that has none of its own.

    Raises: ValueError for one that is missing, damaged, of another base, or has more than LoRA on linears.
    """
    found = []
    for name, directory in adapters.items():
        tuning = resolve(model.config, read_adapter_config(directory)[0])
        if needs_own(directory) or EMBED in tuning.adapted:
            raise ValueError(
                f"adapters: {name} ({directory}) has DoRA, an adapted embedding or modules_to_save, wants LoRA on "
                "linears beside other adapters; give it alone"
            )
        specs = param_specs(model.config, Mesh.single(), tuning)
        values = read_adapter(directory, model.config, tuning, specs, lambda module: model.head_base)
        pairs = {
            module: (values[f"{module}.lora_A"].to(model.compute_dtype), values[f"{module}.lora_B"].to(model.compute_dtype))
            for module in tuning.adapted
        }
        for module, pair in pairs.items():
            if not all(t.isfinite().all() for t in pair):
                raise ValueError(
                    f"adapters: {name} ({directory}) has values of {module} that are not finite in {model.compute_dtype}"
                )
        found.append(LoadedAdapter(tuning.scale, pairs))
    return found


def generation_eos(directory: Path) -> set[int]:
    """The end tokens that generation_config.json names, where there is one: of a chat model, also that of a turn."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return set()
    try:
        found = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model: {path} is not a JSON object ({error}); it is half-written or damaged") from None
    return set(found) if isinstance(found, list) else {found} - {None}

"""The parameters of a model: their names, shapes and places in the layout, and their first values.

Names and shapes are those of the Hugging Face checkpoint. Along the tensor axis q, k, v, gate and up are cut by rows
(output features; whole heads), o and down by columns (input features), the embedding and the head by vocabulary rows;
norms and the biases of o and down are replicated. An adapter's A is cut by columns where its weight is, its B and
magnitude by rows. A weight held in NF4 has its spec too, with the shape of what it stands for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch

from swiftk.model.adapter import EMBED, LM_HEAD, Tuning
from swiftk.model.config import ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.parallel.spec import ParamSpec

EMBEDDING, HEAD = f"{EMBED}.weight", f"{LM_HEAD}.weight"
BLOCK_ELEMENTS = 1 << 16  # of one draw of initial values; fixed, because the values depend on it


def param_specs(config: ModelConfig, mesh: Mesh, tuning: Tuning) -> dict[str, ParamSpec]:
    """Name -> spec, in the order of the checkpoint. A model with tied embeddings has no HEAD."""
    tp, hidden, inner = mesh.tp, config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % tp.size:
            raise ValueError(f"Model: {name} has {getattr(config, name)}, wants a multiple of the tensor axis's size {tp.size}")
    specs: dict[str, ParamSpec] = {}

    def add(name: str, shape: tuple[int, ...], cut: int | None = None) -> None:
        specs[name] = ParamSpec.replicated(name, shape) if cut is None else ParamSpec.split(name, shape, cut, tp.rank, tp.size)

    def add_adapter(module: str, shape: tuple[int, ...], cut: int) -> None:
        if module not in tuning.adapted:
            return
        rank = tuning.config.lora_rank
        if module == EMBED:
            add(f"{module}.lora_embedding_A", (rank, shape[0]), 1)
            add(f"{module}.lora_embedding_B", (shape[1], rank))
            return
        add(f"{module}.lora_A", (rank, shape[1]), None if cut == 0 else 1)
        add(f"{module}.lora_B", (shape[0], rank), 0 if cut == 0 else None)
        if tuning.config.use_dora:
            add(f"{module}.lora_magnitude_vector", shape[:1], 0 if cut == 0 else None)

    add(EMBEDDING, (config.vocab_size, hidden), 0)
    add_adapter(EMBED, (config.vocab_size, hidden), 0)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        add(f"{layer}.input_layernorm.weight", (hidden,))
        for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            add(f"{layer}.self_attn.{name}.weight", (rows, hidden), 0)
            if config.qkv_bias:
                add(f"{layer}.self_attn.{name}.bias", (rows,), 0)
            add_adapter(f"{layer}.self_attn.{name}", (rows, hidden), 0)
        add(f"{layer}.self_attn.o_proj.weight", (hidden, q_rows), 1)
        if config.o_bias:
            add(f"{layer}.self_attn.o_proj.bias", (hidden,))
        add_adapter(f"{layer}.self_attn.o_proj", (hidden, q_rows), 1)
        if config.qk_norm:
            add(f"{layer}.self_attn.q_norm.weight", (config.head_dim,))
            add(f"{layer}.self_attn.k_norm.weight", (config.head_dim,))
        add(f"{layer}.post_attention_layernorm.weight", (hidden,))
        for name, shape, cut in (("gate", (inner, hidden), 0), ("up", (inner, hidden), 0), ("down", (hidden, inner), 1)):
            add(f"{layer}.mlp.{name}_proj.weight", shape, cut)
            if config.mlp_bias:
                add(f"{layer}.mlp.{name}_proj.bias", shape[:1], 0 if cut == 0 else None)
            add_adapter(f"{layer}.mlp.{name}_proj", shape, cut)
    add("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        add(HEAD, (config.vocab_size, hidden), 0)
    add_adapter(LM_HEAD, (config.vocab_size, hidden), 0)
    return specs


def initial_value(spec: ParamSpec, seed: int, std: float, init_weights: str = "true") -> torch.Tensor:
    """This rank's slices of the parameter's first value, fp32.

    normal(0, std) for matrices, ones for norms, zeros for biases. Adapters as PEFT starts them: A uniform in +-1/sqrt(in)
    (init_weights "true": Kaiming with a = sqrt 5) or normal(0, 1 / rank) ("gaussian"), B zero; of the embedding A zero, B
    normal(0, 1). PiSSA's come from the weights: zero here.
    """
    kind = spec.name.rsplit(".", 1)[1]
    if kind in ("lora_B", "lora_embedding_A") or (kind == "lora_A" and init_weights.startswith("pissa")):
        return torch.zeros(spec.local_shape)
    if len(spec.shape) == 1:
        return torch.full(spec.local_shape, 0.0 if kind == "bias" else 1.0)
    if kind == "lora_A" and init_weights == "true":
        bound = 1.0 / math.sqrt(spec.shape[1])
        return _drawn(spec, seed, lambda g, shape: g.random(shape, dtype=np.float32)).mul_(2 * bound).sub_(bound)
    deviation = {"lora_A": 1.0 / spec.shape[0], "lora_embedding_B": 1.0}.get(kind, std)
    return _drawn(spec, seed, lambda g, shape: g.standard_normal(shape, dtype=np.float32)).mul_(deviation)


def random_start(module: str, seed: int, rows: int, columns: int) -> torch.Tensor:
    """normal(0, 1), (rows, columns): the start of a randomised SVD of the module's weight."""
    spec = ParamSpec.replicated(f"{module}.svd", (rows, columns))
    return _drawn(spec, seed, lambda g, shape: g.standard_normal(shape, dtype=np.float32))


def _drawn(spec: ParamSpec, seed: int, draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]) -> torch.Tensor:
    """Rows are drawn in blocks, each from a counter-based generator keyed by (seed, name, block): a layout that holds only
    some rows or columns gets the bits that one process has there."""
    rows, cols = spec.shape
    (row_start, row_stop), (col_start, col_stop) = spec.slices
    value = torch.empty(spec.local_shape)
    per_block = max(1, BLOCK_ELEMENTS // cols)
    for block in range(row_start // per_block, -(-row_stop // per_block)):
        first, last = block * per_block, min(rows, (block + 1) * per_block)
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{spec.name}/{block}".encode(), digest_size=16).digest(), "little")
        drawn = torch.from_numpy(draw(np.random.Generator(np.random.Philox(key=key)), (last - first, cols)))
        start, stop = max(first, row_start), min(last, row_stop)
        value[start - row_start : stop - row_start] = drawn[start - first : stop - first, col_start:col_stop]
    return value

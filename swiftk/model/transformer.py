"""One decoder-only transformer: Llama 3, Mistral, Qwen2 and Qwen3 (dense), on packed tokens.

    x = embed[ids];   per block:  x = x + o(attention(rope(q), rope(k), v)),  q, k, v = linear(norm(x))
                                  x = x + down(silu(gate(norm(x))) up(norm(x)));   hidden = norm(x)

Parameter names are those of the Hugging Face checkpoint. Trainable parameters are fp32 (fp64 where the compute dtype is)
and cast to the compute dtype at use; frozen ones are stored in the compute dtype. Linears may have LoRA adapters and may be
held in NF4, as swiftk/model/adapter.py says; adapters that see the same rows (q, k, v; gate, up) read them once. The head
leaves the model as its parts (`Model.head`): the losses need no logits of all tokens and no gradient of vocab x H. Everything
between the token ids and the hidden states is row-invariant (swiftk kernels, gathers, elementwise + and *): a token's
hidden state depends on the tokens of its document up to it, bit for bit, whether they come packed, alone or one at a time
over a cache.

Activations kept for the backward per token and block, in elements (D query, K key and I inner features, H hidden), Qwen3:
    none       4 H + 3 D + 3 K + 3 I  everything
    selective  3 H + 2 D + 2 K + 2 I  outputs of linears and attention; norms, rope and swiglu, which only move bytes, again
    full       H                      the block's input; the whole block again
Adapters on all linears add 7 r (none, selective), r their rank; a frozen or NF4 weight changes nothing.
Forward and backward take 1.09 and 1.42 times the CPU time of none with selective and full (Zen 3, one thread, fp32, H 512,
I 1536, 8/4 heads of 64, 512 tokens); under bf16 none also keeps the cast weights of each block.
Dropout: of the adapters' inputs only, where `forward` and `head` are given its keys.
Only the data axis of the mesh may exceed one yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from swiftk.config import TunerConfig
from swiftk.kernels.attention import varlen_attention
from swiftk.kernels.linear import check_numerics, linear
from swiftk.kernels.lora_linear import Adapter, Dropout, lora_linear, lora_linear_group, row_norm_sq
from swiftk.kernels.nf4 import Nested, NF4Tensor, nf4_quantize
from swiftk.kernels.nf4_linear import nf4_linear
from swiftk.kernels.rms_norm import rms_norm
from swiftk.kernels.rope import rope, rope_table
from swiftk.kernels.swiglu import swiglu
from swiftk.model.adapter import LM_HEAD, Tuning, is_adapter, resolve
from swiftk.model.config import ModelConfig
from swiftk.model.freezing import frozen
from swiftk.model.parameters import initial_value, param_specs
from swiftk.model.pissa import start_of, take_out_
from swiftk.parallel.comm import Comm, SingleComm
from swiftk.parallel.mesh import Mesh

RECOMPUTE = ("none", "selective", "full")
KVCache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer k, v: (tokens so far, num_kv_heads, head_dim)


@dataclass(frozen=True)
class Ops:
    """The kernels the model is made of; tests pass the references."""

    linear: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rope: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    varlen_attention: Callable[..., torch.Tensor]
    nf4_linear: Callable[..., torch.Tensor]
    lora_linear: Callable[..., torch.Tensor]
    lora_linear_group: Callable[..., tuple[torch.Tensor, ...]]

    @staticmethod
    def native(isa: str, numerics: str = "auto") -> Ops:
        bound: dict[str, Any] = {
            op.__name__: functools.partial(op, isa=isa) for op in (rms_norm, rope, swiglu, varlen_attention)
        }
        for product in (linear, nf4_linear, lora_linear, lora_linear_group):
            bound[product.__name__] = functools.partial(product, isa=isa, numerics=numerics)
        return Ops(**bound)

    def product(
        self, x: torch.Tensor, weight: torch.Tensor | NF4Tensor, adapter: Adapter | None, bias: torch.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x times a plain or NF4 weight, with or without an adapter."""
        if adapter is not None:
            return self.lora_linear(x, weight, adapter, bias, dropout=dropout)
        return (self.nf4_linear if isinstance(weight, NF4Tensor) else self.linear)(x, weight, bias)


class Head(NamedTuple):
    """The head as linear_cross_entropy, token_logprobs and vocab_stats take it: weight, then adapter= and dropout=."""

    weight: torch.Tensor | NF4Tensor  # (vocab, H), in the compute dtype or NF4
    adapter: Adapter | None
    dropout: Dropout | None  # of the adapter's input


@dataclass(frozen=True)
class Rows:
    """What a block needs to know of the packed tokens besides their features."""

    positions: torch.Tensor  # (total,)
    cu_seqlens_q: torch.Tensor  # int32 (documents + 1,)
    cu_seqlens_k: torch.Tensor  # the same, plus what is cached
    cos: torch.Tensor
    sin: torch.Tensor
    seed_step: torch.Tensor | None  # with token_index, the keys of the dropout; None: no dropout
    token_index: torch.Tensor | None


@dataclass(frozen=True)
class Maker:
    """What every leaf is made with."""

    new: Callable[[str], nn.Parameter | None]  # name -> its first value; None where there is no such parameter
    ops: Ops
    dtype: torch.dtype  # of compute
    tuning: Tuning
    seed: int  # of the adapters
    comm: Comm  # of all ranks


class _Leaf(nn.Module):
    """A weight and perhaps more, named by the module's place, used in the compute dtype."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, name: str, make: Maker, *more: str) -> None:
        super().__init__()
        for kind in ("weight", "bias", *more):
            self.register_parameter(kind, make.new(f"{name}.{kind}"))
        self.ops, self.dtype, self.scale = make.ops, make.dtype, make.tuning.scale


class Embedding(_Leaf):
    weight: nn.Parameter
    lora_embedding_A: nn.Parameter | None
    lora_embedding_B: nn.Parameter | None

    def __init__(self, name: str, make: Maker) -> None:
        super().__init__(name, make, "lora_embedding_A", "lora_embedding_B")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        y = nn.functional.embedding(input_ids, self.weight).to(self.dtype)
        if self.lora_embedding_A is None or self.lora_embedding_B is None:
            return y
        s = self.scale * nn.functional.embedding(input_ids, self.lora_embedding_A.t())  # (total, rank)
        return y + self.ops.linear(s.to(self.dtype), self.lora_embedding_B.to(self.dtype))


class Linear(_Leaf):
    """A weight in the compute dtype or fp32, or in NF4 (`nf4`, in buffers); perhaps a LoRA adapter on it."""

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    weight_norm_sq: torch.Tensor | None  # squared norms of the rows of the weight, for DoRA
    start_A: torch.Tensor | None  # PiSSA: the first values of lora_A and lora_B, whose product the weight lacks
    start_B: torch.Tensor | None
    codes: torch.Tensor | None
    absmax: torch.Tensor | None
    nested_code_map: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None

    def __init__(self, name: str, make: Maker) -> None:
        super().__init__(name, make, "lora_A", "lora_B", "lora_magnitude_vector")
        self.number, self.p = make.tuning.numbers[name], make.tuning.config.lora_dropout
        self.name, self.seed, self.comm = name, make.seed, make.comm
        self.rank, self.iterations = make.tuning.config.lora_rank, make.tuning.pissa_iterations
        self.register_buffer("weight_norm_sq", None, persistent=False)
        for side in ("A", "B"):
            first = getattr(self, f"lora_{side}") if make.tuning.pissa else None
            self.register_buffer(f"start_{side}", None if first is None else first.detach().clone(), persistent=False)
        for buffer in ("codes", "absmax", "nested_code_map", "nested_absmax", "nested_offset"):
            self.register_buffer(buffer, None)
        if name in make.tuning.quantised and self.weight is not None:
            weight, self.weight = self.weight, None
            self.set_nf4(nf4_quantize(self.begin(weight.detach())))

    def set_nf4(self, weight: NF4Tensor) -> None:
        self.codes, self.absmax, self.in_features, self.blocksize = weight[:4]
        if weight.nested is not None:
            self.nested_code_map, self.nested_absmax, self.nested_offset = weight.nested

    @torch.no_grad()
    def begin(self, weight: torch.Tensor, *, started: bool = False) -> torch.Tensor:
        """The base's part of a weight (N, K), in its dtype: all of it, or with PiSSA what the adapter does not start with.
        Rank 0 decomposes it for all ranks, unless `started`: then start_A and start_B are those of an earlier process."""
        if self.start_A is None or self.start_B is None or self.lora_A is None or self.lora_B is None:
            return weight
        left = weight.to(torch.promote_types(weight.dtype, self.start_A.dtype), copy=True)
        if not started:
            a, b = start_of(left, self.name, self.rank, self.scale, self.iterations, self.seed, self.comm)
            self.start_A.copy_(a)
            self.start_B.copy_(b)
        self.lora_A.copy_(self.start_A)
        self.lora_B.copy_(self.start_B)
        take_out_(left, self.start_A, self.start_B, self.scale, self.ops.linear)
        return left.to(weight.dtype)

    @property
    def base(self) -> torch.Tensor | NF4Tensor:
        """The weight without its adapter."""
        if self.weight is not None:
            return self.weight.to(self.dtype)
        assert self.codes is not None and self.absmax is not None, "a quantised weight that was not loaded"
        nested = None
        if self.nested_code_map is not None and self.nested_absmax is not None and self.nested_offset is not None:
            nested = Nested(self.nested_code_map, self.nested_absmax, self.nested_offset)
        return NF4Tensor(self.codes, self.absmax, self.in_features, self.blocksize, nested)

    @property
    def adapter(self) -> Adapter | None:
        if self.lora_A is None or self.lora_B is None:
            return None
        return Adapter(self.lora_A, self.lora_B, self.scale, self.lora_magnitude_vector, self.weight_norm_sq)

    def dropout(self, seed_step: torch.Tensor | None, token_index: torch.Tensor | None) -> Dropout | None:
        if seed_step is None or token_index is None or self.p == 0:
            return None
        return Dropout(self.p, seed_step, self.number, token_index)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.ops.product(x, self.base, self.adapter, bias, self.dropout(rows.seed_step, rows.token_index))


def project(x: torch.Tensor, leaves: tuple[Linear, ...], rows: Rows) -> tuple[torch.Tensor, ...]:
    """Each leaf of x; those with an adapter in one call, which reads x once for all of their A."""
    adapters = [leaf.adapter for leaf in leaves]
    if sum(a is not None for a in adapters) < 2:
        return tuple(leaf(x, rows) for leaf in leaves)
    group = [(leaf, a) for leaf, a in zip(leaves, adapters, strict=True) if a is not None]
    found = iter(leaves[0].ops.lora_linear_group(
        x, tuple(leaf.base for leaf, _ in group), tuple(a for _, a in group),
        tuple(None if leaf.bias is None else leaf.bias.to(leaf.dtype) for leaf, _ in group),
        dropouts=tuple(leaf.dropout(rows.seed_step, rows.token_index) for leaf, _ in group),
    ))  # fmt: skip
    return tuple(leaf(x, rows) if a is None else next(found) for leaf, a in zip(leaves, adapters, strict=True))


class RMSNorm(_Leaf):
    weight: nn.Parameter

    def __init__(self, name: str, make: Maker, eps: float) -> None:
        super().__init__(name, make)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight.to(self.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, make: Maker) -> None:
        super().__init__()
        name = f"model.layers.{layer}.self_attn"
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(f"{name}.{p}_proj", make) for p in "qkvo")
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", make, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(f"{name}.k_norm", make, eps=config.rms_norm_eps)
        self.qk_norm, self.head_dim, self.layer = config.qk_norm, config.head_dim, layer
        self.window_size = config.window_size(layer)
        self.ops = make.ops

    def forward(self, x: torch.Tensor, rows: Rows, cache: KVCache | None) -> torch.Tensor:
        projections = project(x, (self.q_proj, self.k_proj, self.v_proj), rows)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.ops.rope(q, rows.cos, rows.sin, rows.positions)
        k = self.ops.rope(k, rows.cos, rows.sin, rows.positions)
        if cache is not None:
            k, v = (torch.cat((old, new)) for old, new in zip(cache[self.layer], (k, v), strict=True))
            cache[self.layer] = (k, v)
        out = self.ops.varlen_attention(
            q, k, v, rows.cu_seqlens_q, rows.cu_seqlens_k, causal=True, window_size=self.window_size
        )  # (total, heads, head_dim)
        return self.o_proj(out.flatten(-2), rows)


class MLP(nn.Module):
    def __init__(self, layer: int, make: Maker) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(f"model.layers.{layer}.mlp.{p}_proj", make) for p in ("gate", "up", "down")
        )
        self.ops = make.ops

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.down_proj(self.ops.swiglu(*project(x, (self.gate_proj, self.up_proj), rows)), rows)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, make: Maker) -> None:
        super().__init__()
        name, eps = f"model.layers.{layer}", config.rms_norm_eps
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", make, eps=eps)
        self.self_attn = Attention(config, layer, make)
        self.post_attention_layernorm = RMSNorm(f"{name}.post_attention_layernorm", make, eps=eps)
        self.mlp = MLP(layer, make)

    def forward(self, x: torch.Tensor, rows: Rows, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rows, cache)
        return x + self.mlp(self.post_attention_layernorm(x), rows)


class Body(nn.Module):
    """Everything below the head; its name in the checkpoint is "model"."""

    def __init__(self, config: ModelConfig, make: Maker) -> None:
        super().__init__()
        self.embed_tokens = Embedding("model.embed_tokens", make)
        self.layers = nn.ModuleList(Block(config, i, make) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm("model.norm", make, eps=config.rms_norm_eps)


NO_TUNER = TunerConfig(tuner_type="full")


class Model(nn.Module):
    """The transformer, built sharded: every parameter has the local shape of its `ParamSpec`.

    Args:
        config: the shape.
        mesh: this process's place; every axis but dp has size 1.
        compute_dtype: bf16, fp32 or fp64: dtype of activations and of weights at use.
        seed: of the initial weights, which depend on (seed, name) and not on the mesh; None leaves them uninitialised,
            for `load_checkpoint`.
        isa: instruction set of the CPU kernels: "auto", "avx512", "avx2" or "portable".
        numerics: of the forward products on a GPU: "auto" (the vendor's) or "invariant" (row m depends on row m alone; on the
            CPU it does in any case).
        recompute: activations computed again in the backward: "none", "selective" or "full"; results are bitwise equal.
            With "selective", a forward can be followed by one backward (no retain_graph).
        tuner: adapters, quantisation, frozen parameters; the default is none of them. With seed None and an adapter,
            `load_checkpoint` comes first.
        adapter_seed: of the adapters' initial values, which are drawn in any case.
        trainable: which parameters are, by name; the others have no gradient and are stored in compute_dtype. None: what
            `tuner` trains (`self.tuning.trains`, less what freezing.py freezes).
        ops: other kernels than swiftk's own, for tests.
    Raises: ValueError for a wrong argument.
    """

    rope_cos: torch.Tensor
    rope_sin: torch.Tensor

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, compute_dtype: torch.dtype = torch.float32, seed: int | None = 0,
        isa: str = "auto", numerics: str = "auto", recompute: str = "selective", tuner: TunerConfig = NO_TUNER,
        adapter_seed: int = 0, trainable: Callable[[str], bool] | None = None, ops: Ops | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for axis in ("pp", "cp", "ep", "tp"):
            if getattr(mesh, axis).size != 1:
                raise ValueError(f"Model: mesh.{axis} has size {getattr(mesh, axis).size}, wants 1 (only dp is there yet)")
        if recompute not in RECOMPUTE:
            raise ValueError(f"Model: recompute has {recompute!r}, wants one of {', '.join(RECOMPUTE)}")
        if compute_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"Model: compute_dtype has {compute_dtype}, wants torch.bfloat16, torch.float32 or torch.float64")
        check_numerics("Model", numerics)
        self.config, self.compute_dtype, self.recompute = config, compute_dtype, recompute
        self.tuning = resolve(config, tuner)
        self.specs = param_specs(config, mesh, self.tuning)
        held = frozen(tuner, {name: spec.shape for name, spec in self.specs.items()})
        trains = trainable or (lambda name: self.tuning.trains(name) and name not in held)
        self.ops, self.isa, self.numerics = Ops.native(isa, numerics) if ops is None else ops, isa, numerics
        master = torch.promote_types(compute_dtype, torch.float32)

        def new(name: str) -> nn.Parameter | None:
            spec = self.specs.get(name)
            if spec is None or (seed is None and name.removesuffix(".weight") in self.tuning.quantised):
                return None
            dtype = master if trains(name) else compute_dtype
            value_seed = adapter_seed if is_adapter(name) else seed
            if value_seed is None:
                value = torch.empty(spec.local_shape, dtype=dtype)
            else:
                value = initial_value(spec, value_seed, config.initializer_range, tuner.init_weights).to(dtype)
            return nn.Parameter(value, requires_grad=trains(name))

        make = Maker(new, self.ops, compute_dtype, self.tuning, adapter_seed, mesh.world.comm)
        self.model = Body(config, make)
        has_head = not config.tie_word_embeddings or LM_HEAD in self.tuning.adapted
        self.lm_head = Linear(LM_HEAD, make) if has_head else None  # tied and adapted: an adapter on the embedding's weight
        cos, sin = rope_table(
            config.head_dim, config.max_position_embeddings, theta=config.rope_theta, scaling=config.rope_scaling, dtype=master
        )
        self._run_block: Callable[..., torch.Tensor] = _run_block
        self.weight_version = 0  # raised by every optimizer step: keys and values computed before it are of another model
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        if seed is not None:
            self.base_loaded()

    @property
    def device(self) -> torch.device:
        """That of all parameters and buffers: the CPU, until `to` moves them."""
        return self.model.embed_tokens.weight.device

    def linears(self) -> dict[str, Linear]:
        """Module name -> linear, the head among them where it has one."""
        return {name: leaf for name, leaf in self.named_modules() if isinstance(leaf, Linear)}

    @torch.no_grad()
    def base_loaded(self, *, started: bool = False) -> None:
        """What adapters take from the weights they stand on; to be called when those have changed. DoRA starts from the
        norms of their rows; PiSSA takes its start out of those that are not in NF4 (it is out of these before they are
        quantised). started: see `load_checkpoint`."""
        for name, leaf in self.linears().items():
            if leaf.start_A is not None and leaf.weight is not None:
                leaf.weight.copy_(leaf.begin(leaf.weight, started=started))
            if leaf.lora_magnitude_vector is not None:
                base = self.head_base if name == LM_HEAD else leaf.base
                leaf.weight_norm_sq = row_norm_sq(base, torch.promote_types(self.compute_dtype, torch.float32))
                leaf.lora_magnitude_vector.copy_(leaf.weight_norm_sq.sqrt())

    def pissa_start(self) -> dict[str, torch.Tensor]:
        """Parameter name -> what it started with, of PiSSA's adapters; empty without."""
        found = {name: {"lora_A": leaf.start_A, "lora_B": leaf.start_B} for name, leaf in self.linears().items()}
        return {f"{name}.{kind}": t for name, pair in found.items() for kind, t in pair.items() if t is not None}

    @property
    def head_base(self) -> torch.Tensor | NF4Tensor:
        """(vocab, H), the head's weight without its adapter, in the compute dtype or NF4."""
        own = self.lm_head
        if own is None or (self.config.tie_word_embeddings and own.codes is None):
            return self.model.embed_tokens.weight.to(self.compute_dtype)
        return own.base

    @torch.no_grad()
    def quantise_head(self) -> None:
        """Holds the head in NF4 from now on; an embedding tied to it stays as it is, for its look-ups. Not to be trained."""
        base = self.head_base
        weight = base if isinstance(base, NF4Tensor) else nf4_quantize(base)
        if self.lm_head is None:
            make = Maker(lambda name: None, self.ops, self.compute_dtype, self.tuning, 0, SingleComm())
            self.lm_head = Linear(LM_HEAD, make)
        self.lm_head.weight = None
        self.lm_head.set_nf4(weight)

    def head(self, seed_step: torch.Tensor | None = None, token_index: torch.Tensor | None = None) -> Head:
        """The head for the losses, which form its logits in pieces of the vocabulary; W + s B A is never formed.

        Args: as of `forward`; token_index has a number per row of the hidden states that the loss gets.
        """
        own = self.lm_head
        if own is None or own.adapter is None:
            return Head(self.head_base, None, None)
        return Head(self.head_base, own.adapter, own.dropout(seed_step, token_index))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., H) -> (..., vocab) in the compute dtype, differentiable, without dropout. The losses and
        token_logprobs have the same sums in the accumulate dtype: these are theirs, rounded."""
        weight, adapter, _ = self.head()
        return self.ops.product(hidden, weight, adapter)

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence: what `forward` takes as kv_cache, and appends to."""
        weight = self.model.embed_tokens.weight
        shape = (0, self.config.num_key_value_heads, self.config.head_dim)
        empty = weight.new_empty(shape, dtype=self.compute_dtype)
        return [(empty, empty) for _ in self.model.layers]

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor, kv_cache: KVCache | None = None, *,
        seed_step: torch.Tensor | None = None, token_index: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states after the last norm, (total, H) in the compute dtype.

        Args:
            input_ids: (total,) int64, documents one after the other.
            positions: (total,) int64 or int32, from 0 in each document, below max_position_embeddings.
            cu_seqlens: (documents + 1,) int32, offsets of the documents; attention stays inside them.
            kv_cache: keys and values of the tokens before these, of one sequence (see `new_cache`); its entries are
                replaced by longer ones. Not differentiable through the cache's past.
            seed_step, token_index: (2,) and (total,) int64, keys of the dropout of the adapters' inputs: the seed and the
                step, and a number for each token that no other token of the step has. None: no dropout.
        """
        if input_ids.dim() != 1 or positions.shape != input_ids.shape:
            raise ValueError(
                f"Model: input_ids has shape {tuple(input_ids.shape)} and positions {tuple(positions.shape)}, "
                "wants (total,) each: packed tokens without a batch dimension"
            )
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            bad = (input_ids < 0) | (input_ids >= self.config.vocab_size)
            if bad.any():  # a GPU would have to wait for the answer, and its gather asserts
                at = int(bad.nonzero()[0])
                raise ValueError(
                    f"Model: input_ids has {int(input_ids[at])} at {at}, "
                    f"wants at least 0 and below vocab_size {self.config.vocab_size}"
                )
        cu_seqlens_k = cu_seqlens
        if kv_cache is not None:
            if cu_seqlens.numel() != 2:
                raise ValueError(f"Model: cu_seqlens has {cu_seqlens.numel() - 1} documents, a kv_cache holds 1")
            past = torch.tensor([0, kv_cache[0][0].shape[0]], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
            cu_seqlens_k = cu_seqlens + past
        rows = Rows(positions, cu_seqlens, cu_seqlens_k, self.rope_cos, self.rope_sin, seed_step, token_index)
        x = self.model.embed_tokens(input_ids)
        for block in self.model.layers:
            if kv_cache is not None:
                x = block(x, rows, kv_cache)
            else:
                x = self._run_block(block, x, rows, self.recompute if torch.is_grad_enabled() else "none")
        return self.model.norm(x)

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """From now on `forward` runs each block as one graph of torch.compile (without a cache): elementwise sums join their
        neighbours, kernels stay what they are. The first steps compile, once for all blocks and again for other lengths."""
        compiled = torch.compile(_run_block, fullgraph=True, backend=backend)

        def run(*args: Any) -> torch.Tensor:
            # an adapter's number, which keys its dropout, differs by block and must not make a graph for each
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
                return compiled(*args)

        self._run_block = run


def _run_block(block: nn.Module, x: torch.Tensor, rows: Rows, recompute: str) -> torch.Tensor:
    if recompute == "none":
        return block(x, rows)
    keep: dict[str, Any] = {"context_fn": _selective} if recompute == "selective" else {}
    return checkpoint(block, x, rows, use_reentrant=False, preserve_rng_state=False, **keep)


# Operators whose outputs are worth their memory: computing them again is bound by arithmetic, not by bytes.
KEEP = {
    "swiftk::linear_fwd", "swiftk::nf4_linear_fwd", "swiftk::lora_linear_fwd", "swiftk::varlen_attention_fwd",
}  # fmt: skip


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEEP else CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(create_selective_checkpoint_contexts, _policy)

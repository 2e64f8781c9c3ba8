"""The trainer's forward over a paged cache: the same kernels in the same order on the same weights, by their launchers.

    x = embed[ids];   per block:  h = norm(x);  q, k, v = h W^T;  store k, v;  x += o(paged_attention(q, cache))
                                  h = norm(x);  x += down(silu(gate(h)) up(h));      logits = norm(x)[rows] head^T

Every kernel is row-invariant, so a token's logits are those of swiftk/model/transformer.py bit for bit, however the tokens
are cut into steps. Weights are read where the model has them. Copied, once per version of the weights, are only those that
the trainer casts at use (fp32 masters under a bf16 compute dtype), and DoRA's norms.

The launches of all blocks are recorded once per (rows, sequences, ...) on a tape (csrc/tape.h) and run again from C++: what
changes from step to step lies in buffers of fixed addresses. On a GPU CUDA graphs take the tapes' place: rows and sequences are
padded to a few sizes, by rows that write to no slot and sequences without queries, and what a step brings travels in one copy.
There the numbers of a row are the trainer's, and those of its own, only with numerics="invariant" (docs/numerics.md).
Several adapters in one step: per linear their A are one matrix and their B another, a row's products with those of others
are zeroed (kernels/lora_linear.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from swiftk.decoder.copies import send
from swiftk.decoder.pages import huge_pages
from swiftk.kernels._low_rank import ALIGN, adapted_norm, base_products, gain_of, keep_own
from swiftk.kernels._native import acc_dtype, native
from swiftk.kernels._triton import on_gpu
from swiftk.kernels.attention.paged import paged_attention_out, store_kv_out
from swiftk.kernels.linear import Product
from swiftk.kernels.lora_linear import Adapter, scales_of
from swiftk.kernels.nf4 import NF4Tensor, plain_absmax
from swiftk.kernels.rms_norm import rms_norm_out
from swiftk.kernels.rope import rope_out
from swiftk.kernels.swiglu import swiglu_out
from swiftk.model.adapter import LM_HEAD
from swiftk.model.transformer import Block, Linear, Model


def _count_fused(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """torch's fused optimizers change parameters without raising their versions (2.13), by which `follow` sees a change."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused)

_GONE = torch.empty(0)  # stands for a parameter that the model has no more
TAPES = 128  # kept; a mix of chunks and decodes has a new number of rows at every step
WIDE = ("ids", "positions", "slots", "owner")  # what a step says of each row, int64; the rest is int32
GRAPH_ROWS = 256  # a step of more rows keeps a GPU busy for longer than its launches take: it gets no graph


@dataclass(frozen=True)
class LoadedAdapter:
    """One of several adapters over one base (decoder/loading.py)."""

    scale: float
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # linear -> A (r, K), B (N, r)


@dataclass(frozen=True)
class Rows:
    """One sequence's share of a step."""

    tokens: Sequence[int]
    start: int  # position of the first
    blocks: Sequence[int]  # its block table
    adapter: int = -1  # number among the adapters; -1: none


@dataclass(frozen=True)
class _Linear:
    """A linear as launchers take it."""

    weight: torch.Tensor | NF4Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None  # (R, K), of one adapter or of all
    b: torch.Tensor | None = None  # (N, R)
    factor: torch.Tensor | None = None  # (R,), s of each column
    gain: torch.Tensor | None = None  # (N,), DoRA's
    adapters: int = 0  # of a stack; 0: the model's own


class _Block(NamedTuple):
    norm1: torch.Tensor
    norm2: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: tuple[_Linear, ...]
    o: tuple[_Linear, ...]
    gate_up: tuple[_Linear, ...]
    down: tuple[_Linear, ...]


class Forward:
    """
    Args:
        model: read where it is; `follow` sees where its parameters have changed.
        num_blocks, block_size: of the cache, which has (blocks, block_size, kv_heads, head_dim) per layer for K and for V.
        max_tokens, max_seqs, max_len: of a step; of a sequence.
        adapters: several, over a model that has none of its own.
    """

    def __init__(
        self, model: Model, *, num_blocks: int, block_size: int, max_tokens: int, max_seqs: int, max_len: int,
        isa: str = "auto", adapters: Sequence[LoadedAdapter] = (),
    ) -> None:  # fmt: skip
        self.model, self.isa, self.block_size, self.max_tokens = model, isa, block_size, max_tokens
        self.dtype, self.acc, self.device = model.compute_dtype, acc_dtype(model.compute_dtype), model.device
        self.adapters, self.max_seqs = adapters, max_seqs
        self._tapes: dict[tuple, Any] = {}
        self._on_gpu = on_gpu(model.rope_cos)
        self._pool: Any = None  # of the graphs
        # streams, events and graphs are those of the current device, whatever the tensors' is
        self._current: Any = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        self._bind()
        self._places: list[tuple[dict[str, Any], str]] = [  # a parameter that is replaced stands in the same place
            (kept, name) for m in model.modules() for kept in (m._parameters, m._buffers)
            for name, t in kept.items() if t is not None
        ]  # fmt: skip
        self._known, self._known_shapes = self._state(), self._shapes()
        c, new = model.config, lambda *shape, dtype=self.dtype: torch.empty(shape, dtype=dtype, device=self.device)
        # a head's rows of a block lie together: reads 2 and 4 KiB apart would fall into the same sets of the L1 cache
        places = (num_blocks, c.num_key_value_heads, block_size, c.head_dim)
        self.cache = [(new(*places).transpose(1, 2), new(*places).transpose(1, 2)) for _ in model.model.layers]
        if self.device.type == "cpu":
            huge_pages([t for pair in self.cache for t in pair], written=False)
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.x, self.h, self.z = (new(max_tokens, c.hidden_size) for _ in range(3))
        self.q, self.k, self.v, self.o = (new(max_tokens, width) for width in (heads, kv, kv, heads))
        self.gate, self.up, self.act = (new(max_tokens, c.intermediate_size) for _ in range(3))
        self.o.zero_()  # rows that only pad are read before they are written
        self.rstd = new(max_tokens * max(1, c.num_attention_heads), dtype=self.acc)
        self.s = new(max_tokens * max(sum(len(p.a) for p in linears if p.a is not None) for linears in self._groups))
        sizes: dict[str, tuple[int, ...]] = {name: (max_tokens,) for name in WIDE}
        sizes |= {"cu_seqlens": (max_seqs + 1,), "lengths": (max_seqs,), "table": (max_seqs, -(-max_len // block_size))}
        count = sum(math.prod(shape) * (1 + (name in WIDE)) for name, shape in sizes.items())
        self._inputs = torch.zeros(count, dtype=torch.int32, device=self.device)
        self._host = self._inputs if self.device.type == "cpu" else torch.zeros(count, dtype=torch.int32).pin_memory()
        self._copied = None if self.device.type == "cpu" else torch.cuda.Event()
        seen, host = _views(self._inputs, sizes), _views(self._host, sizes)
        self.ids, self.positions, self.slots, self.owner, self.cu_seqlens, self.lengths, self.table = seen.values()
        self._numpy = {name: t.numpy() for name, t in host.items()}
        self._numpy["ends"] = self._numpy["cu_seqlens"][1:]
        self._held: list[tuple[Any, int]] = [(None, 0)] * max_seqs  # whose blocks a row of the table has, and how many
        self._logits = new(0, dtype=self.acc)

    # --- the weights -----------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        model = self.model
        self._refreshers: list[Callable[[], object]] = []
        self.blocks = []
        for layer in model.model.layers:
            assert isinstance(layer, Block)
            attention, mlp = layer.self_attn, layer.mlp
            self.blocks.append(_Block(
                self._cast(layer.input_layernorm.weight), self._cast(layer.post_attention_layernorm.weight),
                self._cast(attention.q_norm.weight) if model.config.qk_norm else None,
                self._cast(attention.k_norm.weight) if model.config.qk_norm else None,
                self._linears(attention.q_proj, attention.k_proj, attention.v_proj), self._linears(attention.o_proj),
                self._linears(mlp.gate_proj, mlp.up_proj), self._linears(mlp.down_proj),
            ))  # fmt: skip
        self.norm = self._cast(model.model.norm.weight)
        own = model.lm_head
        if own is None or (model.config.tie_word_embeddings and own.codes is None):
            weight: torch.Tensor | NF4Tensor = self._cast(model.model.embed_tokens.weight)
        else:
            weight = self._weight(own)
        self.head = self._adapted(LM_HEAD, weight, None, None if own is None else own.adapter)
        self._groups = [(self.head,), *(linears for b in self.blocks for linears in (b.qkv, b.o, b.gate_up, b.down))]
        read = [t for linears in self._groups for p in linears for t in (*_parts(p.weight), p.a, p.b) if t is not None]
        if self.device.type == "cpu":
            huge_pages(read, written=True)

    def _cast(self, p: torch.Tensor) -> torch.Tensor:
        """p itself where it has the compute dtype, else a copy that `follow` fills again."""
        p = p.detach()
        if p.dtype == self.dtype and p.is_contiguous():
            return p
        copy = p.to(self.dtype, copy=True).contiguous()
        self._refreshers.append(functools.partial(copy.copy_, p))
        return copy

    def _weight(self, leaf: Linear) -> torch.Tensor | NF4Tensor:
        if leaf.weight is not None:
            return self._cast(leaf.weight)
        base = leaf.base
        assert isinstance(base, NF4Tensor)
        return plain_absmax(base)

    def _linears(self, *leaves: Linear) -> tuple[_Linear, ...]:
        """Those that multiply the same x."""
        return tuple(
            self._adapted(leaf.name, self._weight(leaf), None if leaf.bias is None else self._cast(leaf.bias), leaf.adapter)
            for leaf in leaves
        )

    def _adapted(self, name: str, weight, bias, own: Adapter | None) -> _Linear:
        found = [(i, one.pairs[name]) for i, one in enumerate(self.adapters) if name in one.pairs]
        if own is not None:
            return self._with_own(weight, bias, own)
        if found:
            columns = max(-(-len(a) // ALIGN) * ALIGN for _, (a, _) in found)
            zeros = functools.partial(torch.zeros, device=self.device)
            a = zeros(len(self.adapters), columns, found[0][1][0].shape[1], dtype=self.dtype)
            b = zeros(found[0][1][1].shape[0], len(self.adapters), columns, dtype=self.dtype)
            factor = zeros(len(self.adapters), columns, dtype=self.acc)
            for i, (a_i, b_i) in found:
                a[i, : len(a_i)], b[:, i, : len(a_i)] = a_i, b_i
            for i, one in enumerate(self.adapters):
                factor[i] = one.scale
            return _Linear(weight, bias, a.flatten(0, 1), b.flatten(1), factor.flatten(), adapters=len(self.adapters))
        return _Linear(weight, bias)

    def _with_own(self, weight, bias, own: Adapter) -> _Linear:
        a, b = self._cast(own.a), self._cast(own.b)
        (scale,) = scales_of(own, 1)
        factor = torch.full((len(a),), scale, dtype=self.acc, device=self.device)
        if own.magnitude is None:
            return _Linear(weight, bias, a, b, factor)
        gain = torch.empty(len(b), dtype=self.acc, device=self.device)

        magnitude = own.magnitude.detach()

        def refresh() -> None:
            norm = adapted_norm(weight, a, b, factor, own.weight_norm_sq, self.isa)
            gain.copy_(gain_of(magnitude, norm))

        refresh()
        self._refreshers.append(refresh)
        return _Linear(weight, bias, a, b, factor, gain)

    def follow(self) -> bool:
        """Whether the weights have changed since the last call (trained, loaded, replaced): what is copied of them is then
        copied again.

        Raises: ValueError where one has another shape.
        """
        state = self._state()
        if state == self._known:
            return False
        if state[1] != self._known[1]:  # other tensors: the addresses on the tapes are those of the old ones
            if self._shapes() != self._known_shapes:
                raise ValueError("Engine: the model's parameters have other shapes than they had, wants an Engine of its own")
            self._forget()
            self._bind()
        for fill in self._refreshers:
            fill()
        self._known = state
        return True

    def _state(self) -> tuple[int, list[int]]:
        """Changes in place, and addresses."""
        tensors = self._tensors()
        changes = self.model.weight_version + sum(t._version for t in tensors)  # all of them only rise
        return changes, [t.data_ptr() for t in tensors]

    def _shapes(self) -> list[torch.Size]:
        return [t.shape for t in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        return [_GONE if (t := kept.get(name)) is None else t for kept, name in self._places]

    def _forget(self) -> None:
        """All tapes or graphs; a pool without a graph must not be used again."""
        self._tapes.clear()
        self._pool = None

    # --- a step ----------------------------------------------------------------------------------------------------

    def __call__(self, step: Sequence[Rows]) -> int:
        """Writes the keys and values of all rows into the cache and their last hidden states into `h`; the number of rows."""
        with self._current:
            return self._step(step)

    def _step(self, step: Sequence[Rows]) -> int:
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy has left the buffer that is written now
        size = self.block_size
        new: dict[str, list[int]] = {name: [] for name in ("ids", "positions", "slots", "owner", "ends", "lengths")}
        for i, part in enumerate(step):
            stop = part.start + len(part.tokens)
            new["ids"] += part.tokens
            new["positions"] += range(part.start, stop)
            new["slots"] += [part.blocks[p // size] * size + p % size for p in range(part.start, stop)]
            new["owner"] += [part.adapter] * len(part.tokens)
            new["ends"].append(len(new["ids"]))
            new["lengths"].append(stop)
            held, count = self._held[i]
            if held is not part.blocks or count != len(part.blocks):
                self._numpy["table"][i, : len(part.blocks)] = part.blocks
                self._held[i] = (part.blocks, len(part.blocks))
        for name, values in new.items():
            self._numpy[name][: len(values)] = values
        row = len(new["ids"])
        stacked = bool(self.adapters) and any(part.adapter >= 0 for part in step)
        if self._on_gpu:
            self._run_padded(row, len(step), stacked)
            return row
        self.x[:row] = self.model.model.embed_tokens(self.ids[:row])
        key = (row, len(step), stacked, torch.get_num_threads())
        tape = self._tapes.get(key)
        if tape is None:
            if len(self._tapes) == TAPES:
                self._forget()
            tape = native().Tape()
            tape.start()
            try:
                self._blocks(row, len(step), stacked)
            finally:
                tape.stop()
            self._tapes[key] = tape  # a recording that Ctrl-C has cut short is none
        tape.run()
        return row

    def _run_padded(self, row: int, count: int, stacked: bool) -> None:
        """A step on a GPU: padded to a size that comes again, by a graph of that size."""
        rows, sequences = _padded(row, self.max_tokens), _padded(count, self.max_seqs)
        for name, value in (("ids", 0), ("positions", 0), ("slots", -1), ("owner", -1)):
            self._numpy[name][row:rows] = value
        self._numpy["ends"][count:sequences], self._numpy["lengths"][count:sequences] = row, 0
        if self._copied is not None:
            self._inputs.copy_(self._host, non_blocking=True)
            self._copied.record()
        key = (rows, sequences, stacked)
        if (graph := self._tapes.get(key)) is not None:
            graph.replay()
            return

        def run() -> None:
            self.x[:rows] = self.model.model.embed_tokens(self.ids[:rows])
            self._blocks(rows, sequences, stacked)

        run()
        if self.device.type == "cpu" or rows > GRAPH_ROWS:
            return
        if len(self._tapes) == TAPES:
            self._forget()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # one for all graphs: they never run side by side
        graph = torch.cuda.CUDAGraph()
        # records, and writes nothing; other threads (a trainer's that pins batches) may go on
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        self._tapes[key] = graph

    def _blocks(self, m: int, s: int, stacked: bool) -> None:
        c, isa = self.model.config, self.isa
        x, h, z, q, k, v, o = (t[:m] for t in (self.x, self.h, self.z, self.q, self.k, self.v, self.o))
        gate, up, act = self.gate[:m], self.up[:m], self.act[:m]
        qh, kh, vh, oh = (t.view(m, -1, c.head_dim) for t in (q, k, v, o))
        positions, table = self.positions[:m], (self.table[:s], self.lengths[:s], self.cu_seqlens[: s + 1])
        cos, sin = self.model.rope_cos, self.model.rope_sin
        multiply = functools.partial(self._multiply, stacked=stacked, owner=self.owner[:m])
        residual = None
        for i, block in enumerate(self.blocks):
            rms_norm_out(x, block.norm1, c.rms_norm_eps, h, self.rstd, isa, residual=residual)
            multiply(block.qkv, h, (q, k, v))
            for norm, y in ((block.q_norm, q), (block.k_norm, k)):
                if norm is not None:
                    y = y.view(-1, c.head_dim)
                    rms_norm_out(y, norm, c.rms_norm_eps, y, self.rstd, isa)
            for y in (qh, kh):
                rope_out(y, cos, sin, positions, y, isa=isa)
            store_kv_out(kh, vh, *self.cache[i], self.slots[:m])
            left, _ = c.window_size(i)
            options = c.head_dim**-0.5, 0.0, left, 0, oh, None, isa, self.model.numerics
            paged_attention_out(qh, *self.cache[i], *table, None, *options)
            multiply(block.o, o, (z,))
            rms_norm_out(x, block.norm2, c.rms_norm_eps, h, self.rstd, isa, residual=z)
            multiply(block.gate_up, h, (gate, up))
            swiglu_out(gate, up, act, isa)
            multiply(block.down, act, (z,))
            residual = z
        rms_norm_out(x, self.norm, c.rms_norm_eps, h, self.rstd, isa, residual=residual)

    def _multiply(
        self, linears: Sequence[_Linear], x: torch.Tensor, ys: Sequence[torch.Tensor], stacked: bool, owner: torch.Tensor
    ) -> None:
        """All of one x, in one call, and the low ranks before them in another; owner: the adapter of each row of x."""
        tails, used, numerics = [], 0, self.model.numerics
        for p in linears:
            tail = None
            if p.a is not None and p.b is not None and (stacked or not p.adapters):
                begin, used = used, used + len(x) * len(p.a)
                tail = self.s[begin:used].view(len(x), len(p.a)), p.b
            tails.append(tail)
        pairs = list(zip(linears, tails, strict=True))
        if used:
            base_products(x, [Product(p.a, None, tail[0], scale=p.factor) for p, tail in pairs if tail], self.isa, numerics)
            for p, tail in pairs:
                if tail and p.adapters:
                    keep_own(tail[0], owner, p.adapters)
        products = [Product(p.weight, p.bias, y, tail, p.gain) for (p, tail), y in zip(pairs, ys, strict=True)]
        base_products(x, products, self.isa, numerics)

    def logits(self, rows: Sequence[int], count: int) -> torch.Tensor:
        """(len(rows), vocab) in the accumulate dtype, unrounded, of some of the `count` rows of the last step; overwritten by
        the next call."""
        with self._current:
            return self._rows_logits(rows, count)

    def _rows_logits(self, rows: Sequence[int], count: int) -> torch.Tensor:
        hidden, owner = self.h[:count], self.owner[:count]
        if len(rows) != count:
            (index,) = send(self.device, torch.tensor(rows))
            hidden, owner = hidden[index], owner[index]
        if len(self._logits) < len(rows):
            self._logits = torch.empty(len(rows), self.model.config.vocab_size, dtype=self.acc, device=self.device)
        out = self._logits[: len(rows)]
        self._multiply((self.head,), hidden, (out,), True, owner)
        return out


def _parts(weight: torch.Tensor | NF4Tensor) -> tuple[torch.Tensor, ...]:
    return (weight.codes, weight.absmax) if isinstance(weight, NF4Tensor) else (weight,)


def _views(buffer: torch.Tensor, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Of one int32 buffer, one after the other: those of the tokens as int64, the rest as it is."""
    views, at = {}, 0
    for name, shape in sizes.items():
        piece = buffer[at : at + math.prod(shape) * (1 + (name in WIDE))]
        views[name] = (piece.view(torch.int64) if name in WIDE else piece).view(shape)
        at += len(piece)
    return views


def _padded(count: int, most: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ..., and `most`: at most half as much again from 16 on."""
    power = 1 << (count - 1).bit_length()
    return min(most, power * 3 // 4 if power > 16 and count <= power * 3 // 4 else power)

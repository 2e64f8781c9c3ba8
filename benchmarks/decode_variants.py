"""Two parts of the decoder's benchmark that are not a peer: a model that copies, and products by torch in our engine."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from swiftk.decoder import forward
from swiftk.kernels._low_rank import base_products
from swiftk.kernels._native import native, threads
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh


def copying_model(config: ModelConfig, dtype: torch.dtype, isa: str, seed: int) -> Model:
    """Random weights, but its first two blocks hold an induction circuit: a head of block 0 writes each
    token's predecessor beside it, those of block 1 find where the current token was a predecessor and give what stood there.
    Sampled at temperature 1 it goes on with a document's next token about nine times in ten, and with any token else.

    The residual stream: the token's content in the first C = kv_heads head_dim places, in the next head_dim the first places of
    the content of the token before it, then a constant.
    """
    model = Model(config, Mesh.single(), compute_dtype=dtype, seed=seed, isa=isa, trainable=lambda name: False)
    d, content = config.head_dim, config.num_key_value_heads * config.head_dim
    group, half, one = config.num_attention_heads // config.num_key_value_heads, config.head_dim // 2, content + config.head_dim
    angle = config.rope_theta ** -(torch.arange(half) / half)  # of a pair (i, i + half), per position
    fast, slow = angle > 0.03, angle * 1000 < 0.6  # those that tell neighbours apart, those that positions hardly turn
    layers: Any = model.model.layers
    previous, match = layers[0].self_attn, layers[1].self_attn
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, :content].normal_(generator=torch.Generator().manual_seed(seed))
        embedding[:, one] = 1.0
        # q and k of a constant; k is turned on by one position, so their product is largest one position back
        for p, turn in ((previous.q_proj, 0.0), (previous.k_proj, 1.0)):
            p.weight[:d] = 0
            p.weight[:half, one] = torch.cos(turn * angle) * fast
            p.weight[half:d, one] = torch.sin(turn * angle) * fast
        previous.v_proj.weight[:d] = torch.eye(d, config.hidden_size)
        previous.o_proj.weight[content:one] = 0
        previous.o_proj.weight[content:one, :d] = torch.eye(d)
        for norm in (previous.q_norm, previous.k_norm):
            norm.weight.fill_(8.0)
        # q: the content of this token; k: that of the one before the key's; v: all of the content, a slice per kv head
        places = slow.nonzero()[:, 0]
        rows = torch.cat((places, places + half))
        for p, heads, start in (
            (match.q_proj, config.num_attention_heads, 0), (match.k_proj, config.num_key_value_heads, content),
        ):  # fmt: skip
            p.weight.zero_()
            for head in range(heads):
                p.weight[head * d + rows, start + torch.arange(len(rows))] = 1
        match.v_proj.weight.copy_(torch.eye(content, config.hidden_size))
        match.o_proj.weight.zero_()
        for head in range(config.num_key_value_heads):
            at = torch.arange(d)
            match.o_proj.weight[head * d + at, head * group * d + at] = 5.0
        for norm in (match.q_norm, match.k_norm):
            norm.weight.fill_(4.0)
        model.model.norm.weight.fill_(0.037)  # ln 10 and more between the next token and all others together
    return model


@contextlib.contextmanager
def vendor_products(fastest: dict[Any, bool] | None) -> Iterator[None]:
    """Engines that step inside multiply by torch.mm (MKL, oneDNN), which no tape can hold: theirs is cut there.

    fastest: None for every product; else (rows' power of two, N, K) -> whether torch's took less time there on cold weights,
    found out at the first product of a kind.
    """
    current: list[_CutTape] = []
    cold = torch.ones(24 << 20)  # 96 MB: read between two timings, more than the caches hold

    def products(x, group, isa, _numerics) -> None:
        for p in group:
            product(x, p, isa)

    def product(x, p, isa) -> None:
        weight, y = p.weight, p.y
        ours = functools.partial(base_products, x, [p], isa)
        plain = all(t is None for t in (p.tail, p.scale, p.bias)) and isinstance(weight, torch.Tensor)
        if not plain or x.dtype != y.dtype:
            ours()
            return
        run = functools.partial(torch.mm, x, weight.t(), out=y)
        tape = current[-1] if current else None
        if tape is not None:
            tape.close()
        key = ((len(x) - 1).bit_length(), *weight.shape)
        if fastest is not None and key not in fastest:
            taken = []
            for f in (ours, run):
                best = float("inf")
                for _ in range(4):
                    native().read_memory(cold.data_ptr(), cold.nbytes, threads())
                    begin = time.perf_counter()
                    f()
                    best = min(best, time.perf_counter() - begin)
                taken.append(best)
            fastest[key] = taken[1] < taken[0]
        theirs = fastest is None or fastest[key]
        if tape is None and theirs:
            run()
        elif tape is None:
            ours()
        elif theirs:
            tape.parts.append(run)
            tape.open()
        else:
            tape.open()
            ours()

    def new_tape() -> _CutTape:
        return _CutTape(current)

    kept = forward.native, forward.base_products
    forward.native, forward.base_products = (lambda: SimpleNamespace(Tape=new_tape)), products  # type: ignore[assignment]
    try:
        yield
    finally:
        forward.native, forward.base_products = kept


class _CutTape:
    """A tape with calls of Python between its parts."""

    def __init__(self, current: list[_CutTape]) -> None:
        self.current, self.parts = current, list[Callable[[], Any]]()

    def open(self) -> None:
        self.tape = native().Tape()
        self.parts.append(self.tape.run)
        self.tape.start()

    def close(self) -> None:
        self.tape.stop()

    def start(self) -> None:
        self.current.append(self)
        self.open()

    def stop(self) -> None:
        self.close()
        self.current.remove(self)

    def run(self) -> None:
        for part in self.parts:
            part()

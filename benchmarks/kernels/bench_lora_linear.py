"""lora_linear, forward and backward, against our own frozen linear (the limit), ten lines of torch addmm, and peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.dropout import Dropout
from swiftk.kernels.linear import linear
from swiftk.kernels.lora_linear import Adapter, lora_linear, lora_linear_ref, row_norm_sq
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize, nf4_quantize
from swiftk.kernels.nf4_linear import nf4_linear
from swiftk.testing.accuracy import assert_accurate

KINDS = {  # name: (p, dora, nf4, goal)
    "": (0.0, False, False, "<= 1.08x frozen linear, < addmm"),
    " dropout 0.05": (0.05, False, False, "<= 1.1x frozen linear"),
    " DoRA": (0.0, True, False, "<= 1.15x LoRA"),
    " NF4": (0.0, False, True, "<= 1.1x frozen linear"),
}


class AddmmLora(torch.autograd.Function):
    """The ten lines: the frozen product, and the r columns added in place."""

    @staticmethod
    def forward(ctx, x, w, a, b, scale):
        y, s = F.linear(x, w), F.linear(x, a)
        ctx.save_for_backward(x, w, a, b, s)
        ctx.scale = scale
        return y.addmm_(s, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, s = ctx.saved_tensors
        ds = dy.mm(b).mul_(ctx.scale)
        return dy.mm(w).addmm_(ds, a), None, ds.t().mm(x), dy.t().mm(s).mul_(ctx.scale), None


def peft_lora(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, p: float, m: torch.Tensor | None) -> Any:
    """The same weights in peft's module."""
    import peft

    base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    base.weight.data = w
    kind: dict[str, Any] = {"lora_dropout": p, "use_dora": m is not None, "lora_alpha": scale * len(a)}
    config = peft.LoraConfig(r=len(a), target_modules=["0"], init_lora_weights=False, **kind)
    model: Any = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.train().base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    if m is not None:
        layer.lora_magnitude_vector["default"].weight.data = m
    return layer


def cases(options: Options) -> Iterator[Case]:
    if options.device == "cuda" and not options.quick:
        for r in (16, 64):
            yield forward(1, 4096, 4096, r, torch.bfloat16, options)
            yield forward(8192, 4096, 4096, r, torch.bfloat16, options)
            for kind in KINDS:
                yield forward_backward(8192, 4096, 4096, r, torch.bfloat16, kind, options)
        return
    M, N, K, r = (64, 128, 96, 8) if options.quick else (2048, 3072, 1024, 16)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            yield forward_backward(M, N, K, r, dtype, kind, options)


def forward(M: int, N: int, K: int, r: int, dtype: torch.dtype, options: Options) -> Case:
    """Against the bare GEMM; peft where it is installed."""
    x, w = (torch.randn(s, device=options.device).to(dtype) for s in ((M, K), (N, K)))
    a, b = ((torch.randn(s, device=options.device) / 8).to(dtype) for s in ((r, K), (N, r)))
    adapter = Adapter(a, b, 2.0)

    def check(y):
        rows = slice(0, M, max(1, M // 256))
        exact = lora_linear_ref(x[rows].double(), w.double(), Adapter(a.double(), b.double(), 2.0))
        assert_accurate(y[rows], exact.to(dtype), exact)

    peers: dict[str, Callable[[], Any]] = {
        "bare GEMM": lambda: F.linear(x, w), "addmm": lambda: F.linear(x, w).addmm_(F.linear(x, a), b.t(), alpha=2.0)
    }  # fmt: skip
    if options.wants("peft"):
        try:
            layer = peft_lora(w, a, b, 2.0, 0.0, None)
            peers["peft"] = torch.no_grad()(lambda: layer(x))
        except ImportError:
            pass
    return Case(
        op="lora_linear", name=f"fwd M={M} N={N} K={K} r={r}", dtype=dtype, check=check, peers=peers,
        run=lambda: lora_linear(x, w, adapter, isa=options.isa), goal="<= 1.08x bare GEMM" if M > 1 else "<= 1.1x bare GEMM",
        bytes=sum(t.nbytes for t in (x, w, a, b)) + (M * N + M * r) * x.element_size(),  # y and S written
        flops=0 if M == 1 else 2 * M * N * K + 2 * M * r * (N + K),
    )  # fmt: skip


def forward_backward(M: int, N: int, K: int, r: int, dtype: torch.dtype, kind: str, options: Options) -> Case:
    p, dora, nf4, goal = KINDS[kind]
    x, w, dy = (torch.randn(s, dtype=dtype, device=options.device) for s in ((M, K), (N, K), (M, N)))
    a, b = ((torch.randn(s, device=options.device) / 8).to(dtype).requires_grad_() for s in ((r, K), (N, r)))
    base = nf4_quantize(w) if nf4 else w
    w = nf4_dequantize(base).to(dtype) if isinstance(base, NF4Tensor) else w
    m = w.float().norm(dim=1).to(dtype).requires_grad_() if dora else None
    adapter = Adapter(a, b, 2.0, m, row_norm_sq(w) if dora else None)
    dropout = None
    if p:
        dropout = Dropout(p, torch.tensor([42, 1], device=options.device), 3, torch.arange(M, device=options.device))
    x.requires_grad_()
    trained = [t for t in (a, b, m) if t is not None]

    def run():
        return torch.autograd.grad(lora_linear(x, base, adapter, dropout=dropout, isa=options.isa), [x, *trained], dy)

    def frozen():
        y = nf4_linear(x, base, isa=options.isa) if isinstance(base, NF4Tensor) else linear(x, base, isa=options.isa)
        return torch.autograd.grad(y, x, dy)

    def check(grads):
        inputs = [t.detach().double().requires_grad_() for t in (x, *trained)]
        exact = lora_linear_ref(inputs[0], w.double(), Adapter(inputs[1], inputs[2], 2.0, *inputs[3:]), dropout=dropout)
        for got, want in zip(grads, torch.autograd.grad(exact, inputs, dy.double()), strict=True):
            assert_accurate(got, want.to(got.dtype), want)

    peers: dict[str, Callable[[], Any]] = {"frozen linear": frozen}
    if kind == "":
        peers["addmm"] = lambda: torch.autograd.grad(AddmmLora.apply(x, w, a, b, 2.0), [x, *trained], dy)
    elif not nf4:
        plain = Adapter(a, b, 2.0)
        peers["LoRA"] = lambda: torch.autograd.grad(lora_linear(x, w, plain, isa=options.isa), [x, a, b], dy)
    if options.wants("peft") and not nf4:
        try:
            layer = peft_lora(w, a.detach().clone(), b.detach().clone(), 2.0, p, None if m is None else m.detach().clone())
            theirs = [t for t in layer.parameters() if t.requires_grad]
            peers["peft"] = lambda: torch.autograd.grad(layer(x), [x, *theirs], dy)
        except ImportError:
            pass
    # each direction reads x, W, a, b and writes or reads S and (forward, DoRA's backward) y; backward dy, dx, da, db besides
    weights = base.codes.nbytes + base.absmax.nbytes if isinstance(base, NF4Tensor) else w.nbytes
    once = x.nbytes + weights + a.nbytes + b.nbytes + M * r * x.element_size()
    moved = 2 * once + (2 + dora) * dy.nbytes + x.nbytes + a.nbytes + b.nbytes
    if options.device == "cuda":
        goal = {"": "<= 1.12x frozen linear", " dropout 0.05": "<= 1.15x frozen linear"}.get(kind, goal)
    return Case(
        op="lora_linear", name=f"fwd+bwd M={M} N={N} K={K} r={r}{kind}", dtype=dtype, run=run, check=check, goal=goal,
        peers=peers, flops=4 * M * N * K + 6 * M * r * (N + K), bytes=moved,
    )  # fmt: skip

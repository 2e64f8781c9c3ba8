"""linear_cross_entropy: forward + backward of the head and its loss, against torch with the whole logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import Case, Options, liger
from swiftk.kernels.linear_cross_entropy import linear_cross_entropy
from swiftk.testing.accuracy import error


def cases(options: Options) -> Iterator[Case]:
    if options.quick:
        yield case(32, 16, 3000, torch.float32, True, "fused", options)
        return
    if options.device == "cuda":
        for frozen, mode in ((True, "fused"), (True, "recompute"), (False, "fused")):
            yield case(8192, 4096, 151_936, torch.bfloat16, frozen, mode, options)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield case(4096, 1024, 151_936, dtype, True, "fused", options)
        for frozen in (True, False):
            for mode in ("fused", "recompute"):
                yield case(2048, 512, 32_768, dtype, frozen, mode, options)


def case(T: int, H: int, V: int, dtype: torch.dtype, frozen: bool, mode: str, options: Options) -> Case:
    x = torch.randn(T, H, device=options.device).to(dtype).requires_grad_()
    w = (torch.randn(V, H, device=options.device) / H**0.5).to(dtype).requires_grad_(not frozen)
    y = torch.randint(V, (T,), device=options.device)
    wanted = (x,) if frozen else (x, w)

    def ours():
        loss, _ = linear_cross_entropy(x, w, y, mode=mode, isa=options.isa)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    def eager():
        loss = F.cross_entropy(F.linear(x, w).float(), y, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    def check(result):
        """A row of dx that the whole result depends on: dx_t = sum_v p_v w_v - w_label, from fp64 logits of a few rows."""
        rows = slice(0, T, max(1, T // 8))
        exact = w.detach().double()
        want = torch.softmax(F.linear(x[rows].detach().double(), exact), -1) @ exact - exact[y[rows]]
        assert error(result[1][rows], want) <= (2e-2 if dtype == torch.bfloat16 else 1e-5)

    products = (3 if mode == "recompute" else 2) + (not frozen)
    native_bf16 = dtype != torch.bfloat16 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    slow = not native_bf16 and T * V > 1 << 27  # eager takes hours there: torch's bf16 product without bf16 instructions
    peers = {} if slow else {"torch": eager}
    goal = "<= 0.75x torch's time, <= 10 % of its peak extra memory" if frozen and mode == "fused" else ""
    if options.device == "cuda":
        logits = x.detach() @ w.detach().t()  # 2.5 GB at the goal's shape
        peers["two GEMMs"] = lambda: (x.detach() @ w.detach().t(), logits @ w.detach())
        goal = f"<= {1.1 if mode == 'fused' else 1.6}x two GEMMs" if frozen else ""
        if theirs := liger(options):
            peers["liger"] = lambda: torch.autograd.grad(
                theirs.liger_fused_linear_cross_entropy(x, w, y, reduction="sum"), wanted
            )
    return Case(
        op="linear_cross_entropy", name=f"fwd+bwd {mode} {'frozen' if frozen else 'trained'} T={T} H={H} V={V}", dtype=dtype,
        run=ours, check=check, peers=peers, peer_memory=True,
        bytes=products * w.numel() * w.element_size(),  # W once per product (dW counts as one), at most 4096 rows
        flops=products * 2 * T * H * V,
        goal=goal,
    )  # fmt: skip

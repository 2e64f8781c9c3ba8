"""vocab_stats: log-probabilities of given tokens (evaluation; the decoder at T = 1), against log_softmax of all logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.vocab_stats import vocab_stats
from swiftk.testing.accuracy import error


def cases(options: Options) -> Iterator[Case]:
    shapes = [(8, 16, 3000)] if options.quick else [(1, 1024, 151_936), (512, 1024, 32_768)]
    if options.device == "cuda" and not options.quick:
        yield case(8192, 4096, 151_936, torch.bfloat16, options)
        yield case(1, 4096, 151_936, torch.bfloat16, options)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for T, H, V in shapes:
            yield case(T, H, V, dtype, options)


def case(T: int, H: int, V: int, dtype: torch.dtype, options: Options) -> Case:
    x = torch.randn(T, H, device=options.device).to(dtype)
    w = (torch.randn(V, H, device=options.device) / H**0.5).to(dtype)
    y = torch.randint(V, (T,), device=options.device)

    def check(stats):
        rows = slice(0, T, max(1, T // 16))
        want = torch.log_softmax(F.linear(x[rows].double(), w.double()), -1).gather(-1, y[rows, None])[:, 0]
        assert error(stats.logprob[rows], want) <= 1e-5

    return Case(
        op="vocab_stats", name=f"fwd T={T} H={H} V={V}", dtype=dtype, check=check, peer_memory=T > 1,
        run=lambda: vocab_stats(x, w, y, isa=options.isa),
        bytes=w.numel() * w.element_size(),  # W once; the logits of one block stay in the cache
        flops=0 if T == 1 else 2 * T * H * V,
        peers={"torch": lambda: torch.log_softmax(F.linear(x, w).float(), -1).gather(-1, y[:, None])},
    )  # fmt: skip

"""dropout against torch.nn.functional.dropout, which draws from the global generator and stores a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.dropout import Dropout, dropout, dropout_ref


def cases(options: Options) -> Iterator[Case]:
    rows, columns = (64, 128) if options.quick else (8192, 4096) if options.device == "cuda" else (2048, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        yield forward(rows, columns, dtype, options)


def forward(rows: int, columns: int, dtype: torch.dtype, options: Options) -> Case:
    x = torch.randn(rows, columns, dtype=dtype, device=options.device)
    d = Dropout(0.05, torch.tensor([42, 1], device=options.device), 3, torch.arange(rows, device=options.device))

    def check(y):
        assert torch.equal(y, dropout_ref(x, d))

    return Case(
        op="dropout", name=f"fwd {rows} x {columns}", dtype=dtype, check=check, run=lambda: dropout(x, d, isa=options.isa),
        bytes=2 * x.numel() * x.element_size(),  # x read, y written
        peers={"torch": lambda: F.dropout(x, 0.05)},
    )  # fmt: skip

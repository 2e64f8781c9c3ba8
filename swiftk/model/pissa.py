"""PiSSA: an adapter that starts as the principal part of the weight it stands on (Meng, Wang & Zhang 2024).

    W = U S V^T,    A0 = sqrt(S_r / s) V_r^T,    B0 = U_r sqrt(S_r / s),    base = W - s B0 A0,    s the adapter's scale

so that base + s B A is W at the start, and what is trained first is what matters most. `pissa` takes the exact SVD,
`pissa_niter_N` finds the leading directions by N rounds of subspace iteration from a random start (Halko, Martinsson & Tropp
2011, algorithm 4.4, OVERSAMPLING columns more than the rank; peft takes none). The signs of the directions are free.

The exact SVD of a square weight costs some 20 N^3 operations, N rounds of the subspace 4 N K (rank + OVERSAMPLING) each.
"""

from __future__ import annotations

import torch

OVERSAMPLING = 8
ELEMENTS = 1 << 18  # of the product B0 A0, taken out of the weight at a time


def principal(
    weight: torch.Tensor, rank: int, scale: float, start: torch.Tensor | None, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (rank, K) and B0 (N, rank) of a weight (N, K), fp32 or fp64.

    Args:
        start: (at least rank, K), random: subspace iteration from its rows; None: the exact SVD.
        iterations: of the subspace, after the first product.
    """
    if start is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        q = torch.linalg.qr(weight @ start.to(weight.dtype).t())[0]
        for _ in range(iterations):
            q = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ q)[0])[0]
        u, s, vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)
        u = q @ u
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root

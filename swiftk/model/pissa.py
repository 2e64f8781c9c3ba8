"""PiSSA: an adapter that starts as the principal part of the weight it stands on (Meng, Wang & Zhang 2024).

    W = U S V^T,    A0 = sqrt(S_r / s) V_r^T,    B0 = U_r sqrt(S_r / s),    base = W - s B0 A0,    s the adapter's scale

so that base + s B A is W at the start, and what is trained first is what matters most. `pissa` takes the exact SVD,
`pissa_niter_N` finds the leading directions by N rounds of subspace iteration from a random start (Halko, Martinsson & Tropp
2011, algorithm 4.4, OVERSAMPLING columns more than the rank; peft takes none). The signs of the directions are free.

The exact SVD of a square weight costs some 20 N^3 operations, N rounds of the subspace 4 N K (rank + OVERSAMPLING) each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from swiftk.model.parameters import random_start
from swiftk.parallel.comm import Comm

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


def start_of(
    weight: torch.Tensor, module: str, rank: int, scale: float, iterations: int | None, seed: int, comm: Comm
) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0 of a module's weight (N, K), fp32 or fp64, decomposed by rank 0 for all. iterations None: the exact SVD.

    Raises: ValueError for a weight that is not finite.
    """
    finite = torch.linalg.vector_norm(weight, ord=torch.inf, dim=1).isfinite()  # all(isfinite) would copy the weight
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"init_weights: {module}.weight has NaN or infinity in row {row}, wants a finite weight")
    pair = None
    if comm.rank == 0:
        width = min(rank + OVERSAMPLING, *weight.shape)
        start = None if iterations is None else random_start(module, seed, width, weight.shape[1])
        pair = principal(weight, rank, scale, start, iterations or 0)
    a, b = comm.broadcast_object(pair)
    return a, b


def take_out_(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, linear: Callable[..., torch.Tensor]
) -> None:
    """weight -= s B0 A0, in pieces: a row's product is the same in any piece, and on any number of threads."""
    a, b = a.to(weight.dtype).t().contiguous(), b.to(weight.dtype)
    step = max(1, ELEMENTS // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        weight[rows] -= scale * linear(b[rows], a)

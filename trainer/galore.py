"""GaLore and Q-GaLore: AdamW of the gradient's projection to its leading singular directions.

For a matrix's gradient G (m, n), m <= n (else transposed), every `gap` steps P (m, r) becomes the r leading left singular
vectors of G; with N the step of AdamW for the gradient P^T G (moments (r, n)),
    W <- (1 - lr decay) W - lr scale P N
Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection". The moments stay as they are when P
changes, as there; columns of the new P point the way of the old ones.

P comes from a randomised subspace iteration (Halko, Martinsson & Tropp 2011), Q <- orth(G G^T Q) twice from random Q
(m, r + 8), then the eigenvectors of Q^T G G^T Q: 5 m n (r + 8) multiply-adds, where the papers take a full SVD. The random
numbers are a function of (seed, name, step), so ranks that hold the same gradients and a resumed run get the same P.

Q-GaLore (Zhang et al. 2024): moments in 8 bits, P in 4 (blocks of 256 with one absmax, levels -7 ... 7), and a lazy projection:
the gap of a parameter doubles at each projection where the last 5 leading directions had a mean |cosine| of at least 0.4 with
the ones before. Its INT8 weights are left out: weights are what the model has.

State of a projected parameter: step, moments, projection (or its codes and absmax), due (the step that projects next); with
Q-GaLore gap and cosines.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from swiftk.kernels.adamw_8bit import MIN_8BIT, Update, adamw_8bit_, new_moments
from swiftk.trainer.adamw_8bit import AdamW8bit, moments_of, moments_state

OVERSAMPLE, ITERATIONS = 8, 2
INT4_BLOCK = 256
SETTLED, QUEUE = 0.4, 5  # mean cosine and its number of projections, from the authors' code


def leading_directions(g: torch.Tensor, rank: int, key: str) -> torch.Tensor:
    """(m, rank) fp32, orthonormal: approximately the leading left singular vectors of g (m, n) fp32, the largest first."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    columns = min(rank + OVERSAMPLE, g.shape[0])
    q = torch.from_numpy(generator.standard_normal((g.shape[0], columns), dtype=np.float32)).to(g.device)
    g = g / g.abs().max()  # its square must neither overflow nor vanish
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(g @ (g.t() @ q))[0]
    b = (q.t() @ g).double()
    vectors = torch.linalg.eigh(b @ b.t())[1].flip(1)[:, :rank]  # ascending eigenvalues
    return q @ vectors.float()


def pack_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> uint8 (ceil(n / 2),), element 2j in the high nibble of byte j, and absmax (blocks,) of blocks of 256."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % INT4_BLOCK)).view(-1, INT4_BLOCK)
    absmax = flat.abs().amax(1)
    levels = (flat * (7 / absmax.clamp(min=1e-30))[:, None]).round().add(8).to(torch.uint8).view(-1, 2)
    return (levels[:, 0] << 4 | levels[:, 1])[: -(-x.numel() // 2)], absmax


def unpack_int4(codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    levels = torch.stack([codes >> 4, codes & 15], 1).flatten()[: shape[0] * shape[1]].float() - 8
    return (levels * (absmax / 7).repeat_interleave(INT4_BLOCK)[: len(levels)]).view(shape)


class GaLore(AdamW8bit):
    """AdamW; in groups with `"project": True` of the projected gradients of matrices whose sides are both larger than `rank`.

    Args:
        params: groups of (name, parameter) pairs, fp32 or bf16; the names seed the projections.
        rank, gap, scale: of the projection, in steps, of the update (alpha in the paper).
        quantized: Q-GaLore. Otherwise all moments and projections are fp32.
    """

    own = (*AdamW8bit.own, "rank", "gap", "scale", "quantized", "seed", "names")
    on_host = ("step", "due", "gap")

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, rank: int = 128, gap: int = 200, scale: float = 0.25, quantized: bool = False,
        seed: int = 0, isa: str = "auto",
    ) -> None:  # fmt: skip
        if rank < 1 or gap < 1:
            raise ValueError(f"GaLore: rank has {rank} and gap {gap}, wants at least 1")
        self.rank, self.gap, self.scale, self.quantized, self.seed = rank, gap, scale, quantized, seed
        self.names: dict[torch.Tensor, str] = {}  # of the projected
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit=MIN_8BIT if quantized else sys.maxsize, isa=isa)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, p in zip(group["param_names"], group["params"], strict=True) if group.get("project") else ():
            if p.dim() != 2 or min(p.shape) <= self.rank:
                raise ValueError(
                    f"GaLore: {name} has shape {tuple(p.shape)}, wants two sides larger than the rank, {self.rank}"
                )
            self.names[p] = name

    def initial_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        if p not in self.names:
            return super().initial_state(p)
        m, n = sorted(p.shape)
        moments = new_moments(p.new_empty(self.rank, n, dtype=torch.float32), min_8bit=self.min_8bit)
        state = {"step": torch.zeros((), dtype=torch.float32), **moments_state(moments), "due": torch.ones(())}
        projection = torch.zeros(m, self.rank, device=p.device)
        if not self.quantized:
            return {**state, "projection": projection}
        codes, absmax = pack_int4(projection)
        cosines = torch.full((QUEUE,), -1.0, device=p.device)  # fewer than five so far: the mean stays below
        state |= {"projection": codes, "projection_absmax": absmax, "gap": torch.tensor(float(self.gap)), "cosines": cosines}
        return state

    def projection(self, p: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.quantized:
            return state["projection"]
        return unpack_int4(state["projection"], state["projection_absmax"], (min(p.shape), self.rank))

    def project_anew(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        step, old = int(state["step"]), self.projection(p, state)
        if not g.isfinite().all():
            raise ValueError(f"GaLore: the gradient of {self.names[p]} is not finite at step {step}, when it is projected anew")
        new = leading_directions(g, self.rank, f"{self.seed}/{self.names[p]}/{step}")
        along = (new * old).sum(0)
        new = new * torch.where(along < 0, -1.0, 1.0)
        gap = self.gap
        if not self.quantized:
            state["projection"].copy_(new)
        else:
            if old[:, 0].any():
                cosine = along[0].abs() / old[:, 0].norm()
                state["cosines"].copy_(torch.cat([state["cosines"][1:], cosine[None]]))
                if state["cosines"].min() >= 0 and state["cosines"].mean() >= SETTLED:
                    state["gap"] *= 2
            codes, absmax = pack_int4(new)
            state["projection"].copy_(codes)
            state["projection_absmax"].copy_(absmax)
            gap = int(state["gap"])
        state["due"].fill_(step + gap)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient; AdamW of all of them, projected or not, is one native call."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates, low_rank = [], []
        for group in self.param_groups:
            rates = (group["betas"], group["eps"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.begin(p)
                step, moments = int(state["step"]), moments_of(state)
                if p not in self.names:
                    updates.append(Update(p, p.grad.contiguous(), moments, step, group["lr"], *rates, group["weight_decay"]))
                    continue
                g = (p.grad if p.shape[0] <= p.shape[1] else p.grad.t()).float()
                if step >= state["due"] and g.any():
                    self.project_anew(p, g, state)
                projection = self.projection(p, state)
                r = projection.t() @ g
                n = torch.zeros_like(r)  # with rate 1 and no decay it becomes -N
                updates.append(Update(n, r, moments, step, 1.0, *rates, 0.0))
                low_rank.append((p, projection, n, group))
        adamw_8bit_(updates, isa=self.isa)
        for p, projection, n, group in low_rank:
            w = p if p.shape[0] <= p.shape[1] else p.t()
            decay, rate = 1 - group["lr"] * group["weight_decay"], group["lr"] * self.scale
            if p.dtype == torch.float32:
                w.addmm_(projection, n, beta=decay, alpha=rate)
            else:
                w.copy_(torch.addmm(w.float(), projection, n, beta=decay, alpha=rate))
        return loss

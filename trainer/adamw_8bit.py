"""AdamW with 8-bit moments as a torch optimizer, and its state in bitsandbytes' names and back.

The update is swiftk.kernels.adamw_8bit: one native call for all parameters of all groups. State of a parameter: `step`
(fp32, as torch has it), `exp_avg`, `exp_avg_sq` (uint8 codes, fp32 for fewer than 4096 elements), and with codes
`exp_avg_absmax`, `exp_avg_sq_absmax`: tensors of a fixed shape, so a checkpoint is read into what initial_state made.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from swiftk.kernels.adamw_8bit import MIN_8BIT, Moments, Update, adamw_8bit_, nearest_code, new_moments
from swiftk.kernels.nf4 import dynamic_map

WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes >= 0.49 nests the tensors of a parameter's state here


def moments_state(moments: Moments) -> dict[str, torch.Tensor]:
    return {name: t for name, t in moments._asdict().items() if t is not None}


def moments_of(state: dict[str, torch.Tensor]) -> Moments:
    return Moments(*(state.get(name) for name in Moments._fields))  # type: ignore[arg-type]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, decoupled decay, moments in 8 bits (fp32 below `min_8bit` elements).

    Args:
        params: parameters or groups, bf16 or fp32; lr, betas, eps and weight_decay may differ by group.
        isa: instruction set of the kernel; the result is the same.
    """

    own: tuple[str, ...] = ("min_8bit", "isa")
    on_host: tuple[str, ...] = ("step",)  # state that the host reads at every step; all else lies beside the parameter

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, min_8bit: int = MIN_8BIT, isa: str = "auto",
    ) -> None:  # fmt: skip
        self.min_8bit, self.isa = min_8bit, isa
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError for a rate out of range, and for a parameter of another dtype or with gaps."""
        super().add_param_group(param_group)
        op, group = type(self).__name__, self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{op}: {name} has {group[name]}, wants at least 0")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"{op}: betas has {group['betas']}, wants two of at least 0 and below 1")
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{op}: a parameter has dtype {p.dtype}, wants torch.float32 or torch.bfloat16")
            if not p.is_contiguous():
                raise ValueError(f"{op}: a parameter {tuple(p.shape)} has strides {p.stride()}, wants it contiguous")

    def __getstate__(self) -> dict[str, Any]:  # of a copy or a pickle; torch keeps its own three only
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.own}}

    def initial_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a parameter that was never updated."""
        return {"step": torch.zeros((), dtype=torch.float32), **moments_state(new_moments(p, min_8bit=self.min_8bit))}

    def begin(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of p, made if need be, with one step more."""
        state = self.state[p]
        if not state:
            state.update(self.initial_state(p))
        state["step"] += 1
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient, all in one native call."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = []
        for group in self.param_groups:
            rates = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
            for p in group["params"]:
                if p.grad is not None:
                    state = self.begin(p)
                    updates.append(Update(p, p.grad.contiguous(), moments_of(state), int(state["step"]), *rates))
        adamw_8bit_(updates, isa=self.isa)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch would cast the codes to the parameter's dtype; they are taken as they are."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(saved, ours, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {
                    k: t.detach().clone().to("cpu" if k in self.on_host else p.device)
                    for k, t in state_dict["state"][number].items()
                }


# --- bitsandbytes ------------------------------------------------------------------------------------------------


def to_bitsandbytes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """AdamW8bit.state_dict() -> what bitsandbytes' AdamW8bit.load_state_dict takes, exactly: codes, absmax and the maps."""
    state = {}
    for number, s in state_dict["state"].items():
        entry = {"step": int(s["step"]), "state1": s["exp_avg"], "state2": s["exp_avg_sq"]}
        if "exp_avg_absmax" in s:
            entry |= {"qmap1": dynamic_map(True).clone(), "absmax1": s["exp_avg_absmax"]}
            entry |= {"qmap2": dynamic_map(False).clone(), "absmax2": s["exp_avg_sq_absmax"]}
        state[number] = entry
    extra = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # of other optimizers that share its class
    return {"state": state, "param_groups": [{**group, **extra} for group in state_dict["param_groups"]]}


def from_bitsandbytes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes' AdamW8bit.state_dict() -> AdamW8bit.load_state_dict. A code means what the map beside it says and becomes
    the nearest code of ours: the same one for bitsandbytes' own map, whose values differ from ours in their last bits.

    Raises: ValueError for a state that is not AdamW's with blocks of 256 elements.
    """
    state: dict[Any, dict[str, torch.Tensor]] = {}
    for number, found in state_dict["state"].items():
        s = {**found, **found.get(WRAPPED, {})}
        step = torch.tensor(float(s["step"]))
        if s["state1"].dtype == torch.float32:
            state[number] = {"step": step, "exp_avg": s["state1"].clone(), "exp_avg_sq": s["state2"].clone()}
            continue
        blocks = -(-s["state1"].numel() // 256)
        if "state2" not in s or any(k not in s or s[k].shape != (blocks,) for k in ("absmax1", "absmax2")):
            raise ValueError(f"from_bitsandbytes: state {number} is not AdamW's with {blocks} blocks of 256 elements")
        m, v = (nearest_code(s[f"qmap{i}"], signed=i == 1)[s[f"state{i}"].long()] for i in (1, 2))
        absmax = {"exp_avg_absmax": s["absmax1"].clone(), "exp_avg_sq_absmax": s["absmax2"].clone()}
        state[number] = {"step": step, "exp_avg": m, "exp_avg_sq": v, **absmax}
    names = ("lr", "betas", "eps", "weight_decay", "params")
    return {"state": state, "param_groups": [{k: group[k] for k in names} for group in state_dict["param_groups"]]}

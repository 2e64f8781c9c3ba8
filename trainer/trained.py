"""`--check_trained true`: after the first steps, and at the end, an error that names each trained tensor which does not learn.

After the first step that has a trained token and a rate above 0, every gradient must be other than zero, but for a factor of
an adapter whose other factor is zero (A of a new one): the next step has to bring it one. A gradient, and not the move alone,
because weight decay moves what nothing else does. A tensor must have moved, a bit of it must be another than at the start of
this process, after that step if the update is above the dtype's resolution (in a warm-up it may not be), and at the end in
any case. Compared are SHA-256 digests: no copy is kept, 32 bytes a tensor, one pass over the trained weights each time. Every
rank looks at its own copy and they are compared, so replicas that part are found too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch

from swiftk.parallel.comm import Comm

PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
FACTORS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}  # of an adapter: name -> the other
SMALL = 1e-8  # Adam's epsilon: gradients below it take smaller steps than the rate
SHOWN = 10  # names in a message


class UntrainedError(RuntimeError):
    """A tensor that is trained does not learn, or not on every rank."""


class TrainedCheck:
    """Made before the first step of the process.

    Args:
        params: by name; those without requires_grad are not looked at.
        comm: of the ranks that hold the same parameters.
        say: called with one line per check that was passed.
    """

    def __init__(self, params: Mapping[str, torch.nn.Parameter], comm: Comm, say: Callable[[str], None]) -> None:
        self.params = {name: p for name, p in params.items() if p.requires_grad}
        self.comm, self.say = comm, say
        self.first = {name: _digest(p) for name, p in self.params.items()}
        self.waiting = {name for name in self.params if self._other_factor_is_zero(name)}
        self.steps = self.effective = 0

    def _other_factor_is_zero(self, name: str) -> bool:
        module, kind = name.rsplit(".", 1)
        other = self.params.get(f"{module}.{FACTORS.get(kind)}")
        return other is not None and not bool(other.detach().any())

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After an optimizer step with a trained token, while the gradients are there."""
        held = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        rates = {name: held.get(id(p)) for name, p in self.params.items()}
        self.steps += 1
        if not any(rates.values()):
            return
        self.effective += 1
        if self.effective > 2 or (self.effective == 2 and not self.waiting):
            return
        moved = self._moved()
        problems, waiting = [], set()
        for name in self.params if self.effective == 1 else sorted(self.waiting):
            grad, rate = self.params[name].grad, rates[name]
            size = 0.0 if grad is None else float(grad.abs().max())
            if not rate:
                problems.append(f"{name}: " + ("it is not in the optimizer" if rate is None else "its learning rate is 0"))
            elif size == 0 and name in self.waiting and self.effective == 1:
                waiting.add(name)
            elif size == 0:
                problems.append(f"{name}: its gradient is zero: the loss does not depend on it, or it is multiplied by zeros")
            elif name not in moved and rate * size / (size + SMALL) > self._resolution(name):
                problems.append(f"{name}: its gradient is up to {size:.2g}, its rate {rate:.2g}, and the optimizer leaves it")
        self.waiting = waiting
        self._refuse(f"step {step}", problems)
        line = f"check_trained: {len(moved)} of {len(self.params)} trained tensors have moved after step {step}"
        if waiting:
            line += f"; {len(waiting)} have their first gradient in the next: the other factor of the adapter was zero"
        self.say(line)

    def _resolution(self, name: str) -> float:
        p = self.params[name].detach()
        return torch.finfo(p.dtype).eps * float(p.abs().max())

    def at_end(self) -> None:
        if not self.steps:
            self.say("check_trained: no step was made, nothing is checked")
            return
        moved = self._moved()
        why = "the rate was 0 in every step" if not self.effective else "its updates are lost in rounding: the rate is too low"
        still = [name for name in self.params if name not in moved and not (name in self.waiting and self.effective)]
        self._refuse(f"the end, {self.steps} steps", [f"{name}: it has not moved: {why}" for name in still])
        later = f", {len(self.params) - len(moved)} wait for a second step" if len(moved) < len(self.params) else ""
        self.say(f"check_trained: {len(moved)} of {len(self.params)} trained tensors have moved at the end{later}")

    def _moved(self) -> set[str]:
        """The same on every rank: an error if they do not hold the same tensors."""
        digests = {name: _digest(p) for name, p in self.params.items()}
        all_ranks = self.comm.all_gather_object(list(digests.values()))
        parted = [name for name, values in zip(digests, zip(*all_ranks, strict=True), strict=True) if len(set(values)) > 1]
        self._refuse("the ranks have parted", [f"{name}: its values are not the same on all ranks" for name in parted])
        return {name for name, digest in digests.items() if digest != self.first[name]}

    def _refuse(self, when: str, problems: list[str]) -> None:
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise UntrainedError(
                f"check_trained: {when}: {len(problems)} of {len(self.params)} trained tensors do not learn, wants all: "
                + "\n  ".join(problems[:SHOWN] + more)
            )


def _digest(p: torch.Tensor) -> bytes:
    return hashlib.sha256(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()

"""All communication goes through one small `Comm`. Reductions are sums; nothing is averaged.

Each collective is the identity in a group of one, so there is one code path for every layout. Backends: `SingleComm`
(no process group) and `DistComm` (torch.distributed: gloo, NCCL).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist


class Comm(Protocol):
    rank: int  # in the group
    size: int

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor: ...  # in place; op sum | max | min
    def all_gather_object(self, value: Any) -> list[Any]: ...  # in rank order
    def broadcast_object(self, value: Any, src: int = 0) -> Any: ...
    def barrier(self) -> None: ...


class SingleComm:
    rank = 0
    size = 1

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        return value

    def barrier(self) -> None:
        pass


OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class DistComm:
    """A group of torch.distributed; `group` None is the whole world."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        dist.all_reduce(tensor, OPS[op], group=self.group)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group_src=src, group=self.group)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.group)

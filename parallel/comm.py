"""All communication goes through one small `Comm`. Reductions are sums; nothing is averaged.

Each collective is the identity in a group of one, so there is one code path for every layout. Backends: `SingleComm`
(no process group), `DistComm` (torch.distributed: gloo, NCCL) and `ThreadComm` (N ranks as threads of one process, for
tests, notebooks and debuggers; CPU only, because autograd has one worker thread per device on CUDA).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
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
    """A group of torch.distributed; `group` None is the whole world.

    `position` counts the collectives and names the last with its call site: parallel/watchdog.py publishes it, so that
    a time-out can say which rank is late and where it is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.position: tuple[int, str] = (0, "no collective yet")

    def _enter(self, name: str) -> None:
        caller = sys._getframe(2)
        self.position = (self.position[0] + 1, f"{name} at {caller.f_code.co_filename.rsplit('/', 1)[-1]}:{caller.f_lineno}")

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        self._enter("all_reduce")
        dist.all_reduce(tensor, OPS[op], group=self.group)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        self._enter("all_gather_object")
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        self._enter("broadcast_object")
        box = [value]
        dist.broadcast_object_list(box, group_src=src, group=self.group)
        return box[0]

    def barrier(self) -> None:
        self._enter("barrier")
        dist.barrier(group=self.group)


THREAD_OPS: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class ThreadComm:
    """One of `size` ranks that are threads of this process. Sums run in rank order: bitwise repeatable, and equal to
    gloo's at two ranks. A rank that raises breaks the barrier, so the others raise too instead of waiting."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size = rank, barrier.parties
        self._barrier, self._slots = barrier, slots

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()  # nobody overwrites a slot before all have read
        return values

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        first, *rest = self._exchange(tensor.clone())
        result = first.clone()
        for other in rest:
            result = THREAD_OPS[op](result, other)
        return tensor.copy_(result)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._exchange(value)

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        return self._exchange(value)[src]

    def barrier(self) -> None:
        self._exchange(None)


def run_threads(size: int, f: Callable[[Comm], Any], timeout: float = 120.0) -> list[Any]:
    """f(comm) on `size` ranks as threads; their results in rank order, or the first exception of a rank."""
    barrier, slots = threading.Barrier(size, timeout=timeout), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank(index: int) -> None:
        torch.set_num_threads(1)  # per calling thread: `size` ranks share the cores
        try:
            results[index] = f(ThreadComm(index, barrier, slots))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(i,), name=f"rank{i}") for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if barrier.broken:
        raise TimeoutError(f"run_threads: the ranks waited more than {timeout} s for each other")
    return results

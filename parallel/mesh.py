"""The frozen `Mesh`: which rank this process is along each axis, passed in, never imported."""

from __future__ import annotations

from dataclasses import dataclass

from swiftk.parallel.comm import Comm, DistComm, SingleComm

AXES = ("pp", "dp", "cp", "ep", "tp")  # outermost first; neighbours along the last are neighbours in the world


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: this process's coordinate, the size, and the communicator along it."""

    rank: int
    size: int
    comm: Comm


def _alone() -> Axis:
    return Axis(0, 1, SingleComm())


@dataclass(frozen=True)
class Mesh:
    """Data (dp), pipeline (pp), context (cp), expert (ep) and tensor (tp) axes. Only dp can exceed one so far."""

    dp: Axis
    pp: Axis
    cp: Axis
    ep: Axis
    tp: Axis
    world: Axis

    @staticmethod
    def single() -> Mesh:
        """One process, no process group."""
        return Mesh(*(_alone() for _ in range(6)))

    @staticmethod
    def from_comm(comm: Comm, *, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1) -> Mesh:
        """The mesh over the ranks of `comm`; data parallel takes what the other axes leave."""
        for name, size in (("tp", tp), ("pp", pp), ("cp", cp), ("ep", ep)):
            if size != 1:
                raise ValueError(f"Mesh: {name} has {size}, wants 1 (only data parallelism is there yet)")
        world = Axis(comm.rank, comm.size, comm)
        return Mesh(dp=world, pp=_alone(), cp=_alone(), ep=_alone(), tp=_alone(), world=world)

    @staticmethod
    def from_world(*, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1) -> Mesh:
        """`from_comm` over torch.distributed's default group."""
        return Mesh.from_comm(DistComm(), tp=tp, pp=pp, cp=cp, ep=ep)

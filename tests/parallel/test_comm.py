"""Comm and Mesh: ranks as threads, the group of one, sums of gradients."""

from __future__ import annotations

import threading

import pytest
import torch

from swiftk.parallel import data
from swiftk.parallel.comm import SingleComm, run_threads
from swiftk.parallel.mesh import Mesh
from swiftk.parallel.spec import ParamSpec


def test_collectives_of_three_threads():
    def rank(comm):
        mine = torch.tensor([float(comm.rank), 10.0 * comm.rank])
        results = [comm.all_reduce_(mine.clone(), op).tolist() for op in ("sum", "max", "min")]
        comm.barrier()
        return results, comm.all_gather_object(comm.rank * 2), comm.broadcast_object(f"from {comm.rank}", src=1)

    for results, gathered, broadcast in run_threads(3, rank):
        assert results == [[3.0, 30.0], [2.0, 20.0], [0.0, 0.0]] and gathered == [0, 2, 4] and broadcast == "from 1"


def test_sums_run_in_rank_order():
    """1e8 + 1 - 1e8 is 0 in fp32 from left to right: every rank gets that, every time."""
    for _ in range(5):
        assert run_threads(3, lambda comm: float(comm.all_reduce_(torch.tensor([[1e8, 1.0, -1e8][comm.rank]])))) == [0.0] * 3


def test_a_rank_that_raises_ends_the_others():
    def rank(comm):
        if comm.rank == 1:
            raise KeyError("lost")
        comm.barrier()

    with pytest.raises(KeyError, match="lost"):
        run_threads(3, rank)
    assert threading.active_count() < 50


def test_a_group_of_one_is_the_identity():
    comm, value = SingleComm(), torch.ones(3)
    assert comm.all_reduce_(value) is value and comm.all_gather_object(5) == [5] and comm.broadcast_object("x") == "x"
    assert Mesh.single().dp.size == 1
    with pytest.raises(ValueError, match="Mesh: tp has 2, wants 1"):
        Mesh.from_comm(comm, tp=2)


@pytest.mark.parametrize("elements", [1, 7, 1 << 20])
def test_gradients_are_summed_in_buckets_of_any_size(elements, monkeypatch):
    monkeypatch.setattr(data, "BUCKET_ELEMENTS", elements)
    shapes = {"a": (3, 2), "b": (5,), "frozen": (2,), "c": (4, 4)}

    def rank(comm):
        params = {n: torch.nn.Parameter(torch.zeros(s), requires_grad=n != "frozen") for n, s in shapes.items()}
        params["a"].grad = torch.full((3, 2), 1.0 + comm.rank)
        if comm.rank == 0:  # b has no gradient on rank 1, c on none
            params["b"].grad = torch.arange(5.0)
        data.sum_gradients_(params, {n: ParamSpec.replicated(n, s) for n, s in shapes.items()}, Mesh.from_comm(comm))
        return {name: p.grad for name, p in params.items()}

    for grads in run_threads(2, rank):
        assert torch.equal(grads["a"], torch.full((3, 2), 3.0)) and torch.equal(grads["b"], torch.arange(5.0))
        assert grads["c"].abs().sum() == 0 and grads["frozen"] is None

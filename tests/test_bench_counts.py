"""What a benchmark says of its bytes and FLOPs, against the tensors that its operators see and what torch counts of a peer."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from swiftk import bench
from swiftk.benchmarks.harness import Options

# no operator to look at: one native call for a list of tensors, or the launcher by itself
LAUNCHED = {"adamw_8bit", "paged", "sample"}


class Seen(TorchDispatchMode):
    """Bytes of the inputs and outputs of swiftk's operators and of matrix products, each tensor once per call."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name().startswith(("swiftk::", "aten::mm", "aten::addmm")):
            tensors = {
                (t.data_ptr(), t.numel()): t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)
            }
            self.bytes += sum(tensors.values())
        return result


def quick(name):
    return list(importlib.import_module(f"swiftk.benchmarks.kernels.bench_{name}").cases(Options(quick=True)))


@pytest.mark.parametrize("name", sorted(set(bench.kernel_names()) - LAUNCHED))
def test_bytes_are_those_of_the_tensors(name):
    """At least what is said, and at most a tenth more: statistics of rows, positions, tables."""
    checked = 0
    for case in quick(name):
        if name == "linear" and case.dtype == torch.bfloat16:  # its backward may multiply in fp32 on a CPU
            continue
        with Seen() as seen:
            case.run()
        if seen.bytes == 0:  # a launcher by itself
            continue
        small = TABLES.get(name, lambda case: 0)(case)
        assert 1.0 <= (seen.bytes - small) / case.bytes <= 1.1, f"{case.name}: says {case.bytes}, its tensors {seen.bytes}"
        checked += 1
    assert checked, f"no case of {name} runs an operator"


# what a call reads besides, which is little at real sizes and not in these small ones
TABLES = {"rope": lambda case: case.name.startswith("fwd+bwd") * 33792 + 33792}  # per call 64 rows of cos and sin, positions


@pytest.mark.parametrize("name", ["linear", "linear_cross_entropy"])
def test_flops_are_what_torch_counts_of_the_peer(name):
    for case in quick(name):
        if case.flops and case.dtype == torch.float32 and "torch" in case.peers:
            with FlopCounterMode(display=False) as counter:
                case.peers["torch"]()
            assert case.flops == counter.get_total_flops(), case.name

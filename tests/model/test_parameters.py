"""Parameters: names of the checkpoint, parts that cover the whole, and the same first values in every layout."""

from __future__ import annotations

import pytest
import torch
import transformers

from swiftk.config import TunerConfig
from swiftk.model import Model, ModelConfig
from swiftk.model.adapter import resolve
from swiftk.model.parameters import initial_value, param_specs
from swiftk.parallel.comm import SingleComm
from swiftk.parallel.mesh import Axis, Mesh
from swiftk.parallel.spec import ParamSpec
from tests.model.families import FAMILIES


def tensor_mesh(rank: int, size: int) -> Mesh:
    alone = Axis(0, 1, SingleComm())
    return Mesh(dp=alone, pp=alone, cp=alone, ep=alone, tp=Axis(rank, size, SingleComm()), world=alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_the_checkpoints(family):
    config = ModelConfig.from_hf(FAMILIES[family].to_dict())
    ours = Model(config, Mesh.single())
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    want = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: spec.shape for name, spec in ours.specs.items()} == want
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == want
    assert list(ours.specs) == [name for name, _ in ours.named_parameters()]
    assert set(ours.state_dict()) == set(want)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_two_ranks_make_the_whole(family):
    """Each spec's two parts, drawn apart, are the value that one process draws."""
    config = ModelConfig.from_hf(FAMILIES[family].to_dict() | {"vocab_size": 98, "hidden_size": 704})  # several blocks of rows
    full = resolve(config, TunerConfig("full"))
    whole = param_specs(config, Mesh.single(), full)
    parts = [param_specs(config, tensor_mesh(rank, 2), full) for rank in range(2)]
    for name, spec in whole.items():
        value = initial_value(spec, 7, 0.02)
        assert tuple(value.shape) == spec.shape == spec.local_shape
        for part in (p[name] for p in parts):
            here = value[tuple(slice(*s) for s in part.slices)]
            assert torch.equal(initial_value(part, 7, 0.02), here) and tuple(here.shape) == part.local_shape
        cut = [d for d in range(len(spec.shape)) if parts[0][name].slices[d] != parts[1][name].slices[d]]
        assert (len(cut) == 0) == (parts[0][name].local_shape == spec.shape)
        for d in cut:
            assert parts[0][name].slices[d][1] == parts[1][name].slices[d][0]


def test_first_values_follow_seed_and_name():
    config = ModelConfig.from_hf(FAMILIES["qwen3"].to_dict() | {"initializer_range": 0.02, "hidden_size": 256})
    one, same, other = (dict(Model(config, Mesh.single(), seed=s).named_parameters()) for s in (1, 1, 2))
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[gate], other[gate]) and not torch.equal(one[gate], one[up])
    assert not torch.equal(one[gate], one[gate.replace("0", "1")])
    assert abs(one[gate].std().item() / 0.02 - 1) < 0.03 and abs(one[gate].mean().item()) < 1e-3
    assert torch.equal(one["model.norm.weight"], torch.ones(256))
    rows = initial_value(ParamSpec.replicated("several.blocks", (600, 256)), 1, 1.0)
    assert len(rows[:, 0].unique()) > 590  # no block repeats another
    double = dict(Model(config, Mesh.single(), seed=1, compute_dtype=torch.float64).named_parameters())
    assert torch.equal(double[gate], one[gate].double())


def test_heads_that_do_not_divide_are_refused():
    config = ModelConfig.from_hf(FAMILIES["llama"].to_dict())
    with pytest.raises(ValueError, match="Model: num_attention_heads has 4, wants a multiple of the tensor axis's size 3"):
        param_specs(config, tensor_mesh(0, 3), resolve(config, TunerConfig("full")))

"""What only a CUDA device can show: run by `make gpu PART=test`, skipped visibly elsewhere. The kernels' own tests are
tests/triton, which run there too."""

from __future__ import annotations

import importlib

import pytest
import torch

from swiftk import bench
from swiftk.benchmarks.harness import Options
from swiftk.config import OptimConfig, TunerConfig
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.optimizer import build_optimizer, set_learning_rate
from tests.trainer import toy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.mark.parametrize("name", bench.kernel_names())
def test_smallest_case_of_each_op(name):
    """The benchmarks' checks compare with the references."""
    for case in importlib.import_module(f"swiftk.benchmarks.kernels.bench_{name}").cases(Options(device="cuda", quick=True)):
        case.check(case.run())


TUNERS = {
    "full": TunerConfig(tuner_type="full"), "lora": TunerConfig(tuner_type="lora", lora_dropout=0.1),
    "qlora": TunerConfig(tuner_type="lora", quant_method="bnb", quant_bits=4),
}  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "galore", "q_galore"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_training_steps_follow_the_cpu(tuner, optim):
    """Ten steps in fp32: the losses of the CPU's kernels; the same bits when repeated."""

    def losses(device):
        model = Model(ModelConfig.from_hf(toy.MODEL), Mesh.single(), seed=1, tuner=TUNERS[tuner]).to(device)
        optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(optim=optim, galore_rank=4))
        set_learning_rate(optimizer, 1e-3)
        return toy.losses(model, optimizer, (toy.batch([9, 1, 14, 6], 0.5, step).to(model.device) for step in range(10)))

    want, got = losses("cpu"), losses("cuda")
    assert got == losses("cuda")
    assert max(abs(a - b) / abs(a) for a, b in zip(want, got, strict=True)) < 1e-4

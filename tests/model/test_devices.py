"""The model and the loss on a CUDA device that is not there: fake tensors, which know their device and refuse another's."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from swiftk.config import TunerConfig
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.loss import token_loss
from swiftk.trainer.packing import Batch
from tests.trainer import toy

LORA: dict = {"tuner_type": "lora", "lora_rank": 4}
NF4: dict = {"quant_method": "bnb", "quant_bits": 4}
TUNERS = {
    "full": TunerConfig(tuner_type="full"), "lora": TunerConfig(**LORA, lora_dropout=0.1),
    "dora": TunerConfig(**LORA, use_dora=True), "qlora": TunerConfig(**LORA, **NF4, lora_dropout=0.1),
    "qdora": TunerConfig(**LORA, **NF4, use_dora=True),
    "head": TunerConfig(**LORA, target_modules=("all-linear", "lm_head", "embed_tokens")),
}  # fmt: skip
CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("tuner", TUNERS)
def test_no_tensor_of_the_cpu_meets_one_of_the_gpu(tuner, dtype):
    if torch.version.cuda is None:
        torch._C._ensureCUDADeviceGuardSet()  # so that a build without CUDA has the device at all
    model = Model(ModelConfig.from_hf(toy.MODEL), Mesh.single(), seed=1, tuner=TUNERS[tuner], compute_dtype=dtype)
    batch, mode = toy.batch([9, 1, 14, 6], 0.5, 0), FakeTensorMode()
    places = [(kept, name) for m in model.modules() for kept in (m._parameters, m._buffers) for name in kept]
    shapes = [None if (t := kept[name]) is None else t.detach().to("meta") for kept, name in places]
    inputs = {name: t.to("meta") for name, t in vars(batch).items() if name != "rows"}
    with mode, torch.no_grad():
        for (kept, name), meta in zip(places, shapes, strict=True):
            if meta is not None:
                fake, is_parameter = FakeTensor(mode, meta, CUDA), isinstance(kept[name], torch.nn.Parameter)
                kept[name] = torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        moved = Batch(**{name: FakeTensor(mode, meta, CUDA) for name, meta in inputs.items()}, rows=batch.rows)
        loss = token_loss(model, moved, seed_step=torch.zeros(2, dtype=torch.int64, device=CUDA))
        logits = model.logits(torch.zeros(3, model.config.hidden_size, dtype=dtype, device=CUDA))
    assert model.device == loss.total.device == loss.per_token.device == logits.device == CUDA

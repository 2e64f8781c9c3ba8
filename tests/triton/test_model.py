"""The model by its GPU kernels, forward and backward, against its references in fp64; a token's numbers do not depend on the
pack; a training step repeats bit for bit."""

from __future__ import annotations

import pytest
import torch

from swiftk.config import OptimConfig, TunerConfig
from swiftk.kernels.attention.varlen import varlen_attention_ref
from swiftk.kernels.linear import linear_ref
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.kernels.lora_linear import lora_linear_ref
from swiftk.kernels.nf4_linear import nf4_linear_ref
from swiftk.kernels.rms_norm import rms_norm_ref
from swiftk.kernels.rope import rope_ref
from swiftk.kernels.swiglu import swiglu_ref
from swiftk.model import Model, ModelConfig
from swiftk.model.transformer import Ops
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.loss import token_loss
from swiftk.trainer.optimizer import build_optimizer, set_learning_rate
from swiftk.trainer.packing import Batch
from tests.trainer import toy
from tests.triton.launched import dots_like_a_gpus

CONFIG = ModelConfig.from_hf({
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "initializer_range": 0.3,
})  # fmt: skip
TUNERS = {
    "full": TunerConfig(tuner_type="full"), "lora": TunerConfig(tuner_type="lora", lora_rank=3, lora_dropout=0.1),
    "qlora": TunerConfig(tuner_type="lora", lora_rank=3, lora_dropout=0.0, quant_method="bnb", quant_bits=4),
}  # fmt: skip


def lora_linear_group_ref(x, weights, adapters, biases, *, dropouts):
    return tuple(lora_linear_ref(x, w, a, b, dropout=d) for w, a, b, d in zip(weights, adapters, biases, dropouts, strict=True))


REFERENCES = Ops(
    linear_ref, rms_norm_ref, rope_ref, swiglu_ref, lambda *args, **kw: varlen_attention_ref(*args, **kw)[0],
    nf4_linear_ref, lora_linear_ref, lora_linear_group_ref,
)  # fmt: skip


def batch(*lengths: int, device: torch.device) -> Batch:
    ids = torch.randint(0, CONFIG.vocab_size, (sum(lengths),))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    labels = ids.roll(-1)
    labels[cu_seqlens[1:].long() - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    tensors = (ids, labels, positions, cu_seqlens, torch.arange(len(ids)))
    return Batch(*(t.to(device) for t in tensors), tuple(range(len(lengths))))


def stirred(tuner: str, device: torch.device, **options) -> Model:
    model = Model(CONFIG, Mesh.single(), seed=3, tuner=TUNERS[tuner], **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model.to(device)


@pytest.mark.parametrize("numerics", ["auto", pytest.param("invariant", marks=pytest.mark.long)])
@pytest.mark.parametrize("tuner", TUNERS)
def test_gradients_are_those_of_the_references(tuner, numerics, device):
    one = batch(3, 1, 5, device=device)
    seed_step = torch.tensor([3, 4], device=device)
    found = []
    for dtype, ops in ((torch.float32, None), (torch.float64, REFERENCES)):
        model = stirred(tuner, device, compute_dtype=dtype, numerics=numerics, ops=ops, recompute="none")
        if ops is None:
            loss = token_loss(model, one, seed_step=seed_step).total
        else:
            hidden = model(one.input_ids, one.positions, one.cu_seqlens, seed_step=seed_step, token_index=one.token_index)
            loss = torch.nn.functional.cross_entropy(model.logits(hidden), one.labels, reduction="sum")
        params = [p for p in model.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, params)])
    (loss, *grads), (want, *exact) = found
    assert abs(loss.item() - want.item()) < 1e-5 * want.item()
    scale = torch.stack([g.square().sum() for g in exact]).sum().sqrt().item()
    for got, wanted in zip(grads, exact, strict=True):
        assert (got - wanted).abs().max().item() < 1e-5 * max(wanted.abs().max().item(), 0.01 * scale)


def test_a_document_alone_and_in_a_pack_has_the_same_bits(device):
    model = stirred("lora", device, numerics="invariant")

    def logprobs(one: Batch) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(one.input_ids, one.positions, one.cu_seqlens)
            head = model.head()
            return token_logprobs(hidden, head.weight, one.labels, adapter=head.adapter, numerics="invariant")

    whole = batch(4, 7, 2, device=device)
    with dots_like_a_gpus():
        packed = logprobs(whole)
        for begin, end in ((0, 4), (4, 11), (11, 13)):
            ids, labels, positions = (t[begin:end] for t in (whole.input_ids, whole.labels, whole.positions))
            cu_seqlens = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
            alone = logprobs(Batch(ids, labels, positions, cu_seqlens, positions, (0,)))
            assert torch.equal(alone, packed[begin:end])


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.long)])
def test_steps_repeat_and_learn(optim, device):
    def losses() -> list[float]:
        torch.manual_seed(1)
        model, one = stirred("full", device), batch(4, 3, device=device)
        optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(optim=optim))
        set_learning_rate(optimizer, 0.02)
        return toy.losses(model, optimizer, [one, one])

    first = losses()
    assert first == losses() and first[-1] < first[0]

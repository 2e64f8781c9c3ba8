"""What full tuning freezes and opens again, by ms-swift's keys; a model that is partly frozen."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from swiftk.config import TunerConfig
from swiftk.model import Model, ModelConfig, save_checkpoint
from swiftk.model.freezing import ambiguous_prefixes, frozen
from swiftk.parallel.mesh import Mesh
from tests.model.families import FAMILIES, pack
from tests.model.test_transformer import Held

SHAPES = {
    "model.embed_tokens.weight": (10, 4), "model.layers.0.norm.weight": (4,), "model.layers.0.q_proj.weight": (4, 4),
    "model.layers.1.norm.weight": (4,), "model.layers.1.q_proj.weight": (4, 4), "model.layers.1.q_proj.bias": (4,),
    "model.layers.12.q_proj.weight": (4, 3), "model.norm.weight": (4,),
}  # fmt: skip  # 100 elements


def trained(**keys) -> str:
    """Numbers of the trained parameters in SHAPES."""
    held = frozen(TunerConfig("full", **keys), SHAPES)
    return "".join(str(i) for i, name in enumerate(SHAPES) if name not in held)


def test_each_key():
    assert trained() == "01234567"
    assert trained(freeze_parameters=("model.embed_tokens",)) == "1234567"
    assert trained(freeze_parameters=("model.layers.0.", "model.norm")) == "03456"
    assert trained(freeze_parameters=("model.layers.1",)) == "0127"  # a prefix is a prefix: of 12 too
    assert trained(freeze_parameters=("model.layers.1.",)) == "01267"
    assert trained(freeze_parameters_regex=r"\.norm\.|bias") == "0246"  # found anywhere
    assert trained(freeze_parameters=("model.embed",), freeze_parameters_regex="bias$") == "123467"
    assert trained(freeze_parameters=("model",), trainable_parameters=("model.layers.12", "model.norm")) == "67"
    assert trained(freeze_parameters=("model",), trainable_parameters_regex=r"layers\.[01]\.q") == "245"
    assert trained(freeze_parameters_regex="q_proj", trainable_parameters=("model.layers.0",)) == "01237"


@pytest.mark.parametrize(
    ("ratio", "want"),
    [(0.0, "01234567"), (0.39, "01234567"), (0.4, "1234567"), (0.43, "1234567"), (0.44, "234567"), (0.9, "67"), (0.99, "7")],
)
def test_a_share_of_the_elements(ratio, want):
    """As many whole parameters from the first one on as have at most the share: 40, 44, 60, 64, 80, 84, 96, 100."""
    assert trained(freeze_parameters_ratio=ratio) == want
    assert trained(freeze_parameters_ratio=1.0, trainable_parameters=("model.norm",)) == "7"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze_parameters": ("model.layer.0",)}, r"freeze_parameters: no parameter's name starts with 'model.layer.0'; the "
         r"nearest are model.layers.0"),
        ({"trainable_parameters": ("lm_head",)}, "no parameter's name starts with 'lm_head'; the head is tied: it is model"),
        ({"freeze_parameters_regex": r"layers\.7\.q"}, r"freeze_parameters_regex: 'layers.*' is found in no parameter's name; "
         r"the nearest are layers, model.layers.1"),
        ({"freeze_parameters_regex": "qproj"}, "'qproj' is found in no parameter's name; the nearest are q_proj"),
        ({"freeze_parameters_regex": "zzz"}, "'zzz' is found in no parameter's name; names are like model.embed_tokens.weight"),
        ({"trainable_parameters": ("model.norm",)}, "trainable_parameters: names nothing that is frozen, wants freeze_param"),
        ({"trainable_parameters_regex": "q_proj("}, r"trainable_parameters_regex: 'q_proj\(' is not a regex"),
        ({"freeze_parameters_ratio": 1.0}, "freeze_parameters: has every parameter, wants some left to train"),
        ({"freeze_parameters_regex": "."}, "freeze_parameters: has every parameter, wants some left to train"),
    ],
)  # fmt: skip
def test_what_cannot_be(keys, message):
    with pytest.raises(ValueError, match=message):
        trained(**keys)
    with pytest.raises(ValueError, match=r"is given with tuner_type lora, wants tuner_type full: .* modules_to_save"):
        frozen(TunerConfig("lora", **keys), SHAPES)


def test_a_prefix_that_ends_within_a_number():
    def found(**keys):
        return ambiguous_prefixes(TunerConfig("full", **keys), SHAPES)

    assert found(freeze_parameters=("model.layers.1", "model.layers.0"), trainable_parameters=("model.layers.12",)) == [
        "model.layers.1"
    ]
    assert found(trainable_parameters=("model.layers.1.",)) == []


def test_a_partly_frozen_model(tmp_path):
    """Frozen weights lie in the compute dtype and get no gradient; the others have those of the model that trains all of it;
    what lies below keeps no activation; the checkpoint has every tensor."""
    config = ModelConfig.from_hf(FAMILIES["llama"].to_dict())
    keys = {"freeze_parameters": ("model.embed_tokens", "model.layers.0.", "lm_head")}

    def make(tuner, **more):
        return Model(config, Mesh.single(), tuner=tuner, seed=5, **more)

    whole, part = make(TunerConfig("full")), make(TunerConfig("full", **keys))
    batch, dy, grads = pack(9, 3), torch.randn(12, 97), []
    for model in (whole, part):
        logits = model.logits(model(*batch))
        logits.backward(dy)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, p in part.named_parameters():
        held = name.startswith(keys["freeze_parameters"])
        assert p.requires_grad == (grads[1][name] is not None) == (not held), name
        assert held or torch.equal(grads[1][name], grads[0][name]), name

    bf16 = make(TunerConfig("full", **keys), compute_dtype=torch.bfloat16)
    dtypes = {p.dtype: p.requires_grad for p in bf16.parameters()}
    assert dtypes == {torch.bfloat16: False, torch.float32: True}
    save_checkpoint(bf16, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == bf16.specs.keys()

    kept = []
    for frozen_layers in (0, 1, 2):
        below = tuple(f"model.layers.{i}." for i in range(frozen_layers))
        for recompute in ("none", "selective", "full"):
            model = make(TunerConfig("full", freeze_parameters=("model.embed_tokens", *below)), recompute=recompute)
            with Held() as memory:
                hidden = model(*batch)
            kept.append(memory.bytes())
            del hidden
    for some, fewer in zip(kept[:6], kept[3:], strict=True):
        assert fewer < some
    assert kept[0] - kept[3] == pytest.approx(kept[3] - kept[6], rel=0.02)  # a block's activations each

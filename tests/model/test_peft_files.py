"""Adapters to PEFT and back over the same transformers model, and every way in which an adapter can be wrong."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from swiftk.config import TunerConfig
from swiftk.model import Model, ModelConfig, load_adapter, load_checkpoint, read_adapter_config, save_adapter
from swiftk.model.peft_files import CONFIG, WEIGHTS
from swiftk.parallel.mesh import Mesh
from tests.model.families import make_ours, make_theirs, pack, stir

# family, settings: every family; rsLoRA, DoRA; the embedding and the head, tied and not; what is trained whole
CASES = {
    "llama": ("llama", {}),
    "mistral-rslora": ("mistral", {"use_rslora": True}),
    "bias-dora": ("llama-bias-yarn", {"use_dora": True}),
    "qwen3-dora-rslora": ("qwen3", {"use_dora": True, "use_rslora": True, "target_modules": ("q_proj", "v_proj", "down_proj")}),
    "embedding-and-head": ("llama", {"target_modules": ("all-linear", "embed_tokens", "lm_head")}),
    "tied-embedding-and-head": ("qwen2", {"target_modules": (r".*\.[01]\..*_proj", "embed_tokens", "lm_head")}),
    "head-dora": ("llama", {"target_modules": ("lm_head", "o_proj"), "use_dora": True}),
    "whole-head-and-norms": ("llama", {"modules_to_save": ("lm_head", "model.norm", "layers.1.mlp.gate_proj")}),
    "whole-embedding": ("mistral", {"modules_to_save": ("embed_tokens",)}),
    "whole-tied-embedding": ("qwen3", {"modules_to_save": ("embed_tokens",), "target_modules": ("v_proj",)}),
    "one-linear": ("llama", {"target_modules": ("model.layers.1.self_attn.k_proj",)}),
}  # fmt: skip


def tuner(**changes) -> TunerConfig:
    return TunerConfig(**{"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 6, **changes})


def logits_of(model, ids):
    model.eval()
    with torch.no_grad():
        if isinstance(model, Model):
            return model.logits(model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)))
        return model(ids[None]).logits[0]


def peft_over(theirs, directory):
    """PEFT's model; a warning of a key that is missing or left over is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected|not initialized).*")
        return peft.PeftModel.from_pretrained(theirs, directory)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(case, tmp_path):
    family, settings = CASES[case]
    ours, theirs = make_ours(family, tmp_path / "base", tuner=tuner(**settings))
    ids = pack(19)[0]
    before = logits_of(ours, ids)
    assert torch.allclose(before, logits_of(theirs, ids), atol=1e-5)  # B is zero and DoRA's magnitude the norm
    stir(ours)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad and name.endswith(".weight"):
                p.add_(torch.randn_like(p), alpha=0.05)
    save_adapter(ours, tmp_path / "adapter", str(tmp_path / "base"))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    mine = logits_of(ours, ids)
    assert (mine - before).abs().max() > 1e-2 * before.abs().max()  # there is something to see
    want = logits_of(peft_over(theirs, tmp_path / "adapter"), ids)
    assert (mine - want).abs().max() <= 1e-5 * want.abs().max()

    # and back
    again = Model(ours.config, Mesh.single(), seed=None, tuner=read_adapter_config(tmp_path / "adapter")[0])
    load_checkpoint(again, tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, ids), mine)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, again)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("qwen3", {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
        ("qwen2", {"target_modules": r".*\.layers\.[02]\..*(q|down)_proj", "use_dora": True}),
        ("mistral", {"target_modules": ["o_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
        ("qwen3", {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_we_load_what_peft_writes(family, settings, tmp_path):
    theirs = make_theirs(family)
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, lora_dropout=0.1, **settings)
    adapted = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    found, _ = read_adapter_config(tmp_path / "adapter")
    assert (found.lora_rank, found.lora_alpha, found.lora_dropout) == (3, 5, 0.1)
    ours = Model(ModelConfig.from_hf(tmp_path / "base"), Mesh.single(), seed=None, tuner=found)
    load_checkpoint(ours, tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    ids = pack(19)[0]
    want = logits_of(adapted, ids)
    assert (logits_of(ours, ids) - want).abs().max() <= 1e-5 * want.abs().max()


def test_names_that_peft_would_find_elsewhere_are_written_in_full(tmp_path):
    """PEFT compares the ends of names: "norm" would be every norm, "k_proj" every layer's."""
    settings = {"modules_to_save": ("norm",), "target_modules": ("layers.1.self_attn.k_proj", "up_proj", "lm_head")}
    ours, _ = make_ours("llama", tmp_path / "base", tuner=tuner(**settings))
    save_adapter(ours, tmp_path, "base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["modules_to_save"] == ["model.norm"]
    assert config["target_modules"] == ["lm_head", "model.layers.1.self_attn.k_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "base" and config["r"] == 4 and config["lora_alpha"] == 6


def written(tmp_path, family="llama", **settings):
    ours, theirs = make_ours(family, tmp_path / "base", tuner=tuner(**settings))
    stir(ours)
    save_adapter(ours, tmp_path / "adapter", str(tmp_path / "base"))
    return ours, theirs, tmp_path / "adapter"


def test_an_adapter_of_another_base_lists_what_differs(tmp_path):
    _, _, adapter = written(tmp_path)
    small = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    other = Model(ModelConfig.from_hf(small.to_dict()), Mesh.single(), tuner=tuner())
    with pytest.raises(ValueError) as error:
        load_adapter(other, adapter)
    text = str(error.value)
    assert text.startswith(f"load_adapter: {adapter} does not fit the model: ")
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight has shape (48, 4), wants (40, 4)" in text
    assert "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight is not in the model" in text
    assert "lora_A" not in text.split("layers.2")[0].replace("down_proj.lora_A", "")  # what fits is not listed


def test_a_half_written_adapter(tmp_path):
    ours, _, adapter = written(tmp_path)
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is truncated or not a safetensors file"):
        load_adapter(ours, adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"there is no .*{WEIGHTS}: the adapter is half-written"):
        load_adapter(ours, adapter)
    (adapter / WEIGHTS).write_bytes(whole)
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="is missing, wants shape") as error:
        load_adapter(ours, adapter)
    assert f"{name} has NaN or infinity" in str(error.value)
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text[:40])
    with pytest.raises(ValueError, match=rf"{CONFIG} is not a JSON object .*half-written or damaged"):
        read_adapter_config(adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(ValueError, match=rf"there is no .*{CONFIG}"):
        read_adapter_config(adapter)


def test_a_rank_that_differs_between_settings_and_tensors(tmp_path):
    ours, _, adapter = written(tmp_path)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"r": 2}))
    other = Model(ours.config, Mesh.single(), tuner=read_adapter_config(adapter)[0])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.weight has shape \(4, 32\), wants \(2, 32\)"):
        load_adapter(other, adapter)


def test_an_adapter_of_another_vocabulary(tmp_path):
    _, _, adapter = written(tmp_path, target_modules=("q_proj", "embed_tokens", "lm_head"))
    config = ModelConfig.from_hf({**ModelConfig.from_hf(tmp_path / "base").to_hf(), "vocab_size": 101})
    with pytest.raises(ValueError, match=r"embed_tokens\.lora_embedding_A has shape \(4, 97\), wants \(4, 101\)"):
        load_adapter(Model(config, Mesh.single(), tuner=read_adapter_config(adapter)[0]), adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type has 'IA3', wants 'LORA'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern has {'q_proj': 2}, wants it off"),
        ({"layers_to_transform": [1]}, r"layers_to_transform has \[1\], wants it off"),
        ({"bias": "all"}, "bias has 'all', wants it off"),
        ({"something_new": 1}, "something_new has 1, wants it off"),
        ({"r": 0}, "r has 0, wants an integer of at least 1"),
        ({"r": "four"}, "r has 'four', wants an integer of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha has 0, wants a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha has '8', wants a number above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout has 1\.0, wants 0 <= x < 1"),
        ({"use_dora": "yes"}, "use_dora has 'yes', wants true or false"),
        ({"target_modules": 7}, "cannot be read"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights has 'pissa_niter_4': it belongs to what that init"),
        ({"init_lora_weights": "olora"}, "init_lora_weights has 'olora': it belongs to what that init"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(change, message, tmp_path):
    _, _, adapter = written(tmp_path)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        read_adapter_config(adapter)


def test_embeddings_trained_apart_from_the_tied_head_are_refused(tmp_path):
    ours, _, adapter = written(tmp_path, "qwen3", modules_to_save=("embed_tokens",), target_modules=("v_proj",))
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"ensure_weight_tying": False}))
    with pytest.raises(ValueError, match="ensure_weight_tying has False, wants True"):
        load_adapter(ours, adapter)

"""Checkpoints: to transformers and back, tied both ways, and every way in which a directory can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swiftk.model import Model, ModelConfig, load_checkpoint, save_checkpoint
from swiftk.parallel.mesh import Mesh
from tests.model.families import FAMILIES, make_ours, pack

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def make(family="qwen3", **options) -> Model:
    return Model(ModelConfig.from_hf(FAMILIES[family].to_dict()), Mesh.single(), **options)


def edit(directory, change):
    """Rewrites model.safetensors with `change` applied to its dict."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shards", [20_000, 10**9])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family, shards, tmp_path):
    ours, theirs = make_ours(family, tmp_path / "theirs")
    save_checkpoint(ours, tmp_path / "ours", max_shard_size=shards)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids = pack(11)[0]
    assert torch.equal(again(ids[None]).logits, theirs(ids[None]).logits)
    assert (shards == 10**9) == (tmp_path / "ours/model.safetensors").is_file()
    assert not list((tmp_path / "ours").glob("*.tmp"))
    (tmp_path / "plain").touch()
    modes = {p.stat().st_mode for p in [tmp_path / "plain", *(tmp_path / "ours").iterdir()]}
    assert len(modes) == 1, modes  # 0666 less the umask: other users may read it
    for file in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            sizes = [4 * torch.Size(f.get_slice(name).get_shape()).numel() for name in f.keys()]  # noqa: SIM118
        assert sum(sizes) <= shards or len(sizes) == 1


def test_bf16_round_trip_keeps_the_compute_weights(tmp_path):
    model = make(compute_dtype=torch.bfloat16)
    save_checkpoint(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = make(compute_dtype=torch.bfloat16, seed=None)
    load_checkpoint(again, tmp_path)
    batch = pack(9, 4)
    assert torch.equal(again(*batch), model(*batch))
    assert again.model.norm.weight.dtype == torch.float32
    save_checkpoint(model, tmp_path, dtype=torch.float32)
    load_checkpoint(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_saving_again_leaves_no_stale_files(tmp_path):
    model = make()
    save_checkpoint(model, tmp_path, max_shard_size=20_000)
    save_checkpoint(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    save_checkpoint(model, tmp_path, max_shard_size=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    load_checkpoint(make(seed=None), tmp_path)


def test_tied_embeddings_may_be_stored_under_either_name_or_both(tmp_path):
    model = make("qwen2")
    save_checkpoint(model, tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    for change in (
        lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
        lambda t: t.pop(EMBEDDING),
    ):
        edit(tmp_path, change)
        again = make("qwen2", seed=None)
        load_checkpoint(again, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    edit(tmp_path, lambda t: t.update({EMBEDDING: t[HEAD] + 1}))
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}, wants it equal or absent"):
        load_checkpoint(make("qwen2", seed=None), tmp_path)


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path):
    save_checkpoint(make("llama"), tmp_path)

    def break_it(tensors):
        tensors[NORM] = torch.ones(31)
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old checkpoints; computed here
        del tensors[HEAD]

    edit(tmp_path, break_it)
    with pytest.raises(ValueError) as error:
        load_checkpoint(make("llama", seed=None), tmp_path)
    lines = str(error.value).splitlines()
    head, _, first = lines[0].partition(" does not fit the model: ")  # one problem is one line
    assert head.startswith("load_checkpoint: ")
    assert sorted([first, *(line.strip() for line in lines[1:])]) == [
        "lm_head.weight is missing, wants shape (97, 32) (the checkpoint ties it: set tie_word_embeddings)",
        "model.layers.0.mlp.up_proj.weight has dtype I8, wants one of BF16, F16, F32, F64 (is it quantised?)",
        "model.layers.3.mlp.up_proj.weight is not a parameter of the model, wants it absent",
        "model.norm.weight has shape (31,), wants (32,)",
    ]


def test_broken_files(tmp_path):
    save_checkpoint(make(), tmp_path, max_shard_size=20_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{first.name} is truncated or not a safetensors file \({len(whole) - 100:,} bytes"):
        load_checkpoint(make(seed=None), tmp_path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=rf"{first.name} has no .*, model.safetensors.index.json says that it has"):
        load_checkpoint(make(seed=None), tmp_path)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing, model.safetensors.index.json names it"):
        load_checkpoint(make(seed=None), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="has no readable weight_map"):
        load_checkpoint(make(seed=None), tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has .*pytorch_model.bin, wants model.safetensors or model.safetensors.index.json"):
        load_checkpoint(make(seed=None), tmp_path)

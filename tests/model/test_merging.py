"""Merged checkpoints against peft's merge_and_unload, and against the unmerged model's logits; killed, damaged, refused."""

from __future__ import annotations

import json

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from swiftk import merge
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.model import Model, ModelConfig, load_checkpoint, merging, save_adapter
from swiftk.model.adapter import EMBED, linear_shapes
from swiftk.model.merging import check_bytes, check_logits, merge_adapter, table
from swiftk.model.peft_files import CONFIG, WEIGHTS
from swiftk.parallel.mesh import Mesh
from tests.model.families import make_ours, pack, stir
from tests.model.test_peft_files import logits_of, peft_over, tuner
from tests.model.test_quantised import bnb_checkpoint

CASES = {
    "llama": ("llama", {}),
    "rslora": ("mistral", {"use_rslora": True}),
    "bias-dora": ("llama-bias-yarn", {"use_dora": True}),
    "dora-rslora": ("qwen3", {"use_dora": True, "use_rslora": True, "target_modules": ("q_proj", "v_proj", "down_proj")}),
    "embedding-and-head": ("llama", {"target_modules": ("all-linear", "embed_tokens", "lm_head")}),
    "head-dora": ("llama", {"target_modules": ("lm_head", "o_proj"), "use_dora": True}),
    "whole": ("llama-bias-yarn", {"modules_to_save": ("lm_head", "model.norm", "layers.1.mlp.gate_proj")}),
    "whole-tied": ("qwen3", {"modules_to_save": ("embed_tokens",), "target_modules": ("v_proj",)}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(merging, "ELEMENTS", 500)  # several pieces of a weight, the last one short


def made(tmp_path, family="llama", dtype=torch.float32, **settings):
    """A base and an adapter with something in it; transformers' model of the base."""
    torch.manual_seed(0)
    ours, theirs = make_ours(family, tmp_path / "base", dtype, tuner=tuner(**settings))
    stir(ours)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad and name.endswith((".weight", ".bias")):
                p.add_(torch.randn_like(p), alpha=0.05)
    save_adapter(ours, tmp_path / "adapter", str(tmp_path / "base"))
    return ours, theirs


def weights(directory):
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def transformers_of(directory):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case, tmp_path):
    family, settings = CASES[case]
    ours, theirs = made(tmp_path, family, **settings)
    merged = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", max_shard_size=20_000)
    want = peft_over(theirs, tmp_path / "adapter").merge_and_unload().state_dict()
    have = weights(tmp_path / "out")
    assert not merged.untied and have.keys() == want.keys() - ({"lm_head.weight"} if family == "qwen3" else set())
    for name, value in have.items():
        assert (value - want[name]).abs().max() <= 1e-6 * want[name].abs().max(), name
    changed = {layer.name for layer in merged.layers}
    base = weights(tmp_path / "base")
    assert changed == {name for name in have if not torch.equal(have[name], base[name])}
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    ids = pack(19)[0]
    mine = logits_of(transformers_of(tmp_path / "out"), ids)
    assert (mine - logits_of(ours, ids)).abs().max() <= 1e-5 * mine.abs().max()


def test_an_adapter_of_one_of_two_tied_embeddings_unties_them(tmp_path):
    _, theirs = made(tmp_path, "qwen2", target_modules=(r".*\.[01]\..*_proj", "embed_tokens", "lm_head"))
    assert merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").untied
    ids = pack(19)[0]
    want = logits_of(peft_over(theirs, tmp_path / "adapter"), ids)
    found = transformers_of(tmp_path / "out")
    assert found.config.tie_word_embeddings is False
    assert (logits_of(found, ids) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_nf4(dtype, tmp_path):
    """Linears of the blocks, with an adapter or without, are bf16(NF4(W)) plus the delta, except what is trained whole."""
    settings = {"target_modules": ("q_proj", "embed_tokens"), "modules_to_save": ("layers.1.mlp.gate_proj",)}
    made(tmp_path, "llama", dtype, **settings)
    done = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", onto="nf4")
    base, have, adapter = weights(tmp_path / "base"), weights(tmp_path / "out"), load_file(tmp_path / "adapter" / WEIGHTS)
    layers = {layer.name: layer for layer in done.layers}
    for module in linear_shapes(ModelConfig.from_hf(tmp_path / "base")):
        name, prefix = f"{module}.weight", f"base_model.model.{module}"
        want = nf4_dequantize(nf4_quantize(base[name])).float()
        assert have[name].dtype == dtype and not torch.equal(want, base[name].float())
        if module == "model.layers.1.mlp.gate_proj":
            want = adapter[f"{prefix}.weight"]
            assert layers[name].nf4_error is None
        if module.endswith("q_proj"):
            error = (base[name].float() - want).double().norm()
            delta = 6 / 4 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
            full = want + delta
            rounding = (full.to(dtype).float() - full).double().norm()
            numbers = torch.tensor(layers[name][1:], dtype=torch.float64)
            norms = torch.stack([want.double().norm(), delta.double().norm(), rounding, error])
            assert torch.allclose(numbers, norms, rtol=1e-3)
            want = full
        else:
            assert name == "model.layers.1.mlp.gate_proj.weight" or name not in layers
        bound = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert (have[name].double() - want.double()).abs().max() <= bound * want.abs().max()
    for name in base.keys() - {f"{m}.weight" for m in linear_shapes(ModelConfig.from_hf(tmp_path / "base"))}:
        assert torch.equal(have[name], base[name]) == (name != f"{EMBED}.weight"), name
    assert any("trained in 16 or 32 bits wants --base source" in line for line in table(done))


@pytest.mark.parametrize("double", [False, True])
def test_onto_a_base_in_nf4(double, tmp_path):
    """A plain checkpoint in bf16 of what bitsandbytes holds, with the adapter; peft merges into the same."""
    theirs = bnb_checkpoint(tmp_path, double)
    config = ModelConfig.from_hf(tmp_path / "nf4")
    ours = Model(config, Mesh.single(), seed=None, tuner=tuner(quant_bits=4, target_modules=("q_proj", "down_proj", "lm_head")))
    load_checkpoint(ours, tmp_path / "nf4")
    stir(ours)
    save_adapter(ours, tmp_path / "adapter", str(tmp_path / "nf4"))
    done = merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out")
    assert done.onto == "nf4" and done.dtypes == ("bfloat16",) and all(layer.nf4_error is None for layer in done.layers)
    found = transformers_of(tmp_path / "out")
    assert found.dtype == torch.bfloat16 and not getattr(found.config, "quantization_config", None)
    have, adapter = weights(tmp_path / "out"), load_file(tmp_path / "adapter" / WEIGHTS)
    for module in linear_shapes(config):
        stored = theirs.get_submodule(module).weight
        want = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state).float()
        if module in ours.tuning.adapted:
            a, b = (adapter[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
            want = want + 6 / 4 * b @ a
        assert (have[f"{module}.weight"].float() - want).abs().max() <= 2**-7 * want.abs().max(), module
    check = check_logits(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out", documents=2, length=16)
    assert 0 < check.difference < 0.02 * check.logit and check.adapter > 10 * check.difference
    merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "fp32", dtype=torch.float32)
    exact = check_logits(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "fp32", documents=2, length=16)
    assert exact.difference <= 1e-5 * exact.logit
    with pytest.raises(ValueError, match=r"merge: onto has 'source', wants 'nf4': .*nf4 is stored in NF4"):
        merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "again", onto="source")


def test_the_command_says_what_an_adapter_was_trained_over(tmp_path, capsys):
    made(tmp_path)
    command = ["--adapters", str(tmp_path / "adapter"), "--check_logits", "false"]

    def said(name, *more, **arguments):
        (tmp_path / "adapter" / "args.json").write_text(json.dumps({"arguments": arguments}))
        assert merge.main([*command, "--output_dir", str(tmp_path / name), *more]) == 0
        return capsys.readouterr().out

    assert "careful: the adapter was trained over NF4 and is merged onto the source" in said("one", quant_bits=4)
    assert "careful" not in said("two", quant_bits=None) + said("three", "--base", "nf4", quant_bits=4)
    (tmp_path / "other").symlink_to(tmp_path / "base")
    assert "as its base, and is merged onto" in said("elsewhere", "--model", str(tmp_path / "other"), quant_bits=None)
    for name, base in (("four", []), ("five", ["--base", "nf4"])):
        text = said(name, *base, quant_bits=4, init_weights="pissa_niter_4")
        assert "careful: the adapter was trained by PiSSA over NF4, of weights that no --base has" in text
    (tmp_path / "adapter" / "args.json").write_text("{")
    assert merge.main([*command, "--output_dir", str(tmp_path / "six")]) == 1
    assert "args.json is damaged" in capsys.readouterr().err


def test_logits_of_merged_and_unmerged(tmp_path):
    """In fp32 they agree; on the wrong base, and after rounding to bf16, the check sees it."""
    made(tmp_path, use_dora=True)
    paths = tmp_path / "base", tmp_path / "adapter"
    few = {"documents": 2, "length": 16}
    merge_adapter(*paths, tmp_path / "nf4", onto="nf4")
    check = check_logits(*paths, tmp_path / "nf4", onto="nf4", **few)
    assert check.difference <= 1e-5 * check.logit and check.same_top == 1 and check.tokens == 32
    assert check.adapter > 1e-2 * check.logit
    wrong = check_logits(*paths, tmp_path / "nf4", onto="source", **few)
    merge_adapter(*paths, tmp_path / "bf16", dtype=torch.bfloat16)
    rounded = check_logits(*paths, tmp_path / "bf16", **few)
    assert wrong.difference > 10 * rounded.difference > 100 * check.difference


def test_dtypes(tmp_path):
    """Without a dtype each tensor keeps its own; it is rounded once; what overflows it is an error, and nothing is left."""
    made(tmp_path)
    base = weights(tmp_path / "base")
    for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / name, dtype=dtype)
    narrow = weights(tmp_path / "narrow")
    assert all(torch.equal(t.bfloat16(), narrow[n]) for n, t in weights(tmp_path / "wide").items())
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    mixed = {n: t.bfloat16() if "proj" in n else t.double() if "embed" in n else t for n, t in base.items()}
    save_file(mixed, tmp_path / "base" / "model.safetensors")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {n: t.dtype for n, t in weights(tmp_path / "out").items()} == {n: t.dtype for n, t in mixed.items()}
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    offsets = {n: entry["data_offsets"][0] for n, entry in json.loads(raw[8 : 8 + size]).items() if n != "__metadata__"}
    assert size % 8 == 0 and all(offset % mixed[n].element_size() == 0 for n, offset in offsets.items())  # as readers map them
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype=torch.float16)
    assert transformers_of(tmp_path / "half").dtype == torch.float16
    mixed["model.layers.2.mlp.up_proj.weight"][-1, 0] = 1e6
    save_file(mixed, tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.up_proj\.weight has values that are not finite in torch\.float16, rows"
    ):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", dtype=torch.float16)
    assert not (tmp_path / "again").exists() and not (tmp_path / ".again.merging").exists()


def test_a_killed_merge_leaves_nothing_half(tmp_path, monkeypatch):
    made(tmp_path)
    said = []

    def say(line):
        said.append(line)
        if len(said) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:  # kill -9 cleans nothing up
        killed.setattr(merging.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", max_shard_size=20_000, say=say)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.merging").iterdir())) == 2
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / ".out.merging").exists()
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    with pytest.raises(ValueError, match="out is there already, wants it absent or empty"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_bad_input(tmp_path):
    made(tmp_path)
    good = load_file(tmp_path / "adapter" / WEIGHTS)

    def refused(tensors, message):
        save_file(tensors, tmp_path / "adapter" / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))

    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    refused({n: t for n, t in good.items() if n != name}, "k_proj.lora_B.weight is missing, wants shape")
    refused(good | {name: torch.zeros(5, 4)}, r"k_proj.lora_B.weight has shape \(5, 4\), wants \(16, 4\)")
    refused(good | {name: good[name] * float("inf")}, "k_proj.lora_B.weight has NaN or infinity")
    save_file(good, tmp_path / "adapter" / WEIGHTS)
    made_of_nan = {n: t.clone() for n, t in weights(tmp_path / "base").items()}
    made_of_nan["model.layers.0.mlp.up_proj.weight"][7, 3] = float("nan")
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    save_file(made_of_nan, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"merge: model\.layers\.0\.mlp\.up_proj\.weight cannot be quantised: row 7, "):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", onto="nf4")
    del made_of_nan["model.norm.weight"]
    save_file(made_of_nan, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_command(tmp_path, capsys):
    """The base is the one that the adapter names; the adapter's tokenizer wins; the numbers are printed."""
    made(tmp_path)
    for folder in ("base", "adapter"):
        (tmp_path / folder / "tokenizer_config.json").write_text(f'"{folder}"')
    (tmp_path / "base" / "merges.txt").write_text("a b")
    (tmp_path / "base" / "manifest.json").write_text("{}")
    out = tmp_path / "deep" / "out"
    command = ["--adapters", str(tmp_path / "adapter"), "--output_dir", str(out), "--dtype", "bfloat16"]
    assert merge.main(command) == 0
    names = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer_config.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert (out / "tokenizer_config.json").read_text() == '"adapter"'
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    text = capsys.readouterr().out
    assert "model.layers.2.mlp.down_proj.weight " in text and "|delta|" in text
    assert f"merged onto {tmp_path / 'base'}: its weights as stored; {out} holds bfloat16" in text
    assert "trained over NF4 (QLoRA) wants --base nf4" in text
    size = 4 * sum(t.numel() for t in weights(out).values()) / 2**30
    assert f"comparing logits: holds the model in fp32, {size:.2f} GiB" in text and check_bytes(out) == size * 2**30
    assert "largest |logit difference| merged vs unmerged: " in text and "careful" not in text
    load_checkpoint(Model(ModelConfig.from_hf(out), Mesh.single(), seed=None), out)

    assert merge.main(command) == 1
    assert capsys.readouterr().err.startswith(f"swiftk.merge: merge: output {out} is there already")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert merge.main(command) == 1
    assert "names no base, wants --model BASE" in capsys.readouterr().err

"""NF4 bases: quantised while they are read, taken over from bitsandbytes' checkpoints, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from swiftk.config import TunerConfig
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.model import Model, ModelConfig, checkpoint, load_checkpoint
from swiftk.parallel.mesh import Mesh
from swiftk.parallel.spec import ParamSpec
from tests.model.families import FAMILIES, make_theirs, pack

QLORA = TunerConfig(tuner_type="lora", lora_rank=4, quant_method="bnb", quant_bits=4)
UP = "model.layers.1.mlp.up_proj.weight"


def load(directory, dtype=torch.float32, tuner=QLORA) -> Model:
    model = Model(ModelConfig.from_hf(directory), Mesh.single(), compute_dtype=dtype, seed=None, tuner=tuner)
    load_checkpoint(model, directory)
    return model


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_loading_quantises_each_linear_of_the_blocks(rows, tmp_path, monkeypatch):
    """In pieces of any size, with the result of the whole; embeddings, norms, biases and the head stay."""
    theirs = make_theirs("llama-bias-yarn", torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "PIECE_ELEMENTS", 48 * rows)
    model = load(tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = dict(model.named_parameters())
    assert len(model.tuning.quantised) == 21
    for name, value in tensors.items():
        if name.removesuffix(".weight") not in model.tuning.quantised:
            assert torch.equal(kept[name], value), name
            continue
        got, want = model.get_submodule(name.removesuffix(".weight")).base, nf4_quantize(value)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.absmax, want.absmax), name
        assert got.absmax.dtype == torch.bfloat16 and name not in kept


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_quantises_its_part_only(dim, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_ELEMENTS", 3 * 256)
    value = torch.randn(20, 256)
    for rank in range(2):
        spec = ParamSpec.split("w", value.shape, dim, rank, 2)
        got, want = checkpoint.quantise(value, spec), nf4_quantize(value[tuple(slice(*s) for s in spec.slices)])
        assert torch.equal(got.codes, want.codes) and torch.equal(got.absmax, want.absmax) and got.shape == want.shape


def test_a_source_in_fp16_counts_as_fp32(tmp_path):
    """Its absmax is exact in fp32, and would be rounded in bf16."""
    make_theirs("llama", torch.float16).save_pretrained(tmp_path)
    got = load(tmp_path).get_submodule(UP.removesuffix(".weight")).base
    want = nf4_quantize(load_file(tmp_path / "model.safetensors")[UP].float())
    assert torch.equal(got.codes, want.codes) and torch.equal(got.absmax, want.absmax) and got.absmax.dtype == torch.float32


def bnb_checkpoint(tmp_path: Path, double: bool) -> torch.nn.Module:
    """A checkpoint that transformers and bitsandbytes quantised and saved; their model, whose weights it holds."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, device_map="cpu")
    quantised.save_pretrained(tmp_path / "nf4")
    return quantised


@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_of_bitsandbytes_loads_exactly(double, tmp_path):
    theirs = bnb_checkpoint(tmp_path, double)
    assert ModelConfig.from_hf(tmp_path / "nf4").quantised and not ModelConfig.from_hf(tmp_path / "plain").quantised
    ours = load(tmp_path / "nf4")
    for name in ours.tuning.quantised:
        weight = theirs.get_submodule(name).weight
        want = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        got = nf4_dequantize(ours.get_submodule(name).base).float()
        assert (got - want).abs().max() <= 2**-8 * want.abs().max(), name  # bf16's rounding; equality is test_nf4's
        assert (got != want).float().mean() < 0.02, name
    ids = pack(11)[0]
    mine = ours.logits(ours(ids, torch.arange(11), torch.tensor([0, 11], dtype=torch.int32)))
    assert torch.allclose(mine, theirs(ids[None]).logits[0].float(), atol=0.02 * mine.abs().max().item())


def test_settings_that_contradict_the_checkpoint(tmp_path):
    bnb_checkpoint(tmp_path, False)
    with pytest.raises(ValueError, match=f"{UP} is NF4, wants it in 16 or 32 bits"):
        load(tmp_path / "nf4", tuner=TunerConfig(tuner_type="lora", lora_rank=4))
    with pytest.raises(ValueError, match=f"{UP} is NF4, wants it in 16 or 32 bits"):
        load(tmp_path / "nf4", tuner=TunerConfig(tuner_type="lora", quant_bits=4, lora_rank=4, modules_to_save=("up_proj",)))
    text = (tmp_path / "nf4" / "config.json").read_text()
    (tmp_path / "nf4" / "config.json").write_text(text.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match=rf"{UP} has shape \(128, 64\), wants \(96, 64\)"):
        load(tmp_path / "nf4")
    (tmp_path / "nf4" / "config.json").write_text(text.replace('"nf4"', '"fp4"'))
    with pytest.raises(ValueError, match=r"quantization_config has .*type fp4, .*; wants bitsandbytes, 4 bits, nf4"):
        load(tmp_path / "nf4")
    raw = json.loads(text)
    raw["quantization_config"] |= {"load_in_8bit": True, "_load_in_8bit": True}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"quantization_config has .*bits 8, .*; wants bitsandbytes, 4 bits, nf4"):
        load(tmp_path / "nf4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "has quant_method gptq, bits 4; wants bitsandbytes"),
        ({"quant_method": "awq", "bits": 4}, "has quant_method awq, bits 4; wants"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "has quant_method fp8; wants .* the plain checkpoint"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "has quant_method bitsandbytes, bits 8, "),
    ],
)
def test_other_kinds_of_quantisation(given, message):
    with pytest.raises(ValueError, match=f"quantization_config {message}"):
        ModelConfig.from_hf({**FAMILIES["llama"].to_dict(), "quantization_config": given})


def test_weights_that_cannot_be_quantised_are_named(tmp_path, monkeypatch):
    make_theirs("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "PIECE_ELEMENTS", 32 * 7)  # rows at a time: the weight's own is named
    edit(tmp_path, lambda t: (t[UP].__setitem__((40, 31), float("nan")), t.pop("model.layers.0.self_attn.o_proj.weight")))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    text = str(error.value)
    assert f"{UP} cannot be taken: row 40, block 0 has NaN or infinity, wants finite values" in text
    assert "model.layers.0.self_attn.o_proj.weight is missing, wants shape (32, 32)" in text


MEASURE = """
import sys, torch
from pathlib import Path
from swiftk.config import TunerConfig
from swiftk.model import Model, ModelConfig, load_checkpoint
from swiftk.parallel.mesh import Mesh

def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024

def load(directory, tuner):
    model = Model(ModelConfig.from_hf(directory), Mesh.single(), compute_dtype=torch.bfloat16, seed=None, tuner=tuner)
    load_checkpoint(model, directory)
    return model

torch.set_num_threads(1)
tuner = TunerConfig(tuner_type="lora", quant_method="bnb", quant_bits=4)
load(sys.argv[1], tuner)  # what is imported and started by the first load is not counted
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = load(sys.argv[2], tuner)
held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 2**20
print(held, status("VmHWM") - before)
"""


def test_peak_memory_of_loading_is_that_of_the_quantised_weights(tmp_path):
    """Real resident memory, page cache of the mapped file included: within 28 MiB of what stays, for 192 MiB of weights that
    are quantised and an embedding of 98 that is not."""
    shape = dict(num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=True)
    for name, hidden, inner, layers, vocab in (("small", 64, 64, 1, 64), ("large", 1024, 4096, 6, 50_000)):
        config = ModelConfig("llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                             head_dim=hidden // 8, vocab_size=vocab, **shape)  # fmt: skip
        specs = Model(config, Mesh.single(), seed=None).specs
        some = torch.randn(1 << 22).repeat(13).bfloat16()
        tensors = {n: some[: torch.Size(s.shape).numel()].view(s.shape).clone() for n, s in specs.items()}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_hf()))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    held, peak = map(float, out.stdout.split())
    assert 150 < held < 160 and peak < held + 28, (held, peak)

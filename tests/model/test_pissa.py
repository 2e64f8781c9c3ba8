"""PiSSA: its start against peft's, the adapter it is saved as, NF4 bases, ranks, and what it does not go together with."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import swiftk.model.pissa as pissa_of
from swiftk.kernels.nf4 import nf4_dequantize, nf4_quantize
from swiftk.model import Model, ModelConfig, load_adapter, load_checkpoint, read_adapter_config, save_adapter
from swiftk.model.adapter import resolve
from swiftk.model.merging import merge_adapter
from swiftk.model.parameters import random_start
from swiftk.model.peft_files import CONFIG
from swiftk.model.pissa import principal
from swiftk.parallel.comm import run_threads
from swiftk.parallel.mesh import Mesh
from tests.model.families import make_ours, make_theirs, pack, stir
from tests.model.test_adapter import config_of
from tests.model.test_peft_files import logits_of, peft_over, tuner

SOME = ("q_proj", "v_proj", "down_proj", "lm_head")


def pissa(init="pissa", **changes):
    return tuner(init_weights=init, target_modules=SOME, **changes)


def weights(directory):
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_starts_as_pefts(rslora, tmp_path):
    """A, B up to the sign of each direction, and the base that they leave; the logits are those of the checkpoint."""
    ours, theirs = make_ours("llama", tmp_path, tuner=pissa(use_rslora=rslora))
    ids = pack(19)[0]
    want = logits_of(theirs, ids)
    assert (logits_of(ours, ids) - want).abs().max() <= 1e-5 * want.abs().max()
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(SOME), init_lora_weights="pissa", use_rslora=rslora, task_type="CAUSAL_LM"
    )).base_model.model  # fmt: skip
    assert len(ours.pissa_start()) == 2 * len(ours.tuning.adapted) == 20
    for name in ours.tuning.adapted:
        mine, other = ours.get_submodule(name), adapted.get_submodule(name)
        a, b = other.lora_A.default.weight, other.lora_B.default.weight
        sign = torch.sign((mine.lora_A * a).sum(1))
        assert torch.allclose(mine.lora_A * sign[:, None], a, atol=1e-5) and torch.allclose(mine.lora_B * sign, b, atol=1e-5)
        assert torch.allclose(mine.weight, other.base_layer.weight, atol=1e-6), name
        assert not torch.allclose(mine.weight, weights(tmp_path)[f"{name}.weight"], atol=1e-2), name


def test_subspace_iteration_finds_the_leading_directions():
    """With singular values that fall by 0.7: off by more without rounds, by rounding alone with eight."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64))[0] for n in (90, 60))
    w = u * 0.7 ** torch.arange(40) @ v.t()
    a, b = principal(w, 4, 2.0, None, 0)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    error = []
    for rounds in (0, 1, 8):
        near = principal(w, 4, 2.0, random_start("m", 7, 12, 60), rounds)
        error.append(float((2 * near[1] @ near[0] - 2 * b @ a).norm()))
    best = 0.7**4 / (1 - 0.49) ** 0.5  # what rank 4 leaves
    assert abs((w - 2 * b @ a).norm() - best) < 1e-5
    assert error[0] > 1e-2 and error[0] > 10 * error[1] > 1e3 * error[2] and error[2] < 1e-8
    assert torch.equal(random_start("m", 7, 12, 60), random_start("m", 7, 12, 60))
    assert not torch.equal(random_start("m", 7, 12, 60), random_start("n", 7, 12, 60))


def test_first_values_follow_the_adapters_seed_and_nothing_else():
    """Not torch's generator; with the exact SVD not even the seed."""

    def made(init, seed, other):
        torch.manual_seed(other)
        model = Model(config_of("llama"), Mesh.single(), tuner=pissa(init), adapter_seed=seed)
        return {n: p for n, p in model.named_parameters() if ".lora_" in n or n.removesuffix(".weight") in model.tuning.adapted}

    one, same, differs = made("pissa_niter_2", 3, 0), made("pissa_niter_2", 3, 1), made("pissa_niter_2", 4, 0)
    assert len(one) == 30 and all(torch.equal(p, same[name]) for name, p in one.items())
    assert not any(torch.equal(p, differs[name]) for name, p in one.items())
    exact = made("pissa", 3, 0), made("pissa", 4, 1)
    assert all(torch.equal(p, exact[1][name]) for name, p in exact[0].items())


@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_saved_as_an_adapter_of_the_whole_weight(rslora, tmp_path):
    """Over the checkpoint, in peft, here, and merged: the logits of the model that was trained."""
    ours, theirs = make_ours("llama", tmp_path / "base", tuner=pissa("pissa_niter_4", use_rslora=rslora))
    stir(ours)
    save_adapter(ours, tmp_path / "adapter", str(tmp_path / "base"))
    ids = pack(19)[0]
    mine, plain = logits_of(ours, ids), logits_of(theirs, ids)
    assert (mine - plain).abs().max() > 1e-2 * plain.abs().max()
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True and config["use_rslora"] == rslora
    assert config["lora_alpha"] == pytest.approx(6 * 2**0.5 if rslora else 12)

    found, _ = read_adapter_config(tmp_path / "adapter")
    assert resolve(ours.config, found).scale == pytest.approx(ours.tuning.scale, rel=1e-15) and found.init_weights == "true"
    again = Model(ours.config, Mesh.single(), seed=None, tuner=found)
    load_checkpoint(again, tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = Model(ours.config, Mesh.single(), seed=None)
    load_checkpoint(merged, tmp_path / "merged")
    for other in (again, merged, peft_over(theirs, tmp_path / "adapter")):
        assert (logits_of(other, ids) - mine).abs().max() <= 1e-5 * mine.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_holds_what_it_leaves(dtype, tmp_path, monkeypatch):
    """It is taken out before the weight is quantised: base + adapter are nearer to the weight than its NF4 is."""
    make_theirs("llama", dtype).save_pretrained(tmp_path)
    config = ModelConfig.from_hf(tmp_path)

    def load(**options):
        made = Model(config, Mesh.single(), compute_dtype=dtype, seed=None, tuner=pissa(quant_bits=4))
        for name, t in made.pissa_start().items():
            t.copy_(options["start"][name] if options else torch.nan)
        load_checkpoint(made, tmp_path, started=bool(options))
        return made

    model = load()
    for name in model.tuning.adapted - {"lm_head"}:
        leaf, weight = model.get_submodule(name), weights(tmp_path)[f"{name}.weight"]
        product = model.tuning.scale * leaf.lora_B.double() @ leaf.lora_A.double()
        want = nf4_quantize((weight.double() - product).to(dtype))
        assert leaf.base.absmax.dtype == want.absmax.dtype == dtype
        assert (leaf.base.codes != want.codes).double().mean() < 0.02  # products that round differently
        both = nf4_dequantize(leaf.base).double() + product
        assert (both - weight).norm() < 0.95 * (nf4_dequantize(nf4_quantize(weight)).double() - weight).norm(), name
    with monkeypatch.context() as resumed:  # as a run that goes on makes it: without a second SVD
        resumed.setattr(pissa_of, "principal", None)
        again = load(start=model.pissa_start())
    for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert torch.equal(t, dict([*again.named_parameters(), *again.named_buffers()])[name]), name
    drawn = Model(config, Mesh.single(), compute_dtype=dtype, tuner=pissa(quant_bits=4))
    assert all(t.any() for t in drawn.pissa_start().values())


def test_one_rank_decomposes_for_all(monkeypatch):
    calls = []
    monkeypatch.setattr(pissa_of, "principal", lambda *args: (calls.append(1), principal(*args))[1])
    made = {}

    def rank(comm):
        made[comm.rank] = Model(config_of("llama"), Mesh.from_comm(comm), tuner=pissa())

    run_threads(2, rank)
    assert len(calls) == len(made[0].tuning.adapted)
    assert all(torch.equal(p, made[1].get_parameter(name)) for name, p in made[0].named_parameters())
    assert all(torch.equal(t, made[1].pissa_start()[name]) for name, t in made[0].pissa_start().items())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"init_weights": "pisa"}, "init_weights: has 'pisa', wants true, gaussian, pissa or pissa_niter_N"),
        ("llama", {"use_dora": True}, "init_weights: has pissa with use_dora, wants one of them"),
        ("llama", {"target_modules": ("embed_tokens",)}, "init_weights: has pissa, and target_modules model.embed_tokens"),
        ("qwen3", {"target_modules": ("lm_head",)}, "target_modules lm_head, whose weight is the embedding's too"),
        ("llama", {"lora_rank": 9}, "lora_rank: has 9, wants at most 8: .*k_proj .*saved as an adapter of twice the rank"),
    ],
)
def test_what_it_does_not_go_with(family, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(config_of(family), tuner(**{"init_weights": "pissa", **changes}))


def test_weights_without_an_svd(tmp_path):
    theirs = make_theirs("llama")
    with torch.no_grad():
        theirs.get_parameter("model.layers.1.mlp.down_proj.weight")[30, 2] = float("nan")
    theirs.save_pretrained(tmp_path)
    for quant_bits in (None, 4):
        model = Model(ModelConfig.from_hf(tmp_path), Mesh.single(), seed=None, tuner=pissa(quant_bits=quant_bits))
        with pytest.raises(ValueError, match=r"init_weights: model\.layers\.1\.mlp\.down_proj\.weight has NaN or .* row 30"):
            load_checkpoint(model, tmp_path)

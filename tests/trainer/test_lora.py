"""LoRA and QLoRA runs on a toy checkpoint: what is written and printed, resume, ranks, going on from an adapter, peft."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from swiftk.arguments import ArgumentError, parse
from swiftk.config import DataConfig, OptimConfig, RunConfig, TunerConfig
from swiftk.model import Model, ModelConfig, load_adapter, load_checkpoint, save_checkpoint
from swiftk.model.adapter import LINEARS
from swiftk.parallel.comm import run_threads
from swiftk.parallel.mesh import Mesh
from swiftk.train import main
from swiftk.trainer import checkpoint
from swiftk.trainer.data import load_dataset
from swiftk.trainer.loss import token_loss
from swiftk.trainer.packing import BatchPlan, collate
from swiftk.trainer.rows import read_rows
from swiftk.trainer.run import tuner_of_checkpoint
from swiftk.trainer.tokenizer import train_tokenizer
from tests.trainer import toy
from tests.trainer.test_oracle import SHAPE, transformers_losses
from tests.trainer.test_resume import assert_equal_runs, state_of

STEPS = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of random weights with its tokenizer, beside the rows."""
    folder = tmp_path_factory.mktemp("base")
    data = DataConfig(dataset=(str(toy.write_rows(folder / "rows.jsonl", count=60)),))
    tokenizer = train_tokenizer((m["content"] for row in read_rows(data)[0] for m in row.messages), 300)
    save_checkpoint(Model(ModelConfig.from_hf(SHAPE), Mesh.single(), seed=3), folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def arguments(base: Path, folder: Path, **changes: object) -> dict[str, object]:
    lora = dict(
        model_config={}, tokenizer=None, model=str(base), dataset=(str(base.parent / "rows.jsonl"),), tuner_type="lora",
        lora_rank=4, output_dir=str(folder / "out"), max_length=64,
    )  # fmt: skip
    return {**toy.arguments(folder), **lora, **changes}


def last_of(folder: Path) -> Path:
    return (folder / "out" / "last").resolve()


def evaluations(folder: Path) -> list[float]:
    (run_dir,) = (folder / "out").glob("v0-*")
    return [line["eval_loss"] for line in toy.logged(run_dir) if "eval_loss" in line]


def load(base: Path, adapter: Path, **changes) -> Model:
    settings = TunerConfig(**{"tuner_type": "lora", "lora_rank": 4, **changes})
    model = Model(ModelConfig.from_hf(base), Mesh.single(), seed=None, tuner=settings)
    load_checkpoint(model, base)
    load_adapter(model, adapter)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True, "target_modules": ("q_proj", "up_proj")}, {"modules_to_save": ("lm_head",)}]
)
def test_a_run_and_its_adapter_in_peft(base, tmp_path, capsys, settings):
    assert toy.launch(arguments(base, tmp_path, **settings))
    text = capsys.readouterr().out
    name = "DoRA on 4 modules" if settings.get("use_dora") else "LoRA on 14 modules"
    for expected in (name, "scale 8, dropout 0.05; 0 weights in NF4",
                     "memory      ", "completed greedily", "peft loads it over", "--adapters"):  # fmt: skip
        assert expected in text, expected
    assert evaluations(tmp_path)[-1] < evaluations(tmp_path)[0]
    last = last_of(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "args.json", "manifest.json"} <= {
        p.name for p in last.iterdir()
    }
    assert not list(last.glob("model*.safetensors")) and checkpoint.invalid(last) is None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(last)
    ids = torch.tensor(tokenizer("the quick brown fox")["input_ids"])
    want = peft.PeftModel.from_pretrained(theirs, last).eval()(ids[None]).logits[0]
    ours = load(base, last, **settings)
    got = ours.logits(ours(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)))
    assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item())
    config = json.loads((last / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve()) and config["lora_dropout"] == 0.05


def test_five_and_five_equal_ten_with_dropout(base, tmp_path, capsys):
    targets = ("all-linear", "lm_head")
    keys = arguments(
        base, tmp_path, lora_dropout=0.2, max_steps=10, save_steps=5, lr_decay_steps=10, target_modules=targets,
        lorap_lr_ratio=4.0, parameter_lr={"lm_head": 0.002},
    )  # fmt: skip
    whole, parts = ({**keys, "output_dir": str(tmp_path / name / "out")} for name in ("whole", "parts"))
    toy.launch(whole)
    toy.launch({**parts, "max_steps": 5})
    toy.launch({**parts, "resume_from_checkpoint": "auto"})
    a, b = last_of(tmp_path / "whole"), last_of(tmp_path / "parts")
    assert_equal_runs(a, b)
    tensors = [load_file(p / "adapter_model.safetensors") for p in (a, b)]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    assert all(".lora_" in name for name in state_of(a))  # the base is not in the resume state
    assert any("lm_head" in name for name in state_of(a))
    assert "rates       0.01, except 0.04 (14 tensors), 0.002 (2 tensors)\n" in capsys.readouterr().out
    rates = [line["learning_rate"] for line in toy.logged(a.parent) if "learning_rate" in line]
    assert max(rates) == 0.01 and min(rates) < 0.002  # the schedule's, not those of the groups
    toy.launch({**keys, "output_dir": str(tmp_path / "dry" / "out"), "lora_dropout": 0.0})
    other = load_file(last_of(tmp_path / "dry") / "adapter_model.safetensors")
    assert not any(torch.equal(t, other[n]) for n, t in tensors[0].items())


@pytest.mark.parametrize("quant_bits", [None, 4])
def test_pissa_goes_on_from_where_it_started(base, tmp_path, monkeypatch, capsys, quant_bits):
    """Exact resume, with the base as it was: nothing is decomposed a second time. Over the plain base the saved adapter is
    the model that was trained."""
    keys = arguments(base, tmp_path, init_weights="pissa_niter_2", quant_bits=quant_bits, max_steps=6, lr_decay_steps=6)
    whole, parts = ({**keys, "output_dir": str(tmp_path / name / "out")} for name in ("whole", "parts"))
    toy.launch(whole)
    text = capsys.readouterr().out
    assert "dropout 0.05, PiSSA; " in text
    toy.launch({**parts, "max_steps": 3})
    with monkeypatch.context() as resumed:
        resumed.setattr("swiftk.model.pissa.principal", None)
        toy.launch({**parts, "resume_from_checkpoint": "auto"})
    a, b = last_of(tmp_path / "whole"), last_of(tmp_path / "parts")
    assert_equal_runs(a, b)
    found = state_of(a)
    assert sum(name.startswith("start/") for name in found) == sum(name.startswith("weight/") for name in found) == 28
    last = evaluations(tmp_path / "whole")
    assert last[-1] < last[0] and last == evaluations(tmp_path / "parts")
    tensors = [load_file(p / "adapter_model.safetensors") for p in (a, b)]
    assert all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    if quant_bits is None:
        more = {**keys, "output_dir": str(tmp_path / "more" / "out"), "adapters": (str(a),), "init_weights": "true"}
        toy.launch({**more, "lora_rank": 8, "lora_alpha": 64, "max_steps": 1})
        assert evaluations(tmp_path / "more")[0] == pytest.approx(last[-1], rel=1e-6)


def test_each_step_draws_anew_and_evaluation_does_not_draw(base, tmp_path, monkeypatch):
    seen = []

    def spy(model, batch, *, seed_step=None, isa="auto"):
        seen.append(None if seed_step is None else seed_step.tolist())
        return token_loss(model, batch, seed_step=seed_step, isa=isa)

    monkeypatch.setattr("swiftk.trainer.loop.token_loss", spy)
    monkeypatch.setattr("swiftk.trainer.evaluation.token_loss", spy)
    toy.launch(arguments(base, tmp_path, max_steps=3, save_steps=0, seed=9, global_batch_size=1))
    steps = [keys for keys in seen if keys is not None]
    assert steps == [[9, 0], [9, 1], [9, 2]] and seen[0] is None and seen[-1] is None


def test_two_ranks_follow_one_with_dropout(base, tmp_path):
    targets = ("all-linear", "lm_head")
    keys = arguments(base, tmp_path, lora_dropout=0.2, torch_dtype="float64", max_steps=4, target_modules=targets)
    one, two = ({**keys, "output_dir": str(tmp_path / name / "out")} for name in ("one", "two"))
    toy.launch(one)
    run_threads(2, lambda comm: toy.launch(two, comm))
    assert_equal_runs(last_of(tmp_path / "one"), last_of(tmp_path / "two"), bound=1e-9)


def test_dropout_does_not_feel_how_rows_are_packed(base):
    """Gradients of the same rows in one pack, and one by one: the same masks, so the same sums, in fp64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    dataset = load_dataset(DataConfig(dataset=(str(base.parent / "rows.jsonl"),)), tokenizer, 64)
    settings = TunerConfig(tuner_type="lora", lora_rank=4, lora_dropout=0.3, target_modules=("all-linear", "lm_head"))
    index = collate(dataset, [(3, 1), (17,)]).token_index
    want = [row << 32 | i for row in (3, 1, 17) for i in range(dataset.lengths[row])]
    assert index.tolist() == want and len(set(want)) == len(want)
    grads = []
    for packs in ([(3, 1, 17)], [(1,), (3,), (17,)]):
        model = Model(ModelConfig.from_hf(base), Mesh.single(), seed=3, compute_dtype=torch.float64, tuner=settings)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.fill_(0.01)
        for pack in packs:
            token_loss(model, collate(dataset, [pack]), seed_step=torch.tensor([42, 7])).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-9, atol=1e-12), name


def test_going_on_from_an_adapter_names_nothing_twice(base, tmp_path, capsys):
    """--adapters DIR: model and settings are its args.json's; the first evaluation is the last one of the run before."""
    toy.launch(arguments(base, tmp_path, use_rslora=True, target_modules=("all-linear", "lm_head")))
    first = last_of(tmp_path)
    more = {
        "adapters": (str(first),), "dataset": (str(base.parent / "rows.jsonl"),), "output_dir": str(tmp_path / "more" / "out"),
        "split_dataset_ratio": 0.1, "max_steps": 2, "torch_dtype": "float32", "peak_tflops": 0.1, "report_to": "none",
        "global_batch_size": 3, "max_length": 64, "packing": True,
    }  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert main(toy.argv(more)) == 0
        args = json.loads((last_of(tmp_path / "more") / "args.json").read_text())["arguments"]
        assert args["model"] == str(base) and args["use_rslora"] and args["lora_rank"] == 4 and args["learning_rate"] == 1e-4
        assert evaluations(tmp_path / "more")[0] == evaluations(tmp_path)[-1]
        capsys.readouterr()
        for changes, message in (
            ({"target_modules": ("all-linear",)}, "target_modules: has ('all-linear',), wants ("),
            ({"target_modules": ("qproj",)}, "target_modules: 'qproj' matches no module of the model; the nearest are q_proj"),
            ({"modules_to_save": ("lm_head",)}, "modules_to_save: has ('lm_head',), wants ()"),
            ({"lora_rank": 8}, f"lora_rank: has 8, wants 4 like {first}; leave it out, or start a new adapter"),
            ({"tuner_type": "full"}, "is given with tuner_type full"),
            ({"init_weights": "pissa"}, "init_weights: has pissa with adapters, wants it left out"),
            ({"adapters": (str(first), str(first))}, "adapters: has 2 directories, wants one"),
            ({"adapters": (str(tmp_path / "none"),)}, "adapters: there is no"),
        ):
            assert main(toy.argv({**more, **changes})) == 2
            assert message in capsys.readouterr().err
        other = tmp_path / "other"
        save_checkpoint(Model(ModelConfig.from_hf({**SHAPE, "hidden_size": 48}), Mesh.single()), other)
        for file in base.iterdir():
            if not (other / file.name).exists():
                os.symlink(file, other / file.name)
        assert main(toy.argv({**more, "model": str(other)})) == 1
        careful, line, *_ = capsys.readouterr().err.strip().splitlines()
        assert careful.endswith(f"names {base} as its base, and goes on over {other}")
        assert line.startswith(f"swiftk.train: load_adapter: {first} does not fit the model: ") and "has shape" in line
    finally:
        torch.set_num_threads(threads)


def test_adapters_by_other_names_of_the_same_modules(base, tmp_path):
    """all-linear is its seven names; quant_bits of the run before, unless it is switched off."""
    toy.launch(arguments(base, tmp_path, quant_bits=4, quant_method="bnb", max_steps=1, save_steps=0))
    argv = ["--adapters", str(last_of(tmp_path)), "--dataset", "rows.jsonl", "--target_modules"]
    seven = [name.rsplit(".")[-1] for name in LINEARS]
    for names in (["all-linear"], seven, ["self_attn.q_proj", *seven], [r"model\.layers\..*"]):
        found = parse([*argv, *names], preset="")
        assert found.tuner.target_modules == tuple(names) and found.tuner.quant_bits == 4 and not found.warnings
    with pytest.raises(ArgumentError, match="target_modules: has"):
        parse([*argv, *seven[1:]], preset="")
    off = parse([*argv[:-1], "--quant_bits", "null"], preset="")
    assert off.tuner.quant_bits is None and "was trained over NF4; over 16 or 32 bits it is off" in off.warnings[0]
    path = last_of(tmp_path) / "args.json"
    path.write_text(json.dumps({"arguments": json.loads(path.read_text())["arguments"] | {"init_weights": "pissa"}}))
    assert "was trained by PiSSA over NF4, of weights that no base has" in parse(argv[:-1], preset="").warnings[0]
    path.write_text("[]")
    with pytest.raises(ArgumentError, match=r"args\.json is damaged"):
        parse(argv[:-1], preset="")


def test_qlora_holds_the_base_in_nf4(base, tmp_path, capsys):
    targets = ("all-linear", "embed_tokens")
    keys = arguments(base, tmp_path, quant_method="bnb", quant_bits=4, max_steps=4, target_modules=targets)
    assert toy.launch(keys)
    text = capsys.readouterr().out
    assert "LoRA on 15 modules" in text and "14 weights in NF4" in text
    assert "in NF4 (load_in_4bit, bnb_4bit_quant_type nf4)" in text
    assert f"swiftk.merge --adapters {last_of(tmp_path).parent / 'last'} --output_dir merged --base nf4" in text
    assert evaluations(tmp_path)[-1] < evaluations(tmp_path)[0]
    toy.launch({**keys, "max_steps": 6, "resume_from_checkpoint": "auto"})
    assert (tmp_path / "out" / "last").resolve().name == "checkpoint-6"


def test_adapters_stand_on_their_own_base_from_anywhere(base, tmp_path, monkeypatch):
    """The run was started with a relative path that names another checkpoint elsewhere."""
    (tmp_path / "here").mkdir(), (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "here" / "model").symlink_to(base)
    monkeypatch.chdir(tmp_path / "here")
    toy.launch(arguments(base, tmp_path, max_steps=1, save_steps=0) | {"model": "model"})
    monkeypatch.chdir(tmp_path / "there")
    found = parse(["--adapters", str(last_of(tmp_path)), "--dataset", "rows.jsonl"], preset="")
    assert Path(found.run.model).resolve() == base.resolve() and not found.warnings
    (tmp_path / "other").symlink_to(base)
    argv = ["--adapters", str(last_of(tmp_path)), "--dataset", "rows.jsonl"]
    moved = parse([*argv, "--model", str(tmp_path / "other")], preset="")
    assert "as its base, and goes on over" in moved.warnings[0]


def test_adapters_without_their_base_are_refused(base, tmp_path, capsys):
    """Full tuning of NF4 weights; an adapter of random weights; and the checkpoint's own quantisation."""
    common = {"dataset": (str(base.parent / "rows.jsonl"),), "output_dir": str(tmp_path / "out")}
    for keys, message in (
        ({"model": str(base), "tuner_type": "full", "quant_bits": 4}, "quant_bits: has 4 with tuner_type full"),
        ({"model": str(base), "quant_bits": 8}, "quant_bits: has 8, wants 4"),
        ({"model": str(base), "quant_method": "bnb"}, "quant_method: has bnb without quant_bits"),
        ({"model": str(base), "quant_method": "awq"}, "quant_method: awq is not there yet, wants bnb"),
        ({"model_config": toy.MODEL, "tokenizer": "train", "tuner_type": "lora"}, "tuner_type: has lora with model_config"),
        ({"model_config": toy.MODEL, "tokenizer": "train", "lora_rank": 4}, "lora_rank: is given with tuner_type full"),
    ):
        assert main(toy.argv({**common, **keys})) == 2
        assert message in capsys.readouterr().err
    threads = torch.get_num_threads()
    assert main(toy.argv({**common, "model": str(base), "target_modules": ("qproj",), "peak_tflops": 1})) == 1
    assert "target_modules: 'qproj' matches no module of the model; the nearest are q_proj" in capsys.readouterr().err
    torch.set_num_threads(threads)


def test_a_checkpoint_in_nf4_is_tuned_by_adapters_only(base):
    shape = replace(ModelConfig.from_hf(base), quantised=True)
    found = tuner_of_checkpoint(TunerConfig("lora", lora_rank=4), shape, RunConfig(model="there"))
    assert found == TunerConfig("lora", lora_rank=4, quant_method="bnb", quant_bits=4)
    with pytest.raises(ValueError, match=r"tuner_type: has full, wants lora: there is quantised \(NF4\)"):
        tuner_of_checkpoint(TunerConfig("full"), shape, RunConfig(model="there"))


@pytest.mark.parametrize("targets", [("all-linear",), ("v_proj", "lm_head")], ids=["blocks", "head"])
def test_ten_steps_follow_peft(base, tmp_path, targets):
    """Without dropout, which draws from another generator there: losses of ten steps, weight decay included, in fp32."""
    settings = dict(learning_rate=5e-3, weight_decay=0.1, max_grad_norm=1.0, warmup_ratio=0.1)
    keys = arguments(
        base, tmp_path, lora_dropout=0.0, split_dataset_ratio=0.0, max_steps=STEPS, save_steps=0, global_batch_size=4,
        micro_batch_size=2, target_modules=targets, **settings,
    )  # fmt: skip
    toy.launch(keys)
    ours = [line["loss"] for line in toy.logged(next((tmp_path / "out").glob("v0-*"))) if "loss" in line]

    tuner = TunerConfig("lora", lora_rank=4, target_modules=targets)
    start = Model(ModelConfig.from_hf(base), Mesh.single(), seed=None, tuner=tuner, adapter_seed=42)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs_targets = "all-linear" if "all-linear" in targets else list(targets)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.0, target_modules=theirs_targets, task_type="CAUSAL_LM"
    ))  # fmt: skip
    with torch.no_grad():
        for name, p in start.named_parameters():
            if ".lora_" in name:
                adapted.get_parameter(f"base_model.model.{name}.default.weight").copy_(p)
    data = DataConfig(dataset=keys["dataset"], packing=True)
    dataset = load_dataset(data, transformers.AutoTokenizer.from_pretrained(base), 64)
    plan = BatchPlan(dataset.lengths, packing_length=64, micro_batch_size=2, global_batch_size=4, seed=42)
    expected = transformers_losses(adapted, dataset, plan, OptimConfig(**settings), torch.float32, STEPS)
    assert len(ours) == STEPS and ours[-1] < 0.95 * ours[0]
    for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a == pytest.approx(b, rel=1e-4), f"step {step}: {a} against {b}"

"""A whole run on a toy: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import re
import resource
import time

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from swiftk.model import Model
from swiftk.parallel.comm import run_threads
from swiftk.train import main
from swiftk.trainer import checkpoint
from swiftk.trainer.loop import NonFiniteError
from swiftk.trainer.run import completion_lines
from tests.conftest import ISAS
from tests.trainer import toy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run over the command line with everything on: (output_dir, run directory)."""
    folder = tmp_path_factory.mktemp("run")
    keys = toy.arguments(folder, report_to=("tensorboard",), peak_tflops=None, eval_steps=2, save_total_limit=2, save_steps=2)
    config = folder / "mine.yaml"
    config.write_text("weight_decay: 0.01\n")
    before = torch.get_num_threads()
    assert main([str(config), *toy.argv({k: v for k, v in keys.items() if v is not None})]) == 0
    torch.set_num_threads(before)
    (run_dir,) = (folder / "out").glob("v0-*")
    return folder / "out", run_dir


def test_output_layout(finished):
    output, run_dir = finished
    assert {p.name for p in run_dir.iterdir()} == {
        "args.json", "mine.yaml", "logging.jsonl", "runs", "checkpoint-4", "checkpoint-6", "last", "best",
    } | {p.name for p in run_dir.glob("checkpoint-*")}  # fmt: skip
    assert os.readlink(run_dir / "last") == "checkpoint-6" and (output / "last" / "config.json").is_file()
    assert any((run_dir / "runs").glob("events*"))
    args = json.loads((run_dir / "args.json").read_text())
    assert args["arguments"]["weight_decay"] == 0.01 and args["arguments"]["max_steps"] == 6
    assert args["version"] and args["isa"] in ("avx512", "avx2", "portable") and args["compute_dtype"] == "float32"
    last = run_dir / "checkpoint-6"
    names = {p.name for p in last.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names  # Hugging Face's part
    assert {"args.json", "trainer_state.json", "resume", "manifest.json"} <= names
    assert checkpoint.invalid(last) is None and checkpoint.read_state(last).step == 6


def test_log_lines(finished):
    _, run_dir = finished
    lines = toy.logged(run_dir)
    steps = [line for line in lines if "loss" in line]
    assert [line["global_step/max_steps"] for line in steps] == [f"{i}/6" for i in range(1, 7)]
    assert set(steps[0]) == {
        "loss", "grad_norm", "learning_rate", "token_acc", "epoch", "global_step/max_steps", "elapsed_time", "remaining_time",
        "memory(GiB)", "train_speed(s/it)", "tokens/s", "mfu", "mfu_causal", "pack_eff", "time",
    }  # fmt: skip
    for line in steps:
        assert 0 < line["mfu_causal"] < line["mfu"] < 1 and 0 < line["pack_eff"] <= 1 and line["grad_norm"] > 0
    assert steps[0]["loss"] == pytest.approx(8, abs=5) and steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["global_step/max_steps"] for line in evaluations] == ["0/6", "2/6", "4/6", "6/6"]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert 0 < evaluations[0]["eval_nats_per_byte"] < evaluations[0]["eval_loss"]


def test_best_has_the_lowest_evaluation(finished):
    _, run_dir = finished
    state = checkpoint.read_state(run_dir / "checkpoint-6")
    losses = {int(x["global_step/max_steps"].split("/")[0]): x["eval_loss"] for x in toy.logged(run_dir) if "eval_loss" in x}
    del losses[0]  # nothing is saved before the first step
    assert state.best_step == min(losses, key=losses.get)
    assert os.readlink(run_dir / "best") == f"checkpoint-{state.best_step}"


def test_transformers_loads_the_checkpoint_and_computes_the_same(finished):
    transformers = pytest.importorskip("transformers")
    _, run_dir = finished
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "last", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "last")
    ids = torch.tensor(tokenizer("the quick brown fox")["input_ids"])
    from swiftk.model import ModelConfig, load_checkpoint
    from swiftk.parallel.mesh import Mesh

    ours = Model(ModelConfig.from_hf(run_dir / "last"), Mesh.single(), seed=None)
    load_checkpoint(ours, run_dir / "last")
    hidden = ours(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
    assert torch.allclose(ours.logits(hidden), theirs(ids[None]).logits[0], atol=1e-4)


def test_what_is_printed(tmp_path, capsys):
    toy.launch(toy.arguments(tmp_path, max_steps=2))
    text = capsys.readouterr().out
    for expected in ("M parameters, 100% trainable (fp32)", "compute     float32", "tokens/row", "{+", "held out    rows",
                     "completed greedily", "loads it: AutoModelForCausalLM",
                     "--tuner_type full --learning_rate 0.01 --dataset yours.jsonl"):  # fmt: skip
        assert expected in text, expected


def test_paths_that_are_printed_can_be_pasted(tmp_path, capsys):
    toy.launch(toy.arguments(tmp_path, max_steps=1, output_dir=str(tmp_path / "my out"), report_to=("tensorboard",)))
    text = capsys.readouterr().out
    assert f"--model '{tmp_path}/my out/" in text and f"--logdir '{tmp_path}/my out/" in text
    toy.launch(toy.arguments(tmp_path, max_steps=1, output_dir=str(tmp_path / "other")))
    assert "--logdir" not in capsys.readouterr().out


def test_a_completion_of_empty_lines_is_short():
    assert completion_lines("\n\n \n") == ["(nothing but white space)"]
    assert completion_lines("a\n\n" * 8) == ["a"] * 8 and completion_lines("a\n\n" * 9) == ["a"] * 8 + ["..."]


def test_a_second_run_gets_the_next_version(tmp_path):
    for _ in range(2):
        toy.launch(toy.arguments(tmp_path, max_steps=1))
    assert sorted(p.name[:3] for p in (tmp_path / "out").glob("v*")) == ["v0-", "v1-"]
    assert os.readlink(tmp_path / "out" / "last").startswith("v1-")
    toy.launch(toy.arguments(tmp_path, max_steps=1, add_version=False, output_dir=str(tmp_path / "flat")))
    assert (tmp_path / "flat" / "checkpoint-1").is_dir() and (tmp_path / "flat" / "last").is_symlink()


def test_preview_trains_nothing(tmp_path, capsys):
    assert toy.launch(toy.arguments(tmp_path, preview=2))
    text = capsys.readouterr().out
    assert "pack 2 of 2" in text and not (tmp_path / "out").exists()
    assert text.endswith("preview only, nothing is trained: leave out --preview to train\n") and "careful" not in text


def test_pretraining_on_plain_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(" ".join(toy.WORDS[i % 7 :]) for i in range(200)))
    keys = toy.arguments(tmp_path, stage="pt", dataset=(str(tmp_path / "text.txt"),), max_length=32, max_steps=2)
    assert toy.launch(keys) and "careful" not in capsys.readouterr().out
    assert toy.launch({**keys, "truncation_strategy": "right", "split_dataset_ratio": 0.0, "preview": 1})
    found = re.search(r"careful: (\d+) tokens of 1 rows are cut off at max_length 32 \(truncation_strategy right; split",
                      capsys.readouterr().out)  # fmt: skip
    assert found and int(found[1]) > 1000
    lines = toy.logged(next((tmp_path / "out").glob("v0-*")))
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_two_ranks_end_with_identical_weights_and_follow_one(tmp_path):
    """The hash of every weight after three steps, over ranks; and the losses of one process on the same global batches."""
    base = toy.arguments(tmp_path, max_steps=3, torch_dtype="float64")
    one, two = ({**base, "output_dir": str(tmp_path / name)} for name in ("one", "two"))
    weights = {}
    original = Model.__init__

    def keep(self, config, mesh, **kwargs):
        original(self, config, mesh, **kwargs)
        weights[mesh.world.rank, mesh.world.size] = self

    Model.__init__ = keep
    try:
        toy.launch(one)
        run_threads(2, lambda comm: toy.launch(two, comm))
    finally:
        Model.__init__ = original
    for name, p in weights[0, 2].named_parameters():
        assert torch.equal(p, weights[1, 2].get_parameter(name)), name
        assert torch.allclose(p, weights[0, 1].get_parameter(name), rtol=1e-9, atol=1e-12), name
    runs = [toy.logged(next((tmp_path / name).glob("v0-*"))) for name in ("one", "two")]
    for a, b in zip(*runs, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "eval_loss", "token_acc", "pack_eff"}:
            assert a[key] == pytest.approx(b[key], rel=1e-9), key


# --- bad input ---------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_stops_with_step_checkpoint_and_rows(tmp_path):
    keys = toy.arguments(tmp_path, save_steps=2, max_steps=4)
    original = torch.optim.AdamW.step
    steps = []

    def poison(self, *args, **kwargs):
        original(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data[5].fill_(float("nan"))

    torch.optim.AdamW.step = poison
    try:
        with pytest.raises(NonFiniteError, match="step 4: the loss is nan") as caught:
            toy.launch(keys)
    finally:
        torch.optim.AdamW.step = original
    (run_dir,) = (tmp_path / "out").glob("v0-*")
    assert f"the last good checkpoint is {run_dir}/checkpoint-2" in str(caught.value)
    assert str(caught.value).endswith("Try a lower learning_rate")  # it computes in float32 already
    rows = [json.loads(line) for line in (run_dir / "non-finite-step-4-rank-0.jsonl").read_text().splitlines()]
    assert rows and any(not row["finite"] for row in rows)
    assert all(row["source"].startswith("rows.jsonl line") and "<|im_start|>" in row["text"] for row in rows)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """An update may overflow after a finite loss and gradient: such a checkpoint would pass for the last good one."""
    with pytest.raises(NonFiniteError, match=r"step 1: the weights are NaN or infinite after its update .* is none yet"):
        toy.launch(toy.arguments(tmp_path, save_steps=1, learning_rate=1e300))
    (run_dir,) = (tmp_path / "out").glob("v0-*")
    assert not list(run_dir.glob("checkpoint-*")) and not list(run_dir.glob(".saving*"))
    rows = [json.loads(line) for line in (run_dir / "non-finite-step-1-rank-0.jsonl").read_text().splitlines()]
    assert rows and all(row["source"].startswith("rows.jsonl line") for row in rows)


@pytest.mark.parametrize("limit", [1000, 8000, 40000])
def test_a_disk_that_fills_up_while_it_saves(tmp_path, capsys, monkeypatch, limit):
    """The kernel's own error (a limit on the size of files), through safetensors, tokenizers and DCP: one line, and the first
    checkpoint intact."""
    save = checkpoint.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_full(*args, **kwargs):
        path = save(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return path

    monkeypatch.setattr(checkpoint, "save", then_full)
    threads = torch.get_num_threads()
    try:
        code = main(toy.argv(toy.arguments(tmp_path, save_steps=1, eval_steps=0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        torch.set_num_threads(threads)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and len(lines) == 1, lines
    (run_dir,) = (tmp_path / "out").glob("v0-*")
    assert f"the last good checkpoint is {run_dir}/checkpoint-1" in lines[0] and "File too large" in lines[0], lines
    assert [p.name for p in checkpoint.checkpoints(run_dir)] == ["checkpoint-1"] and not list(run_dir.glob(".*"))
    assert checkpoint.invalid(run_dir / "checkpoint-1") is None


def test_a_log_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        return open("/dev/full", "a", buffering=1)

    monkeypatch.setattr("swiftk.trainer.metrics.open", full, raising=False)
    threads = torch.get_num_threads()
    assert main(toy.argv(toy.arguments(tmp_path))) == 1
    torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert error == "swiftk.train: /dev/full cannot be written: No space left on device; the last good checkpoint is none yet\n"


def test_an_output_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(checkpoint.CheckpointError, match=r"output_dir .*out.* cannot be written: .*choose another"):
        toy.launch(toy.arguments(tmp_path))


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(checkpoint.CheckpointError, match=r"has 0.00 GiB free, a checkpoint takes 0.02 GiB; make room"):
        toy.launch(toy.arguments(tmp_path))


def test_the_launcher_is_told_why(tmp_path, monkeypatch, capsys):
    """The message in torchrun's summary, and the time of the failure, by which it finds the root cause; by its own reader."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert main(["--model", "m", "--dataset", "d", "--learning_rte", "1"]) == 2
    main(["--model", "m", "--dataset", "d", "--seeed", "1"])  # the first reason stands
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert abs(failure.timestamp - time.time()) < 60
    assert "traceback : command line: unknown key 'learning_rte'" in str(ChildFailedError("train", {0: failure}))


def test_bad_arguments_exit_with_2_and_bad_data_with_1(tmp_path, capsys):
    assert main(["--model", "m", "--dataset", "d", "--learning_rte", "1"]) == 2
    assert "unknown key 'learning_rte'; the nearest is 'learning_rate'" in capsys.readouterr().err
    if "avx512" not in ISAS:
        assert main(toy.argv(toy.arguments(tmp_path, isa="avx512"))) == 2
        assert "isa: has 'avx512', wants what this CPU has: auto, " in capsys.readouterr().err
    assert main(["--dataset", "d.jsonl"]) == 2
    assert "without model" in capsys.readouterr().err
    assert main(toy.argv(toy.arguments(tmp_path, dataset=(str(tmp_path / "rowz.jsonl"),), peak_tflops=1))) == 1
    assert "rows.jsonl" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("model_config: {model_type: gpt9}\ntokenizer: train\n")
    assert main([str(tmp_path / "mine.yaml"), "--dataset", "d", "--output_dir", str(tmp_path / "out")]) == 1
    assert f"(model_config of {tmp_path}/mine.yaml)" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "--learning_rate" in capsys.readouterr().out

"""A run that was stopped, killed or moved to another number of ranks ends as the one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftk.parallel.comm import run_threads
from swiftk.train import main
from swiftk.trainer import checkpoint
from swiftk.trainer.loop import Training
from tests.trainer import toy

ROOT = Path(__file__).resolve().parents[2]
CURVE = ("loss", "grad_norm", "learning_rate", "token_acc", "eval_loss")


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the resume state."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(path / "resume")
    saved = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in saved.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_equal_runs(a: Path, b: Path, bound: float = 0.0) -> None:
    left, right = state_of(a), state_of(b)
    assert left.keys() == right.keys() and len(left) > 20
    for name, value in left.items():
        if bound:
            assert torch.allclose(value, right[name], rtol=bound, atol=bound), name
        else:
            assert torch.equal(value, right[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps without a stop: the arguments and the last checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    keys = toy.arguments(folder, max_steps=10, save_steps=5, global_batch_size=4)
    toy.launch(keys)
    return keys, folder, folder / "out" / "last"


def test_five_and_five_equal_ten(straight, tmp_path):
    """Stopped after five by max_steps, with the schedule's length fixed; the second epoch begins in the second half."""
    keys, folder, last = straight
    part = {**keys, "output_dir": str(tmp_path / "out"), "lr_decay_steps": 10}
    toy.launch({**part, "max_steps": 5})
    toy.launch({**part, "max_steps": 10, "resume_from_checkpoint": "auto"})
    assert len(list((tmp_path / "out").glob("v*"))) == 1  # it went on in its own directory
    assert_equal_runs(last, tmp_path / "out" / "last")
    ours, theirs = (toy.logged(next(path.glob("v*"))) for path in (tmp_path / "out", folder / "out"))
    by_step = {(line["global_step/max_steps"].split("/")[0], "loss" in line): line for line in ours}
    for line in theirs:
        mine = by_step[line["global_step/max_steps"].split("/")[0], "loss" in line]
        assert {k: mine.get(k) for k in CURVE} == {k: line.get(k) for k in CURVE}
    weights = [load_file(p / "model.safetensors") for p in (last, tmp_path / "out" / "last")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("optim", ["adamw_8bit", "q_galore"])
def test_five_and_five_equal_ten_with_other_optimizers(tmp_path, optim):
    galore = {"galore_rank": 4, "galore_update_proj_gap": 2}
    keys = toy.arguments(tmp_path, max_steps=10, save_steps=5, lr_decay_steps=10, optim=optim, **galore)
    toy.launch({**keys, "output_dir": str(tmp_path / "straight")})
    toy.launch({**keys, "max_steps": 5})
    toy.launch({**keys, "resume_from_checkpoint": "auto"})
    state = state_of(tmp_path / "out" / "last")
    assert state["exp_avg/model.embed_tokens.weight"].dtype == torch.uint8
    assert any(name.startswith("projection/") for name in state) == (optim == "q_galore")
    assert_equal_runs(tmp_path / "straight" / "last", tmp_path / "out" / "last")


def test_a_partly_frozen_run_resumes_and_leaves_the_rest_as_it_was(straight, tmp_path, capsys):
    """Only what is trained is in the resume state; the checkpoint has every tensor, the frozen ones those of the model."""
    _, _, source = straight
    keys = toy.arguments(
        tmp_path, model=str(source), model_config={}, tokenizer=None, max_steps=6, lr_decay_steps=6, save_steps=3,
        freeze_parameters=("model.layers.0",), trainable_parameters_regex=r"mlp\.(gate|up)", parameter_lr={"embed": 1e-3},
    )  # fmt: skip
    toy.launch({**keys, "output_dir": str(tmp_path / "whole")})
    text = capsys.readouterr().out
    assert "trained     4 of 13 tensors, from model.embed_tokens.weight to model.norm.weight; the others are frozen" in text
    assert "rates       0.01, except 0.001 (1 tensor)" in text and "memory      " in text
    toy.launch({**keys, "max_steps": 3})
    toy.launch({**keys, "resume_from_checkpoint": "auto"})
    a, b = (tmp_path / name / "last" for name in ("whole", "out"))
    left, right = state_of(a), state_of(b)
    assert left.keys() == right.keys() and all(torch.equal(t, right[name]) for name, t in left.items())
    names = {"model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.norm"}
    assert {name.split("/")[1] for name in left} == {f"{name}.weight" for name in names}
    before, after = (load_file(path / "model.safetensors") for path in (source, a))
    assert before.keys() == after.keys()
    for name, t in before.items():
        assert torch.equal(t, after[name]) == (name.removesuffix(".weight") not in names), name


def test_the_second_half_on_two_ranks(straight, tmp_path):
    """State and data order name no layout: one process, then two ranks, in fp64."""
    keys, _, _ = straight
    double = {**keys, "torch_dtype": "float64", "lr_decay_steps": 10}
    toy.launch({**double, "output_dir": str(tmp_path / "one")})
    moved = {**double, "output_dir": str(tmp_path / "two")}
    toy.launch({**moved, "max_steps": 5})
    run_threads(2, lambda comm: toy.launch({**moved, "resume_from_checkpoint": "auto"}, comm))
    assert_equal_runs(tmp_path / "one" / "last", tmp_path / "two" / "last", bound=1e-9)


def test_other_arguments_start_anew_and_say_why(straight, tmp_path, capsys):
    keys, _, _ = straight
    mine = {**keys, "output_dir": str(tmp_path / "out"), "max_steps": 2}
    toy.launch(mine)
    toy.launch({**mine, "learning_rate": 0.02, "resume_from_checkpoint": "auto"})
    text = capsys.readouterr().out
    assert "is passed over: it belongs to another run: learning_rate: 0.01 -> 0.02" in text and "starting anew" in text
    assert len(list((tmp_path / "out").glob("v*"))) == 2


def test_an_explicit_directory_warns_and_another_dataset_is_refused(straight, tmp_path, capsys):
    keys, _, last = straight
    middle = last.resolve().parent / "checkpoint-5"
    resumed = {**keys, "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": str(middle)}
    toy.launch({**resumed, "learning_rate": 0.02, "max_steps": 6})
    text = capsys.readouterr().out
    assert "careful: the run differs in learning_rate: 0.01 -> 0.02" in text
    assert "careful: the run had 10 steps and has 6 now" in text
    (new,) = (tmp_path / "out").glob("v*")  # nothing is written where it was not asked for
    assert (new / "checkpoint-6").is_dir() and not (middle.parent / "checkpoint-6").exists()
    rows = toy.write_rows(tmp_path / "rows.jsonl", count=30)
    with pytest.raises(checkpoint.CheckpointError, match="the dataset's tokens are not those of the checkpoint"):
        toy.launch({**resumed, "dataset": (str(rows),)})
    with pytest.raises(checkpoint.CheckpointError, match="cannot be resumed: there is no such directory"):
        toy.launch({**resumed, "resume_from_checkpoint": str(tmp_path / "nothing")})


def test_other_arguments_do_not_write_over_the_run_they_start_from(straight, tmp_path):
    keys, _, _ = straight
    mine = {**keys, "output_dir": str(tmp_path / "out")}
    toy.launch({**mine, "max_steps": 5})
    (run_dir,) = (tmp_path / "out").glob("v0-*")
    before = (run_dir / "args.json").read_text()
    toy.launch({**mine, "learning_rate": 0.5, "max_steps": 6, "resume_from_checkpoint": str(run_dir / "checkpoint-5")})
    assert (run_dir / "args.json").read_text() == before and not (run_dir / "checkpoint-6").exists()
    assert next((tmp_path / "out").glob("v1-*/checkpoint-6")).is_dir()


def test_fewer_steps_than_are_done_is_a_finished_run(straight, tmp_path, capsys):
    keys, _, _ = straight
    mine = {**keys, "output_dir": str(tmp_path / "out"), "max_steps": 5}
    toy.launch(mine)
    assert toy.launch({**mine, "max_steps": 3, "resume_from_checkpoint": "auto"})
    assert "the checkpoint is of step 5 of 3: nothing is left to train" in capsys.readouterr().out


def test_the_copied_configuration_is_a_configuration_too(straight, tmp_path):
    keys, _, _ = straight
    config = tmp_path / "mine.yaml"
    config.write_text("weight_decay: 0.01\n")
    mine = toy.argv({**keys, "output_dir": str(tmp_path / "out"), "max_steps": 1})
    threads = torch.get_num_threads()
    assert main([str(config), *mine]) == 0
    (copy,) = (tmp_path / "out").glob("v0-*/mine.yaml")
    assert main([str(copy), *mine, "--resume_from_checkpoint", "auto"]) == 0
    torch.set_num_threads(threads)
    assert copy.read_text() == config.read_text()


def test_another_instruction_set_is_said(straight, tmp_path, capsys):
    """`auto` is an equal argument on two machines that choose differently."""
    keys, _, _ = straight
    mine = {**keys, "output_dir": str(tmp_path / "out"), "max_steps": 1}
    toy.launch(mine)
    (saved,) = (tmp_path / "out").glob("v0-*/checkpoint-1")
    text = (saved / "args.json").read_text()
    (saved / "args.json").write_text(text.replace('"float32",\n "data', '"float64",\n "data'))
    listing = json.loads((saved / "manifest.json").read_text())
    listing["files"]["args.json"]["sha256"] = checkpoint._sha256(saved / "args.json")
    (saved / "manifest.json").write_text(json.dumps(listing))
    assert toy.launch({**mine, "resume_from_checkpoint": "auto"})
    assert "careful: compute_dtype was float64 and is float32" in capsys.readouterr().out


# --- kill -9 -----------------------------------------------------------------------------------------------------

PAUSE = """
import sys, time
from swiftk.trainer import checkpoint
from swiftk.train import main
original, calls = checkpoint.write_text, []
def pause(path, text):
    if path.name == checkpoint.MANIFEST:
        calls.append(1)
        if len(calls) == 2:
            print("IN THE MIDDLE OF A SAVE", flush=True)
            time.sleep(60)
    original(path, text)
checkpoint.write_text = pause
sys.exit(main(sys.argv[1:]))
"""


def start(keys, code="import sys; from swiftk.train import main; sys.exit(main(sys.argv[1:]))"):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *toy.argv(keys)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)


def read_until(process, text):
    """The lines of its output up to the one with `text`, or all."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            break
    return seen


def test_kill_in_the_middle_of_a_save(straight, tmp_path, capsys):
    """The second save (step 10) is killed before its manifest: step 5 stays valid, and going on ends at the same weights."""
    keys, _, last = straight
    killed = {**keys, "output_dir": str(tmp_path / "out")}
    process = start(killed, PAUSE)
    seen = read_until(process, "IN THE MIDDLE")
    process.kill()
    process.wait()
    process.stdout.close()
    assert "IN THE MIDDLE" in seen[-1], "".join(seen)
    (run_dir,) = (tmp_path / "out").glob("v*")
    (left,) = run_dir.glob(".saving-checkpoint-10*")
    assert checkpoint.newest(run_dir).name == "checkpoint-5" and os.readlink(run_dir / "last") == "checkpoint-5"
    toy.launch({**killed, "resume_from_checkpoint": "auto"})
    text = capsys.readouterr().out
    assert f"removed {left}" in text and "resuming from" in text and not left.exists()
    assert_equal_runs(last, tmp_path / "out" / "last")


@pytest.mark.long
def test_kill_at_twenty_moments(straight, tmp_path):
    """At any moment at most save_steps steps are lost, and the end is the same."""
    keys, _, _ = straight
    keys = {**keys, "save_steps": 2, "max_steps": 20}
    whole = start({**keys, "output_dir": str(tmp_path / "whole")})
    read_until(whole, "eval_loss")  # from here on it trains and saves; what comes before has nothing to lose
    begin = time.monotonic()
    whole.communicate()
    takes = time.monotonic() - begin
    rng, went_on = random.Random(0), 0
    for moment in range(20):
        mine = {**keys, "output_dir": str(tmp_path / f"out{moment}"), "resume_from_checkpoint": "auto"}
        process = start(mine)
        reached = rng.randrange(0, 19)
        at = f"global_step/max_steps {reached}/20"  # by progress: a busy machine's pace changes
        before = read_until(process, at)
        assert at in before[-1], "".join(before)
        time.sleep(takes / 20 * rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        seen = process.communicate()[0].splitlines()
        steps = [line.split("global_step/max_steps ")[1].split("/")[0] for line in seen if line.startswith("loss ")]
        done = max([reached, *map(int, steps)])
        resumed = start(mine)
        text = resumed.communicate()[0]
        assert resumed.returncode == 0, text
        found = [int(line.rsplit("-", 1)[1]) for line in text.splitlines() if line.startswith("resuming from")]
        assert done - (found or [0])[0] <= 2, (moment, done, found)
        went_on += 0 < (found or [0])[0] < 20
        assert not list((tmp_path / f"out{moment}").glob("v*/.*"))  # nothing is left of the save that was killed
        assert_equal_runs(tmp_path / "whole" / "last", tmp_path / f"out{moment}" / "last")
    assert went_on >= 5  # the moments were in the middle of training


def test_nothing_of_a_run_is_outside_its_state():
    """A field that is added to Training has to be saved or follow from the arguments: change this list knowingly."""
    changing = {"step", "consumed_tokens", "best", "saved_step"}
    assert changing <= set(Training.__dataclass_fields__) and len(Training.__dataclass_fields__) == 20

"""Saves that are whole or absent; finding the right one; a full disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time

import pytest
import torch

from swiftk.config import OptimConfig
from swiftk.trainer import checkpoint
from swiftk.trainer.optimizer import build_optimizer
from tests.trainer import toy

ARGS = {"arguments": {"learning_rate": 0.1, "dataset": ["/a/rows.jsonl"], "output_dir": "x", "max_steps": 5, "save_steps": 1}}


def make(seed=0):
    torch.manual_seed(seed)
    params = {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}
    optimizer = build_optimizer(params, OptimConfig())
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return params, optimizer


def write(run_dir, step, params, optimizer, *, limit=None, best=False, args=ARGS):
    state = checkpoint.new_state(step, 10, step * 7, "data", (1.5, step) if best else None)

    def write_model(directory):
        (directory / "model.safetensors").write_bytes(b"weights" * 100)

    return checkpoint.save(
        run_dir, state, params, optimizer, {}, write_model=write_model, args=args, save_total_limit=limit, is_best=best
    )  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    return checkpoint.new_run_dir(tmp_path / "out", add_version=True)


def test_what_was_saved_comes_back_bit_for_bit(run_dir):
    params, optimizer = make()
    path = write(run_dir, 5, params, optimizer, best=True)
    other, fresh = make(seed=1)
    state = checkpoint.load(path, other, fresh, {})
    assert (state.step, state.consumed_tokens, state.best_loss, state.best_step) == (5, 35, 1.5, 5)
    for name, p in params.items():
        assert torch.equal(other[name], p)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(fresh.state[other[name]][key], optimizer.state[p][key]), key
    for step, p in enumerate((params["w"], other["w"])):  # and the next update is the same
        p.grad = torch.ones_like(p)
        (optimizer, fresh)[step].param_groups[0]["lr"] = 0.1
        (optimizer, fresh)[step].step()
    assert torch.equal(params["w"], other["w"])


def test_moments_of_an_optimizer_that_never_stepped_are_filled(run_dir):
    path = write(run_dir, 5, *make())
    params = {"w": torch.nn.Parameter(torch.zeros(4, 3)), "b": torch.nn.Parameter(torch.zeros(3))}
    fresh = build_optimizer(params, OptimConfig())
    checkpoint.load(path, params, fresh, {})
    assert float(fresh.state[params["w"]]["step"]) == 1.0 and fresh.state[params["w"]]["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "galore", "q_galore"])
def test_whatever_the_optimizer_keeps_comes_back(run_dir, optim):
    """Saved after three steps, read by one that never stepped: the next two steps are the same, bit for bit."""

    def fresh():
        torch.manual_seed(0)
        params = {"a.weight": torch.nn.Parameter(torch.randn(70, 90)), "b": torch.nn.Parameter(torch.randn(3))}
        optimizer = build_optimizer(params, OptimConfig(optim=optim, galore_rank=60, galore_update_proj_gap=2))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        return params, optimizer

    def step(params, optimizer, number):
        torch.manual_seed(number)
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()

    params, optimizer = fresh()
    for number in (1, 2, 3):
        step(params, optimizer, number)
    path = write(run_dir, 3, params, optimizer)
    other, resumed = fresh()
    checkpoint.load(path, other, resumed, {})
    for number in (4, 5):
        step(params, optimizer, number)
        step(other, resumed, number)
    for name, p in params.items():
        assert torch.equal(p, other[name])
        kept = optimizer.state[p]
        assert kept.keys() == resumed.state[other[name]].keys()
        assert all(torch.equal(tensor, resumed.state[other[name]][key]) for key, tensor in kept.items())


def test_moments_and_codes_are_not_read_as_each_other(run_dir):
    params = {"w": torch.nn.Parameter(torch.randn(70, 90))}
    path = write(run_dir, 3, params, build_optimizer(params, OptimConfig()))
    with pytest.raises(checkpoint.CheckpointError, match=r"exp_avg/w has torch\.float32, wants torch\.uint8"):
        checkpoint.load(path, params, build_optimizer(params, OptimConfig(optim="adamw_8bit")), {})


def test_another_model_is_refused_by_name(run_dir):
    params, optimizer = make()
    path = write(run_dir, 5, params, optimizer)
    wrong = {"w": torch.nn.Parameter(torch.zeros(4, 2)), "c": torch.nn.Parameter(torch.zeros(3))}
    message = r"weight/b is not of this model.*weight/c is missing.*weight/w has \(4, 3\), wants \(4, 2\)"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(path, wrong, build_optimizer(wrong, OptimConfig()), {})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing: the save did not finish"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is not readable"),
        (lambda p: (p / "manifest.json").write_text('{"files": {}}'), "manifest.json does not list args.json"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "model.safetensors").write_bytes(b"w" * 9), "model.safetensors has 9 bytes, wants 700"),
        (lambda p: (p / "model.safetensors").write_bytes(b"Weights" * 100), "model.safetensors has another SHA-256"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(run_dir, damage, why):
    params, optimizer = make()
    good, bad = write(run_dir, 1, params, optimizer), write(run_dir, 2, params, optimizer)
    assert checkpoint.newest(run_dir) == bad
    damage(bad)
    assert checkpoint.invalid(bad).startswith(why)
    assert checkpoint.newest(run_dir) == good
    found, notes = checkpoint.find_resumable(run_dir.parent, ARGS["arguments"])
    assert found == good and why in notes[0]
    with pytest.raises(checkpoint.CheckpointError, match="cannot be resumed"):
        checkpoint.load(bad, params, optimizer, {})


def test_a_directory_that_never_was_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"w")
    assert (checkpoint.invalid(tmp_path) or "").startswith("it is not a checkpoint of a run")


def test_an_output_directory_is_tried_without_making_it(tmp_path, monkeypatch):
    checkpoint.check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match=r"file/out cannot be written: .*file is not a directory; choose"):
        checkpoint.check_writable(tmp_path / "file" / "out")
    monkeypatch.setattr(checkpoint.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(checkpoint.CheckpointError, match=r"may not be written to"):
        checkpoint.check_writable(tmp_path / "out")


@pytest.mark.parametrize("stage", ["model", "moments", "fsync", "manifest", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint(run_dir, stage, monkeypatch):
    """ENOSPC at each stage of a save: a clear error, no remains, the old one intact and linked."""
    params, optimizer = make()
    good = write(run_dir, 1, params, optimizer)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage == "model":
        monkeypatch.setattr(toy.Path, "write_bytes", full)
    elif stage == "moments":
        monkeypatch.setattr(checkpoint.dcp, "save", full)
    elif stage == "fsync":
        monkeypatch.setattr(checkpoint, "fsync_path", full)
    elif stage == "manifest":
        monkeypatch.setattr(checkpoint, "write_text", full)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", full)
    message = f"step 2 could not be saved .*: No space left on device; the last good checkpoint is {good}"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        write(run_dir, 2, params, optimizer)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.checkpoints(run_dir)] == ["checkpoint-1"] and not list(run_dir.glob(".saving*"))
    assert os.readlink(run_dir / "last") == "checkpoint-1" and checkpoint.invalid(good) is None
    assert write(run_dir, 2, params, optimizer).name == "checkpoint-2"


def test_the_limit_keeps_the_newest_and_the_best(run_dir):
    params, optimizer = make()
    for step in range(1, 7):
        write(run_dir, step, params, optimizer, limit=2, best=step == 2)
        assert checkpoint.newest(run_dir).name == f"checkpoint-{step}"
    assert [p.name for p in checkpoint.checkpoints(run_dir)] == ["checkpoint-2", "checkpoint-6"]
    write(run_dir, 7, params, optimizer, limit=1, best=True)
    assert [p.name for p in checkpoint.checkpoints(run_dir)] == ["checkpoint-7"]
    assert not [p for p in run_dir.iterdir() if p.name.startswith(".")]


def test_leftovers_of_dead_processes_are_removed_and_others_left(run_dir):
    import socket

    host = socket.gethostname()
    dead, alive, far = (
        run_dir / f".saving-checkpoint-3@{owner}"
        for owner in (f"{host}@4194304999-5", f"{host}@{os.getppid()}-{checkpoint._started(os.getppid())}", "elsewhere@1-5")
    )
    recycled = run_dir / f".saving-checkpoint-4@{host}@{os.getppid()}-5"  # a living process, but not the one that wrote this
    for path in (dead, alive, far, recycled):
        path.mkdir()
        (path / "half").write_text("x")
    assert set(checkpoint.remove_leftovers(run_dir.parent)) == {dead, recycled}
    assert alive.exists() and far.exists()


def test_a_checkpoint_of_the_same_step_is_replaced_only_by_a_whole_one(run_dir, monkeypatch):
    params, optimizer = make()
    write(run_dir, 1, params, optimizer)
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if str(target).endswith("checkpoint-1") and ".old@" not in str(source) and str(source).count(".saving"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"last good checkpoint is .*checkpoint-1"):
        write(run_dir, 1, params, optimizer)
    monkeypatch.undo()
    assert checkpoint.invalid(run_dir / "checkpoint-1") is None and not list(run_dir.glob(".saving*"))
    write(run_dir, 1, params, optimizer)
    assert checkpoint.invalid(run_dir / "checkpoint-1") is None and not list(run_dir.glob(".*"))


def test_a_damaged_state_does_not_hide_the_good_one(run_dir):
    params, optimizer = make()
    good, bad = write(run_dir, 1, params, optimizer), write(run_dir, 2, params, optimizer)
    size = (bad / "trainer_state.json").stat().st_size
    (bad / "trainer_state.json").write_bytes(b"\0" * size)
    assert checkpoint.newest(run_dir) == good
    found, _ = checkpoint.find_resumable(run_dir.parent, ARGS["arguments"])
    assert found == good


def test_auto_takes_the_newest_of_an_equal_run(run_dir, tmp_path):
    params, optimizer = make()
    first = write(run_dir, 1, params, optimizer)
    other = checkpoint.new_run_dir(tmp_path / "out", add_version=True)
    different = {"arguments": {**ARGS["arguments"], "learning_rate": 0.2}}
    time.sleep(0.01)
    write(other, 9, params, optimizer, args=different)
    now = {**ARGS["arguments"], "max_steps": 99, "output_dir": "elsewhere", "dataset": ("/moved/rows.jsonl",), "save_steps": 7}
    found, notes = checkpoint.find_resumable(tmp_path / "out", now)
    assert found == first and "learning_rate: 0.2 -> 0.1" in notes[0]
    assert checkpoint.find_resumable(tmp_path / "out", {**now, "dataset": ("/a/others.jsonl",)})[0] is None
    assert checkpoint.find_resumable(tmp_path / "nothing", now) == (None, [])
    newer = {**now, "freeze_parameters": (), "lorap_lr_ratio": None}  # keys that the run's version did not have
    assert checkpoint.find_resumable(tmp_path / "out", newer)[0] == first
    assert checkpoint.find_resumable(tmp_path / "out", {**newer, "lorap_lr_ratio": 4.0})[0] is None


def test_state_file_has_the_fields(run_dir):
    found = json.loads((write(run_dir, 3, *make()) / "trainer_state.json").read_text())
    assert set(found) == {f.name for f in dataclasses.fields(checkpoint.TrainerState)}

"""What `make gpu` does with its parts; the parts themselves need a GPU."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swiftk.benchmarks import bench_train, gpu
from swiftk.benchmarks.harness import Options
from swiftk.benchmarks.report import training_markdown
from swiftk.config import TunerConfig
from swiftk.model.adapter import resolve
from swiftk.model.parameters import param_specs
from swiftk.parallel.mesh import Mesh

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ["linear", "nf4", "rms_norm", "varlen"]


@pytest.fixture
def machine(monkeypatch):
    """One with a GPU, whose parts take `seconds` each and end with `codes`."""
    state = {"ran": [], "saved": {}, "codes": {}, "seconds": 1.0, "clock": 0.0, "built": False}

    def run_part(part, root):
        state["ran"].append(part)
        state["clock"] += state["seconds"]
        return {"part": part, "exit": state["codes"].get(part, 0), "seconds": state["seconds"], "output": []}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "is_built", lambda root: state["built"])
    monkeypatch.setattr(gpu, "device_facts", lambda: {"device": "made up"})
    monkeypatch.setattr(gpu.time, "monotonic", lambda: state["clock"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return state


def start(state, *wanted, budget=None):
    return gpu.run(list(wanted), KERNELS, state["saved"].__setitem__, state["saved"].get, None, budget)


def test_all_parts_in_order_and_again_from_where_it_stopped(machine, capsys):
    machine["seconds"] = 100.0
    assert start(machine, budget=540) == 3
    assert machine["ran"] == ["build", "test", "sanitize", "train-lora"]  # 400 s: the next could end after nine minutes
    assert "from train-qlora on" in capsys.readouterr().err
    assert machine["saved"]["gpu-build"]["device"] == "made up"
    machine["codes"]["bench-varlen"] = 1
    machine["clock"] = 0.0
    machine["seconds"] = 1.0
    assert start(machine) == 1
    rest = [*list(gpu.TRAIN)[1:], "decode", *(f"bench-{k}" for k in ("varlen", "nf4"))]
    assert machine["ran"][4:] == ["build", *rest, "bench-linear", "bench-rms_norm"]
    assert "failed: bench-varlen" in capsys.readouterr().err
    machine["codes"].clear()
    assert start(machine) == 0 and machine["ran"][-2:] == ["build", "bench-varlen"]  # what failed is done again


def test_one_part_is_done_again_when_named(machine):
    assert start(machine, "test") == 0 and start(machine, "test") == 0
    assert machine["ran"] == ["build", "test", "build", "test"]
    machine["built"] = True
    assert start(machine, "test") == 0 and machine["ran"][4:] == ["test"]
    assert start(machine, "build") == 0 and machine["ran"][5:] == ["build"]


def test_what_is_built_is_not_built_again(machine, capsys):
    machine["built"] = True
    assert start(machine) == 0 and machine["ran"][:2] == ["build", "test"]  # once: its JSON says what the device is
    machine["ran"].clear()
    assert start(machine) == 0 and machine["ran"] == []


@pytest.mark.parametrize("stale", ["native", "native_cuda", None])
def test_whether_it_is_built_is_asked_of_both_modules(stale, tmp_path):
    (tmp_path / "swiftk" / "kernels").mkdir(parents=True)
    for folder in (tmp_path / "swiftk", tmp_path / "swiftk" / "kernels"):
        (folder / "__init__.py").write_text("")
    bodies = (f"def {f}():\n    {'raise ImportError' if f == stale else 'pass'}\n" for f in ("native", "native_cuda"))
    (tmp_path / "swiftk" / "kernels" / "_native.py").write_text("".join(bodies))
    assert gpu.is_built(tmp_path) == (stale is None)


@pytest.mark.parametrize("wanted", [[], ["test"], ["build"]])
def test_nothing_runs_after_a_build_that_failed(wanted, machine, capsys):
    machine["codes"]["build"] = 1
    assert start(machine, *wanted) == 1
    assert machine["ran"] == ["build"] and not machine["saved"] and "the build has failed" in capsys.readouterr().err


def test_errors_come_before_the_build(machine, monkeypatch):
    with pytest.raises(SystemExit, match=r"make gpu: PART has 'tset', wants one of build, test, sanitize"):
        start(machine, "tset")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        start(machine)
    assert machine["ran"] == []
    lines = subprocess.run(["make", "-n", "gpu", "PART=tset"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "swiftk.bench gpu --parts tset" in lines and "setup.py" not in lines


def test_the_python_is_the_one_of_make_train_or_the_machines(tmp_path):
    """And where that lacks torch or pytest, one line says so."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    bare = tmp_path / "bare"  # without site-packages
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    bare.chmod(0o755)
    make = ["make", "-s", "gpu", f"PYTHON={bare}"]
    outer = ("PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs this test
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, env=environment)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make:")]  # make's own "Error 1"
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stdout
    assert said[0].startswith(f"make gpu: {bare} has no torch, pytest: make .venv/.test, or GPU_PY=PATH")
    (tmp_path / ".venv").mkdir()
    for stamp in (".torch", ".train"):  # once it is whole
        python = bare if stamp == ".torch" else ".venv/bin/python"
        (tmp_path / ".venv" / stamp).touch()
        planned = subprocess.run([*make, "-n"], cwd=tmp_path, capture_output=True, text=True, env=environment).stdout
        assert f"\n{python} -m swiftk.bench gpu --parts" in planned
    for name in ("torch", "pytest"):  # with both it goes on
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "swiftk").mkdir()
    (tmp_path / "swiftk" / "bench.py").write_text("import sys; print(sys.argv[1:])")
    done = subprocess.run([*make, f"GPU_PY={bare}", "PART=test"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "['gpu', '--parts', 'test']" in done.stdout


def test_a_part_that_takes_too_long_or_cannot_start_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PART_SECONDS", 1.0)
    note = f"open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid()))"
    child = f"import os, time; {note}; print('begun', flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu, "command", lambda part: ["bash", "-c", shlex.join([sys.executable, "-c", child]) + "; true"])
    found = gpu.run_part("test", tmp_path)
    assert found["exit"] == 124 and found["output"] == ["begun"]
    with pytest.raises(ProcessLookupError):  # what the part has started is gone too
        for _ in range(100):
            os.kill(int((tmp_path / "child").read_text()), 0)
            time.sleep(0.05)
    monkeypatch.setattr(gpu, "command", lambda part: [str(tmp_path / "missing")])
    assert gpu.run_part("test", tmp_path)["exit"] == 127


def test_training_steps_of_all_parts_are_kept_apart(monkeypatch):
    """Each part's arguments as `bench train` takes them, up to what is measured."""
    kept, settings = {}, []

    def measure(rows, setting, timed, memory):
        settings.append((setting.config, setting.tuner, setting.recompute, setting.peer_checkpointing))
        step = {"peak_mib": 9.0, "tokens_per_s": 1.0, "percent_of_floor": 1.0}
        return {"tuner": setting.tuner, "rows": rows, "swiftk": step, "padding": 0.0, "self_spread": 0.0}

    monkeypatch.setattr(bench_train, "measure", measure)
    monkeypatch.setattr(bench_train, "candidates_of", lambda setting, against: {})
    monkeypatch.setattr(bench_train, "show", lambda record: "")
    for arguments in gpu.TRAIN.values():
        bench_train.run(Options(device="cuda", dtypes=("bfloat16",)), arguments, kept.__setitem__)
    assert list(kept) == [*list(gpu.TRAIN)[:-1], "train-qlora-full-7b"] and len(settings) == 2 * len(kept)
    assert (bench_train.EIGHT_B, "lora", "none", False) in settings and (bench_train.SEVEN_B, "qlora", "full", True) in settings
    table = training_markdown([found | {"commit": "abc", "environment": {"threads": 1}} for found in kept.values()])
    for step in ("lora, 8b", "lora, 8b, recompute none", "qlora, 7b, recompute full by both"):
        assert table.count(f"| {step} | rows of 2048 |") == 1, step


def test_the_shapes_have_the_published_sizes():
    def weights(config):
        specs = param_specs(config, Mesh.single(), resolve(config, TunerConfig(tuner_type="full")))
        return sum(math.prod(spec.shape) for spec in specs.values())

    assert weights(bench_train.SEVEN_B) == 6_738_415_616 and weights(bench_train.EIGHT_B) == 8_030_261_248


def test_every_part_has_a_command():
    for part in gpu.parts(KERNELS):
        assert all(isinstance(word, str) for word in gpu.command(part))


def test_the_sanitizers_tests_are_found(monkeypatch):
    """The inner command, as the shell splits it, collects tests."""
    _bash, _c, line = gpu.command("sanitize")
    words = shlex.split(line.split("&& ")[-1])
    inner = words[words.index(sys.executable) :]
    done = subprocess.run([*inner, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "test_nf4_cuda.py::" in done.stdout, done.stdout + done.stderr

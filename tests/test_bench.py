"""The benchmarks themselves: each case's values hold on its smallest shape, results are saved, compared and shown."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from swiftk import bench
from swiftk.benchmarks import harness, report
from swiftk.benchmarks.harness import Case, Limits, Options, as_json, measure, peak_extra_mib


class FixedLimits(Limits):
    """Limits without measuring them: these tests look at values and bookkeeping, never at speed."""

    def bandwidth(self) -> float:
        return 1e9

    def matmul(self, dtype) -> float:
        return 1e9


@pytest.mark.parametrize("name", bench.kernel_names())
def test_smallest_case_of_each_op(name):
    options = Options(quick=True, peers=frozenset())
    found = list(importlib.import_module(f"swiftk.benchmarks.kernels.bench_{name}").cases(options))
    assert found, f"bench_{name} yields no case"
    for case in found:
        record = as_json(measure(case, FixedLimits("cpu"), options))
        assert record["ms"] > 0 and case.bytes > 0


def make(value: float) -> Case:
    def check(y):
        assert y == 1.0, f"got {y}"

    return Case(op="op", name="case", dtype=torch.float32, run=lambda: value, check=check, bytes=8, peers={"torch": float})


def test_wrong_values_are_never_timed():
    with pytest.raises(AssertionError, match=r"got 2.0"):
        measure(make(2.0), FixedLimits("cpu"), Options(quick=True))


def test_a_peer_that_the_option_does_not_know_is_noticed():
    with pytest.raises(ValueError, match="PEERS lacks 'other'"):
        measure(dataclasses.replace(make(1.0), peers={"other": lambda: 1.0}), FixedLimits("cpu"), Options(quick=True))


def test_results_are_compared_and_rendered(tmp_path):
    record = as_json(measure(make(1.0), FixedLimits("cpu"), Options(quick=True)))
    calm, busy = record | {"self_spread": 0.1}, record | {"self_spread": 0.3}
    limits = {"bandwidth": 2.5e10, "torch.float32": 1.4e11}
    assert report.closing([calm], limits) == "limits measured in this run: bandwidth 25.0 GB/s, torch.float32 140.0 GFLOP/s"
    assert "careful: in 1 of 2 cases the op differs from itself by more than 20%" in report.closing([calm, busy], limits)
    slow = record | {"ms": record["ms"] * 100}
    for name, r in (("a", record), ("b", slow)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"records": [r]}))
    assert "slower" in report.compare(tmp_path / "a.json", tmp_path / "b.json")
    assert "torch 1." in report.table([record | {"ratios": {"torch": 1.5}}]) and "| op |" in report.markdown([record])
    report.plot([record], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    with pytest.raises(SystemExit, match="has no results"):
        report.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "invalid choice: 'nope' (choose from 'kernels', 'train'"),
        (["--quick"], "required: PART"),
        (["kernels", "--only", "nope"], "invalid choice: 'nope' (choose from 'adamw_8bit', 'dropout'"),
        (["kernels", "--peers", "nonsense"], "invalid choice: 'nonsense' (choose from 'torch', 'torch fused'"),
        (["train", "--peers", "torch"], "invalid choice: 'torch' (choose from 'transformers', 'none')"),
        (["decode", "--only", "nope", "--quick"], "invalid choice: 'nope' (choose from 'single-nf4'"),
        (["train", "--tuner", "lora", "--steps", "0"], "--steps has 0, wants at least 1"),
        (["memory", "--nope"], "unrecognized arguments: --nope"),
        (["kernels", "--plot", "lacking.png"], '--plot wants matplotlib: pip install -e ".[bench]"'),
        (["kernels", "--plot", "not/there.png"], "--plot has not/there.png, wants a .png, .svg or .pdf in a folder"),
        (["kernels", "--plot", "x.jpeg"], "--plot has x.jpeg, wants a .png"),
        (["kernels", "--isa", "avx512"], "--isa has 'avx512', which this CPU does not support"),
        (["decode", "--isa", "avx512"], "--isa has 'avx512', which this CPU does not support"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anything_runs(arguments, message, monkeypatch, capsys):
    def resolve_isa(name):
        if name == "avx512":
            raise ValueError("isa has 'avx512', which this CPU does not support; wants auto")

    find, lacks = importlib.util.find_spec, "lacking.png" in arguments
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacks and name == "matplotlib" else find(name))
    monkeypatch.setattr(harness, "native", lambda: types.SimpleNamespace(resolve_isa=resolve_isa))
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_help_says_what_a_part_takes(capsys):
    assert bench.main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"\n  {part} " in shown for part in bench.PARTS)
    own = {
        "kernels": "rms_norm", "train": "--tuner", "memory": "--tokens", "decode": "single-nf4", "compile-gpu": "--arch",
        "gpu": "train-qlora-7b", "readme": "README",
    }  # fmt: skip
    assert own.keys() == bench.PARTS.keys()
    for part, word in own.items():
        with pytest.raises(SystemExit) as ended:
            bench.main([part, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and word in shown, part
        assert ("--peers" in shown and "--save" in shown) == (part in harness.PEERS)


def test_peak_extra_memory_sees_a_temporary():
    mib = peak_extra_mib(lambda: torch.ones(16 << 20).sum())
    if mib is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert 60 <= mib <= 100  # 64 MiB of fp32


def test_readme_tables_are_the_generated_ones():
    readme = (bench.ROOT / "README.md").read_text()
    page = (bench.ROOT / "docs" / "benchmarks.md").read_text()
    assert report.readme_block(bench.RESULTS) in readme, "run `python -m swiftk.bench readme`"
    assert page == report.page(bench.RESULTS), "run `python -m swiftk.bench readme`"


def test_the_cases_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    kept = tmp_path / "kept.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--quick"]
    command += ["--ops", "swiglu", "merge", f"--benchmark-json={kept}", "--benchmark-min-rounds=2", "--benchmark-max-time=0.01"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # under xdist it is disabled
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(kept.read_text())["benchmarks"]
    assert {b["group"] for b in found} == {"swiglu", "merge"}
    assert all(b["extra_info"]["bytes"] > 0 and b["stats"]["rounds"] >= 2 for b in found)


def test_results_of_a_gpu_are_shown_with_what_make_gpu_said(tmp_path):
    """Made-up figures: that they are shown, from which dtype, and that nothing claims a GPU where there is none."""
    record = as_json(measure(make(1.0), FixedLimits("cpu"), Options(quick=True)))
    environment = {"device": "cuda", "threads": 1, "isa": "avx2", "versions": {"torch": "9"}}
    head = {"date": "2030-01-01", "commit": "abc", "environment": environment}
    folder = tmp_path / "h200"
    folder.mkdir()
    fp32, bf16 = record | {"name": "fwd 1"}, record | {"name": "fwd 2", "dtype": "bfloat16"}
    (folder / "kernels-op.json").write_text(json.dumps(head | {"records": [fp32, bf16]}))
    (folder / "gpu-test.json").write_text(json.dumps(head | {"part": "test", "exit": 1}))
    block = report.readme_block(tmp_path)
    assert "**h200** (torch 9; 2030-01-01, commit abc)" in block and "`make gpu`: test FAILED (abc)" in block
    assert "fwd 2" in block and "fwd 1" not in block and "No GPU result yet" not in block
    (folder / "kernels-op.json").unlink()
    assert "No GPU result yet" in report.readme_block(tmp_path)

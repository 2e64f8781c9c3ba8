"""The training benchmarks: ours and the peers take the same step, rows come as asked, memory is counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from swiftk.benchmarks import bench_memory, bench_train, report, step
from swiftk.benchmarks.harness import Options
from swiftk.kernels.nf4 import nf4_dequantize
from swiftk.model.adapter import is_adapter, linear_shapes

ORIGIN = {"commit": "abc", "environment": {"threads": 2}}  # what --save adds


def setting(tuner, *lengths) -> step.Setting:
    return step.Setting(step.QUICK, tuner, torch.float32, "auto", "selective", 1, lengths)


@pytest.mark.parametrize("tuner", step.TUNERS)
def test_ours_and_the_peer_take_the_same_step(tuner):
    unequal = setting(tuner, (9, 30, 2, 17))
    (batch,) = step.make_batches(unequal)
    step.check_values(unequal, batch)
    halved = batch.labels.clone()
    halved[::2] = -100  # another loss on our side only
    with pytest.raises(AssertionError, match=f"swiftk .*{step.PACKAGES[tuner][-1]}"):
        step.check_values(unequal, dataclasses.replace(batch, labels=halved))


@pytest.mark.parametrize("tuner", step.TUNERS)
def test_weights_drawn_on_the_device_are_the_same_for_both(tuner):
    there = dataclasses.replace(setting(tuner, (9, 30)), drawn_there=True)
    step.check_values(there, step.make_batches(there)[0])
    assert not torch.equal(step.our_model(there).head_base, step.our_model(setting(tuner)).head_base)


def test_another_scale_of_the_adapters_is_noticed(monkeypatch):
    one = setting("lora", (9, 30))
    config = step.tuner_config(one)
    monkeypatch.setattr(step, "tuner_config", lambda _: dataclasses.replace(config, lora_alpha=2 * config.lora_alpha))
    with pytest.raises(AssertionError, match=r"loss|gradient norm"):
        step.check_values(one, step.make_batches(one)[0])


def test_the_peer_has_our_weights_in_our_codes():
    one = setting("qlora", (4,))
    mine, theirs = step.ours(one).model, step.peer(one).model
    names = [name for name, _ in theirs.named_modules()]
    for module in linear_shapes(step.QUICK):
        base = theirs.get_submodule(f"base_model.model.{module}.base_layer")
        weight = mine.get_submodule(module).base
        assert torch.equal(base.weight.data.view(-1), weight.codes.view(-1)) and module.split(".")[-1] in str(names)
        assert torch.equal(base.weight.quant_state.absmax.view(-1), weight.absmax.float().view(-1))
        rounded = torch.ops.bitsandbytes.dequantize_4bit(
            base.weight.data, base.weight.quant_state.absmax, 64, "nf4", list(weight.shape), torch.float32
        ).bfloat16()
        assert torch.equal(rounded, nf4_dequantize(weight))
    found = dict(theirs.named_parameters())
    trained = {name: p for name, p in mine.named_parameters() if p.requires_grad}
    assert {id(p) for p in theirs.parameters() if p.requires_grad} == {id(found[step.peer_name(name)]) for name in trained}
    assert all(is_adapter(name) and torch.equal(found[step.peer_name(name)], p) for name, p in trained.items())
    assert torch.equal(found["base_model.model.model.embed_tokens.weight"], mine.model.embed_tokens.weight)


def test_a_quick_run_reports_every_step_and_kind_of_rows(capsys, tmp_path):
    (tmp_path / "rows.txt").write_text("12\n20\n7\n")
    kept = {}
    arguments = ["--no-memory", "--rows", "2", "--lengths", str(tmp_path / "rows.txt")]
    records = bench_train.run(Options(quick=True, peers=frozenset()), arguments, kept.__setitem__)
    kinds = ["rows.txt", "rows of 32"]
    assert [(r["tuner"], r["rows"]) for r in records] == [(tuner, rows) for tuner in step.TUNERS for rows in kinds]
    assert list(kept) == [f"train-{tuner}" for tuner in step.TUNERS] and json.dumps(kept)
    for record in records:
        assert record["swiftk"]["tokens_per_s"] > 0 and record["swiftk"]["percent_of_floor"] > 0
    assert [r["matmuls"] for r in records] == [45, 45, 27, 27, 27, 27]  # 15 linears with the head; three need no dx
    assert "real tokens/s" in capsys.readouterr().out
    table = report.training_markdown([result | ORIGIN for result in kept.values()])
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [f"| {tuner}" for tuner in step.TUNERS for _ in kinds]


def test_dtype_is_the_one_asked_for():
    assert bench_train.step_dtype(Options(dtypes=("bfloat16",))) == torch.bfloat16
    assert bench_train.step_dtype(Options(isa="portable")) == torch.float32
    with pytest.raises(SystemExit):
        bench_train.run(Options(dtypes=("float64",)), [])


def test_lengths_of_the_data_set_are_there_and_drawn_alike():
    lengths = bench_train.read_lengths(bench_train.GSM8K, 8192)
    assert len(lengths) == 7473 and min(lengths) > 20
    batches = bench_train.draw(lengths, 50, 8, 400)
    assert batches == bench_train.draw(lengths, 50, 8, 400) and max(map(max, batches)) <= 400
    assert {n for batch in batches for n in batch} <= {min(n, 400) for n in lengths}


def test_lengths_are_read_from_numbers_and_counted_in_rows(tmp_path):
    numbers, rows = tmp_path / "numbers.json", tmp_path / "rows.jsonl"
    numbers.write_text("[5, 80,\n 7]")
    assert bench_train.read_lengths(numbers, 300) == [5, 80, 7]
    words = [f"word{i} another{i}" for i in range(30)]
    rows.write_text("".join(json.dumps({"query": w, "response": w * 2}) + "\n" for w in words))
    lengths = bench_train.read_lengths(rows, 270)
    assert len(lengths) == 30 and min(lengths) > 20  # the turns' own tokens, and the text


def test_wrong_lengths_are_named(tmp_path):
    for text, message in (
        ("", "has no numbers"),
        ("5\n1\n", "has a row of 1, wants at least 2"),
        ('{"text": "five"}\n', "rows.jsonl line 1"),
    ):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(SystemExit, match=message):
            bench_train.read_lengths(tmp_path / "rows.jsonl", 300)


def test_memory_is_counted_by_component():
    kept = {}
    found = bench_memory.run(Options(quick=True, peers=frozenset()), ["--recompute", "selective"], kept.__setitem__)
    assert kept == {"memory": found} and "peer" not in found
    mib = {name: size * 2**20 for name, size in found["swiftk"]["components_mib"].items()}
    linears = linear_shapes(step.QUICK).values()
    weights = sum(n * k for n, k in linears)
    assert mib["NF4 weights"] == weights // 2 + weights // 64 * 4  # codes, and an fp32 absmax for 64 weights
    assert mib["adapters"] == mib["their gradients"] == sum(step.RANK * (n + k) * 4 for n, k in linears)
    assert mib["optimizer"] == 2 * mib["adapters"] + 4 * 2 * len(linears)  # two moments, and a step's number each
    H, D, K, I, T = 64, 256, 128, 128, 64
    assert mib["activations kept"] == 2 * 4 * T * (3 * H + 2 * D + 2 * K + 2 * I + 7 * step.RANK)
    assert mib["activations of one block again"] == 4 * T * (H + D + K + I)
    assert mib["head and loss"] == 4 * T * (3 * H + 256)  # the whole logits where they are less than a buffer
    assert found["sum_mib"] == pytest.approx(sum(found["swiftk"]["components_mib"].values()))
    table = report.memory_markdown(found | ORIGIN)
    assert f"| sum | {found['sum_mib']:.0f} |" in table and all(f"| {name} |" in table for name in mib)
    if found["of_sum"] is not None:
        assert found["swiftk"]["process_mib"] > found["swiftk"]["peak_mib"] > 0

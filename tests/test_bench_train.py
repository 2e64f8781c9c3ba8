"""The training benchmark: ours and transformers take the same step, rows come as asked, wrong input is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from swiftk.benchmarks import bench_train
from swiftk.benchmarks.harness import Options


def setting(lengths) -> bench_train.Setting:
    return bench_train.Setting(bench_train.QUICK, torch.float32, "auto", "selective", 1, lengths)


def test_ours_and_the_peer_take_the_same_step():
    unequal = setting(((9, 30, 2, 17),))
    (batch,) = bench_train.make_batches(unequal)
    bench_train.check_values(unequal, batch)
    halved = batch.labels.clone()
    halved[::2] = -100  # another loss on our side only
    with pytest.raises(AssertionError, match="loss: swiftk"):
        bench_train.check_values(unequal, dataclasses.replace(batch, labels=halved))


def test_a_quick_run_reports_every_kind_of_rows(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('12\n{"length": 20}\n7\n')
    options = Options(quick=True, peers=frozenset())
    result = bench_train.run(options, ["--no-memory", "--steps", "1", "--rows", "2", "--lengths", str(tmp_path / "rows.jsonl")])
    assert [r["rows"] for r in result["training"]] == ["rows.jsonl", "rows of 256"]
    for record in result["training"]:
        assert record["swiftk"]["tokens_per_s"] > 0 and record["swiftk"]["percent_of_floor"] > 0
    assert "real tokens/s" in capsys.readouterr().out


def test_short_answers_stay_in_their_range():
    lengths = [n for batch in bench_train.short_answers(50, 8, 400) for n in batch]
    assert (
        60 <= min(lengths) < 80
        and 350 < max(lengths) <= 400
        and lengths == [n for batch in bench_train.short_answers(50, 8, 400) for n in batch]
    )


def test_wrong_lengths_are_named(tmp_path):
    for text, message in (
        ("", "has no lines"),
        ("5\nfive\n", "'five' in line 2"),
        ("1\n", "has 1 in line 1, wants at least 2"),
    ):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(SystemExit, match=message):
            bench_train.lengths_of(tmp_path / "rows.jsonl", 1, 1, 100)

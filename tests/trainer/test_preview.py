"""What --preview prints, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from swiftk.config import DataConfig
from swiftk.trainer.data import load_splits
from swiftk.trainer.packing import BatchPlan
from swiftk.trainer.preview import preview, segments
from swiftk.trainer.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["question answer"] * 9, 262)


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"query": f"q{i}", "response": f"r{i} [bold]\x1b"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, _ = load_splits(DataConfig(dataset=(str(path),), split_dataset_ratio=0.2), TOKENIZER, 64)
    size = int(dataset.lengths.max()) * 2
    return dataset, BatchPlan(dataset.lengths, packing_length=size, micro_batch_size=1, global_batch_size=2, seed=0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_output_marks_what_is_trained(packed):
    dataset, plan = packed
    out = io.StringIO()
    preview(dataset, plan, TOKENIZER, 2, out)
    text = out.getvalue()
    assert text.count("=== pack") == 2 and text.count("--- document 1, tokens 0-") == 2
    first = plan.packs(0)[0]
    tokens = sum(int(dataset.lengths[row]) for row in first)
    assert (
        f"=== pack 1 of 2 shown: {len(first)} documents, {tokens} of {plan.packing_length} tokens; masked {{+trained+}}\n"
        in text
    )
    for row in (row for pack in plan.packs(0)[:2] for row in pack):
        number = int(dataset.rows[row].source.split()[-1]) - 1
        want = f"<|im_start|>user\nq{number}<|im_end|>\n<|im_start|>assistant\n{{+r{number} [bold]\u241b<|im_end|>+}}\n"
        assert f"{dataset.rows[row].source}\n{want}" in text
    assert "\x1b" not in text


def test_a_terminal_gets_two_colours(packed, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    dataset, plan = packed
    out = Terminal()
    preview(dataset, plan, TOKENIZER, 1, out)
    number = int(dataset.rows[plan.packs(0)[0][0]].source.split()[-1]) - 1
    assert f"\x1b[1;32mr{number} [bold]\u241b<|im_end|>\x1b[0m" in out.getvalue()
    assert "\x1b[90m<|im_start|>user" in out.getvalue() and "{+" not in out.getvalue()


def test_segments_are_the_row(packed):
    row = packed[0].rows[0]
    parts = segments(row, TOKENIZER)
    assert "".join(text for text, _ in parts) == TOKENIZER.decode(row.input_ids)
    assert [trained for _, trained in parts] == [False, True, False]
    row.loss_mask[:] = True
    assert [trained for _, trained in segments(row, TOKENIZER)] == [False, True]  # the first token is no label


def test_the_trainer_imports_without_rich():
    code = "import sys; sys.modules['rich'] = None; import swiftk.trainer.run"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])

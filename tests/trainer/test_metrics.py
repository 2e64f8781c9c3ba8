"""What a terminal gets: lines that can be pasted, and a bar that is there while it trains and not before or after."""

from __future__ import annotations

import io

from swiftk.trainer.metrics import Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_whole_lines_and_the_bar_only_while_it_trains(tmp_path, monkeypatch):
    for name, value in {"COLUMNS": "60", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    reporter = Reporter(tmp_path, 5, ("none",), quiet=False, out=out)
    command = (
        "torchrun --nproc-per-node 2 -m swiftk.train my.yaml --output_dir " + "a/path/" * 12 + " --resume_from_checkpoint auto"
    )
    reporter.say(command)
    assert out.getvalue() == command + "\n"
    with reporter.progress():
        reporter.step(2, "loss 1")
        reporter.record(2, {f"value_{i}": float(i) for i in range(9)})
        assert "train" in out.getvalue()
    shown = len(out.getvalue())
    assert "  ".join(f"value_{i} {i}" for i in range(9)) + "\n" in out.getvalue()
    reporter.say(command)
    reporter.close()
    assert out.getvalue()[shown:] == command + "\n"

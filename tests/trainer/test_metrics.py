"""The count of FLOPs against torch's; what a terminal gets: lines that can be pasted, and a bar that is there while it trains
and not before or after."""

from __future__ import annotations

import io

import pytest
from torch.utils.flop_counter import FlopCounterMode

from swiftk.config import TunerConfig
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.metrics import Reporter, model_work, step_flops
from tests.model.families import FAMILIES, pack
from tests.model.test_transformer import REFERENCES

LORA = {"tuner_type": "lora", "lora_rank": 4}


@pytest.mark.parametrize(
    ("family", "tuner"),
    [
        ("qwen3", {}), ("llama", {"freeze_parameters": ("model.embed_tokens",)}),
        ("qwen3", {"freeze_parameters": ("model.embed", "model.layers.0")}),
        ("llama", {"freeze_parameters": ("model.",), "trainable_parameters": ("model.layers.1.self_attn.o_proj",)}),
        ("qwen3", {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": "1.self_attn.[qkv]_proj|2.mlp.down"}),
        ("llama", {"freeze_parameters_ratio": 1.0, "trainable_parameters": ("model.norm",)}),
        ("llama", LORA), ("qwen3", {**LORA, "target_modules": ("all-linear", "embed_tokens", "lm_head")}),
        ("llama", {**LORA, "target_modules": ("2.mlp.up_proj",)}), ("llama", {**LORA, "target_modules": ("lm_head",)}),
    ],
    ids=["tied", "embedding", "first-block", "one", "two", "norm", "lora", "lora-all", "lora-one", "lora-head"],
)  # fmt: skip
def test_the_work_is_what_torch_counts(family, tuner):
    """Matrix products of the forward and backward through the references, whose attention forms its whole square."""
    config, lengths = ModelConfig.from_hf(FAMILIES[family].to_dict()), (9, 2, 14)
    model = Model(config, Mesh.single(), recompute="none", tuner=TunerConfig(**{"tuner_type": "full", **tuner}), ops=REFERENCES)
    batch = pack(*lengths)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(*batch)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    work = model_work(config, model.specs, trained)
    found, causal = step_flops(config, work, sum(lengths), sum(n * n for n in lengths))
    vectors = {name: spec for name, spec in model.specs.items() if len(spec.shape) == 1}
    of_vectors = 6 * sum(lengths) * (work.parameters - model_work(config, without(model.specs, vectors), trained).parameters)
    assert found - of_vectors == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert found - causal == pytest.approx((work.layers * 6 * config.num_attention_heads * config.head_dim) * (81 + 4 + 196))


def without(specs, some):
    return {name: spec for name, spec in specs.items() if name not in some}


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

"""Arguments: YAML and command line to configs; every spelling, every refusal."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from swiftk.arguments import ALIASES, NOT_YET, VALUE_ALIASES, ArgumentError, help_text, keys, parse
from swiftk.train import PRESET, resume_command

MODEL = ["--model", "m", "--dataset", "a.jsonl"]


def read(*argv, world_size=1):
    return parse([*MODEL, *argv], world_size=world_size, preset=str(PRESET))


def test_command_line_types():
    a = read(
        "--val_dataset", "b.jsonl", "c.jsonl#5", "--packing", "true", "--columns", '{"q": "query"}',
        "--learning_rate", "1e-4", "--max_steps", "-1", "--system=be kind", "--max_length", "null",
    )  # fmt: skip
    assert a.data.dataset == ("a.jsonl",) and a.data.val_dataset == ("b.jsonl", "c.jsonl#5")
    assert a.data.packing is True and a.data.columns == {"q": "query"} and a.data.system == "be kind"
    assert a.optim.learning_rate == 1e-4 and a.run.max_steps == -1 and a.data.max_length is None
    assert a.tuner.tuner_type == "lora" and not a.preset and a.warnings == ()


def test_yaml_blocks_are_flattened_and_the_command_line_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: m\ndata:\n  dataset: [x.jsonl, y.jsonl]\n  columns: {a: query}\n  deeper: {packing: true}\n"
        "optimizer:\n  learning_rate: 1e-3\n  min_lr: 0\nseed: 7\n"
    )
    a = parse([str(path), "--learning_rate", "2e-3"], preset=str(PRESET))
    assert a.data.dataset == ("x.jsonl", "y.jsonl") and a.data.columns == {"a": "query"} and a.data.packing
    assert a.optim.learning_rate == 2e-3 and a.optim.min_lr == 0.0
    assert a.run.seed == a.data.seed == 7 and a.yaml_path == str(path)


@pytest.mark.parametrize(("old", "new"), sorted(ALIASES.items()))
def test_an_alias_is_read_and_warned_of_once(old, new):
    if new in NOT_YET:
        assert read(f"--{old}", "false").warnings == ()
        return
    value = {"model": "m2", "dataset": "d", "output_dir": "o", "tuner_type": "full", "packing": "true", "warmup_ratio": "0.5",
             "lr_scheduler_type": "linear", "quant_bits": "4"}.get(new, "1")  # fmt: skip
    argv = [*(a for a in MODEL if new not in ("model", "dataset")), f"--{old}", value]
    if new in ("model", "dataset"):
        argv += ["--dataset", "a"] if new == "model" else ["--model", "m"]
    a = parse(argv, preset=str(PRESET))
    assert a.warnings == (f"{old} is read as {new}",)
    flat = a.flat()[new]
    assert (flat[0] if isinstance(flat, tuple) else flat) == parse_like(flat, value)


def parse_like(parsed, text):
    parsed = parsed[0] if isinstance(parsed, tuple) else parsed
    return text == "true" if isinstance(parsed, bool) else type(parsed)(text)


def test_aliases_that_convert():
    assert read("--train_type", "pt").data.stage == "pt"
    assert read("--train_type", "full").tuner.tuner_type == "full"
    assert read("--use_lora", "false").tuner.tuner_type == "full"
    assert read("--gradient_checkpointing", "true").run.recompute_granularity == "full"
    a = read("--per-device-train-batch-size", "2", "--gradient_accumulation_steps", "3", world_size=4)
    assert a.run.global_batch_size == 24


@pytest.mark.parametrize(("old", "new"), sorted(VALUE_ALIASES["optim"].items()))
def test_other_spellings_of_an_optimizer(old, new):
    a = read("--optim", old, "--tuner_type", "full")
    assert a.optim.optim == new and a.warnings == (f"optim {old} is read as {new}",)
    assert read("--optim", new, "--tuner_type", "full").warnings == ()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim", "adam"], r"optim: has 'adam', wants adamw or adamw_8bit or galore or q_galore \(the nearest is adamw\)"),
        (["--optim", "lion"], "optim: lion is not there yet, wants adamw"),
        (["--optim", "galore", "--galore_rank", "0"], "galore_rank: has 0, wants more than 0"),
        (["--galore_rank", "8"], "galore_rank: is given with optim adamw, wants optim galore or q_galore; or remove the key"),
        (["--galore_scale", "1", "--optim", "adamw_8bit"], "galore_scale: is given with optim adamw_8bit, wants optim galore"),
        (["--learning_rte", "1"], "command line: unknown key 'learning_rte'; the nearest is 'learning_rate'"),
        (["--zzzzzz", "1"], "command line: unknown key 'zzzzzz'; python -m swiftk.train --help lists them"),
        (["--max_steps", "many"], "max_steps: has 'many', wants an integer"),
        (["--max_steps", "1.5"], "max_steps: has '1.5', wants an integer"),
        (["--packing", "yes"], "packing: has 'yes', wants true or false"),
        (["--columns", "{"], "columns: has '{', wants a mapping as JSON"),
        (["--learning_rate", "1", "2"], r"learning_rate: has \['1', '2'\], wants a number"),
        (["--learning_rate"], "command line: --learning_rate has no value"),
        (["--seed", "1", "--seed", "2"], "command line: --seed is given twice"),
        (["--lr", "1", "--learning_rate", "2"], "learning_rate is given twice"),
        (["--micro_batch_size", "0"], "micro_batch_size: has 0, wants more than 0"),
        (["--learning_rate", "-1"], "learning_rate: has -1.0, wants at least 0"),
        (["--tuner_type", "adalora"], "tuner_type: adalora is not there yet, wants full or lora or qlora"),
        (["--train_type", "longlora"], "tuner_type: longlora is not there yet"),
        (["--stage", "dpo"], "stage: dpo is not there yet, wants pt or sft"),
        (["--stage", "sftt"], r"stage: has 'sftt', wants pt or sft \(the nearest is sft\)"),
        (["--lora_rank", "8", "--tuner_type", "full"], "lora_rank: is given with tuner_type full, wants tuner_type lora"),
        (["--lora_rank", "0"], "lora_rank: has 0, wants more than 0"),
        (["--lora_rank", "-4"], "lora_rank: has -4, wants more than 0"),
        (["--lora_alpha", "0"], "lora_alpha: has 0.0, wants more than 0"),
        (["--lora_dropout", "1"], "lora_dropout: has 1.0, wants 0 <= x < 1"),
        (["--init_weights", "olora"], "init_weights: olora is not there yet, wants true or gaussian or pissa"),
        (["--init_weights", "pissa_niter_two"], "init_weights: has 'pissa_niter_two', wants true or gaussian or pissa"),
        (["--lorap_lr_ratio", "0"], "lorap_lr_ratio: has 0.0, wants more than 0"),
        (["--lorap_lr_ratio", "4", "--tuner_type", "full"], "lorap_lr_ratio: is given with tuner_type full"),
        (["--lorap_emb_lr", "1e-5"], r"lorap_emb_lr: is given without lorap_lr_ratio, wants both \(LoRA\+\) or neither"),
        (["--parameter_lr", '{"a": "x"}'], "parameter_lr: a: has 'x', wants a number"),
        (["--parameter_lr", '{"a": 0}'], "parameter_lr: 'a' has 0.0, wants more than 0; freeze_parameters_regex freezes"),
        (["--parameter_lr", "1e-5"], "parameter_lr: has 1e-05, wants a mapping"),
        (["--parameter_lr", '{"a": 1e-5}', "--learning_rate", "0"], "learning_rate: has 0, wants more than 0: parameter_lr"),
        (["--freeze_parameters", "lm_head"], "freeze_parameters: is given with tuner_type lora, wants tuner_type full"),
        (["--trainable_parameters_regex", "norm", "--tuner_type", "qlora"], "trainable_parameters_regex: is given with"),
        (["--freeze_parameters_ratio", "1.1", "--tuner_type", "full"], "freeze_parameters_ratio: has 1.1, wants at most 1"),
        (["--freeze_parameters_ratio", "-1", "--tuner_type", "full"], "freeze_parameters_ratio: has -1.0, wants at least 0"),
        (["--quant_bits", "8"], "quant_bits: has 8, wants 4"),
        (["--quant_method", "bnb"], "quant_method: has bnb without quant_bits, wants --quant_bits 4"),
        (["--quant_bits", "4", "--tuner_type", "full"], "quant_bits: has 4 with tuner_type full, wants tuner_type lora"),
        (["--adapters", "a", "b"], "adapters: has 2 directories, wants one"),
        (["--zero_stage", "2"], "zero_stage: a sharded optimizer is not there yet"),
        (["--tp_size", "2"], "tensor_model_parallel_size: has 2, wants 1: tensor parallelism is not there yet"),
        (["--padding_free", "false"], "padding_free: has False, wants true"),
        (["--report_to", "wandb"], "report_to: wandb is not there yet"),
        (["--isa", "sse"], "isa: has 'sse', wants auto or avx512 or avx2 or portable"),
        (["--model_config", '{"a": 1}'], "model_config: cannot be given together with model"),
        (["--tokenizer", "train"], "tokenizer: has 'train', wants model_config"),
        (["--gradient_accumulation_steps", "2", "--global_batch_size", "8"], "are both given"),
        (["--max_steps", "0"], "max_steps: has 0"),
        (["--learning_rate", "inf"], "learning_rate: has 'inf', wants a number"),
    ],
)
def test_errors(argv, message):
    with pytest.raises(ArgumentError, match=message):
        read(*argv)


def test_the_tuner_is_made_explicit():
    """LoRA is the default on a checkpoint, with its own rate; qlora is two more keys; random weights are trained whole."""
    a = read()
    assert (a.tuner.tuner_type, a.optim.learning_rate, a.tuner.quant_bits) == ("lora", 1e-4, None)
    a = read("--tuner_type", "qlora", "--learning_rate", "2e-4", "--target_modules", "q_proj", "v_proj")
    assert (a.tuner.tuner_type, a.tuner.quant_method, a.tuner.quant_bits) == ("lora", "bnb", 4)
    assert a.optim.learning_rate == 2e-4 and a.tuner.target_modules == ("q_proj", "v_proj")
    assert read("--quantization_bit", "4").tuner == a.tuner.__class__("lora", quant_method="bnb", quant_bits=4)
    assert read("--quant_bits", "0", "--quant_method", "none").tuner == read().tuner
    a = read("--tuner_type", "full")
    assert a.tuner.tuner_type == "full" and a.optim.learning_rate is None
    assert parse([], preset=str(PRESET)).tuner.tuner_type == "full"
    assert {"tuner_type", "lora_rank", "quant_bits"} <= a.flat().keys()


def test_rates_of_their_own(tmp_path):
    want = {r"layers\.0\.": 1e-5, "norm": 2e-5}
    assert read("--parameter_lr", '{"layers\\\\.0\\\\.": 1e-5, "norm": "2e-5"}').optim.parameter_lr == want
    text = "model: m\ndataset: d\nparameter_lr: {'layers\\.0\\.': 1e-5, norm: 2.0e-5}\nlorap_lr_ratio: 16\n"
    (tmp_path / "c.yaml").write_text(text)
    a = parse([str(tmp_path / "c.yaml")], preset=str(PRESET))
    assert a.optim.parameter_lr == want and a.optim.lorap_lr_ratio == 16.0


def test_yaml_true_is_the_initial_weights_name(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ndataset: d\ntuner: {tuner_type: lora, init_weights: true, lora_alpha: 16}\n")
    a = parse([str(tmp_path / "c.yaml")], preset=str(PRESET))
    assert a.tuner.init_weights == "true" and a.tuner.lora_alpha == 16


def test_dataset_without_model_names_both():
    with pytest.raises(ArgumentError, match=r"dataset is given \(d.jsonl\) without model"):
        parse(["--dataset", "d.jsonl"], preset=str(PRESET))
    with pytest.raises(ArgumentError, match="dataset: has nothing"):
        parse(["--model", "m"], preset=str(PRESET))


def test_yaml_errors(tmp_path):
    def yaml(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return [str(path)]

    for text, message in (
        ("model: m\nmodle: n\n", "unknown key 'modle'; the nearest is 'model'"),
        ("model: m\nmodel: n\n", "model is given twice"),
        ("a: {seed: 1}\nb: {seed: 2}\n", "seed is given twice"),
        ("model: [\n", r"config.yaml line 2: not YAML: [^\n]+$"),
        ("- 1\n", "has list, wants keys and values"),
        ("model: m\ndataset: [1]\n", r"dataset: has \[1\], wants a list of strings"),
        ("model: 3\ndataset: d\n", "model: has 3, wants a string"),
        ("model: m\ndataset: d\nseed: true\n", "seed: has True, wants an integer"),
    ):
        with pytest.raises(ArgumentError, match=message):
            parse(yaml(text), preset=str(PRESET))
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match=r"config.yaml: cannot be read as text"):
        parse([str(tmp_path / "config.yaml")], preset=str(PRESET))
    with pytest.raises(ArgumentError, match=r"is a directory, wants a configuration file; did you mean --model .*\?"):
        parse([str(tmp_path), "--dataset", "d.jsonl"], preset=str(PRESET))
    with pytest.raises(ArgumentError, match=r"confg.yaml: no such configuration file; the nearest in .* is config.yaml"):
        parse([str(tmp_path / "confg.yaml")], preset=str(PRESET))


def test_no_arguments_are_the_preset():
    a = parse([], preset=str(PRESET))
    assert a.preset and a.run.model_config["model_type"] == "qwen3" and a.run.tokenizer == "train"
    assert a.data.dataset and a.data.split_dataset_ratio > 0 and a.run.output_dir is not None
    example = Path(__file__).resolve().parents[2] / "examples" / "tiny.yaml"
    assert example.read_text() == PRESET.read_text()  # one file, linked


def test_keys_that_do_not_say_what_to_train_go_on_top_of_the_preset():
    a = parse(["--preview", "2"], preset=str(PRESET))
    assert a.preset and a.run.preview == 2 and a.run.model_config == parse([], preset=str(PRESET)).run.model_config
    assert a.yaml_path == str(PRESET) and "the preset tiny.yaml with the given keys on top" in a.warnings[0]
    with pytest.raises(ArgumentError, match="dataset: has nothing"):
        parse(["--model", "m", "--preview", "2"], preset=str(PRESET))


def test_help_lists_every_key_with_its_default_and_comment():
    text = help_text()
    for key in keys().values():
        assert f"--{key.name} " in text
        if not dataclasses.is_dataclass(key.default) and key.name == "warmup_ratio":
            assert "0.05" in text
    assert keys()["packing"].help.startswith("several rows per sequence")


def test_the_resume_command_replaces_an_older_one_and_is_what_the_shell_finds(tmp_path, monkeypatch):
    argv = ["my config.yaml", "--resume_from_checkpoint", "x y", "--seed", "1"]
    rest = "-m swiftk.train 'my config.yaml' --seed 1 --resume_from_checkpoint auto"
    (tmp_path / "my env").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "my env" / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "my env"))  # activated
    assert resume_command(argv, 2) == f"torchrun --nproc-per-node 2 {rest}"
    assert resume_command(argv, 1) == f"python {rest}"
    (tmp_path / "torchrun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # another environment's
    python = f"'{tmp_path}/my env/python'"
    assert resume_command(argv, 2) == f"{python} -m torch.distributed.run --nproc-per-node 2 {rest}"
    assert resume_command(argv, 1) == f"{python} {rest}"

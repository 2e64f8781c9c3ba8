"""A run that takes a second: forty rows, a tokenizer of 300 tokens, a model of one narrow layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from swiftk.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TunerConfig
from swiftk.model import Model, ModelConfig
from swiftk.parallel.comm import Comm
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.loss import token_loss
from swiftk.trainer.packing import Batch
from swiftk.trainer.run import Commands, run
from swiftk.trainer.stop import StopFlag

MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "bears", "watch", "far"]


def write_rows(path: Path, count: int = 40) -> Path:
    rows = [
        {
            "query": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 4)),
            "response": " ".join(WORDS[i % 5 : i % 5 + 2 + i % 3]),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder: Path, **changes: object) -> dict[str, object]:
    """Keys as the command line has them."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    base: dict[str, object] = dict(
        model_config=MODEL, tuner_type="full", tokenizer="train", dataset=(str(rows),), split_dataset_ratio=0.1, packing=True,
        output_dir=str(folder / "out"), micro_batch_size=1, global_batch_size=3, max_steps=6, save_steps=3, logging_steps=1,
        learning_rate=0.01, report_to=("none",), torch_dtype="float32", recompute_granularity="none", peak_tflops=0.1,
    )  # fmt: skip
    return {**base, **changes}


def argv(keys: dict[str, object]) -> list[str]:
    found = []
    for name, value in keys.items():
        found.append(f"--{name}")
        if isinstance(value, tuple):
            found += map(str, value)
        elif isinstance(value, dict):
            found.append(json.dumps(value))
        else:
            found.append(str(value).lower() if isinstance(value, bool) else str(value))
    return found


def launch(keys: dict[str, object], comm: Comm | None = None) -> bool:
    """The run in this process: one rank, or the rank of `comm` (ranks as threads hear no signals)."""
    configs = [
        config(**{f.name: keys[f.name] for f in dataclasses.fields(config) if f.name in keys})
        for config in (RunConfig, TunerConfig, DataConfig, OptimConfig)
    ]
    flat = {name: value for config in (*configs, ParallelConfig()) for name, value in dataclasses.asdict(config).items()}
    stop, threads = StopFlag(listen=comm is None), torch.get_num_threads()
    torch.set_num_threads(1)  # the operators are tiny: a second thread costs more than it does
    try:
        return run(
            *configs, Mesh.single() if comm is None else Mesh.from_comm(comm), stop,
            arguments=flat, yaml_path=None,
            commands=Commands(
                "torchrun -m swiftk.train", "tensorboard", "swiftk.train --resume_from_checkpoint auto", "swiftk.merge",
                "swiftk.generate",
            ),
        )  # fmt: skip
    finally:
        stop.close()
        torch.set_num_threads(threads)


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]


def model(mesh: Mesh | None = None, dtype: torch.dtype = torch.float64, **changes: object) -> Model:
    config = ModelConfig.from_hf({**MODEL, **changes})
    return Model(config, mesh or Mesh.single(), compute_dtype=dtype, seed=1, recompute="none")


def batch(lengths: list[int], trained: float, seed: int) -> Batch:
    """Random documents; `trained` is the share of their tokens with a label."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(0, MODEL["vocab_size"], (total,), generator=g)
    labels = torch.where(torch.rand(total, generator=g) < trained, ids.roll(-1), -100)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    labels[bounds[1:] - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Batch(ids, labels, positions, bounds.int(), rows << 32 | positions, tuple(range(len(lengths))))


def losses(model: Model, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> list[float]:
    """Of one step per batch."""
    found = []
    for step, one in enumerate(batches):
        loss = token_loss(model, one, seed_step=torch.tensor([7, step], device=model.device)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found

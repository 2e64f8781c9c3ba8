"""Peak resident memory of a QLoRA step, against the sum of what has to be there, component by component; the peer beside it.

A Qwen3-0.6B shape (28 layers, hidden 1024, vocabulary 151,936, tied) with random weights, 2 rows of 2048 tokens, r 16 on all
linears. Each candidate has a process of its own: imports and steps of a tiny model, whose memory is not counted; then the
model, one step on a few tokens (after it the optimizer has its state), and the step that is measured.
Activations are counted by the formula of swiftk/model/transformer.py, and so is the block that is being computed again; of the
loss the three rows of H per token around the head (the last norm's input and output, and their gradient) and its buffer of
logits. Not counted, so part of the excess: gradients inside a block, the NF4 columns that the backward dequantises, torch's
and the allocator's own. The peer has gradient checkpointing on, whatever --recompute says: its best for memory.
bf16, where the CPU has it, for both; else fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.allocator import give_back_large_blocks
from swiftk.benchmarks.bench_train import FEW, Save, step_dtype
from swiftk.benchmarks.harness import Options, Parser, peak_extra_mib, peak_resident_mib, shared_arguments
from swiftk.benchmarks.step import (
    CANDIDATES,
    PEER,
    QUICK,
    RANK,
    Candidate,
    Setting,
    in_own_process,
    make_batches,
    missing_packages,
    warm_up,
)
from swiftk.kernels._head import BUFFER_BYTES
from swiftk.model import ModelConfig
from swiftk.model.transformer import RECOMPUTE

GOAL = 1.15  # of the sum
QWEN3_600M = ModelConfig(
    model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rope_theta=1e6,
    tie_word_embeddings=True, qk_norm=True,
)  # fmt: skip


def activation_elements(config: ModelConfig, recompute: str, rank: int) -> tuple[int, int]:
    """Elements per token that a block keeps for the backward, and how many more it has while it is computed again."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    everything = 4 * hidden + 3 * query + 3 * kv + 3 * inner + 7 * rank
    selective = 3 * hidden + 2 * query + 2 * kv + 2 * inner + 7 * rank
    kept = {"none": everything, "selective": selective, "full": hidden}[recompute]
    return kept, everything - kept


def components(setting: Setting, candidate: Candidate) -> dict[str, float]:
    """MiB of everything that is counted, after a step."""
    model, config = candidate.model, setting.config
    tokens, wide, accumulated = sum(setting.lengths[-1]), setting.dtype.itemsize, 4  # bytes; logits are fp32
    kept, again = activation_elements(config, setting.recompute, RANK)
    nf4 = {"codes", "absmax", "nested_code_map", "nested_absmax", "nested_offset"}

    def nbytes(tensors) -> int:
        return sum(t.nbytes for t in tensors)

    buffers = dict(model.named_buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    count = {
        "NF4 weights": nbytes(t for name, t in buffers.items() if name.rsplit(".", 1)[-1] in nf4),
        "embeddings and norms": nbytes(p for p in model.parameters() if not p.requires_grad),
        "rotary tables": nbytes((model.rope_cos, model.rope_sin)),
        "adapters": nbytes(trained),
        "their gradients": nbytes(trained),
        "optimizer": nbytes(t for state in candidate.optimizer.state.values() for t in state.values()),
        "activations kept": config.num_hidden_layers * kept * tokens * wide,
        "activations of one block again": again * tokens * wide,
        "head and loss": 3 * config.hidden_size * tokens * wide + min(BUFFER_BYTES, tokens * config.vocab_size * accumulated),
    }
    return {name: size / 2**20 for name, size in count.items()}


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """In a process of its own: the peak beyond imports, the process's own peak, and of ours the components."""
    if name == "swiftk":
        give_back_large_blocks()  # as every run of the trainer does
    warm_up(name, setting)
    parts: dict[str, float] = {}

    def run() -> None:
        candidate = CANDIDATES[name](setting)
        for batch in make_batches(setting):
            candidate.step(batch)
        if name == "swiftk":
            parts.update(components(setting, candidate))

    peak = peak_extra_mib(run)
    return {"peak_mib": peak, "process_mib": None if peak is None else peak_resident_mib(), "components_mib": parts}


def show(r: dict[str, Any]) -> str:
    ours = r["swiftk"]
    lines = [f"QLoRA, {r['tokens']} tokens, {r['dtype']}, recompute {r['recompute']}:"]
    lines += [f"  {name:34} {mib:8.0f} MiB" for name, mib in ours["components_mib"].items()]
    lines.append(f"  {'sum':34} {r['sum_mib']:8.0f} MiB")
    for name, label in (("swiftk", "swiftk"), ("peer", PEER["qlora"])):
        if name in r:
            peak = "not measured"
            if r[name]["peak_mib"] is not None:
                ratio = f", {r['of_sum']:.2f}x of the sum (at most {GOAL} is the goal)" if name == "swiftk" else ""
                peak = f"{r[name]['peak_mib']:8.0f} MiB{ratio}; the process {r[name]['process_mib']:.0f} MiB"
            lines.append(f"  {'peak of ' + label:34} {peak}")
    return "\n".join(lines)


def run(options: Options, arguments: list[str], save: Save | None = None) -> dict[str, Any]:
    """Measures and prints; `save`, with a name and what to keep, is called at the end."""
    parser = Parser("memory", description=__doc__, parents=[shared_arguments("memory")])
    parser.add_argument("--recompute", choices=RECOMPUTE, default="full", help="ours; default: full")
    parser.add_argument("--tokens", type=int, default=32 if options.quick else 2048, help="of each row")
    parser.add_argument("--rows", type=int, default=2)
    args = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error(f"--device has {options.device}, wants cpu; a GPU's peak is in `bench train --device cuda`")
    for name, least in (("tokens", 2), ("rows", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} has {getattr(args, name)}, wants at least {least}")
    config = QUICK if options.quick else QWEN3_600M
    lengths = (FEW, (args.tokens,) * args.rows)
    setting = Setting(
        config, "qlora", step_dtype(options), options.isa, args.recompute, torch.get_num_threads(), lengths,
        peer_checkpointing=True,
    )  # fmt: skip
    shape = {"layers": config.num_hidden_layers, "hidden": config.hidden_size, "vocab": config.vocab_size, "rank": RANK}
    record: dict[str, Any] = {
        "dtype": str(setting.dtype).removeprefix("torch."), "recompute": args.recompute, "model": shape,
        "tokens": args.tokens * args.rows, "swiftk": in_own_process(setting.threads, measure, "swiftk", setting),
    }  # fmt: skip
    ours = record["swiftk"]
    record["sum_mib"] = sum(ours["components_mib"].values())
    record["of_sum"] = None if ours["peak_mib"] is None else ours["peak_mib"] / record["sum_mib"]
    missing = missing_packages("qlora")
    if missing and options.wants("transformers"):
        print(f"{', '.join(missing)} not installed: ours alone")
    elif options.wants("transformers"):
        record["peer"] = in_own_process(setting.threads, measure, "peer", setting)
    print(show(record))
    if save:
        save("memory", record)
    return record

"""One optimizer step of full tuning, LoRA and QLoRA against transformers, peft and bitsandbytes (step.py says what each does).

    forward + loss, backward, gradient norm and clip, fused AdamW, gradients set to None

Two kinds of rows: lengths as they are in a data set, where the peer pads, and equal lengths of 256 (on a GPU two of 2048),
which need no padding. The model has 29 M parameters, on a GPU the shape of Llama 3.1 8B with random weights (--shape 7b: of
Llama 2 7B).
Loss and gradient norm of both are compared before anything is timed. The steps of ours, ours again (the self-pair: the noise
floor), the peer and the matmul floor are interleaved batch by batch, their order reversed in every second round.
The matmul floor is torch.matmul's time for the step's products on the real tokens: of each linear y = x W^T and dx = dy W, in
full tuning dW = dy^T x, and of the head; with adapters there is no dx of the first q, k, v, below which nothing is trained.
Attention, the adapters' narrow products, dequantising and everything that only moves bytes is not in it. Peak memory is that
of a process of its own for each, beyond what is resident after its imports and steps of a tiny model; the peer keeps all of
its activations, ours what --recompute says.
bf16, where the CPU has it, for both; else fp32. Weights are held as step.py says.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftk.benchmarks.harness import Options, Parser, peak_extra_mib, shared_arguments
from swiftk.benchmarks.step import (
    CANDIDATES,
    PEER,
    QUICK,
    RANK,
    TUNERS,
    Setting,
    check_values,
    in_own_process,
    make_batches,
    missing_packages,
    ours,
    peer,
    warm_up,
)
from swiftk.config import DataConfig, TunerConfig
from swiftk.model import ModelConfig
from swiftk.model.adapter import linear_shapes
from swiftk.model.compute import compute_dtype
from swiftk.trainer.data import load_dataset
from swiftk.trainer.packing import Batch
from swiftk.trainer.rows import read_rows
from swiftk.trainer.tokenizer import train_tokenizer

Save = Callable[[str, dict[str, Any]], Any]  # name, what to keep

CHECKED = (40, 90, 64)  # rows on which values are compared, enough for that
FEW = (8, 8)  # rows of a step after which the optimizer has its state
EQUAL, EQUAL_GPU = 256, 2048  # tokens of the rows that need no padding: 8 of them, on a GPU 2
GSM8K = Path(__file__).with_name("gsm8k_lengths.json")
SMALL = ModelConfig(
    model_type="qwen3", vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, rope_theta=1e6,
    tie_word_embeddings=True, qk_norm=True,
)  # fmt: skip
EIGHT_B = ModelConfig(  # Llama 3.1 8B
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rope_theta=5e5,
    tie_word_embeddings=False,
)  # fmt: skip
SEVEN_B = ModelConfig(  # Llama 2 7B
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096, rope_theta=1e4,
    tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {"small": SMALL, "7b": SEVEN_B, "8b": EIGHT_B}


# --- rows --------------------------------------------------------------------------------------------------------


def read_lengths(path: Path, vocab_size: int) -> list[int]:
    """Tokens per row: a file of numbers (a JSON list, or one a line), of {"counts": {"tokens": rows}}, or of rows as the
    trainer reads them, counted with a tokenizer of vocab_size tokens that is trained on them (`--tokenizer train` there)."""
    try:
        text = path.read_text()
        if re.fullmatch(r"[\d\s,\[\]]*", text):
            found = [int(n) for n in re.findall(r"\d+", text)]
        elif text.lstrip().startswith("{") and '"counts"' in text[:500]:
            found = [int(n) for n, rows in json.loads(text)["counts"].items() for _ in range(rows)]
        else:
            found = count_tokens(path, vocab_size)
    except (OSError, ValueError) as error:
        raise SystemExit(f"swiftk.bench: --lengths {path}: {error}") from None
    if not found or min(found) < 2:
        what = f"a row of {min(found)}, wants at least 2 tokens" if found else "no numbers, wants the tokens of each row"
        raise SystemExit(f"swiftk.bench: --lengths {path} has {what}")
    return found


def count_tokens(path: Path, vocab_size: int) -> list[int]:
    config = DataConfig(dataset=(str(path),))
    rows, _ = read_rows(config)
    tokenizer = train_tokenizer((str(m["content"]) for row in rows for m in row.messages), vocab_size)
    return load_dataset(config, tokenizer, 1 << 30).lengths.tolist()


def draw(lengths: list[int], batches: int, rows: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """Rows in the order of a fixed seed, from the start again where there are too few."""
    drawn = np.resize(np.random.default_rng(0).permutation(lengths).clip(max=longest), (batches, rows))
    return tuple(tuple(batch) for batch in drawn.tolist())


# --- the limit ---------------------------------------------------------------------------------------------------


def products(setting: Setting) -> list[tuple[tuple[int, int], int]]:
    """(shape of the weight, how many products with it), of each linear and the head: y, dx and, in full tuning, dW."""
    full = setting.tuner == "full"
    found = []
    for name, shape in linear_shapes(setting.config).items():
        below = name.startswith("model.layers.0.") and name.endswith(("q_proj", "k_proj", "v_proj"))
        found.append((shape, 3 if full else 1 if below else 2))
    return [*found, ((setting.config.vocab_size, setting.config.hidden_size), 3 if full else 2)]


def matmul_floor(setting: Setting) -> Callable[[Batch], float]:
    """The returned function gives the seconds that the products of one step on the batch take."""
    todo = products(setting)
    weights = {shape: torch.randn(shape, device=setting.device).to(setting.dtype) for shape, _ in todo}
    wait = torch.cuda.synchronize if setting.device == "cuda" else lambda: None

    def run(batch: Batch) -> float:
        tokens, seconds = len(batch.input_ids), 0.0
        x = {n: torch.randn(tokens, n, device=setting.device).to(setting.dtype) for shape in weights for n in shape}
        for shape, count in todo:
            weight, inputs, gradient = weights[shape], x[shape[1]], x[shape[0]]
            wait()
            start = time.perf_counter()
            inputs @ weight.T
            if count > 1:
                gradient @ weight
            if count > 2:
                gradient.T @ inputs
            wait()
            seconds += time.perf_counter() - start
        return seconds

    return run


# --- measurement -------------------------------------------------------------------------------------------------


def peak_mib(name: str, setting: Setting) -> float | None:
    """Weights, gradients, optimizer state and activations of a step; None where the system does not tell."""
    warm_up(name, setting)

    def run() -> None:
        candidate = CANDIDATES[name](setting)
        for batch in make_batches(replace(setting, lengths=(FEW, setting.lengths[0]))):
            candidate.step(batch)

    return peak_extra_mib(run, setting.device)


Timed = dict[str, Callable[[Batch], Any]]


def candidates_of(setting: Setting, against: bool) -> Timed:
    """Each ready: values compared, a step of the first batch done. `against`: the peer too."""
    if against:
        check_values(setting, make_batches(replace(setting, lengths=(CHECKED,)))[0])
    mine, floor = ours(setting).step, matmul_floor(setting)
    candidates: Timed = {"swiftk": mine, "self": mine, **({"peer": peer(setting).step} if against else {}), "floor": floor}
    first = make_batches(setting)[0]
    for step in set(candidates.values()):
        step(first)
    return candidates


def measure(rows: str, setting: Setting, timed: Timed, *, memory: bool) -> dict[str, Any]:
    """One record."""
    batches, against = make_batches(setting), "peer" in timed
    candidates = {name: step for name, step in timed.items() if name != "floor"}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number, batch in enumerate(batches):
        order = list(candidates) if number % 2 == 0 else list(reversed(candidates))
        for candidate in order:
            start = time.perf_counter()
            candidates[candidate](batch)
            if setting.device == "cuda":
                torch.cuda.synchronize()
            seconds[candidate].append(time.perf_counter() - start)
        seconds["floor"].append(timed["floor"](batch))
    tokens = [len(b.input_ids) for b in batches]
    places = [len(b) * max(b) for b in setting.lengths]
    record: dict[str, Any] = {
        "tuner": setting.tuner, "peer_name": PEER[setting.tuner], "rows": rows, "batches": len(batches), "tokens": sum(tokens),
        "padding": 1 - sum(tokens) / sum(places), "matmuls": sum(count for _, count in products(setting)),
        "matmul_floor_ms": 1e3 * statistics.median(seconds["floor"]),
        "self_spread": abs(statistics.median(b / a for a, b in zip(seconds["swiftk"], seconds["self"], strict=True)) - 1),
    }  # fmt: skip
    for candidate in candidates:
        if candidate != "self":
            taken = seconds[candidate]
            percents = [100 * f / s for f, s in zip(seconds["floor"], taken, strict=True)]
            record[candidate] = {
                "tokens_per_s": sum(tokens) / sum(taken), "ms": 1e3 * statistics.median(taken),
                "ms_steps": [1e3 * s for s in taken], "percent_of_floor": statistics.median(percents),
                "peak_mib": in_own_process(setting.threads, peak_mib, candidate, setting) if memory else None,
            }  # fmt: skip
    if against:
        ratios = [b / a for a, b in zip(seconds["swiftk"], seconds["peer"], strict=True)]
        record["ratio"], record["ratio_steps"] = statistics.median(ratios), ratios
    return record


def show(r: dict[str, Any]) -> str:
    lines = [
        f"{r['tuner']}, {r['rows']}: {r['batches']} batches, {r['tokens']} tokens, {100 * r['padding']:.0f} % padding for the "
        f"peer; matmul floor {r['matmul_floor_ms']:.0f} ms ({r['matmuls']} products), self-pair {100 * r['self_spread']:.0f} %"
    ]
    for name, label in (("swiftk", "swiftk"), ("peer", r["peer_name"])):
        if name in r:
            c = r[name]
            memory = "not measured" if c["peak_mib"] is None else f"{c['peak_mib']:.0f} MiB"
            lines.append(
                f"  {label:34} {c['tokens_per_s']:7.0f} real tokens/s  {c['ms']:7.0f} ms a step  "
                f"{c['percent_of_floor']:3.0f} % of the floor's rate  peak {memory}"
            )
    if "ratio" in r:
        spread = f"{min(r['ratio_steps']):.2f} .. {max(r['ratio_steps']):.2f}"
        lines.append(f"  the peer's time / ours: {r['ratio']:.2f}x ({spread})")
    return "\n".join(lines)


def step_dtype(options: Options) -> torch.dtype:
    """The one of --dtypes, or bf16 on a GPU and where the CPU multiplies it, else fp32."""
    return compute_dtype(options.dtypes[0] if options.dtypes else None, options.isa, torch.device(options.device))


def run(options: Options, arguments: list[str], save: Save | None = None) -> list[dict[str, Any]]:
    """Measures and prints; `save`, with a name and what to keep, is called after each tuner."""
    parser = Parser("train", description=__doc__, parents=[shared_arguments("train")])
    parser.add_argument("--tuner", nargs="+", choices=TUNERS, help="default: all; on a GPU lora and qlora")
    parser.add_argument("--shape", choices=SHAPES, help="default: small; on a GPU 8b")
    parser.add_argument("--lengths", type=Path, default=GSM8K, metavar="FILE", help="tokens per row, or rows whose tokens are "
                        "counted; default: those of GSM8K's training split, benchmarks/gsm8k_lengths.json")  # fmt: skip
    parser.add_argument("--steps", type=int, default=1 if options.quick else 3, help="batches per kind of rows")
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--dropout", type=float, default=TunerConfig.lora_dropout, help="of the adapters' inputs, for both")
    parser.add_argument(
        "--recompute", choices=["none", "selective", "full"], default="selective", help="ours; the peer keeps all"
    )
    parser.add_argument(
        "--peer_checkpointing", action="store_true", help="the peer computes its blocks again, as ours with --recompute full"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not start the processes that measure peak memory")
    args = parser.parse_args(arguments)
    if len(options.dtypes) > 1 or "float64" in options.dtypes:
        parser.error(f"--dtypes has {' '.join(options.dtypes)}, wants float32 or bfloat16")
    for name in ("steps", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has {getattr(args, name)}, wants at least 1")
    gpu = options.device == "cuda"
    usual = "8b" if gpu else "small"
    shape_name = args.shape or usual
    config = QUICK if options.quick else SHAPES[shape_name]
    longest = 32 if options.quick else config.max_position_embeddings
    equal_tokens = min(EQUAL_GPU if gpu else EQUAL, longest)
    equal = ((equal_tokens,) * (2 if gpu else args.rows),) * args.steps
    drawn = draw(read_lengths(args.lengths, config.vocab_size), args.steps, args.rows, longest)
    kinds = {args.lengths.name: drawn, f"rows of {equal_tokens}": equal}
    everything = []
    for tuner in args.tuner or (("lora", "qlora") if gpu else TUNERS):
        missing = missing_packages(tuner)
        against = options.wants("transformers") and not missing
        if missing and options.wants("transformers"):
            print(f"{', '.join(missing)} not installed: {tuner} of ours alone")
        setting = Setting(
            config, tuner, step_dtype(options), options.isa, args.recompute, torch.get_num_threads(), equal, args.dropout,
            peer_checkpointing=args.peer_checkpointing, device=options.device, drawn_there=gpu,
        )  # fmt: skip
        timed = candidates_of(setting, against)
        records = []
        for name, lengths in kinds.items():
            records.append(measure(name, replace(setting, lengths=lengths), timed, memory=not args.no_memory))
            print(show(records[-1]), flush=True)
        shape = {"layers": config.num_hidden_layers, "hidden": config.hidden_size, "vocab": config.vocab_size}
        adapters = {} if tuner == "full" else {"rank": RANK, "dropout": args.dropout}
        kept = {
            "tuner": tuner, "dtype": str(setting.dtype).removeprefix("torch."), "recompute": args.recompute,
            "peer_checkpointing": args.peer_checkpointing, "shape": shape_name, "model": shape | adapters, "training": records,
        }  # fmt: skip
        if save:
            another = [] if args.recompute == "selective" else [args.recompute]
            save("-".join(["train", tuner, *another, *([] if shape_name == usual else [shape_name])]), kept)
        everything += records
    return everything

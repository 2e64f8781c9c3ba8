"""One optimizer step of full tuning against transformers: the same configuration, initial weights, rows and optimizer.

Ours is the trainer's step on one token-first batch of 8 rows (no padding); the peer gets the same rows padded to the longest
one, with an attention mask, and its own loss (logits of every position). Three kinds of rows: lengths of short questions and
answers (log-normal, 60 to 400 tokens), of a file, and equal lengths of 256, where padding costs nothing.

    forward + loss, backward, gradient norm and clip, fused AdamW, gradients set to None

Loss and gradient norm of both are compared before anything is timed. The steps of ours, ours again (the self-pair: the noise
floor), the peer and the matmul floor are interleaved batch by batch, their order reversed in every second round.
The matmul floor is torch.matmul's time for the step's products on the real tokens: of each linear y = x W^T, dx = dy W,
dW = dy^T x, and of the head; attention and everything that only moves bytes is not in it. Peak memory is that of a process
of its own for each, beyond what is resident after its imports and a step of a tiny model.
bf16, where the CPU has it: our compute dtype; the peer under autocast; fp32 weights for both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftk.benchmarks.harness import Options, peak_extra_mib
from swiftk.config import OptimConfig
from swiftk.kernels._native import native
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.data import Dataset
from swiftk.trainer.loss import token_loss
from swiftk.trainer.optimizer import build_optimizer, clip_gradients_, gradient_norm, set_learning_rate
from swiftk.trainer.packing import IGNORE_INDEX, Batch, collate
from swiftk.trainer.template import Encoded

RATE = 1e-4
OPTIM = OptimConfig()
MEMORY_STEPS = 2  # the second one has the optimizer's state
SMALL = ModelConfig(
    model_type="qwen3", vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, rope_theta=1e6,
    tie_word_embeddings=True, qk_norm=True,
)  # fmt: skip
QUICK = replace(SMALL, vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, layer_types=())


@dataclass(frozen=True)
class Setting:
    """Everything that a process needs to make the same batches and models."""

    config: ModelConfig
    dtype: torch.dtype
    isa: str
    recompute: str
    threads: int
    lengths: tuple[tuple[int, ...], ...]  # of the rows of each batch


# --- rows --------------------------------------------------------------------------------------------------------


def short_answers(batches: int, rows: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """Log-normal lengths around 150 tokens with sigma 0.5, clipped to 60 .. 400 (scaled down where `longest` is less)."""
    drawn = np.random.default_rng(0).lognormal(np.log(150), 0.5, (batches, rows)).clip(60, 400) * min(1.0, longest / 400)
    return tuple(tuple(int(n) for n in batch) for batch in drawn)


def lengths_of(path: Path, batches: int, rows: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """Tokens per row from a JSONL file, one number or {"length": number} a line, shuffled by a fixed seed and reused."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            value = json.loads(line)
            value = value["length"] if isinstance(value, dict) else value
            found.append(min(int(value), longest))
        except (ValueError, KeyError, TypeError):
            raise SystemExit(
                f'swiftk.bench: --lengths {path} has {line[:60]!r} in line {number}, wants a number or {{"length": number}}'
            ) from None
        if found[-1] < 2:
            raise SystemExit(f"swiftk.bench: --lengths {path} has {found[-1]} in line {number}, wants at least 2")
    if not found:
        raise SystemExit(f"swiftk.bench: --lengths {path} has no lines, wants one length a line")
    drawn = np.resize(np.random.default_rng(0).permutation(found), (batches, rows))
    return tuple(tuple(batch) for batch in drawn.tolist())


def make_batches(setting: Setting) -> list[Batch]:
    random = np.random.default_rng(1)
    batches = []
    for lengths in setting.lengths:
        rows = [Encoded(random.integers(0, setting.config.vocab_size, n).astype(np.int32), np.ones(n, bool)) for n in lengths]
        batches.append(collate(Dataset(rows, {}), [tuple(range(len(rows)))]))
    return batches


# --- candidates --------------------------------------------------------------------------------------------------

Step = Callable[[Batch], tuple[float, float]]  # one optimizer step: loss per trained token, gradient norm before the clip


def our_step(setting: Setting) -> tuple[Step, Model]:
    model = Model(setting.config, Mesh.single(), compute_dtype=setting.dtype, isa=setting.isa, recompute=setting.recompute)
    params = dict(model.named_parameters())
    optimizer = build_optimizer(params, OPTIM)
    set_learning_rate(optimizer, RATE)

    def step(batch: Batch) -> tuple[float, float]:
        trained = batch.num_loss_tokens
        loss = token_loss(model, batch, isa=setting.isa).total
        (loss / trained).backward()
        norm = gradient_norm(params.values())
        clip_gradients_(params.values(), norm, OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) / trained, norm

    return step, model


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The rows as (rows, longest) with a mask; the peer shifts the labels itself, so they are the input ids."""
    rows = batch.input_ids.split((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())

    def pad(value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    labels = pad(IGNORE_INDEX)
    return {"input_ids": pad(0), "attention_mask": (labels != IGNORE_INDEX).long(), "labels": labels}


def transformers_step(setting: Setting) -> tuple[Step, torch.nn.Module]:
    import transformers

    hf = transformers.AutoConfig.for_model(**setting.config.to_hf())
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    model.train()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        params, lr=RATE, betas=(OPTIM.adam_beta1, OPTIM.adam_beta2), eps=OPTIM.adam_eps, weight_decay=OPTIM.weight_decay,
        fused=True,
    )  # fmt: skip

    def step(batch: Batch) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            loss = model(**padded(batch)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    return step, model


def matmul_floor(setting: Setting) -> Callable[[Batch], float]:
    """The returned function gives the seconds that the products of one step on the batch take."""
    c = setting.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = [(q, c.hidden_size), (kv, c.hidden_size), (kv, c.hidden_size), (c.hidden_size, q)]
    block += [(c.intermediate_size, c.hidden_size)] * 2 + [(c.hidden_size, c.intermediate_size)]
    weights = {shape: torch.randn(shape, dtype=setting.dtype) for shape in {*block, (c.vocab_size, c.hidden_size)}}

    def run(batch: Batch) -> float:
        tokens, seconds = len(batch.input_ids), 0.0
        x = {n: torch.randn(tokens, n).to(setting.dtype) for shape in weights for n in shape}
        for shape in block * c.num_hidden_layers + [(c.vocab_size, c.hidden_size)]:
            weight, inputs, gradient = weights[shape], x[shape[1]], x[shape[0]]
            start = time.perf_counter()
            inputs @ weight.T
            gradient @ weight
            gradient.T @ inputs
            seconds += time.perf_counter() - start
        return seconds

    return run


# --- measurement -------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Setting], tuple[Step, torch.nn.Module]]] = {"swiftk": our_step, "transformers": transformers_step}


def _memory_process(name: str, setting: Setting, pipe) -> None:
    torch.set_num_threads(setting.threads)

    def run(setting: Setting) -> None:
        step, _model = STEPS[name](setting)
        for batch in make_batches(setting):
            step(batch)

    run(replace(setting, config=QUICK, lengths=((8, 8),)))  # what is imported and started on the first step is not counted
    pipe.send(peak_extra_mib(lambda: run(replace(setting, lengths=setting.lengths[:MEMORY_STEPS]))))


def peak_mib(name: str, setting: Setting) -> float | None:
    """Weights, gradients, optimizer state and activations of two steps; None where the system does not tell."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_memory_process, args=(name, setting, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"bench train: the memory measurement of {name} ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def check_values(setting: Setting, batch: Batch) -> None:
    """Both models, from one set of weights: loss and gradient norm on one batch. 1e-4 in fp32, 2 % in bf16."""
    (ours, model), (theirs, peer) = our_step(setting), transformers_step(setting)
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    bound = 0.02 if setting.dtype == torch.bfloat16 else 1e-4
    for what, a, b in zip(("loss", "gradient norm"), ours(batch), theirs(batch), strict=True):
        assert abs(a - b) <= bound * abs(b), f"{what}: swiftk {a:.6g}, transformers {b:.6g}, bound {bound} relative"


def measure(name: str, setting: Setting, *, peer: bool, memory: bool) -> dict[str, Any]:
    batches = make_batches(setting)
    if peer:
        check_values(setting, batches[0])
    floor = matmul_floor(setting)
    ours, _ = our_step(setting)
    candidates: dict[str, Callable[[Batch], Any]] = {"swiftk": ours, "self": ours}
    if peer:
        candidates["transformers"] = transformers_step(setting)[0]
    seconds: dict[str, list[float]] = {c: [] for c in [*candidates, "floor"]}
    for f in (*candidates.values(), floor):
        f(batches[0])  # first calls: threads, optimizer state
    for number, batch in enumerate(batches):
        order = list(candidates) if number % 2 == 0 else list(reversed(candidates))
        for candidate in order:
            start = time.perf_counter()
            candidates[candidate](batch)
            seconds[candidate].append(time.perf_counter() - start)
        seconds["floor"].append(floor(batch))
    tokens = [len(b.input_ids) for b in batches]
    places = [len(b) * max(b) for b in setting.lengths]
    record: dict[str, Any] = {
        "rows": name, "batches": len(batches), "tokens": sum(tokens), "padding": 1 - sum(tokens) / sum(places),
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
                "peak_mib": peak_mib(candidate, setting) if memory else None,
            }  # fmt: skip
    if peer:
        ratios = [b / a for a, b in zip(seconds["swiftk"], seconds["transformers"], strict=True)]
        record["ratio"], record["ratio_steps"] = statistics.median(ratios), ratios
    return record


def show(r: dict[str, Any]) -> str:
    lines = [
        f"{r['rows']}: {r['batches']} batches, {r['tokens']} tokens, {100 * r['padding']:.0f} % padding for the peer; "
        f"matmul floor {r['matmul_floor_ms']:.0f} ms, self-pair {100 * r['self_spread']:.0f} %"
    ]
    for name in ("swiftk", "transformers"):
        if name in r:
            c = r[name]
            memory = "not measured" if c["peak_mib"] is None else f"{c['peak_mib']:.0f} MiB"
            lines.append(
                f"  {name:12} {c['tokens_per_s']:7.0f} real tokens/s  {c['ms']:7.0f} ms a step  "
                f"{c['percent_of_floor']:3.0f} % of the floor's rate  peak {memory}"
            )
    if "ratio" in r:
        lines.append(
            f"  transformers' time / ours: {r['ratio']:.2f}x ({min(r['ratio_steps']):.2f} .. {max(r['ratio_steps']):.2f})"
        )
    return "\n".join(lines)


def run(options: Options, arguments: list[str]) -> dict[str, Any]:
    """Measures, prints, and returns what `python -m swiftk.bench train --save` keeps."""
    parser = argparse.ArgumentParser(prog="python -m swiftk.bench train")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help='JSONL, tokens of a row per line: 123 or {"length": 123}')
    parser.add_argument("--steps", type=int, default=2 if options.quick else 7, help="batches per kind of rows")
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument(
        "--recompute", choices=["none", "selective", "full"], default="selective", help="ours; the peer keeps all"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not start the processes that measure peak memory")
    args = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error(f"--device has {options.device}, wants cpu: training has no CUDA kernels yet")
    for name in ("steps", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has {getattr(args, name)}, wants at least 1")
    config = QUICK if options.quick else SMALL
    longest = 32 if options.quick else 400
    fast_bf16 = (native().best_isa() if options.isa == "auto" else options.isa) == "avx512"
    dtype = torch.bfloat16 if args.dtype == "bfloat16" or (args.dtype is None and fast_bf16) else torch.float32
    setting = Setting(config, dtype, options.isa, args.recompute, torch.get_num_threads(), ())
    peer = options.wants("transformers")
    if peer:
        try:
            import transformers  # noqa: F401
        except ImportError:
            print("transformers is not installed: ours alone")
            peer = False
    kinds = {"short answers": short_answers(args.steps, args.rows, longest)}
    if args.lengths:
        kinds = {args.lengths.name: lengths_of(args.lengths, args.steps, args.rows, config.max_position_embeddings)}
    kinds["rows of 256"] = ((min(256, longest),) * args.rows,) * args.steps
    records = []
    for name, lengths in kinds.items():
        records.append(measure(name, replace(setting, lengths=lengths), peer=peer, memory=not args.no_memory))
        print(show(records[-1]), flush=True)
    shape = {"layers": config.num_hidden_layers, "hidden": config.hidden_size, "vocab": config.vocab_size}
    return {"dtype": str(dtype).removeprefix("torch."), "recompute": args.recompute, "model": shape, "training": records}

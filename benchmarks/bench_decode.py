"""The paged decoder against llama.cpp and transformers, and against itself with a part of it switched off.

On a GPU the first, the second and `batch` at the shape of Llama 3.1 8B.

    single-nf4    one sequence, Qwen3-0.6B shape, NF4 with the head in NF4; llama.cpp Q4_0
    single        the same shape in the compute dtype; transformers `generate`
    single-small  the 29 M model of the training benchmark; transformers `generate`
    batch         64 requests of random lengths in and out, 29 M; transformers: static batches of 16, continuous batching
    prefill       time to the first token of a 512-token prompt, Qwen3-0.6B shape, plain and NF4; llama.cpp, transformers
    lora          an unmerged adapter of rank 16 on all linears; the base alone
    prefix        32 requests that share 512 tokens; without the prefix cache
    speculation   prompt look-up on text that copies, one sequence; without drafts
    invariance    row-invariant linears; the same engine with torch.matmul's vendor, and with the faster of both per product

Values come before time: our log-probabilities are the trainer's, bit for bit, greedy text in fp32 is transformers', the Q4_0
model's logits are those of its dequantised weights up to llama.cpp's 8-bit activations. All take torch's number of threads.
Ours, ours again (the self-pair: the noise floor) and each peer are interleaved, in three runs; medians. One sequence is timed
from its first new token to its last, requests from their arrival to the last token of all. Weights are random (seed 0), no
sequence ends before its length.

Bytes of a step: each weight that multiplies once (NF4: half a byte and 4/64 for absmax), and of the cache what each row reads:
    2 layers kv_heads head_dim itemsize   per token before it and itself
bf16, where the CPU has it, for both; else fp32.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swiftk.benchmarks.bench_train import EIGHT_B, SMALL, Save, step_dtype
from swiftk.benchmarks.decode_measure import (
    BIG,
    GPU,
    NF4,
    PLAIN,
    QUICK,
    RANK,
    SEED,
    Bench,
    Served,
    Sizes,
    Timed,
    after_first,
    check_trainer,
    interleave,
    over_all,
    random_prompts,
    random_requests,
    record,
    serve,
    to_first,
)
from swiftk.benchmarks.decode_peers import Decoded
from swiftk.benchmarks.decode_variants import copying_model, vendor_products
from swiftk.benchmarks.harness import Limits, Options, Parser, shared_arguments
from swiftk.decoder.engine import Engine
from swiftk.decoder.loading import NF4_BYTES, token_bytes
from swiftk.model import Model, ModelConfig
from swiftk.model.adapter import linear_shapes

# --- what a step moves and computes ------------------------------------------------------------------------------


def matrix_elements(config: ModelConfig) -> int:
    """Of all linears and the head: each multiplies every row (the head those that sample)."""
    return sum(n * k for n, k in linear_shapes(config).values()) + config.vocab_size * config.hidden_size


def weight_bytes(config: ModelConfig, dtype: torch.dtype, nf4: bool) -> float:
    return matrix_elements(config) * (NF4_BYTES if nf4 else dtype.itemsize)


def single_bytes(config: ModelConfig, dtype: torch.dtype, nf4: bool, prompt: int, new: int) -> float:
    """Per token at the mean context of tokens 2 .. new."""
    return weight_bytes(config, dtype, nf4) + token_bytes(config, dtype) * (prompt + (new + 1) / 2)


def batch_bytes(config: ModelConfig, dtype: torch.dtype, steps: int, prompts: list[list[int]], new: list[int]) -> float:
    """Per new token: weights once a step, the cache for each decoding row, the prompts' keys and values once."""
    read = sum(sum(range(len(p) + 1, len(p) + n)) + len(p) for p, n in zip(prompts, new, strict=True))
    return (steps * weight_bytes(config, dtype, False) + read * token_bytes(config, dtype)) / sum(new)


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Two per weight and token (the head: one token), four per query, key and feature of the causal half of attention."""
    head = config.vocab_size * config.hidden_size
    attention = 4 * config.num_attention_heads * config.head_dim * (tokens * (tokens + 1) // 2) * config.num_hidden_layers
    return 2 * (matrix_elements(config) - head) * tokens + 2 * head + attention


# --- the works ---------------------------------------------------------------------------------------------------


def single_nf4(bench: Bench) -> list[dict[str, Any]]:
    sizes, config = bench.sizes, bench.sizes.big
    new, (prompt,) = sizes.new_nf4, random_prompts(config, [sizes.prompt])
    model = bench.model(config, NF4)
    engine = bench.engine(model, 256)
    check_trainer(engine)
    mine = lambda: after_first(serve(engine, [prompt], [new]))  # noqa: E731
    timed: Timed = {"swiftk": mine, "self": mine}
    quantised = len(linear_shapes(config)) + 1
    facts: dict[str, Any] = {"swiftk NF4": f"{quantised} tensors, {weight_bytes(config, bench.dtype, True) / 1e6:.1f} MB"}
    if bench.wants("llama.cpp"):
        peer = bench.llama()
        facts |= peer.facts
        timed["llama.cpp Q4_0"] = lambda: after_first(peer.generate(prompt, new))
    size = single_bytes(config, bench.dtype, True, sizes.prompt, new)
    case = f"{shape(config)}, NF4 and NF4 head, {new} tokens"
    seconds = interleave(timed, sizes.runs)
    goals = {"llama.cpp Q4_0": 1.15} | ({"bandwidth": sizes.bandwidth_goals[1]} if sizes.bandwidth_goals[1] else {})
    return [record(bench, "single-nf4", case, seconds, bytes=size, goals=goals, facts=facts)]


def single(bench: Bench, work: str, config: ModelConfig, new: int, goals: dict[str, float]) -> list[dict[str, Any]]:
    sizes, (prompt,) = bench.sizes, random_prompts(config, [bench.sizes.prompt])
    engine = bench.engine(bench.model(config), 256)
    check_trainer(engine)
    mine = lambda: after_first(serve(engine, [prompt], [new]))  # noqa: E731
    timed: Timed = {"swiftk": mine, "self": mine}
    facts: dict[str, Any] = {}
    if bench.wants("transformers"):
        peer = bench.transformers(config)
        facts["attention of transformers"] = peer.best(lambda: peer.generate([prompt], min(8, new)))
        timed["transformers"] = lambda: after_first(peer.generate([prompt], new))
    size = single_bytes(config, bench.dtype, False, sizes.prompt, new)
    case = f"{shape(config)}, {new} tokens"
    goals = goals | ({"bandwidth": sizes.bandwidth_goals[0]} if sizes.bandwidth_goals[0] else {})
    return [record(bench, work, case, interleave(timed, sizes.runs), bytes=size, goals=goals, facts=facts)]


def batch(bench: Bench) -> list[dict[str, Any]]:
    sizes, config = bench.sizes, bench.sizes.small
    prompts, new = random_requests(sizes, sizes.requests)
    engine = bench.engine(bench.model(config), 2 * sizes.lengths[1], min(sizes.requests, 64))
    check_trainer(engine)
    steps = serve(engine, prompts, new).steps
    mine = lambda: over_all(serve(engine, prompts, new))  # noqa: E731
    timed: Timed = {"swiftk": mine, "self": mine}
    facts: dict[str, Any] = {"tokens in": sum(map(len, prompts)), "tokens out": sum(new)}
    once: dict[str, list[float]] = {}
    if bench.wants("transformers"):
        peer = bench.transformers(config)
        some = prompts[: sizes.static]
        facts["attention of transformers"] = peer.best(lambda: peer.generate(some, min(16, max(new))))
        timed["transformers static"] = lambda: over_all(peer.static_batches(prompts, new, sizes.static))
        few = slice(sizes.continuous)
        peer.continuous(prompts[:1], [2])
        once["transformers continuous"] = [over_all(peer.continuous(prompts[few], new[few]))]
        facts["continuous batching"] = f"once, of {sizes.continuous} requests"
    seconds = interleave(timed, sizes.runs, warm=True) | once
    size = batch_bytes(config, bench.dtype, steps, prompts, new)
    flops = sum(prefill_flops(config, len(p) + n) for p, n in zip(prompts, new, strict=True)) / sum(new)
    goals = {"transformers static": 3.0, "transformers continuous": sizes.continuous_goal}
    low, high = sizes.lengths
    case = f"{shape(config)}, {sizes.requests} requests, {low}-{high} tokens in and out"
    return [record(bench, "batch", case, seconds, bytes=size, flops=flops, goals=goals, facts=facts)]


def prefill(bench: Bench) -> list[dict[str, Any]]:
    sizes, config = bench.sizes, bench.sizes.big
    n, (prompt,) = sizes.prefill, random_prompts(config, [sizes.prefill])
    peers: Timed = {}
    facts: dict[str, Any] = {}
    if bench.wants("transformers"):
        hf = bench.transformers(config)
        facts["attention of transformers"] = hf.best(lambda: hf.generate([prompt], 1))
        peers["transformers"] = lambda: hf.generate([prompt], 1).seconds / n
    if bench.wants("llama.cpp"):
        llama = bench.llama()
        peers["llama.cpp Q4_0"] = lambda: llama.generate(prompt, 1).seconds / n
    engines = {
        kind: bench.engine(bench.model(config, tuner), n + 16, max_batched_tokens=n)
        for kind, tuner in (("plain", PLAIN), ("NF4", NF4))
    }
    timed: Timed = {
        kind: functools.partial(lambda e: serve(e, [prompt], [1]).seconds / n, engine) for kind, engine in engines.items()
    }
    timed |= {f"{kind} again": f for kind, f in timed.items()} | peers
    seconds = interleave(timed, sizes.runs)
    return [
        record(
            bench, "prefill", f"{shape(config)}, {kind}, {n} tokens",
            {"swiftk": seconds[kind], "self": seconds[f"{kind} again"], **{name: seconds[name] for name in peers}},
            bytes=weight_bytes(config, bench.dtype, kind == "NF4") / n + token_bytes(config, bench.dtype),
            flops=prefill_flops(config, n) / n, goals={name: 1.4 for name in peers}, facts=facts,
        )
        for kind in engines
    ]  # fmt: skip


def lora(bench: Bench) -> list[dict[str, Any]]:
    sizes, longest = bench.sizes, 2 * max(bench.sizes.lengths[1], 128)
    prompts, new = random_requests(sizes, sizes.part)

    def against_base(case: str, model: Model, prompts, new, per: Callable[[Decoded], float], moved) -> dict[str, Any]:
        config = model.config
        adapters = {"a": bench.adapter(config)}
        engine = bench.engine(model, longest, len(prompts), adapters=adapters)
        adapted, base = (serve(engine, prompts, new, adapter=a, logprobs=0) for a in ("a", None))
        assert adapted.logprobs != base.logprobs, "the adapter changes nothing"
        mine = lambda: per(serve(engine, prompts, new, adapter="a"))  # noqa: E731
        timed: Timed = {"swiftk": mine, "self": mine, "without adapter": lambda: per(serve(engine, prompts, new))}
        seconds = interleave(timed, sizes.runs, warm=True)
        a_and_b = sum(RANK * (n + k) for n, k in linear_shapes(config).values()) * bench.dtype.itemsize
        size = moved(adapted.steps) + a_and_b * (1 if len(prompts) == 1 else adapted.steps / sum(new))
        goals = {"without adapter": 0.9}
        return record(bench, "lora", f"{shape(config)}, {case}", seconds, bytes=size, goals=goals, facts={"rank": RANK})

    found = []
    for config, tuner, name, count in (
        (sizes.big, NF4, "NF4, ", sizes.new_nf4), (sizes.small, PLAIN, "", sizes.new_small),
    ):  # fmt: skip
        size = single_bytes(config, bench.dtype, tuner is NF4, sizes.prompt, count)
        one = random_prompts(config, [sizes.prompt])
        case = f"{name}one sequence, {count} tokens"
        found.append(against_base(case, bench.model(config, tuner), one, [count], after_first, lambda _, size=size: size))
    small = sizes.small
    found.append(against_base(
        f"{len(prompts)} requests", bench.model(small), prompts, new, over_all,
        lambda steps: batch_bytes(small, bench.dtype, steps, prompts, new),
    ))  # fmt: skip
    return found


def prefix(bench: Bench) -> list[dict[str, Any]]:
    sizes, config = bench.sizes, bench.sizes.small
    tail, new = 32, 16
    total, runs = sizes.shared + tail + new, itertools.count(1)
    rows: dict[bool, int] = {}
    engines = {
        caching: bench.engine(bench.model(config), total, sizes.sharing, prefix_caching=caching) for caching in (True, False)
    }

    def first(caching: bool) -> float:
        seed = next(runs)  # another prefix each time: none is in the cache when its requests arrive
        (shared,) = random_prompts(config, [sizes.shared], seed)
        prompts = [shared + own for own in random_prompts(config, [tail] * sizes.sharing, seed + 1000)]
        done = serve(engines[caching], prompts, [new] * sizes.sharing)
        rows[caching] = done.rows - sizes.sharing * (new - 1)
        return to_first(done)

    timed = {"swiftk": lambda: first(True), "self": lambda: first(True), "no prefix cache": lambda: first(False)}
    seconds = interleave(timed, sizes.runs)
    case = f"{shape(config)}, {sizes.sharing} requests, {sizes.shared} tokens shared, {tail} own; mean time to first token"
    size = weight_bytes(config, bench.dtype, False) * -(-rows[True] // 512)
    facts = {"prompt tokens computed": rows[True], "without": rows[False], "fewer by": f"{rows[False] / rows[True]:.1f}x"}
    goals = {"no prefix cache": 1 / 0.3}
    return [record(bench, "prefix", case, seconds, unit="s", bytes=size, flops=rows[True] * prefill_flops(config, 544) / 544,
                   goals=goals, facts=facts)]  # fmt: skip


def speculation(bench: Bench) -> list[dict[str, Any]]:
    sizes, config, n = bench.sizes, bench.sizes.small, bench.sizes.copied
    (document,) = random_prompts(config, [n])

    def against_none(case: str, model: Model, prompt: list[int], temperature: float, goals: dict[str, float]) -> dict[str, Any]:
        plain, drafting = (bench.engine(model, 2 * n + 64, speculate=kind) for kind in (None, "ngram"))
        run = functools.partial(serve, prompts=[prompt], new=[n], temperature=temperature)
        with_drafts, without = run(drafting), run(plain)
        assert with_drafts.tokens == without.tokens, "speculation changed the text"
        steps = with_drafts.steps - 1  # the first reads the prompt and gives a token
        drafted, taken = with_drafts.rows - len(prompt) - steps, n - 1 - steps
        mine = lambda: after_first(run(drafting))  # noqa: E731
        timed: Timed = {"swiftk": mine, "self": mine, "no drafts": lambda: after_first(run(plain))}
        seconds = interleave(timed, sizes.runs, warm=True)
        size = single_bytes(config, bench.dtype, False, len(prompt), n) * steps / (n - 1)
        facts = {
            "drafts": drafted, "accepted": f"{100 * taken / max(1, drafted):.0f} %", "tokens a step": f"{(n - 1) / steps:.2f}",
        }  # fmt: skip
        return record(bench, "speculation", f"{shape(config)}, {case}", seconds, bytes=size, goals=goals, facts=facts)

    copier = copying_model(config, bench.dtype, bench.options.isa, SEED)
    return [
        against_none("a text that is copied", copier, document + document[:2], 1.0, {"no drafts": 1.8}),
        # random weights would give one token for ever: at this temperature any one
        against_none("text without repetition", bench.model(config), document, 100.0, {}),
    ]


def invariance(bench: Bench) -> list[dict[str, Any]]:
    sizes, small, big = bench.sizes, bench.sizes.small, bench.sizes.big

    def against_vendor(case: str, config: ModelConfig, prompts, new, per: Callable[[Served], float], moved) -> dict[str, Any]:
        longest = max(len(p) + n for p, n in zip(prompts, new, strict=True)) + 16
        engine, vendor, free = (bench.engine(bench.model(config), longest, len(prompts)) for _ in range(3))
        fastest: dict[Any, bool] = {}

        def other(e: Engine, choice: dict[Any, bool] | None) -> float:
            with vendor_products(choice):
                return per(serve(e, prompts, new))

        mine = lambda: per(serve(engine, prompts, new))  # noqa: E731
        timed: Timed = {
            "swiftk": mine, "self": mine, "vendor": lambda: other(vendor, None), "faster of both": lambda: other(free, fastest),
        }  # fmt: skip
        seconds = interleave(timed, sizes.runs)
        size, goals = moved(serve(engine, prompts, new).steps), {"faster of both": 1 / 1.15}
        facts = {"vendor's products among the faster": f"{sum(fastest.values())} of {len(fastest)}"}
        return record(bench, "invariance", f"{shape(config)}, {case}", seconds, bytes=size, goals=goals, facts=facts)

    of_one = single_bytes(small, bench.dtype, False, sizes.prompt, sizes.new_small)
    of_prompt = weight_bytes(big, bench.dtype, False) / sizes.prefill + token_bytes(big, bench.dtype)
    prompts, new = random_requests(sizes, sizes.part)
    return [
        against_vendor(
            f"one sequence, {sizes.new_small} tokens", small, random_prompts(small, [sizes.prompt]), [sizes.new_small],
            after_first, lambda steps: of_one,
        ),
        against_vendor(
            f"{len(prompts)} requests", small, prompts, new, over_all,
            lambda steps: batch_bytes(small, bench.dtype, steps, prompts, new),
        ),
        against_vendor(
            f"a prompt of {sizes.prefill} tokens", big, random_prompts(big, [sizes.prefill]), [1],
            lambda done: done.seconds / sizes.prefill, lambda steps: of_prompt,
        ),
    ]  # fmt: skip


def shape(config: ModelConfig) -> str:
    names = {BIG: "Qwen3-0.6B shape", SMALL: "29 M", EIGHT_B: "Llama 3.1 8B shape"}
    return names.get(config, f"{config.num_hidden_layers} x {config.hidden_size}")


# In this order: the large model first, so that it is given back before the small one's many sequences.
WORKS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "single-nf4": single_nf4,
    "prefill": prefill,
    "single": lambda b: single(b, "single", b.sizes.big, b.sizes.new_big, {"transformers": 2.5}),
    "single-small": lambda b: single(
        b, "single-small", b.sizes.small, b.sizes.new_small, {"transformers": 3.0, "bandwidth": 65}
    ),
    "batch": batch,
    "lora": lora,
    "prefix": prefix,
    "speculation": speculation,
    "invariance": invariance,
}
GPU_WORKS = ("single", "single-nf4", "batch")


def show(r: dict[str, Any]) -> str:
    rate = f"{r['value']:.4g} {r['unit']}"
    limits = f"{r['megabytes']:.4g} MB{' a token' if r['unit'] == 'tokens/s' else ''}, {r['gb_per_s']:.1f} GB/s"
    limits += f" = {r['percent_of_bandwidth']:.0f} % of the bandwidth"
    if "bandwidth" in r["goals"]:
        limits += f" (wanted: {r['goals']['bandwidth']:g})"
    if r["percent_of_matmul"] is not None:
        limits += f", {r['percent_of_matmul']:.0f} % of matmul"
    lines = [f"{r['work']}: {r['case']}, {r['dtype']}", f"  {rate}, {limits}; self-pair {100 * r['self_spread']:.0f} %"]
    for name, ratio in r["ratios"].items():
        spread = f"{min(r['ratio_runs'][name]):.2f} .. {max(r['ratio_runs'][name]):.2f}"
        wanted = f", wanted {r['goals'][name]:.2f}x" if name in r["goals"] else ""
        lines.append(f"  {name}: {r['peers'][name]:.4g} {r['unit']}; its time / ours {ratio:.2f}x ({spread}){wanted}")
    if r["facts"]:
        lines.append("  " + "; ".join(f"{name} {value}" for name, value in r["facts"].items()))
    return "\n".join(lines)


def run(options: Options, arguments: list[str], save: Save | None = None) -> list[dict[str, Any]]:
    """Measures and prints; `save`, with a name and what to keep, is called after each work."""
    parser = Parser("decode", description=__doc__, parents=[shared_arguments("decode")])
    known = list(WORKS) if options.device == "cpu" else GPU_WORKS
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="WORK",
                        help=f"some of {', '.join(WORKS)}; default: all; on a GPU {', '.join(GPU_WORKS)}")  # fmt: skip
    args = parser.parse_args(arguments)
    if len(options.dtypes) > 1 or "float64" in options.dtypes:
        parser.error(f"--dtypes has {' '.join(options.dtypes)}, wants float32 or bfloat16")
    everything = []
    with tempfile.TemporaryDirectory(prefix="swiftk-bench-") as folder:
        sizes = QUICK if options.quick else Sizes() if options.device == "cpu" else GPU
        bench = Bench(options, sizes, step_dtype(options), Path(folder), Limits(options.device))
        for name in (work for work in WORKS if work in args.only):
            begin = time.perf_counter()
            records = WORKS[name](bench)
            everything += records
            for r in records:
                print(show(r))
            print(f"  ({name} took {time.perf_counter() - begin:.0f} s)", flush=True)
            if save:
                save(f"decode-{name}", {"decode": records, "limits": bench.limits.known()})
    return everything

"""How the decoder is measured: how much of each work, our engine, the models and peers that works share, the checks of values
that come before time, interleaved runs and their record. bench_decode.py has the works."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftk.benchmarks.bench_train import EIGHT_B, SMALL
from swiftk.benchmarks.decode_peers import Decoded, LlamaCpp, Transformers, installed, q4_0_values, write_gguf
from swiftk.benchmarks.harness import Limits, Options
from swiftk.benchmarks.step import drawn_model
from swiftk.config import TunerConfig
from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.model import Model, ModelConfig, save_adapter, save_checkpoint
from swiftk.parallel.mesh import Mesh

RUNS = 3
SEED = 0  # of weights and prompts
RANK = 16
BIG = ModelConfig(
    model_type="qwen3", vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, rope_theta=1e6,
    tie_word_embeddings=True, qk_norm=True,
)  # fmt: skip
TINY = ModelConfig(
    model_type="qwen3", vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, rope_theta=1e6, tie_word_embeddings=True, qk_norm=True,
)  # fmt: skip
PLAIN, NF4 = TunerConfig(tuner_type="none"), TunerConfig(tuner_type="none", quant_method="bnb", quant_bits=4)
LORA = TunerConfig(tuner_type="lora", lora_rank=RANK, lora_alpha=2 * RANK)


@dataclass(frozen=True)
class Sizes:
    """How much of each work; `--quick` has its own."""

    big: ModelConfig = BIG
    small: ModelConfig = SMALL
    prompt: int = 16  # tokens, of single sequences
    new_nf4: int = 64
    new_big: int = 24
    new_small: int = 128
    requests: int = 64
    lengths: tuple[int, int] = (100, 400)  # of their prompts and outputs
    static: int = 16  # sequences of a batch of transformers
    continuous: int = 16  # requests that its continuous batching is timed on, once
    part: int = 32  # of the requests, for lora and invariance
    prefill: int = 512
    shared: int = 512
    sharing: int = 32
    copied: int = 256
    runs: int = RUNS
    continuous_goal: float = 20.0  # peer's time / ours
    bandwidth_goals: tuple[float, float] = (0.0, 0.0)  # percent, single and single-nf4; 0: none


QUICK = Sizes(
    big=TINY, small=TINY, prompt=5, new_nf4=4, new_big=4, new_small=4, requests=4, lengths=(3, 9), static=2, continuous=2,
    part=3, prefill=40, shared=40, sharing=3, copied=24, runs=1,
)  # fmt: skip
GPU = Sizes(  # an 8B shape; see GPU_WORKS
    big=EIGHT_B, small=EIGHT_B, new_nf4=128, new_big=128, static=64, continuous=64, continuous_goal=8.0,
    bandwidth_goals=(80, 65),
)  # fmt: skip


def random_prompts(config: ModelConfig, lengths: Sequence[int], seed: int = SEED) -> list[list[int]]:
    random = np.random.default_rng([SEED, seed])
    return [random.integers(0, config.vocab_size, n).tolist() for n in lengths]


def random_requests(sizes: Sizes, first: int) -> tuple[list[list[int]], list[int]]:
    """The first ones of them all."""
    low, high = sizes.lengths
    lengths = np.random.default_rng(SEED).integers(low, high + 1, (2, sizes.requests)).tolist()
    return random_prompts(sizes.small, lengths[0])[:first], lengths[1][:first]


# --- ours --------------------------------------------------------------------------------------------------------


@dataclass
class Served(Decoded):
    """Decoded, and what the engine did for it."""

    steps: int = 0
    rows: int = 0
    logprobs: list[list[float]] = field(default_factory=list)  # of the tokens, where params ask for them


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], new: Sequence[int], adapter: str | None = None, **params: Any
) -> Served:
    """All requests at once; greedy unless params say otherwise."""
    params = {"temperature": 0.0, "seed": SEED} | params
    rows, begin = engine.num_computed_tokens, time.perf_counter()
    place = {
        engine.add(p, SamplingParams(max_tokens=n, ignore_eos=True, **params), adapter=adapter): i
        for i, (p, n) in enumerate(zip(prompts, new, strict=True))
    }
    done = Served([[] for _ in prompts], [[] for _ in prompts], logprobs=[[] for _ in prompts])
    while engine.has_work:
        updates, now = engine.step(), time.perf_counter() - begin
        done.steps += 1
        for update in updates:
            assert update.finish_reason in (None, "length"), f"a request ended with {update.finish_reason} {update.stop_reason}"
            done.tokens[place[update.id]] += update.token_ids
            done.stamps[place[update.id]] += [now] * len(update.token_ids)
            done.logprobs[place[update.id]] += [one.logprob for one in update.logprobs or []]
    done.seconds, done.rows = time.perf_counter() - begin, engine.num_computed_tokens - rows
    return done


def after_first(done: Decoded) -> float:
    """Seconds per token of one sequence, from its first token to its last."""
    (stamps,) = done.stamps
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def over_all(done: Decoded) -> float:
    return done.seconds / done.count


def to_first(done: Decoded) -> float:
    """Mean seconds to the first token."""
    return statistics.mean(stamps[0] for stamps in done.stamps)


# --- measurement -------------------------------------------------------------------------------------------------

Timed = dict[str, Callable[[], float]]  # name -> seconds per token, or to the first one


@dataclass
class Bench:
    """What works share: sizes, limits, and models and peers that are made when first asked for."""

    options: Options
    sizes: Sizes
    dtype: torch.dtype
    folder: Path
    limits: Limits
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def wants(self, peer: str) -> bool:
        packages = {"transformers": ("transformers",), "llama.cpp": ("llama_cpp", "gguf")}[peer]
        if not self.options.wants(peer) or (peer == "llama.cpp" and self.options.device == "cuda"):
            return False
        if not installed(*packages):
            print(f"{' and '.join(packages)} not installed: without {peer}", file=sys.stderr)
            return False
        return True

    def model(self, config: ModelConfig, tuner: TunerConfig = PLAIN) -> Model:
        """Its head in NF4 too, where tuner is NF4."""

        def make() -> Model:
            if self.options.device == "cuda":
                model = drawn_model(config, self.dtype, "cuda", tuner, trainable=lambda name: False)
            else:
                model = Model(
                    config, Mesh.single(), compute_dtype=self.dtype, seed=SEED, isa=self.options.isa, tuner=tuner,
                    trainable=lambda name: False,
                )  # fmt: skip
            if tuner is NF4:
                model.quantise_head()
            return model

        return self.once((config, tuner), make)

    def engine(self, model: Model, tokens: int, seqs: int = 1, **more: Any) -> Engine:
        """With room for `seqs` sequences of `tokens` tokens (and for those of the checks)."""
        tokens = max(tokens, 64)
        blocks = 1 + (seqs + 1) * (-(-tokens // 32) + 2)  # more than all have at once: admission keeps some free
        sizes: dict[str, Any] = dict(
            num_blocks=blocks, max_model_len=tokens, max_num_seqs=seqs, prefix_caching=False, isa=self.options.isa
        )
        return Engine(model, **sizes | more)

    def transformers(self, config: ModelConfig) -> Transformers:
        """On our weights, by way of the disk (on a GPU our tensors themselves), checked against ours."""

        def make() -> Transformers:
            directory, model = self.folder / f"hf-{config.num_hidden_layers}-{config.hidden_size}", self.model(config)
            if self.options.device == "cuda":
                peer = Transformers(model, self.dtype)
            else:
                save_checkpoint(model, directory)
                peer = Transformers(directory, self.dtype)
            check_transformers(self.engine(model, 128), peer)
            return peer

        return self.once((config, "transformers"), make)

    def llama(self) -> LlamaCpp:
        def make() -> LlamaCpp:
            check_llama(self)
            path = self.folder / "big.gguf"
            tensors, size = write_gguf(self.model(self.sizes.big), path)
            peer = LlamaCpp(path, self.sizes.big, 1024, 512)
            peer.facts["llama.cpp Q4_0"] = f"{tensors} tensors, {size / 1e6:.1f} MB (embedding and head apart)"
            return peer

        return self.once("llama", make)

    def adapter(self, config: ModelConfig) -> Path:
        """A directory with an adapter whose B is not zero."""

        def make() -> Path:
            model = Model(config, Mesh.single(), compute_dtype=self.dtype, seed=None, tuner=LORA)  # the base stays untouched
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith("lora_B"):
                        p.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
            save_adapter(model, self.folder / f"lora-{config.hidden_size}", "base")
            return self.folder / f"lora-{config.hidden_size}"

        return self.once((config, "adapter"), make)


def interleave(timed: Timed, runs: int, *, warm: bool = False) -> dict[str, list[float]]:
    """Each once per run, in reversed order in every second; unless all are warm, a run before them is not counted."""
    for f in () if warm else dict.fromkeys(timed.values()):
        f()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for run in range(runs):
        for name in list(timed) if run % 2 == 0 else list(reversed(timed)):
            seconds[name].append(timed[name]())
    return seconds


def record(
    bench: Bench, work: str, case: str, seconds: dict[str, list[float]], *, bytes: float, flops: float = 0,
    unit: str = "tokens/s", goals: dict[str, float] | None = None, facts: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """unit: "tokens/s", for seconds per token, or "s", for seconds. bytes and flops are those of `seconds`.
    goals: peer -> at least this ratio; "bandwidth" -> percent of it."""
    ours = seconds["swiftk"]
    s = statistics.median(ours)
    ratios = {
        name: [p / o for p, o in zip(taken, ours, strict=True)] if len(taken) == len(ours) else [taken[0] / s]
        for name, taken in seconds.items()
        if name not in ("swiftk", "self")
    }

    def shown(value: float) -> float:
        return float(f"{value if unit == 's' else 1 / value:.4g}")

    dtype = str(bench.dtype).removeprefix("torch.")
    bandwidth, limit = bench.limits.bandwidth(), bench.limits.matmul(bench.dtype) if flops else None
    return {
        "work": work, "case": case, "dtype": dtype, "unit": unit, "value": shown(s), "runs": [shown(x) for x in ours],
        "self_spread": max(abs(b / a - 1) for a, b in zip(ours, seconds["self"], strict=True)),
        "megabytes": bytes / 1e6, "gb_per_s": bytes / s / 1e9, "percent_of_bandwidth": 100 * bytes / s / bandwidth,
        "percent_of_matmul": None if limit is None else 100 * flops / s / limit,
        "peers": {name: shown(statistics.median(seconds[name])) for name in ratios},
        "ratios": {name: statistics.median(found) for name, found in ratios.items()}, "ratio_runs": ratios,
        "goals": {} if bench.sizes is QUICK else goals or {}, "facts": facts or {},
    }  # fmt: skip


# --- values ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_trainer(engine: Engine) -> None:
    """The log-probabilities of a greedy text are those of the trainer's forward on it, bit for bit; to 0.1 on a GPU unless
    numerics is "invariant"."""
    (prompt,) = random_prompts(engine.config, [21])
    done = serve(engine, [prompt], [9], logprobs=0)
    tokens = prompt + done.tokens[0]
    model = engine.model
    ids = torch.tensor(tokens, device=model.device)
    cu_seqlens = torch.tensor([0, len(ids) - 1], dtype=torch.int32, device=model.device)
    hidden = model(ids[:-1], torch.arange(len(ids) - 1, device=model.device), cu_seqlens)
    expected = token_logprobs(hidden, model.head().weight, ids[1:], numerics=model.numerics)[len(prompt) - 1 :].cpu()
    found = torch.tensor(done.logprobs[0], dtype=expected.dtype)
    close = model.device.type == "cuda" and model.numerics == "auto"
    equal = (found - expected).abs().max() < 0.1 if close else torch.equal(found, expected)
    assert equal, f"the decoder's log-probabilities {found} are not the trainer's {expected}"


def check_transformers(engine: Engine, peer: Transformers) -> None:
    """In fp32 the same greedy text; log-probabilities to 1e-3, in bf16 to 0.1."""
    check_trainer(engine)
    for prompt in random_prompts(engine.config, [5, 40]):
        done = serve(engine, [prompt], [12], logprobs=0)
        (mine,), (found,) = done.tokens, done.logprobs
        if engine.model.compute_dtype == torch.float32:
            (theirs,) = peer.generate([prompt], 12).tokens
            assert mine == theirs, f"greedy text: swiftk {mine}, transformers {theirs}"
        bound = 1e-3 if engine.model.compute_dtype == torch.float32 else 0.1
        worst = (torch.tensor(found) - peer.logprobs(prompt + mine)[len(prompt) - 1 :]).abs().max().item()
        assert worst <= bound, f"log-probabilities: {worst:.2g} from transformers', bound {bound}"


def check_llama(bench: Bench) -> None:
    """Two blocks of the shape: llama.cpp's logits and ours on the values of its Q4_0 weights, up to its 8-bit activations
    (cosine of 0.999; of another token's logits it is near 0)."""
    big = bench.sizes.big
    config = dataclasses.replace(big, num_hidden_layers=2, layer_types=big.layer_types[:2])
    model = Model(config, Mesh.single(), compute_dtype=torch.float32, seed=SEED, trainable=lambda name: False)
    write_gguf(model, bench.folder / "two.gguf")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(q4_0_values(p))
        (prompt,) = random_prompts(config, [33])
        hidden = model(torch.tensor(prompt), torch.arange(33), torch.tensor([0, 33], dtype=torch.int32))
        expected = model.logits(hidden[-1:])[0]
    peer = LlamaCpp(bench.folder / "two.gguf", config, 64, 64)
    cosine = torch.cosine_similarity(peer.logits(prompt), expected, dim=0).item()
    peer.close()
    assert cosine > 0.999, f"logits of llama.cpp and of its weights have a cosine of {cosine:.5f}, wants 0.999"

"""What a TunerConfig means for one model: which modules get an adapter, which are trained whole, which are held in NF4.

    y = x W^T + bias + s (drop(x) A^T) B^T,    s = alpha / rank, rsLoRA: alpha / sqrt(rank)
    DoRA: rows of W + s B A are rescaled to a trained magnitude;  embedding: y = W[ids] + s A^T[ids] B^T, without dropout

Sources: LoRA, Hu et al. 2021; rsLoRA, Kalajdzievski 2023; DoRA, Liu et al. 2024; QLoRA, Dettmers et al. 2023; PiSSA, which
starts the adapter as a part of W, is swiftk/model/pissa.py. Modules are named as in the Hugging Face model, so are the
parameters: `<module>.lora_A` (rank, in), `<module>.lora_B` (out, rank), `<module>.lora_magnitude_vector` (out,); of the
embedding `lora_embedding_A` (rank, vocab), `lora_embedding_B` (H, rank).
With tied embeddings, adapters of the embedding and of the head are two adapters; training one of them whole trains both.
Not supported: DoRA of the embedding, PiSSA of the embedding, of a tied head or with DoRA, adapters of norms, a rank or alpha
per module.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from swiftk.config import TunerConfig
from swiftk.model.config import ModelConfig

ALL_LINEAR = "all-linear"
EMBED, LM_HEAD = "model.embed_tokens", "lm_head"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
ADAPTER = (".lora_A", ".lora_B", ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B")
PLAIN_NAME = re.compile(r"[\w.-]+")  # anything else is a regex
INIT_WEIGHTS = re.compile(r"true|gaussian|pissa|pissa_niter_(\d+)")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter and not to the checkpoint of the base."""
    return name.endswith(ADAPTER)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of the linears of the blocks, in the order of the checkpoint."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in zip(LINEARS, shapes, strict=True)}


def norm_names(config: ModelConfig) -> list[str]:
    kinds = ["input_layernorm", "post_attention_layernorm", *(("self_attn.q_norm", "self_attn.k_norm") * config.qk_norm)]
    return [f"model.layers.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in kinds] + ["model.norm"]


@dataclass(frozen=True)
class Tuning:
    """`resolve` makes it. Names of modules; the numbers of linears do not depend on which of them are adapted."""

    config: TunerConfig
    adapted: frozenset[str]
    saved: frozenset[str]  # trained whole
    quantised: frozenset[str]
    numbers: dict[str, int]  # linear -> its number in the model, a key of its dropout

    @property
    def lora(self) -> bool:
        return self.config.tuner_type == "lora"

    @property
    def scale(self) -> float:
        rank = self.config.lora_rank
        return self.config.lora_alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    @property
    def pissa(self) -> bool:
        return self.lora and self.config.init_weights.startswith("pissa")

    @property
    def pissa_iterations(self) -> int | None:
        """Of the randomised SVD; None: the exact one."""
        found = INIT_WEIGHTS.fullmatch(self.config.init_weights)
        return int(found[1]) if found and found[1] else None

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained: all, or adapters and what modules_to_save names; none of a decoder's."""
        if self.config.tuner_type == "none":
            return False
        return not self.lora or is_adapter(name) or name.rsplit(".", 1)[0] in self.saved


def resolve(config: ModelConfig, tuner: TunerConfig) -> Tuning:
    """Raises ValueError for a target that matches nothing, or no linear, for a rank above a dimension (PiSSA: twice the rank,
    which is that of the adapter it is saved as), and for settings that do not go together."""
    blocks = linear_shapes(config)
    numbers = {name: i for i, name in enumerate((*blocks, LM_HEAD))}
    if tuner.tuner_type == "none":
        return Tuning(tuner, frozenset(), frozenset(), frozenset(blocks) if tuner.quant_bits else frozenset(), numbers)
    if tuner.tuner_type != "lora":
        if tuner.quant_bits:
            raise ValueError(f"quant_bits: has {tuner.quant_bits}, wants tuner_type lora: NF4 weights cannot be trained")
        return Tuning(tuner, frozenset(), frozenset(), frozenset(), numbers)
    for field, value, fits, wants in (
        ("lora_rank", tuner.lora_rank, tuner.lora_rank >= 1, "at least 1"),
        ("lora_alpha", tuner.lora_alpha, 0 < tuner.lora_alpha < math.inf, "more than 0"),
        ("lora_dropout", tuner.lora_dropout, 0 <= tuner.lora_dropout < 1, "0 <= x < 1"),
        ("quant_bits", tuner.quant_bits, tuner.quant_bits in (None, 4), "4, or None"),
    ):
        if not fits:
            raise ValueError(f"{field}: has {value}, wants {wants}")
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes = {EMBED: vocabulary, **blocks, LM_HEAD: vocabulary}
    norms = norm_names(config)

    saved = frozenset(_matches("modules_to_save", tuner.modules_to_save, [*shapes, *norms], ()))
    if config.tie_word_embeddings and saved & {EMBED, LM_HEAD}:
        saved |= {EMBED, LM_HEAD}  # one weight
    targets = [t for t in tuner.target_modules if t != ALL_LINEAR]
    adapted = set(_matches("target_modules", targets, shapes, norms))
    if ALL_LINEAR in tuner.target_modules:
        adapted |= set(blocks)
    if adapted and adapted <= saved:
        raise ValueError("target_modules: all are in modules_to_save too, wants one at least that is not, or --tuner_type full")
    adapted -= saved
    if not adapted:
        raise ValueError(f"target_modules: has nothing, wants {ALL_LINEAR} or names of linears: there is no adapter to train")
    if tuner.use_dora and EMBED in adapted:
        raise ValueError(f"use_dora: {EMBED} cannot be a target of DoRA yet; take it out of target_modules, or use_dora false")
    quantised = frozenset(blocks) - saved if tuner.quant_bits else frozenset()
    tuning = Tuning(tuner, frozenset(adapted), saved, quantised, numbers)
    if not INIT_WEIGHTS.fullmatch(tuner.init_weights):
        raise ValueError(f"init_weights: has {tuner.init_weights!r}, wants true, gaussian, pissa or pissa_niter_N")
    if tuning.pissa:
        _check_pissa(config, tuning)
    for name in sorted(adapted, key=lambda n: (min(shapes[n]), n)):
        most, why = min(shapes[name]), ""
        if tuning.pissa:
            most, why = most // 2, ", and what PiSSA trains is saved as an adapter of twice the rank"
        if tuner.lora_rank > most:
            raise ValueError(f"lora_rank: has {tuner.lora_rank}, wants at most {most}: {name} has shape {shapes[name]}{why}")
    return tuning


def _check_pissa(config: ModelConfig, tuning: Tuning) -> None:
    init = tuning.config.init_weights
    if tuning.config.use_dora:
        raise ValueError(f"init_weights: has {init} with use_dora, wants one of them: DoRA starts from whole weights")
    if config.quantised:
        raise ValueError(
            f"init_weights: has {init}, wants true or gaussian: the checkpoint is in NF4, and what PiSSA leaves of its weights "
            "would be quantised a second time; or --model <the checkpoint that is not quantised>"
        )
    whole = {EMBED} | ({LM_HEAD} if config.tie_word_embeddings else set())
    for name in sorted(whole & tuning.adapted):
        raise ValueError(
            f"init_weights: has {init}, and target_modules {name}, whose weight is "
            + ("looked up, not multiplied" if name == EMBED else "the embedding's too") + "; take one of them out"
        )


def _matches(key: str, wanted: Iterable[str], modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Modules that a name (the whole, or its end after a dot) or a regex (the whole) of `wanted` names."""
    modules, others = list(modules), list(others)
    found: list[str] = []
    for one in wanted:
        try:
            pattern = re.compile(rf"(.*\.)?{re.escape(one)}" if PLAIN_NAME.fullmatch(one) else one)
        except re.error as error:
            raise ValueError(f"{key}: {one!r} is neither a module's name nor a regex ({error})") from None
        here = [m for m in modules if pattern.fullmatch(m)]
        if not here and any(pattern.fullmatch(m) for m in others):
            raise ValueError(f"{key}: {one!r} names a norm, wants linears or embed_tokens; modules_to_save trains a norm whole")
        if not here:
            names = sorted({m.rsplit(".", 1)[1] if "." in m else m for m in modules} | set(modules))
            near = difflib.get_close_matches(one, names, n=3, cutoff=0.4)
            hint = f"the nearest are {', '.join(near)}" if near else f"e.g. {ALL_LINEAR}"
            raise ValueError(f"{key}: {one!r} matches no module of the model; {hint}")
        found += here
    return found

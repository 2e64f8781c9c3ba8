"""`ModelConfig`: the shape of one decoder-only transformer, read from and written as Hugging Face's config.json. No torch here.

Every key of a config.json is read, known to have no effect here, or an error that names it: a field that is ignored is a
model that is silently another one. Absent keys have the values that transformers gives them for the family.
A quantization_config of bitsandbytes' NF4 is read (`quantised`), others are errors.
Not supported: mixture of experts, rotary embedding of a part of the head, rope types other than
those of ROPE_KEYS, dropout.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OP = "ModelConfig.from_hf"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelConfig:
    """Field names are Hugging Face's; the biases, which families spell in three ways, are three fields of their own."""

    model_type: str  # a key of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "llama3", "factor": ...}; None: rope_type "default"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k before the rotation
    sliding_window: int | None = None  # a token sees this many tokens, itself included, in layers of type SLIDING
    layer_types: tuple[str, ...] = ()  # FULL or SLIDING per layer; (): FULL everywhere
    initializer_range: float = 0.02  # standard deviation of the initial weights
    quantised: bool = False  # the checkpoint holds linears of the blocks in bitsandbytes' NF4; `to_hf` is of a plain one
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.layer_types == ():
            object.__setattr__(self, "layer_types", (FULL,) * self.num_hidden_layers)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} has {getattr(self, name)}, wants at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"ModelConfig: num_key_value_heads has {self.num_key_value_heads}, "
                f"wants a divisor of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim has {self.head_dim}, wants an even number (rope rotates pairs)")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"ModelConfig: layer_types has {len(self.layer_types)} entries, "
                f"wants {self.num_hidden_layers} (num_hidden_layers)"
            )
        for i, kind in enumerate(self.layer_types):
            if kind not in (FULL, SLIDING):
                raise ValueError(f"ModelConfig: layer_types[{i}] has {kind!r}, wants {FULL!r} or {SLIDING!r}")
        if SLIDING in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                f"ModelConfig: sliding_window has {self.sliding_window}, wants at least 1 (layer_types names {SLIDING!r})"
            )

    def window_size(self, layer: int) -> tuple[int, int]:
        """(left, right) as varlen_attention takes it: tokens seen before and after a token, -1 for all."""
        if self.layer_types[layer] == FULL or self.sliding_window is None:
            return -1, -1
        return self.sliding_window - 1, -1  # Hugging Face counts the token itself; the right is the causal mask's

    @staticmethod
    def from_hf(source: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Reads a config.json's dict, its path, or the directory it lies in. ValueError names the field, got and wanted."""
        if isinstance(source, Mapping):
            return _parse(dict(source))
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.exists()
            fetch = f"; a hub's names are not fetched: hf download {source} --local-dir DIR, then --model DIR" if hub else ""
            raise ValueError(f"{OP}: there is no {path}; wants a directory with a config.json{fetch}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{OP}: {path} is not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{OP}: {path} has a {type(raw).__name__}, wants an object")
        return _parse(raw)

    def to_hf(self) -> dict[str, Any]:
        """A config.json's dict. Rope is written in both spellings, for transformers before and from version 5."""
        family = FAMILIES[self.model_type]
        theta, scaling = self.rope_theta, self.rope_scaling
        out: dict[str, Any] = {
            "architectures": [family.architecture], "model_type": self.model_type,
            **{name: getattr(self, name) for name in _SIZES + _PLAIN},
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "hidden_act": "silu", "attention_dropout": 0.0,
            "rope_theta": theta, "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default", **(scaling or {})},
        }  # fmt: skip
        if "attention_bias" in family.keys:
            out["attention_bias"] = self.qkv_bias
        if "mlp_bias" in family.keys:
            out["mlp_bias"] = self.mlp_bias
        if "sliding_window" in family.keys:
            out["sliding_window"] = self.sliding_window
        if "layer_types" in family.keys:
            full = self.layer_types.count(FULL)
            in_order = self.layer_types == (FULL,) * full + (SLIDING,) * (self.num_hidden_layers - full)
            out |= {
                "use_sliding_window": self.sliding_window is not None, "layer_types": list(self.layer_types),
                "max_window_layers": full if in_order else self.num_hidden_layers,
            }  # fmt: skip
        return out


@dataclass(frozen=True)
class Family:
    """What a model_type means beyond its sizes. keys: the optional fields that the family reads."""

    architecture: str
    keys: frozenset[str]
    qkv_bias: bool = False  # always, without a field
    qk_norm: bool = False
    head_dim: int | None = None  # where absent; None: hidden_size / num_attention_heads
    sliding_window: int | None = None  # where absent


_LAYERS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
FAMILIES = {
    "llama": Family("LlamaForCausalLM", frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family("MistralForCausalLM", frozenset({"sliding_window"}), sliding_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", _LAYERS, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", _LAYERS | {"attention_bias"}, qk_norm=True, head_dim=128),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "max_position_embeddings")  # fmt: skip
_PLAIN = ("rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "pad_token_id")

# rope type -> the keys it must have and the keys it may have
_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": ({"factor", "original_max_position_embeddings"}, _YARN),
}

# Fields with the only values that are right here; elsewhere they change the result.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_dropout": (0, None), "hidden_dropout": (0, None), "embd_pdrop": (0, None),
    "resid_pdrop": (0, None), "attention_bias": (False, None), "mlp_bias": (False, None), "sliding_window": (None,),
    "use_sliding_window": (False, None), "partial_rotary_factor": (1, None), "pretraining_tp": (1, None),
    "is_encoder_decoder": (False, None), "chunk_size_feed_forward": (0, None),
    "auto_map": (None, {}), "num_experts": (None, 0), "num_local_experts": (None, 0), "pruned_heads": (None, {}),
    "add_cross_attention": (False, None), "rope_interleaved": (False, None), "use_mrope": (False, None),
    "tie_encoder_decoder": (False, None),
}  # fmt: skip
# Fields that do not reach the forward: records of versions and names, and defaults of generation.
IGNORED = {
    "architectures", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "use_return_dict", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "is_decoder",
    "cross_attention_hidden_size", "torchscript", "use_bfloat16", "tf_legacy_loss", "sep_token_id",
    "decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "unsloth_version", "unsloth_fixed",
    "is_llama_config", "transformers.js_config",
}  # fmt: skip


class _Fields:
    """The raw dict; what is taken is remembered, so that what is left can be refused by name."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is absent (a null is a value)."""
        self.taken.add(key)
        return self.raw.get(key, default)

    def number(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.take(key, default)
        if value is ...:
            raise ValueError(f"{OP}: {key} is missing, wants {kind.__name__}")
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise ValueError(f"{OP}: {key} has {value!r}, wants {kind.__name__}")
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{OP}: {key} has {value!r}, wants true or false")
        return value

    def optional(self, key: str, kind: type) -> Any:
        return None if self.take(key) is None else self.number(key, kind)

    def refuse_the_rest(self, known: set[str], where: str) -> None:
        for key, value in self.raw.items():
            if key in self.taken or key in IGNORED:
                continue
            if key in ONLY:
                if value not in ONLY[key]:
                    raise ValueError(f"{OP}: {key} has {value!r}, wants {ONLY[key][0]!r}: {where} has no other here")
            elif "expert" in key or "moe" in key or "router" in key:
                raise ValueError(f"{OP}: {key} has {value!r}, wants it absent: mixture of experts is not there yet")
            else:
                near = difflib.get_close_matches(key, sorted(known), 1)
                hint = f"did you mean {near[0]}?" if near else "take it out of config.json if it changes nothing"
                raise ValueError(f"{OP}: {key} is not a field of {where}; {hint}")


def _parse(raw: dict[str, Any]) -> ModelConfig:
    fields = _Fields(raw)
    kind = fields.take("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{OP}: model_type has {kind!r}, wants one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for name in raw.get("architectures") or ():
        if name != family.architecture:
            raise ValueError(f"{OP}: architectures has {name!r}, wants {family.architecture!r} for model_type {kind!r}")

    sizes = {name: fields.number(name, int) for name in _SIZES if name not in ("num_key_value_heads", "head_dim")}
    heads = sizes["num_attention_heads"]
    if fields.take("num_key_value_heads", None if kind == "llama" else ...) is None:
        sizes["num_key_value_heads"] = heads
    else:
        sizes["num_key_value_heads"] = fields.number("num_key_value_heads", int)
    head_dim = fields.take("head_dim", family.head_dim)
    if head_dim is None and sizes["hidden_size"] % heads:
        raise ValueError(f"{OP}: hidden_size has {sizes['hidden_size']}, wants a multiple of num_attention_heads {heads}")
    sizes["head_dim"] = sizes["hidden_size"] // heads if head_dim is None else fields.number("head_dim", int, head_dim)

    bias = fields.flag("attention_bias") if "attention_bias" in family.keys else False
    if family.qkv_bias and not fields.flag("attention_bias", True):
        raise ValueError(f"{OP}: attention_bias has False, wants it absent: {kind} has a bias in q, k and v, always")
    theta, scaling = _rope(fields, sizes["max_position_embeddings"])
    window, layer_types = _windows(fields, family, sizes["num_hidden_layers"])
    eos = fields.take("eos_token_id")
    quantised = _quantised(fields.take("quantization_config"))
    config = ModelConfig(
        model_type=kind,
        **sizes,
        rms_norm_eps=fields.number("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias") if "mlp_bias" in family.keys else False,
        qk_norm=family.qk_norm,
        sliding_window=window,
        layer_types=layer_types,
        initializer_range=fields.number("initializer_range", float, 0.02),
        quantised=quantised,
        bos_token_id=fields.optional("bos_token_id", int),
        eos_token_id=tuple(eos) if isinstance(eos, (list, tuple)) else fields.optional("eos_token_id", int),
        pad_token_id=fields.optional("pad_token_id", int),
    )
    fields.refuse_the_rest(fields.taken | set(family.keys), kind)
    return config


def _quantised(given: Any) -> bool:
    """Whether a quantization_config says bitsandbytes' NF4; ValueError for what says anything else."""
    if not given:
        return False
    if not isinstance(given, Mapping):
        raise ValueError(f"{OP}: quantization_config has {given!r}, wants an object")
    kind = {
        "quant_method": given.get("quant_method"),
        "bits": 8 if given.get("load_in_8bit") else 4 if given.get("load_in_4bit") else given.get("bits"),
        "type": given.get("bnb_4bit_quant_type", "fp4"),
        "storage": given.get("bnb_4bit_quant_storage", "uint8"),
    }
    if tuple(kind.values()) != ("bitsandbytes", 4, "nf4", "uint8"):
        if kind["quant_method"] != "bitsandbytes":  # the others are bitsandbytes' words, with its defaults
            kind = {name: kind[name] for name in ("quant_method", "bits") if kind[name] is not None}
        said = ", ".join(f"{name} {value}" for name, value in kind.items())
        raise ValueError(
            f"{OP}: quantization_config has {said}; wants bitsandbytes, 4 bits, nf4, uint8; or take the plain checkpoint"
        )
    return True


def _windows(fields: _Fields, family: Family, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """The window and the type of each layer, from the three ways of saying it."""
    if "sliding_window" not in family.keys:
        types = fields.take("layer_types")
        if types is not None and tuple(types) != (FULL,) * layers:
            raise ValueError(f"{OP}: layer_types has {types!r}, wants {FULL!r} in each layer: the family has no window")
        return None, (FULL,) * layers
    window = fields.take("sliding_window", family.sliding_window)
    window = None if window is None else fields.number("sliding_window", int, window)
    if "layer_types" not in family.keys:  # every layer, or none
        kinds = (FULL if window is None else SLIDING,) * layers
        types = fields.take("layer_types")
        if types is not None and tuple(types) != kinds:
            raise ValueError(f"{OP}: layer_types has {types!r}, wants {kinds[0]!r} in each layer: sliding_window has {window}")
        return window, kinds
    first = fields.number("max_window_layers", int, 28)  # layers from here on have the window
    if not fields.flag("use_sliding_window"):
        window = None
    types = fields.take("layer_types")
    if types is None:
        return window, tuple(SLIDING if window is not None and i >= first else FULL for i in range(layers))
    return window, tuple(types)


def _rope(fields: _Fields, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """theta and the scaling, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    outer = {
        key: fields.take(key)
        for key in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
        if fields.take(key) is not None
    }
    spellings = (("rope_parameters", new), ("rope_scaling", old))
    results = [_rope_of(where, given, outer, max_positions) for where, given in spellings if given]
    if len(results) == 2 and results[0] != results[1]:
        raise ValueError(f"{OP}: rope_scaling has {old!r}, wants the same as rope_parameters {new!r}, or one of them absent")
    return results[0] if results else _rope_of("rope_parameters", {}, outer, max_positions)


def _rope_of(where: str, given: Any, outer: dict[str, Any], max_positions: int) -> tuple[float, dict[str, Any] | None]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{OP}: {where} has {given!r}, wants an object")
    values = {key: value for key, value in given.items() if value is not None}
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if kind not in ROPE_KEYS:
        raise ValueError(f"{OP}: {where}.rope_type has {kind!r}, wants one of {', '.join(ROPE_KEYS)}")
    theta = values.pop("rope_theta", outer.get("rope_theta", 10000.0))
    if "rope_theta" in outer and theta != outer["rope_theta"]:
        raise ValueError(f"{OP}: {where}.rope_theta has {theta}, wants {outer['rope_theta']} like rope_theta")
    partial = values.pop("partial_rotary_factor", outer.get("partial_rotary_factor", 1.0))
    if partial != 1:
        raise ValueError(f"{OP}: {where}.partial_rotary_factor has {partial}, wants 1.0: these families rotate the whole head")
    needed, allowed = ROPE_KEYS[kind]
    if "original_max_position_embeddings" in needed:
        values["original_max_position_embeddings"] = outer.get(
            "original_max_position_embeddings", values.get("original_max_position_embeddings", max_positions)
        )
    for key, value in values.items():
        if key not in needed | allowed:
            near = difflib.get_close_matches(key, sorted(needed | allowed), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{OP}: {where}.{key} is not a field of rope_type {kind!r}{hint}")
        if not isinstance(value, bool if key == "truncate" else (int, float)):
            raise ValueError(f"{OP}: {where}.{key} has {value!r}, wants {'true or false' if key == 'truncate' else 'a number'}")
    for key in sorted(needed - set(values)):
        raise ValueError(f"{OP}: {where}.{key} is missing, rope_type {kind!r} needs it")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"{OP}: {where}.rope_theta has {theta!r}, wants a positive number")
    return float(theta), None if kind == "default" else {"rope_type": kind, **values}

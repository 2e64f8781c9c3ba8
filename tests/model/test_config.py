"""ModelConfig: every family and spelling against transformers' own reading, and an error for each thing it cannot mean."""

from __future__ import annotations

import json

import pytest
import transformers

from swiftk.model import ModelConfig
from tests.model.families import FAMILIES, LLAMA3, YARN

# config.json as they are published, old spelling; numbers of the families' own releases
PUBLISHED = {
    "Llama-3.2-1B": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=128001, head_dim=64, hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32, num_hidden_layers=16,
        num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192, rope_type="llama3"
        ),
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.45.0", use_cache=True,
        vocab_size=128256,
    ),
    "Mistral-7B-v0.1": dict(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0", use_cache=True,
        vocab_size=32000,
    ),
    "Qwen2.5-0.5B": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643, hidden_act="silu",
        hidden_size=896, initializer_range=0.02, intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24,
        model_type="qwen2", num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06,
        rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.40.1", use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=151936,
    ),
    "Qwen3-0.6B": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=[151645, 151643], head_dim=128, hidden_act="silu", hidden_size=1024, initializer_range=0.02,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, model_type="qwen3", num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
        use_sliding_window=False, vocab_size=151936,
    ),
}  # fmt: skip


def meaning(config) -> dict:
    """What a transformers configuration says, for comparison; every key that reaches the forward."""
    names = [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "initializer_range",
        "bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "mlp_bias", "layer_types", "sliding_window",
    ]  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {name: getattr(config, name, None) for name in names} | {"head_dim": head_dim}


@pytest.mark.parametrize("name", [*PUBLISHED, *FAMILIES])
def test_to_hf_means_the_same_to_transformers(name):
    raw = PUBLISHED[name] if name in PUBLISHED else FAMILIES[name].to_dict()
    config = ModelConfig.from_hf(raw)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    again = transformers.AutoConfig.for_model(**json.loads(json.dumps(config.to_hf())))
    assert meaning(again) == meaning(theirs)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_reads_a_path_and_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-0.6B"]))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=r"a hub's names are not fetched: hf download Qwen/Qwen3-0.6B --local-dir DIR"):
        ModelConfig.from_hf("Qwen/Qwen3-0.6B")
    with pytest.raises(ValueError, match=r"there is no .*nowhere; wants a directory with a config.json"):
        ModelConfig.from_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is not JSON \(Expecting value"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="has a list, wants an object"):
        ModelConfig.from_hf(tmp_path)


def test_old_and_new_spelling_of_rope_mean_the_same():
    plain = {k: v for k, v in PUBLISHED["Llama-3.2-1B"].items() if not k.startswith("rope_")}
    for new in (LLAMA3, YARN, dict(rope_type="default", rope_theta=7.0), dict(rope_type="linear", factor=2.0, rope_theta=1e4)):
        scaling = {k: v for k, v in new.items() if k != "rope_theta"}
        type_key = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
        spellings = [
            plain | {"rope_parameters": new},
            plain | {"rope_theta": new["rope_theta"], "rope_scaling": scaling},
            plain | {"rope_theta": new["rope_theta"], "rope_scaling": type_key},
            plain | {"rope_theta": new["rope_theta"], "rope_scaling": scaling, "rope_parameters": new},
        ]
        configs = [ModelConfig.from_hf(s) for s in spellings]
        assert all(c == configs[0] for c in configs) and configs[0].rope_theta == new["rope_theta"]
    without = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    assert ModelConfig.from_hf(plain | {"rope_parameters": without}).rope_scaling["original_max_position_embeddings"] == 131072


def test_windows_of_each_family():
    assert ModelConfig.from_hf(PUBLISHED["Mistral-7B-v0.1"]).window_size(0) == (4095, -1)
    assert ModelConfig.from_hf(PUBLISHED["Mistral-7B-v0.1"] | {"sliding_window": None}).window_size(0) == (-1, -1)
    qwen = PUBLISHED["Qwen2.5-0.5B"]
    assert {ModelConfig.from_hf(qwen).window_size(i) for i in range(24)} == {(-1, -1)}
    used = ModelConfig.from_hf(qwen | {"use_sliding_window": True, "max_window_layers": 20})
    assert [used.window_size(i) for i in (0, 19, 20, 23)] == [(-1, -1), (-1, -1), (32767, -1), (32767, -1)]
    types = ["full_attention", "sliding_attention"] * 12
    named = ModelConfig.from_hf(qwen | {"use_sliding_window": True, "layer_types": types})
    assert [named.window_size(i) for i in (0, 1)] == [(-1, -1), (32767, -1)]


ROPE = {"rope_type": "llama3", "factor": 8.0}
BAD_YARN = YARN | {"rope_theta": 500000.0}
ERRORS = [
    ("Qwen3-0.6B", {"model_type": "mixtral"}, "model_type has 'mixtral', wants one of llama, mistral, qwen2, qwen3"),
    ("Qwen3-0.6B", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures has 'Qwen3ForSequenceClassification'"),
    ("Qwen3-0.6B", {"hidden_sise": 3}, "hidden_sise is not a field of qwen3; did you mean hidden_size"),
    ("Qwen3-0.6B", {"vocab_size": None}, "vocab_size has None, wants int"),
    ("Qwen3-0.6B", {"vocab_size": "many"}, "vocab_size has 'many', wants int"),
    ("Qwen3-0.6B", {"vocab_size": 0}, "vocab_size has 0, wants at least 1"),
    ("Qwen3-0.6B", {"hidden_size": ...}, "hidden_size is missing, wants int"),
    ("Qwen3-0.6B", {"num_key_value_heads": ...}, "num_key_value_heads is missing, wants int"),
    ("Qwen3-0.6B", {"num_key_value_heads": 5}, "num_key_value_heads has 5, wants a divisor of num_attention_heads 16"),
    ("Qwen3-0.6B", {"head_dim": 33}, "head_dim has 33, wants an even number"),
    ("Qwen3-0.6B", {"hidden_act": "gelu"}, "hidden_act has 'gelu', wants 'silu'"),
    ("Qwen3-0.6B", {"mlp_bias": True}, "mlp_bias has True, wants False"),
    ("Qwen3-0.6B", {"attention_dropout": 0.1}, "attention_dropout has 0.1, wants 0"),
    ("Qwen3-0.6B", {"num_experts": 8}, "num_experts has 8, wants None"),
    ("Qwen3-0.6B", {"num_experts_per_tok": 2}, "num_experts_per_tok has 2, wants it absent: mixture of experts is not there"),
    ("Qwen3-0.6B", {"quantization_config": {"quant_method": "awq"}}, "quantization_config has quant_method awq; wants"),
    ("Qwen3-0.6B", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map has .* wants None"),
    ("Qwen3-0.6B", {"tie_word_embeddings": 1}, "tie_word_embeddings has 1, wants true or false"),
    ("Qwen3-0.6B", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, wants 28"),
    ("Qwen3-0.6B", {"layer_types": ["linear_attention"] * 28}, r"layer_types\[0\] has 'linear_attention', wants "),
    ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, "sliding_window has None, wants at least 1"),
    ("Llama-3.2-1B", {"sliding_window": 128}, "sliding_window has 128, wants None"),
    ("Llama-3.2-1B", {"head_dim": None, "hidden_size": 2050}, "hidden_size has 2050, wants a multiple of num_attention_heads"),
    ("Mistral-7B-v0.1", {"attention_bias": True}, "attention_bias has True, wants False: mistral"),
    ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types has .* wants 'sliding_attention' in each layer"),
    ("Qwen2.5-0.5B", {"attention_bias": False}, "attention_bias has False, wants it absent: qwen2 has a bias"),
    ("Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope has True, wants False"),
    ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type has 'longrope', wants one of"),
    ("Llama-3.2-1B", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type has 'dynamic'"),
    ("Llama-3.2-1B", {"rope_scaling": ROPE}, "rope_scaling.high_freq_factor is missing, rope_type 'llama3' needs it"),
    ("Llama-3.2-1B", {"rope_scaling": "yarn"}, "rope_scaling has 'yarn', wants an object"),
    ("Llama-3.2-1B", {"rope_scaling": BAD_YARN | {"betafast": 1.0}}, "scaling.betafast is not a field of .* mean beta_fast"),
    ("Llama-3.2-1B", {"rope_scaling": BAD_YARN | {"factor": "4"}}, "rope_scaling.factor has '4', wants a number"),
    ("Llama-3.2-1B", {"rope_scaling": YARN}, "rope_scaling.rope_theta has 10000.0, wants 500000.0 like rope_theta"),
    ("Llama-3.2-1B", {"rope_parameters": LLAMA3}, "rope_scaling has .* wants the same as rope_parameters"),
    ("Llama-3.2-1B", {"rope_theta": -1.0}, "rope_theta has -1.0, wants a positive number"),
    ("Llama-3.2-1B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor has 0.5, wants 1.0"),
    ("Qwen3-0.6B", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is not a field of rope_type"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), ERRORS, ids=[f"{i}-{next(iter(e[1]))}" for i, e in enumerate(ERRORS)])
def test_errors_name_the_field(name, change, message):
    raw = {key: value for key, value in (PUBLISHED[name] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(raw)

"""Adapters and NF4 in the model: what is named, first values, layouts, dropout, the one-at-a-time contract."""

from __future__ import annotations

import pytest
import torch

from swiftk.config import TunerConfig
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.kernels.nf4 import nf4_dequantize
from swiftk.model import Model, ModelConfig
from swiftk.model.adapter import LINEARS, resolve
from swiftk.model.parameters import initial_value, param_specs
from swiftk.parallel.mesh import Mesh
from tests.model.families import FAMILIES, make_ours, pack, stir
from tests.model.test_parameters import tensor_mesh
from tests.model.test_transformer import REFERENCES, assert_close

KEYS = torch.tensor([5, 3])  # seed and step


def config_of(family, **changes) -> ModelConfig:
    return ModelConfig.from_hf(FAMILIES[family].to_dict() | changes)


def tuner(**changes) -> TunerConfig:
    return TunerConfig(**{"tuner_type": "lora", "lora_rank": 4, **changes})


def targets(family="llama", **changes) -> set[str]:
    return set(resolve(config_of(family), tuner(**changes)).adapted)


def linears(*layers: int) -> set[str]:
    return {f"model.layers.{i}.{name}" for i in layers for name in LINEARS}


# --- names -------------------------------------------------------------------------------------------------------


def test_targets():
    assert targets() == linears(0, 1, 2)
    assert targets(target_modules=("q_proj", "mlp.down_proj")) == {
        m for m in linears(0, 1, 2) if m.endswith(("q_proj", "down_proj"))
    }
    assert targets(target_modules=("model.layers.1.self_attn.k_proj",)) == {"model.layers.1.self_attn.k_proj"}
    assert targets(target_modules=("1.self_attn.k_proj",)) == {"model.layers.1.self_attn.k_proj"}
    assert targets(target_modules=(r"model\.layers\.[12]\..*",)) == linears(1, 2)
    both = {"lm_head", "model.embed_tokens"}
    assert targets(target_modules=("all-linear", "lm_head", "embed_tokens")) == linears(0, 1, 2) | both
    saved = resolve(config_of("llama"), tuner(modules_to_save=("lm_head", "1.mlp.up_proj", "norm")))
    assert saved.adapted == linears(0, 1, 2) - {"model.layers.1.mlp.up_proj"}
    assert saved.saved == {"lm_head", "model.layers.1.mlp.up_proj", "model.norm"}
    assert resolve(config_of("qwen3"), tuner(modules_to_save=("lm_head",))).saved == {"lm_head", "model.embed_tokens"}
    assert resolve(config_of("llama"), TunerConfig(tuner_type="full")).adapted == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("qproj",)}, "target_modules: 'qproj' matches no module of the model; the nearest are q_proj"),
        ({"target_modules": (r".*\.wq",)}, r"target_modules: '\.\*\\\\\.wq' matches no module"),
        ({"target_modules": ("q_proj(",)}, r"target_modules: 'q_proj\(' is neither a module's name nor a regex"),
        ({"target_modules": ("input_layernorm",)}, "'input_layernorm' names a norm, wants linears or embed_tokens"),
        ({"modules_to_save": ("lm_haed",)}, "modules_to_save: 'lm_haed' matches no module .*; the nearest are lm_head"),
        ({"target_modules": ()}, "target_modules: has nothing, wants all-linear or names"),
        ({"target_modules": (), "modules_to_save": ("lm_head",)}, "target_modules: has nothing, wants all-linear or names"),
        ({"target_modules": ("q_proj",), "modules_to_save": ("q_proj",)}, "target_modules: all are in modules_to_save too"),
        ({"lora_rank": 17}, r"lora_rank: has 17, wants at most 16: model.layers.0.self_attn.k_proj has shape \(16, 32\)"),
        ({"use_dora": True, "target_modules": ("embed_tokens",)}, "use_dora: model.embed_tokens cannot be a target"),
        ({"tuner_type": "full", "quant_bits": 4}, "quant_bits: has 4, wants tuner_type lora"),
        ({"quant_bits": 8}, "quant_bits: has 8, wants 4"),
        ({"lora_rank": 0}, "lora_rank: has 0, wants at least 1"),
        ({"lora_rank": -2}, "lora_rank: has -2, wants at least 1"),
        ({"lora_alpha": 0}, "lora_alpha: has 0, wants more than 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: has nan, wants more than 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: has 1\.0, wants 0 <= x < 1"),
        ({"lora_dropout": -0.1}, r"lora_dropout: has -0\.1, wants 0 <= x < 1"),
    ],
)
def test_targets_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(config_of("llama"), tuner(**changes))


@pytest.mark.parametrize("quant_bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_follow_the_specs(family, quant_bits):
    settings = {"target_modules": ("all-linear", "embed_tokens", "lm_head"), "quant_bits": quant_bits}
    model = Model(config_of(family), Mesh.single(), compute_dtype=torch.bfloat16, tuner=tuner(**settings))
    parameters = dict(model.named_parameters())
    held = [name for name in model.specs if name.removesuffix(".weight") not in model.tuning.quantised]
    assert held == list(parameters) and len(held) + 21 * bool(quant_bits) == len(model.specs)
    for name, p in parameters.items():
        assert p.shape == model.specs[name].shape and p.requires_grad == (".lora_" in name), name
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    for name in model.tuning.quantised:
        leaf = model.get_submodule(name)
        assert tuple(leaf.base.shape) == model.specs[f"{name}.weight"].shape and leaf.absmax.dtype == torch.bfloat16


def test_parts_of_two_ranks_make_the_whole():
    config = config_of("llama", vocab_size=98, hidden_size=704)  # several blocks of rows
    tuning = resolve(config, tuner(target_modules=("all-linear", "embed_tokens"), use_rslora=True))
    whole = param_specs(config, Mesh.single(), tuning)
    parts = [param_specs(config, tensor_mesh(rank, 2), tuning) for rank in range(2)]
    assert sum(".lora_" in name for name in whole) == 2 * 22
    for name, spec in whole.items():
        value = initial_value(spec, 7, 0.02)
        for part in (p[name] for p in parts):
            assert torch.equal(initial_value(part, 7, 0.02), value[tuple(slice(*s) for s in part.slices)]), name
    down, gate = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    assert parts[1][f"{down}.lora_A"].slices[1] == (24, 48) and parts[1][f"{down}.lora_B"].local_shape == (704, 4)
    assert parts[1][f"{gate}.lora_B"].slices[0] == (24, 48) and parts[1][f"{gate}.lora_A"].local_shape == (4, 704)


def test_first_values_are_pefts():
    config = config_of("llama", hidden_size=600)

    def make(seed=2, rank=32, **changes):
        return Model(config, Mesh.single(), tuner=tuner(lora_rank=rank, **changes), adapter_seed=seed)

    targets = ("all-linear", "embed_tokens")
    one, other = (dict(make(seed, 16, target_modules=targets).named_parameters()) for seed in (2, 3))
    a = one["model.layers.0.mlp.gate_proj.lora_A"]
    bound = 600**-0.5
    assert a.abs().max() <= bound and abs(a.std() / (bound / 3**0.5) - 1) < 0.02 and abs(a.mean()) < 0.02 * bound
    assert not torch.equal(a, other["model.layers.0.mlp.gate_proj.lora_A"])
    assert not torch.equal(a, one["model.layers.0.mlp.up_proj.lora_A"])
    assert torch.equal(one["model.layers.0.mlp.gate_proj.weight"], other["model.layers.0.mlp.gate_proj.weight"])
    assert not any(p.any() for name, p in one.items() if name.endswith((".lora_B", ".lora_embedding_A")))
    assert abs(one["model.embed_tokens.lora_embedding_B"].std() - 1) < 0.02
    gaussian = make(init_weights="gaussian", target_modules=("o_proj",)).get_parameter("model.layers.0.self_attn.o_proj.lora_A")
    assert gaussian.shape == (32, 32) and abs(gaussian.std() * 32 - 1) < 0.06
    dora = make(use_dora=True, target_modules=("o_proj",)).get_submodule("model.layers.2.self_attn.o_proj")
    assert torch.allclose(dora.lora_magnitude_vector, dora.weight.norm(dim=1), rtol=1e-6)


# --- the forward -------------------------------------------------------------------------------------------------


SHALLOW = {"num_hidden_layers": 1, "layer_types": None}


def gradients(model, batch, dy, **noise):
    logits = model.logits(model(*batch, **noise))
    model.zero_grad()
    logits.backward(dy)
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


SOME = {"target_modules": ("q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head")}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama-bias-yarn", {}), ("qwen3", {"use_dora": True}), ("llama", {"quant_bits": 4}), ("llama-bias-yarn", SOME)],
    ids=["lora", "dora", "nf4", "some"],
)
def test_kernels_equal_references_in_fp64(family, settings):
    batch, dy = pack(9, 1, 14), torch.randn(24, 97, dtype=torch.float64)
    results = []
    for ops in (None, REFERENCES):
        config = config_of(family, **SHALLOW)
        model = Model(config, Mesh.single(), compute_dtype=torch.float64, seed=3, tuner=tuner(**settings), ops=ops)
        torch.manual_seed(1)
        stir(model)
        results.append(gradients(model, batch, dy, seed_step=KEYS, token_index=torch.arange(24)))
    assert_close(*results, 1e-9)


def test_dropout_belongs_to_the_token_and_stops_without_keys():
    """The same numbers in a pack, alone, in another order; others at another step, layer or seed; none in evaluation."""
    model = Model(config_of("llama"), Mesh.single(), tuner=tuner(lora_dropout=0.3))
    stir(model)
    ids, positions, cu_seqlens = pack(7, 5)
    index = torch.tensor([3 << 32, 8 << 32]).repeat_interleave(torch.tensor([7, 5])) | positions
    packed = model(ids, positions, cu_seqlens, seed_step=KEYS, token_index=index)
    for part, length in ((slice(0, 7), 7), (slice(7, 12), 5)):
        cu = torch.tensor([0, length], dtype=torch.int32)
        alone = model(ids[part], positions[part], cu, seed_step=KEYS, token_index=index[part])
        assert torch.equal(alone, packed[part])
    for keys, tokens in ((torch.tensor([5, 4]), index), (torch.tensor([6, 3]), index), (KEYS, index + 1)):
        assert not torch.equal(model(ids, positions, cu_seqlens, seed_step=keys, token_index=tokens), packed)
    none = model(ids, positions, cu_seqlens)
    assert not torch.equal(none, packed) and torch.equal(none, model(ids, positions, cu_seqlens))
    for name, want in zip(model.linears(), range(22), strict=True):  # each draws its own, whichever others have adapters
        assert model.get_submodule(name).number == want
    one = Model(model.config, Mesh.single(), tuner=tuner(target_modules=("2.mlp.down_proj",)))
    assert one.get_submodule("model.layers.2.mlp.down_proj").number == 20
    quiet = Model(model.config, Mesh.single(), tuner=tuner(lora_dropout=0.0))
    quiet.load_state_dict(model.state_dict())
    assert torch.equal(quiet(ids, positions, cu_seqlens, seed_step=KEYS, token_index=index), none)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.float32, {}), (torch.bfloat16, {"quant_bits": 4}), (torch.float32, {"use_dora": True, "quant_bits": 4})],
    ids=["lora", "nf4", "nf4-dora"],
)
def test_recompute_changes_nothing(dtype, settings):
    batch, dy = pack(9, 1, 14), torch.randn(24, 97).to(dtype)
    results = {}
    for recompute in ("none", "selective", "full"):
        model = Model(
            config_of("qwen3", **SHALLOW), Mesh.single(), compute_dtype=dtype, recompute=recompute,
            tuner=tuner(lora_dropout=0.2, **settings),
        )  # fmt: skip
        torch.manual_seed(1)
        stir(model)
        logits, grads = gradients(model, batch, dy, seed_step=KEYS, token_index=torch.arange(24))
        results[recompute] = {"logits": logits, **grads}
    for recompute in ("selective", "full"):
        assert all(torch.equal(got, results["none"][name]) for name, got in results[recompute].items()), recompute


ADAPTERS = {
    "lora": {}, "nf4": {"quant_bits": 4}, "dora": {"use_dora": True},
    "nf4-dora": {"quant_bits": 4, "use_dora": True, "target_modules": ("q_proj", "up_proj")},
    "embedding-head": {"target_modules": ("all-linear", "embed_tokens", "lm_head")},
    "dora-head": {"target_modules": ("q_proj", "lm_head"), "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in FAMILIES for kind in ADAPTERS if kind in ("lora", "nf4") or family == "qwen2"],
)
def test_one_token_at_a_time_gives_the_packed_logprobs(family, dtype, kind, thread_count):
    """The decoder's contract for adapters over plain and NF4 weights: no size is a multiple of a tile or of a block."""
    config = config_of(family, hidden_size=192, intermediate_size=520, head_dim=40, vocab_size=509, **SHALLOW,
                       **({"max_window_layers": 0} if family == "qwen2" else {}))  # fmt: skip
    model = Model(config, Mesh.single(), compute_dtype=dtype, tuner=tuner(lora_rank=6, **ADAPTERS[kind]))
    stir(model)
    ids, positions, cu_seqlens = pack(68, 1, 3)  # 68: past one tile of 64 keys
    labels = torch.randint(0, 509, ids.shape)

    def feed(steps):
        hidden = []
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            cache = model.new_cache()
            for i in range(start, stop, steps):
                piece = slice(i, min(i + steps, stop))
                cu = torch.tensor([0, piece.stop - i], dtype=torch.int32)
                hidden.append(model(ids[piece], positions[piece], cu, kv_cache=cache))
        pieces = zip(hidden, labels.split([len(h) for h in hidden]), strict=True)
        return torch.cat(hidden), torch.cat([logprobs(h, l) for h, l in pieces]), torch.cat([model.logits(h) for h in hidden])

    def logprobs(hidden, labels):
        weight, adapter, dropout = model.head()
        assert dropout is None and (adapter is not None) == ("head" in kind)
        return token_logprobs(hidden, weight, labels, adapter=adapter)

    def whole():
        hidden = model(ids, positions, cu_seqlens)
        return hidden, logprobs(hidden, labels), model.logits(hidden)

    with torch.no_grad():
        packed = thread_count(2, whole)
        for alone, together in zip(thread_count(1, lambda: feed(1)), packed, strict=True):
            assert torch.equal(alone, together)


def test_nf4_is_the_dequantised_model(tmp_path):
    """A model in NF4 has the numbers of one whose weights are the dequantised ones."""
    config = config_of("llama-bias-yarn")
    quantised = Model(config, Mesh.single(), compute_dtype=torch.float32, tuner=tuner(quant_bits=4))
    plain = Model(config, Mesh.single(), compute_dtype=torch.float32, tuner=tuner())
    with torch.no_grad():
        for name in quantised.tuning.quantised:
            plain.get_submodule(name).weight.copy_(nf4_dequantize(quantised.get_submodule(name).base))
    torch.manual_seed(1)
    stir(quantised)
    torch.manual_seed(1)
    stir(plain)
    batch, dy = pack(9, 1, 14), torch.randn(24, 97)
    ours, theirs = gradients(quantised, batch, dy), gradients(plain, batch, dy)
    assert torch.equal(ours[0], theirs[0])
    assert_close(ours, theirs, 1e-5)


def test_compiles_as_one_graph_and_not_again_for_another_step():
    model = Model(config_of("qwen3", **SHALLOW), Mesh.single(), tuner=tuner(lora_dropout=0.2))
    stir(model)
    batch, dy, index = pack(9, 1, 14), torch.randn(24, 97), torch.arange(24)
    eager = [gradients(model, batch, dy, seed_step=torch.tensor([5, step]), token_index=index) for step in (1, 2)]
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = [gradients(model, batch, dy, seed_step=torch.tensor([5, step]), token_index=index) for step in (1, 2)]
    for ours, theirs in zip(compiled, eager, strict=True):
        assert_close(ours, theirs, 1e-6)
    assert not torch.equal(eager[0][0], eager[1][0])


def test_only_what_is_trained_has_a_gradient(tmp_path):
    model, _ = make_ours("llama", tmp_path, tuner=tuner(modules_to_save=("norm", "0.mlp.down_proj")))
    logits = model.logits(model(*pack(6, 3)))
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        trained = ".lora_" in name or name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight")
        assert (p.grad is not None) == p.requires_grad == trained, name

"""The model: against transformers, against its own references, packed, one token at a time, recomputed, compiled."""

from __future__ import annotations

import collections

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swiftk.config import TunerConfig
from swiftk.kernels.attention.varlen import varlen_attention_ref
from swiftk.kernels.linear import linear_ref
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.kernels.lora_linear import lora_linear_ref
from swiftk.kernels.nf4_linear import nf4_linear_ref
from swiftk.kernels.rms_norm import rms_norm_ref
from swiftk.kernels.rope import rope_ref
from swiftk.kernels.swiglu import swiglu_ref
from swiftk.model import Model, ModelConfig
from swiftk.model.transformer import NO_TUNER, Ops
from swiftk.parallel.comm import SingleComm
from swiftk.parallel.mesh import Axis, Mesh
from tests.model.families import FAMILIES, make_ours, pack


def lora_linear_group_ref(x, weights, adapters, biases, *, dropouts):
    return tuple(lora_linear_ref(x, *given, dropout=d) for *given, d in zip(weights, adapters, biases, dropouts, strict=True))


REFERENCES = Ops(
    linear_ref, rms_norm_ref, rope_ref, swiglu_ref, lambda *args, **kw: varlen_attention_ref(*args, **kw)[0],
    nf4_linear_ref, lora_linear_ref, lora_linear_group_ref,
)  # fmt: skip


def assert_close(ours, theirs, bound):
    """Each of (logits, {name: gradient}): max|a - b| <= bound max(max|b|, 1e-3 of the global gradient norm)."""
    floor = 1e-3 * sum(g.double().square().sum() for g in theirs[1].values()).sqrt().item()
    assert (ours[0] - theirs[0]).abs().max() <= bound * theirs[0].abs().max()
    assert ours[1].keys() == theirs[1].keys()
    for name, want in theirs[1].items():
        error = (ours[1][name] - want).abs().max().item()
        assert error <= bound * max(want.abs().max().item(), floor), f"{name}: {error}"


def logits_and_gradients(model, batch, dy):
    logits = model.logits(model(*batch)) if isinstance(model, Model) else model(batch[0][None]).logits[0]
    model.zero_grad()
    logits.backward(dy)
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 2e-6)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, dtype, bound, tmp_path):
    """2e-6 in fp64, because transformers computes norms, softmax and rope in fp32 there."""
    ours, theirs = make_ours(family, tmp_path, dtype)
    batch, dy = pack(23), torch.randn(23, 97, dtype=dtype)
    assert_close(logits_and_gradients(ours, batch, dy), logits_and_gradients(theirs, batch, dy), bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_equal_references_in_fp64(family):
    config = ModelConfig.from_hf(FAMILIES[family].to_dict())
    batch, dy = pack(9, 1, 14), torch.randn(24, 97, dtype=torch.float64)
    results = [
        logits_and_gradients(Model(config, Mesh.single(), compute_dtype=torch.float64, seed=3, ops=ops), batch, dy)
        for ops in (None, REFERENCES)
    ]
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_does_not_feel_its_neighbours(family, tmp_path):
    model, _ = make_ours(family, tmp_path)
    ids, positions, cu_seqlens = pack(7, 1, 12)
    packed = model(ids, positions, cu_seqlens)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = model(ids[start:stop], positions[start:stop], torch.tensor([0, stop - start], dtype=torch.int32))
        assert torch.equal(packed[start:stop], alone)
    model.zero_grad()
    packed[7:8].sum().backward()  # the middle document's one token
    touched = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [ids[7].item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time_gives_the_packed_logprobs(family, dtype, thread_count):
    """The contract that the decoder rests on: trainer and decoder have the same log-probabilities, bit for bit."""
    sizes = dict(hidden_size=192, intermediate_size=520, head_dim=40, vocab_size=1031)  # none a multiple of a tile
    config = ModelConfig.from_hf(FAMILIES[family].to_dict() | sizes)
    model = Model(config, Mesh.single(), compute_dtype=dtype, trainable=lambda name: False)
    ids, positions, cu_seqlens = pack(68, 1, 3)  # 68: past one tile of 64 keys
    labels = torch.randint(0, 1031, ids.shape)

    def feed(steps):
        """Each document in pieces of `steps` tokens over a cache of its own."""
        hidden: list[torch.Tensor] = []
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            cache = model.new_cache()
            for i in range(start, stop, steps):
                piece = slice(i, min(i + steps, stop))
                cu = torch.tensor([0, piece.stop - i], dtype=torch.int32)
                hidden.append(model(ids[piece], positions[piece], cu, kv_cache=cache))
        pieces = zip(hidden, labels.split([len(h) for h in hidden]), strict=True)
        return torch.cat(hidden), torch.cat([token_logprobs(h, model.head().weight, l) for h, l in pieces])

    def whole():
        hidden = model(ids, positions, cu_seqlens)
        return hidden, token_logprobs(hidden, model.head().weight, labels)

    with torch.no_grad():
        packed = thread_count(2, whole)
        for steps, threads in ((1, 1), (4, 2)):
            hidden, logprobs = thread_count(threads, lambda steps=steps: feed(steps))
            assert torch.equal(hidden, packed[0])
            assert torch.equal(logprobs, packed[1])


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().removeprefix("swiftk::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_recompute_changes_memory_and_not_results(dtype):
    config = ModelConfig.from_hf(FAMILIES["qwen3"].to_dict())
    batch, dy = pack(9, 1, 14), torch.randn(24, 97).to(dtype)
    kept, results = {}, {}
    for recompute in ("none", "selective", "full"):
        model = Model(config, Mesh.single(), compute_dtype=dtype, recompute=recompute)
        logits, gradients = logits_and_gradients(model, batch, dy)
        results[recompute] = {"logits": logits, **gradients}
        hidden = model(*batch)
        with CountOps() as count:
            hidden.sum().backward()
        kept[recompute] = count.calls
    for recompute in ("selective", "full"):
        assert all(torch.equal(got, results["none"][name]) for name, got in results[recompute].items()), recompute
    layers = config.num_hidden_layers
    assert kept["none"]["rms_norm_fwd"] == 0
    assert kept["selective"]["rms_norm_fwd"] == kept["full"]["rms_norm_fwd"] == 4 * layers  # two of the block, q and k
    assert kept["selective"]["linear_fwd"] == kept["selective"]["varlen_attention_fwd"] == 0
    assert kept["full"]["linear_fwd"] == 7 * layers and kept["full"]["varlen_attention_fwd"] == layers


class Held(TorchDispatchMode):
    """Bytes of the storages that were made under the mode and are still alive."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self.made.setdefault(ref.cdata, (ref, tensor.untyped_storage().nbytes()))
        return out

    def bytes(self):
        return sum(size for ref, size in self.made.values() if not ref.expired())


@pytest.mark.parametrize("rank", [0, 4])
def test_activations_kept_are_those_of_the_docstring(rank):
    H, I, heads, kv_heads, head_dim, tokens = 32, 56, 6, 2, 16, 24
    D, K = heads * head_dim, kv_heads * head_dim
    statistics = {"none": 2 + 2 * heads + kv_heads, "selective": heads, "full": 0}  # of norms and attention, a float each
    want = {"none": 4 * H + 3 * D + 3 * K + 3 * I, "selective": 3 * H + 2 * D + 2 * K + 2 * I, "full": H}
    tuner = TunerConfig("lora", lora_rank=rank, quant_bits=4) if rank else TunerConfig("full")
    for recompute in want:
        kept = []
        for layers in (2, 3):
            config = ModelConfig("qwen3", 97, H, I, layers, heads, kv_heads, head_dim, 64, qk_norm=True)
            model = Model(config, Mesh.single(), recompute=recompute, tuner=tuner)
            with Held() as held:
                hidden = model(*pack(tokens))
            kept.append(held.bytes())
            hidden.sum().backward()
        adapters = 7 * rank if recompute != "full" else 0
        assert (kept[1] - kept[0]) / tokens / 4 == want[recompute] + statistics[recompute] + adapters, recompute


def test_frozen_parameters_are_stored_in_the_compute_dtype_and_get_no_gradient():
    config = ModelConfig.from_hf(FAMILIES["llama-bias-yarn"].to_dict())
    model = Model(config, Mesh.single(), compute_dtype=torch.bfloat16, trainable=lambda name: "q_proj" in name)
    model(*pack(6, 3)).float().square().sum().backward()
    for name, p in model.named_parameters():
        trained = "q_proj" in name
        assert p.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert (p.grad is not None) == p.requires_grad == trained, name


def test_the_head_of_tied_embeddings_is_the_embedding():
    model = Model(ModelConfig.from_hf(FAMILIES["qwen2"].to_dict()), Mesh.single())
    assert model.head()[0] is model.model.embed_tokens.weight and model.head()[1:] == (None, None) and model.lm_head is None


def compiled_equals_eager(backend, recompute):
    config = ModelConfig.from_hf(FAMILIES["qwen3"].to_dict())
    batch, dy = pack(9, 1, 14), torch.randn(24, 97)
    model = Model(config, Mesh.single(), recompute=recompute)
    eager = logits_and_gradients(model, batch, dy)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    compiled = logits_and_gradients(model, batch, dy)
    assert_close(compiled, eager, 1e-6)


def test_compiles_as_one_graph():
    compiled_equals_eager("aot_eager", "selective")


@pytest.mark.parametrize(("recompute", "tuner"), [
    ("selective", TunerConfig(tuner_type="lora", lora_dropout=0.1)), pytest.param("none", NO_TUNER, marks=pytest.mark.long),
    pytest.param("full", NO_TUNER, marks=pytest.mark.long),
])  # fmt: skip
def test_compiled_blocks_are_the_blocks_and_share_their_graphs(recompute, tuner):
    config = ModelConfig.from_hf({**FAMILIES["qwen3"].to_dict(), "num_hidden_layers": 3, "layer_types": None})
    model = Model(config, Mesh.single(), recompute=recompute, tuner=tuner)

    def gradients(batch):
        hidden = model(*batch, seed_step=torch.tensor([3, len(batch[0])]), token_index=torch.arange(len(batch[0])))
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(hidden.square().sum(), trained, allow_unused=True)
        return [hidden, *(g for g in found if g is not None)]

    batches = [pack(9, 1), pack(4, 8, 2), pack(3, 6)]
    eager = [gradients(batch) for batch in batches]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(counter)
    for batch, want in zip(batches, eager, strict=True):
        for a, b in zip(gradients(batch), want, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 4  # lengths as they come and any length, each with and without a gradient of the input


@pytest.mark.long
@pytest.mark.skipif(" " in torch.__file__, reason="inductor does not quote torch's own include path, which has a space here")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiles_with_inductor(recompute):
    compiled_equals_eager("inductor", recompute)


def test_errors():
    config = ModelConfig.from_hf(FAMILIES["qwen3"].to_dict())
    model = Model(config, Mesh.single())
    ids, positions, cu_seqlens = pack(5, 4)
    with pytest.raises(ValueError, match=r"Model: input_ids has shape \(1, 9\) and positions \(9,\), wants \(total,\)"):
        model(ids[None], positions, cu_seqlens)
    with pytest.raises(ValueError, match="Model: input_ids has 97 at 2, wants at least 0 and below vocab_size 97"):
        model(ids.index_fill(0, torch.tensor(2), 97), positions, cu_seqlens)
    with pytest.raises(ValueError, match="Model: cu_seqlens has 2 documents, a kv_cache holds 1"):
        model(ids, positions, cu_seqlens, kv_cache=model.new_cache())
    with pytest.raises(ValueError, match="Model: recompute has 'some', wants one of none, selective, full"):
        Model(config, Mesh.single(), recompute="some")
    with pytest.raises(ValueError, match="Model: numerics has 'foo', wants one of auto, invariant"):
        Model(config, Mesh.single(), numerics="foo")
    with pytest.raises(ValueError, match=r"Model: compute_dtype has torch.float16, wants torch.bfloat16"):
        Model(config, Mesh.single(), compute_dtype=torch.float16)
    alone = Axis(0, 1, SingleComm())
    with pytest.raises(ValueError, match=r"Model: mesh.tp has size 2, wants 1"):
        Model(config, Mesh(alone, alone, alone, alone, Axis(0, 2, SingleComm()), alone))

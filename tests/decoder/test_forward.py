"""The decoder's forward against the trainer's, bit for bit: families, dtypes, cuts, adapters, NF4, weights that move."""

from __future__ import annotations

import random

import pytest
import torch

from swiftk.config import TunerConfig
from swiftk.decoder.forward import Forward, LoadedAdapter, Rows
from swiftk.kernels.lora_linear import Adapter, lora_linear
from swiftk.model import Model, ModelConfig, load_checkpoint
from swiftk.parallel.mesh import Mesh
from tests.model.families import FAMILIES, make_ours, pack, stir
from tests.model.test_peft_files import tuner

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIZES = dict(num_blocks=64, block_size=4, max_tokens=96, max_seqs=8, max_len=64)


class Paged:
    """Sequences over a cache, fed in pieces of any size; blocks are taken at random."""

    def __init__(self, model: Model, **options) -> None:
        self.forward = Forward(model, **{**SIZES, **options})
        self.free = random.Random(0).sample(range(1, SIZES["num_blocks"]), SIZES["num_blocks"] - 1)
        self.tables: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    @torch.no_grad()
    def feed(self, *pieces: tuple[int, list[int]], adapters: dict[int, int] | None = None) -> list[torch.Tensor]:
        """(sequence, tokens) each -> its hidden states; `logits` then gives those of rows of the step."""
        step = []
        for sequence, tokens in pieces:
            table, start = self.tables.setdefault(sequence, []), self.done.get(sequence, 0)
            while len(table) * SIZES["block_size"] < start + len(tokens):
                table.append(self.free.pop())
            step.append(Rows(tokens, start, table, (adapters or {}).get(sequence, -1)))
            self.done[sequence] = start + len(tokens)
        self.count = self.forward(step)
        return list(self.forward.h[: self.count].clone().split([len(tokens) for _, tokens in pieces]))

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.forward.logits(list(range(self.count)), self.count).clone()


def in_pieces(model: Model, ids: list[list[int]], cuts: int = 3, **options) -> list[torch.Tensor]:
    """Hidden states of each sequence, in steps that mix chunks and single tokens of all of them."""
    paged, rng, at = Paged(model, **options), random.Random(1), [0] * len(ids)
    found: list[list[torch.Tensor]] = [[] for _ in ids]
    while any(at[i] < len(ids[i]) for i in range(len(ids))):
        pieces = []
        for i, tokens in enumerate(ids):
            n = min(rng.choice((1, 1, 2, 7, cuts)), len(tokens) - at[i])
            if n and rng.random() < 0.8:
                pieces.append((i, tokens[at[i] : at[i] + n]))
                at[i] += n
        if pieces:
            for (i, _), hidden in zip(pieces, paged.feed(*pieces), strict=True):
                found[i].append(hidden)
    return [torch.cat(parts) for parts in found]


def packed(model: Model, ids: list[list[int]]) -> list[torch.Tensor]:
    """The trainer's forward of all sequences as one pack."""
    lengths = [len(i) for i in ids]
    with torch.no_grad():
        hidden = model(
            torch.tensor([t for tokens in ids for t in tokens]), torch.cat([torch.arange(n) for n in lengths]),
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        )  # fmt: skip
    return list(hidden.split(lengths))


def sequences(*lengths: int) -> list[list[int]]:
    return [pack(n)[0].tolist() for n in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_trainer(family, dtype, tmp_path):
    model, _ = make_ours(family, tmp_path, dtype)
    ids = sequences(33, 1, 17)
    assert all(map(torch.equal, in_pieces(model, ids), packed(model, ids)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("changes", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"quant_bits": 4}, {"quant_bits": 4, "use_dora": True},
    {"target_modules": ("all-linear", "embed_tokens", "lm_head")}, {"modules_to_save": ("lm_head",)},
], ids=str)  # fmt: skip
def test_equals_a_trained_model_with_an_adapter(changes, threads, tmp_path):
    """Its own adapter: fp32 under bf16, DoRA's norms, NF4; and again after the weights have moved."""
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = make_ours("llama-bias-yarn", tmp_path, dtype, tuner=tuner(**changes))
        stir(model)
        ids, before = sequences(19, 6), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            paged = Paged(model)
            for _ in range(2):
                hidden = torch.cat(paged.feed((0, ids[0]), (1, ids[1])))
                assert torch.equal(hidden, torch.cat(packed(model, ids)))
                assert torch.equal(paged.logits().to(dtype), model.logits(hidden))
                stir(model)  # as an optimizer step would
                paged.forward.follow()
                paged.done.clear()
        finally:
            torch.set_num_threads(before)


def test_several_adapters_in_a_batch_equal_each_alone(tmp_path):
    """Each row's numbers are those of a model with that adapter as its own; rows without one those of the base."""
    for dtype, bits in ((torch.float32, None), (torch.bfloat16, 4)):
        base = Model(
            ModelConfig.from_hf(FAMILIES["qwen2"].to_dict()), Mesh.single(), compute_dtype=dtype, seed=3,
            tuner=TunerConfig(tuner_type="none", quant_bits=bits),
        )  # fmt: skip
        ids, adapters, alone = sequences(9, 14, 5), [], [base]
        for seed, rank, targets in ((1, 4, ("all-linear",)), (2, 20, ("q_proj", "down_proj", "lm_head"))):
            one = Model(
                base.config, Mesh.single(), compute_dtype=dtype, seed=3,
                tuner=TunerConfig(tuner_type="lora", lora_rank=rank, target_modules=targets, quant_bits=bits),
            )  # fmt: skip
            torch.manual_seed(seed)
            stir(one)
            pairs = {
                name: (leaf.lora_A.detach().to(dtype), leaf.lora_B.detach().to(dtype))
                for name, leaf in one.linears().items() if leaf.lora_A is not None
            }  # fmt: skip
            adapters.append(LoadedAdapter(one.tuning.scale, pairs))
            alone.append(one)
        owner = {0: -1, 1: 0, 2: 1}
        paged = Paged(base, adapters=adapters)
        for pieces in ([(0, ids[0][:4]), (1, ids[1]), (2, ids[2][:1])], [(2, ids[2][1:]), (0, ids[0][4:])]):
            got = paged.feed(*pieces, adapters=owner)
            whole = paged.logits()
            last = [sum(len(t) for _, t in pieces[: i + 1]) - 1 for i in range(len(pieces))]
            with torch.no_grad():  # of some rows, whose adapters are not the first ones
                assert torch.equal(paged.forward.logits(last, paged.count), whole[last])
            logits = list(whole.split([len(t) for _, t in pieces]))
            for (i, tokens), hidden, z in zip(pieces, got, logits, strict=True):
                model = alone[owner[i] + 1]
                stop = paged.done[i]
                want = packed(model, [ids[i]])[0][stop - len(tokens) : stop]
                assert torch.equal(hidden, want), (i, dtype)
                weight, adapter, _ = model.head()
                if adapter is not None:
                    assert isinstance(adapter, Adapter)
                    assert torch.equal(lora_linear(hidden, weight, adapter), z.to(dtype))


def test_a_head_in_nf4(tmp_path):
    for family in ("qwen3", "llama"):  # tied and not
        model, _ = make_ours(family, tmp_path / family, torch.float32)
        plain = model.head_base.clone()
        model.quantise_head()
        ids = sequences(12)
        paged = Paged(model)
        (hidden,) = paged.feed((0, ids[0]))
        assert torch.equal(model.logits(hidden), paged.logits())
        assert 0 < (paged.logits() - hidden @ plain.t()).abs().max() < 0.5 * (hidden @ plain.t()).abs().max()
        assert torch.equal(hidden, packed(model, ids)[0])  # the embedding is as it was


def test_trained_whole_under_bf16(tmp_path):
    """fp32 masters are cast once; after a step, again."""
    model, _ = make_ours("qwen3", tmp_path, torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    ids = sequences(21)
    paged = Paged(model)
    for _ in range(2):
        (hidden,) = paged.feed((0, ids[0]))
        assert torch.equal(hidden, packed(model, ids)[0])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.01)
        paged.forward.follow()
        paged.done.clear()


def test_weights_in_the_compute_dtype_are_not_copied(tmp_path):
    model, _ = make_ours("qwen3", tmp_path, torch.float32)
    forward = Forward(model, **SIZES)
    own = {p.data_ptr() for p in model.parameters()}
    linears = [forward.head, *(p for b in forward.blocks for group in (b.qkv, b.o, b.gate_up, b.down) for p in group)]
    assert all(p.weight.data_ptr() in own for p in linears)
    assert all(t.data_ptr() in own for block in forward.blocks for t in block[:4])


def test_tapes_are_bounded_and_give_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr("swiftk.decoder.forward.TAPES", 2)
    model, _ = make_ours("llama", tmp_path, torch.float32)
    ids = sequences(40)
    assert torch.equal(in_pieces(model, ids)[0], packed(model, ids)[0])


def test_load_checkpoint_into_a_model_that_only_decodes(tmp_path):
    make_ours("qwen3", tmp_path, torch.bfloat16)
    model = Model(
        ModelConfig.from_hf(tmp_path), Mesh.single(), compute_dtype=torch.bfloat16, seed=None,
        tuner=TunerConfig(tuner_type="none", quant_bits=4), trainable=lambda name: False,
    )  # fmt: skip
    load_checkpoint(model, tmp_path)
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.tuning.quantised and not any("proj" in name for name, _ in model.named_parameters())
    ids = sequences(8)
    assert torch.equal(in_pieces(model, ids)[0], packed(model, ids)[0])

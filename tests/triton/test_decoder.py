"""The decoder through the Triton kernels: without tapes under the interpreter, by CUDA graphs on a GPU."""

from __future__ import annotations

import pytest
import torch

from swiftk.config import TunerConfig
from swiftk.decoder.engine import Engine
from swiftk.decoder.forward import Forward, LoadedAdapter, Rows, _padded
from swiftk.decoder.params import SamplingParams
from swiftk.kernels.linear_cross_entropy import token_logprobs
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from tests.triton.conftest import ON_CUDA
from tests.triton.launched import device_asserts, dots_like_a_gpus

CONFIG = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=50, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    initializer_range=0.3, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu",
)  # fmt: skip
DTYPES = [torch.float32, *([torch.bfloat16] if ON_CUDA else [])]
SIZES = dict(num_blocks=24, block_size=4, max_tokens=24, max_seqs=3, max_len=48)


def make(device, dtype=torch.float32, layers=2, **options) -> Model:
    config = ModelConfig.from_hf(CONFIG | dict(num_hidden_layers=layers))
    torch.manual_seed(0)
    return Model(config, Mesh.single(), compute_dtype=dtype, seed=3, numerics="invariant", **options).to(device)


@torch.no_grad()
def feed(forward: Forward, *pieces: tuple[list[int], int, list[int]], adapter: int = -1) -> list[torch.Tensor]:
    """(tokens, position of the first, blocks) each -> its hidden states."""
    count = forward([Rows(*piece, adapter) for piece in pieces])
    return list(forward.h[:count].clone().split([len(tokens) for tokens, *_ in pieces]))


def test_sizes_that_steps_are_padded_to():
    sizes = {_padded(n, 100) for n in range(1, 101)}
    assert sizes == {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100}
    assert all(n <= _padded(n, 100) <= 2 * n - 1 for n in range(1, 101))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states_in_any_pieces(dtype, device):
    """Prefilled at once, in chunks beside another sequence, one by one, and by the trainer: the same bits."""
    model = make(device, dtype)
    ids = torch.randint(0, 50, (13,)).tolist()
    blocks, other = [5, 2, 9, 7], [1, 3]
    with dots_like_a_gpus():
        forward = Forward(model, **SIZES)
        (whole,) = feed(forward, (ids, 0, blocks))
        cut = Forward(model, **SIZES)
        first, _ = feed(cut, (ids[:6], 0, blocks), (ids[:5], 0, other))
        _, second = feed(cut, (ids[5:6], 5, other), (ids[6:11], 6, blocks))
        third = [feed(cut, (ids[i : i + 1], i, blocks))[0] for i in (11, 12)]
        assert torch.equal(torch.cat([first, second, *third]), whole)
        again = feed(cut, (ids[12:], 12, blocks))[0]  # of the same size as before: on a GPU by its graph
        assert torch.equal(again, whole[12:])
        with torch.no_grad():
            cu = torch.tensor([0, 13], dtype=torch.int32, device=device)
            assert torch.equal(model(torch.tensor(ids, device=device), torch.arange(13, device=device), cu), whole)


def test_padding_of_rows_and_sequences_touches_nothing(device):
    """More sequences than a step has, blocks from 0 on, and a step that had more of both before it."""
    model = make(device, layers=1)
    sizes = SIZES | dict(block_size=8, max_tokens=48, max_seqs=8)
    ids = torch.randint(0, 50, (12,)).tolist()
    blocks = [[0, 1], [2, 3], [4, 5]]
    with dots_like_a_gpus(), device_asserts():
        used, fresh = Forward(model, **sizes), Forward(model, **sizes)
        feed(used, *((ids[:1], 0, b) for b in (*blocks, [6])))
        pieces = [(ids, 0, b) for b in blocks]
        for got, want in zip(feed(used, *pieces), feed(fresh, *pieces), strict=True):
            assert torch.equal(got, want)
        for begin, end in (
            (0, 5),
            (5, 6),
        ):  # padded to 8 rows, none of which writes a slot
            (got,), (want,) = feed(used, (ids[begin:end], begin, [0])), feed(fresh, (ids[begin:end], begin, [10]))
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_tokens_and_their_logprobs_are_the_trainers(dtype, device):
    model = make(device, dtype)
    engine = Engine(model, num_blocks=24, block_size=4, max_num_seqs=3, max_batched_tokens=16)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1, ignore_eos=True)
    prompts = [[3, 7, 1, 44, 9], [2, 31]]
    with dots_like_a_gpus():
        done = engine.generate(prompts, params)
        for prompt, completion in zip(prompts, done, strict=True):
            (output,) = completion.outputs
            tokens = torch.tensor([*prompt, *output.token_ids], device=device)
            cu = torch.tensor([0, len(tokens) - 1], dtype=torch.int32, device=device)
            with torch.no_grad():
                hidden = model(tokens[:-1], torch.arange(len(tokens) - 1, device=device), cu)
                greedy = model.logits(hidden).argmax(-1)[len(prompt) - 1 :]
                logprobs = token_logprobs(hidden, model.head_base, tokens[1:], numerics="invariant")[len(prompt) - 1 :]
            assert greedy.tolist() == output.token_ids
            assert [x.logprob for x in output.logprobs or []] == logprobs.tolist()


@pytest.mark.long
def test_sampled_text_does_not_depend_on_the_batch(device):
    model = make(device)
    params = [
        SamplingParams(max_tokens=3, temperature=0.9, top_p=0.9, top_k=20, seed=5, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(max_tokens=2, temperature=1.1, min_p=0.05, seed=6, ignore_eos=True),
    ]
    prompts = [[3, 7, 1], [2, 31, 8, 9]]
    sizes = dict(num_blocks=24, block_size=4, max_num_seqs=3, max_batched_tokens=8)
    with dots_like_a_gpus():
        together = Engine(model, **sizes).generate(prompts, params)
        alone = [Engine(model, **sizes).generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert [c.outputs[0].token_ids for c in together] == [c.outputs[0].token_ids for c in alone]


@pytest.mark.long
def test_adapters_in_one_step_and_weights_that_move(device):
    """A row's numbers are those of its adapter alone; after a change in place a step sees the new weights."""
    base = make(device, tuner=TunerConfig(tuner_type="none"))
    torch.manual_seed(1)
    shapes = {name: tuple(leaf.weight.shape) for name, leaf in base.linears().items() if leaf.weight is not None}
    adapters = [
        LoadedAdapter(0.5, {
            name: (torch.randn(r, k, device=device) * 0.1, torch.randn(n, r, device=device) * 0.1)
            for name, (n, k) in shapes.items() if name.endswith(("q_proj", "down_proj"))
        })
        for r in (4, 8)
    ]  # fmt: skip
    ids = [3, 7, 1, 44, 9]
    with dots_like_a_gpus():
        both = Forward(base, adapters=adapters, **SIZES)
        count = both([Rows(ids, 0, [4, 6], 0), Rows(ids, 0, [5, 8], 1), Rows(ids, 0, [1, 2], -1)])
        of = both.h[:count].clone().split(5)
        for i, one in enumerate(adapters):
            alone = Forward(base, adapters=[one], **SIZES)
            torch.testing.assert_close(feed(alone, (ids, 0, [3, 9]), adapter=0)[0], of[i], rtol=1e-5, atol=1e-5)
        plain = Forward(base, **SIZES)
        assert torch.equal(feed(plain, (ids, 0, [3, 9]))[0], of[2]) and not torch.equal(of[0], of[2])
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert plain.follow()
        moved = feed(plain, (ids, 0, [3, 9]))[0]
        assert torch.equal(moved, feed(Forward(base, **SIZES), (ids, 0, [3, 9]))[0]) and not torch.equal(moved, of[2])


@pytest.mark.skipif(not ON_CUDA, reason="a CUDA graph")
def test_steps_with_and_without_adapters_have_graphs_of_their_own():
    device = torch.device("cuda")
    base = make(device, torch.bfloat16, tuner=TunerConfig(tuner_type="none"))
    n, k = base.linears()["model.layers.0.self_attn.q_proj"].weight.shape
    pair = torch.randn(4, k, device=device, dtype=torch.bfloat16), torch.randn(n, 4, device=device, dtype=torch.bfloat16)
    one = LoadedAdapter(0.5, {"model.layers.0.self_attn.q_proj": pair})
    forward = Forward(base, adapters=[one], **SIZES)
    found = {}
    for turn in range(3):  # the first step of a size runs, and its graph after that
        for adapter in (-1, 0):
            (got,) = feed(forward, ([3, 7, 1], 0, [4]), adapter=adapter)
            assert turn == 0 or torch.equal(got, found[adapter])
            found[adapter] = got
    assert not torch.equal(found[-1], found[0])


@pytest.mark.skipif(not ON_CUDA, reason="a CUDA graph")
def test_graphs_are_bounded_and_give_the_same_again(monkeypatch):
    monkeypatch.setattr("swiftk.decoder.forward.TAPES", 2)
    device = torch.device("cuda")
    model = make(device, torch.bfloat16)
    forward, want = Forward(model, **SIZES), Forward(model, **SIZES)
    ids = torch.randint(0, 50, (20,)).tolist()
    (whole,) = feed(want, (ids, 0, [1, 2, 3, 4, 5]))
    at = 0
    for n in (1, 3, 1, 5, 1, 1, 3, 5):
        (got,) = feed(forward, (ids[at : at + n], at, [1, 2, 3, 4, 5]))
        assert torch.equal(got, whole[at : at + n])
        at += n
    assert len(forward._tapes) <= 2

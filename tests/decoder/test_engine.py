"""The engine's contract: the trainer's log-probabilities, transformers' text, the same text under every schedule."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.results import Update
from swiftk.model import Model, save_adapter
from swiftk.parallel.mesh import Mesh
from tests.decoder.engines import (
    LONG,
    SMALL,
    cached_logprobs_equal_the_trainers,
    engine_of,
    outcome,
    prompts,
    run,
    tokens_of,
    trainer_logprobs,
)
from tests.model.families import FAMILIES, make_ours, stir
from tests.model.test_peft_files import tuner

# --- the trainer, transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_transformers(family, tmp_path):
    ours, theirs = make_ours(family, tmp_path)
    theirs.eval()
    theirs.generation_config.eos_token_id = None
    engine = engine_of(ours)
    for prompt in prompts(9, 1, 30):
        got = engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))[0].outputs[0]
        config = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        given = torch.tensor([prompt])  # with its mask: a 0 in the prompt would be taken for padding
        want = theirs.generate(given, attention_mask=torch.ones_like(given), generation_config=config)[0, len(prompt) :]
        assert got.token_ids == want.tolist() and got.finish_reason == "length"


@pytest.mark.parametrize("kind", ["dense", "bf16", "lora", "dora", "nf4-lora", "head", "live"])
def test_logprobs_are_the_trainers(kind, tmp_path):
    """Of prompts (in chunks) and of what is sampled, bit for bit; and again on live weights after training steps."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    options = {
        "lora": dict(tuner=tuner()), "dora": dict(tuner=tuner(use_dora=True)), "nf4-lora": dict(tuner=tuner(quant_bits=4)),
        "head": dict(tuner=tuner(target_modules=("all-linear", "lm_head"))),
    }.get(kind, {})  # fmt: skip
    model, _ = make_ours("llama-bias-yarn", tmp_path, dtype, **options)
    stir(model)
    engine = engine_of(model)
    params = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=0, seed=5)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(2):
        done = engine.generate(prompts(31, 1, 7), params)
        for one in done:
            out = one.outputs[0]
            want = trainer_logprobs(model, one.prompt_token_ids + out.token_ids)
            got = [x.logprob for x in [*(one.prompt_logprobs or []), *(out.logprobs or [])] if x is not None]
            assert torch.equal(torch.tensor(got, dtype=want.dtype), want), kind
            assert len(out.token_ids) == 9 and all(len(x.top) == 2 for x in out.logprobs or [])
        ids = torch.tensor(prompts(40)[0])  # a step of training on the same tensors
        hidden = model(ids, torch.arange(40), torch.tensor([0, 40], dtype=torch.int32))
        model.logits(hidden).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# --- one text under every schedule -------------------------------------------------------------------------------


def requests(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share prefixes, and parameters of every kind."""
    shared = [[rng.randrange(97) for _ in range(n)] for n in (4, 9, 16)]
    made = []
    for i in range(count):
        prompt = list(rng.choice([[], *shared])) + [rng.randrange(97) for _ in range(rng.randint(1, 12))]
        if rng.random() < 0.3:
            prompt = (prompt * 4)[:30]  # something to look up
        made.append((prompt, SamplingParams(
            max_tokens=rng.randint(1, 14), temperature=rng.choice((0, 0, 0.7, 1.3)), top_k=rng.choice((0, 5)),
            top_p=rng.choice((1.0, 0.8)), min_p=rng.choice((0.0, 0.05)), repetition_penalty=rng.choice((1.0, 1.2)),
            presence_penalty=rng.choice((0.0, 0.5)), frequency_penalty=rng.choice((0.0, 0.3)), seed=i, logprobs=1,
            prompt_logprobs=rng.choice((None, None, 1)), n=rng.choice((1, 1, 2)), ignore_eos=True,
            min_tokens=rng.choice((0, 1)), stop_token_ids=tuple(rng.sample(range(97), 3)),
            logit_bias=rng.choice(({}, {3: 2.0, 4: -math.inf})),
        )))  # fmt: skip
    return made


def check_schedules(tmp_path: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    options = rng.choice(({}, dict(tuner=tuner()), dict(tuner=tuner(quant_bits=4))))
    family = rng.choice(("mistral", "qwen3", "llama"))
    model, _ = make_ours(family, tmp_path, rng.choice((torch.float32, torch.bfloat16)), **options)
    stir(model)
    config = replace(model.config, num_hidden_layers=1, layer_types=model.config.layer_types[:1])
    draft = Model(config, Mesh.single(), compute_dtype=model.compute_dtype, seed=seed)
    todo = requests(rng, count)
    alone = engine_of(model, prefix_caching=False, max_batched_tokens=64, max_num_seqs=1, num_blocks=60)
    want = {}
    for i, (prompt, params) in enumerate(todo):
        for (_, index), updates in run(alone, {alone.add(prompt, params): i}).items():
            want[i, index] = outcome(updates)
    before = torch.get_num_threads()
    for speculate in (None, "ngram", draft):
        engine = engine_of(
            model, block_size=rng.choice((1, 4, 16, 32)), num_blocks=rng.choice((70, 200)),
            max_batched_tokens=rng.choice((6, 13, 64)), max_num_seqs=rng.choice((2, 6)), max_model_len=60,
            prefix_caching=rng.random() < 0.7, speculate=speculate,
            num_draft_tokens=rng.choice((1, 3, 5)),
        )  # fmt: skip
        order = list(range(count))
        rng.shuffle(order)
        torch.set_num_threads(rng.choice((1, 2)))
        try:
            ids, found = {}, {}
            while order or engine.has_work:
                while order and (rng.random() < 0.5 or not engine.has_work):
                    i = order.pop()
                    ids[engine.add(*todo[i], priority=rng.choice((0, 1)))] = i
                if engine.scheduler.running and rng.random() < 0.1:
                    engine.scheduler.preempt(rng.choice(engine.scheduler.running))
                for update in engine.step():
                    found.setdefault((ids[update.id], update.index), []).append(update)
                engine.scheduler.check()
        finally:
            torch.set_num_threads(before)
        assert found.keys() == want.keys()
        for key, updates in found.items():
            assert outcome(updates) == want[key], (seed, speculate, key, todo[key[0]])


@pytest.mark.parametrize("seed", range(4))
def test_a_request_is_the_same_under_every_schedule(seed, tmp_path):
    """Alone or in any mix, any chunk and block size, prefix hit or miss, preempted, speculating, 1 or 2 threads."""
    check_schedules(tmp_path, seed, 8)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 40))
def test_a_request_is_the_same_under_many_schedules(seed, tmp_path):
    check_schedules(tmp_path, seed, 16)


def test_drafts_are_used(tmp_path):
    """Fewer steps than tokens on text that repeats; all drafts of the model itself are right."""
    model, _ = make_ours("qwen3", tmp_path)
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, seed=1)
    steps = {}
    for name, speculate in (("none", None), ("self", model)):
        engine, count = engine_of(model, speculate=speculate, num_draft_tokens=4), itertools.count()
        updates = run(engine, {engine.add([1, 2, 3], params): 0}, lambda e, c=count: next(c))
        steps[name] = next(count), tokens_of(updates[0, 0])
    assert steps["none"][1] == steps["self"][1] and steps["none"][0] == 24 and steps["self"][0] <= 8
    greedy = replace(params, temperature=0, max_tokens=40)
    base = engine_of(model).generate([[5]], greedy)[0].outputs[0].token_ids  # greedy text of a small model repeats soon
    engine, count = engine_of(model, speculate="ngram"), itertools.count()
    updates = run(engine, {engine.add([5], greedy): 0}, lambda e: next(count))
    assert tokens_of(updates[0, 0]) == base and next(count) < 40


@pytest.mark.parametrize("speculate", [None, "draft"])
def test_the_sampled_distribution(speculate, tmp_path):
    """Chi-square of the second token against the model's own probabilities, over seeds."""
    model, _ = make_ours("llama", tmp_path)
    toy = replace(model.config, vocab_size=11, num_hidden_layers=1, layer_types=model.config.layer_types[:1])
    model, draft = (Model(toy, Mesh.single(), seed=s) for s in (1, 2))
    with torch.no_grad():
        for m in (model, draft):
            m.model.embed_tokens.weight.mul_(3)
    engine = engine_of(model, speculate=draft if speculate else None, max_num_seqs=64, max_batched_tokens=256, num_blocks=400)
    draws, first = 3000, 7
    ids = {engine.add([1, first], SamplingParams(max_tokens=3, ignore_eos=True, seed=s)): s for s in range(draws)}
    found = [tokens_of(u) for u in run_all(engine, ids).values()]
    for place, given in ((0, None), (1, max(range(11), key=lambda t: sum(f[0] == t for f in found)))):
        those = [f for f in found if given is None or f[0] == given]
        before = [1, first] if given is None else [1, first, given]
        p = torch.tensor([trainer_logprobs(model, [*before, t])[-1] for t in range(11)]).double().exp()
        counts = torch.tensor([sum(f[place] == t for f in those) for t in range(11)], dtype=torch.float64)
        expected = p * len(those)
        small = expected < 5
        chi = ((counts - expected).square() / expected)[~small].sum()
        chi += (counts[small].sum() - expected[small].sum()).square() / expected[small].sum().clamp(min=1)
        assert chi < 33, (place, chi, counts, expected)  # 10 degrees of freedom: p = 0.0003, and the seeds are fixed


def run_all(engine: Engine, ids: dict[int, int]) -> dict[int, list[Update]]:
    found: dict[int, list[Update]] = {}
    while engine.has_work:
        for update in engine.step():
            found.setdefault(ids[update.id], []).append(update)
    return found


def test_a_recording_that_was_cut_short_is_not_played(tmp_path, monkeypatch):
    """Ctrl-C while the first step of its size is recorded."""
    model, _ = make_ours("qwen3", tmp_path)
    engine, (prompt,) = engine_of(model), prompts(23)
    calls = itertools.count()
    multiply = engine.forward._multiply

    def interrupted(*args, **options):
        if next(calls) == 5:
            raise KeyboardInterrupt
        multiply(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.forward, "_multiply", interrupted)
        engine.generate([prompt], LONG)
    assert not engine.has_work
    assert cached_logprobs_equal_the_trainers(engine, model, prompt)


def test_generate_that_is_left_leaves_nothing_behind(tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model)

    def stop(number: int, update: Update) -> None:
        raise RuntimeError("enough")

    other = engine.add(prompts(4)[0], LONG)
    with pytest.raises(RuntimeError, match="enough"):
        engine.generate(prompts(5, 9), replace(LONG, n=2), on_update=stop)
    found = run(engine, {other: 0})
    assert list(found) == [(0, 0)] and sum(len(tokens_of(u)) for u in found.values()) <= 12


def test_a_draft_model_with_nan_guesses_nothing(tmp_path):
    model, _ = make_ours("qwen3", tmp_path / "a")
    draft, _ = make_ours("qwen3", tmp_path / "b")
    with torch.no_grad():
        draft.model.norm.weight.fill_(math.nan)
    given, params = prompts(9), replace(LONG, seed=1, repetition_penalty=1.2)
    want, got = (engine_of(model, speculate=one).generate(given, params)[0].outputs[0] for one in (None, draft))
    assert got.token_ids == want.token_ids


def test_an_end_token_beyond_the_vocabulary(tmp_path):
    """Of a tokenizer with more tokens than the model has: nothing to ban before min_tokens."""
    model, _ = make_ours("qwen3", tmp_path)
    model.config = replace(model.config, eos_token_id=(3, model.config.vocab_size + 2))
    done = engine_of(model).generate(prompts(9), SamplingParams(max_tokens=4, min_tokens=4))[0]
    assert len(done.outputs[0].token_ids) == 4


def test_a_shared_prefix_is_computed_once(tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    shared = prompts(40)[0]
    computed = {}
    for caching in (False, True):
        engine = engine_of(model, prefix_caching=caching, num_blocks=400, max_batched_tokens=48)
        engine.generate([[*shared, i] for i in range(8)], SamplingParams(max_tokens=2, ignore_eos=True))
        computed[caching] = engine.num_computed_tokens
    assert computed[False] == 8 * 42 and computed[True] <= 40 + 8 * 2 + 8


# --- parameters --------------------------------------------------------------------------------------------------


def test_stops_and_lengths(tmp_path):
    model, _ = make_ours("qwen2", tmp_path)
    engine = engine_of(model)
    (prompt,) = prompts(6)
    plain = engine.generate([prompt], replace(LONG, temperature=0))[0].outputs[0].token_ids
    stop = engine.generate([prompt], replace(LONG, temperature=0, stop_token_ids=(plain[3],)))[0]
    at = plain.index(plain[3])
    assert stop.outputs[0].token_ids == plain[: at + 1]
    assert (stop.outputs[0].finish_reason, stop.outputs[0].stop_reason) == ("stop", plain[3])
    engine._eos = frozenset({plain[2]})
    ended = engine.generate([prompt], SamplingParams(max_tokens=12, temperature=0))[0].outputs[0]
    assert ended.finish_reason == "stop" and ended.stop_reason is None and ended.token_ids == plain[: plain.index(plain[2]) + 1]
    later = engine.generate([prompt], SamplingParams(max_tokens=12, temperature=0, min_tokens=8))[0].outputs[0]
    assert plain[2] not in later.token_ids[:7] and len(later.token_ids) >= 8
    two = engine.generate([prompt], replace(LONG, n=2, seed=4))[0].outputs
    assert two[0].token_ids != two[1].token_ids
    assert two[0].token_ids == engine.generate([prompt], replace(LONG, seed=4))[0].outputs[0].token_ids


def test_abort_in_every_state(tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model, max_num_seqs=2)
    ids = [engine.add(p, LONG) for p in prompts(30, 5, 5)]
    engine.step()
    for id in ids:  # one in its prompt, one decoding, one waiting
        engine.abort(id)
    engine.abort(12345)
    ended = {u.id: u.finish_reason for u in engine.step()}
    assert ended == dict.fromkeys(ids, "abort") and not engine.has_work
    assert engine.scheduler.pool.num_free == 79
    assert engine.generate(prompts(3), LONG)[0].outputs[0].finish_reason == "length"


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "params", "message"), [
    ([], LONG, r"^prompt: has no tokens, wants at least one$"),
    ([1, 97], LONG, r"^prompt: has token 97 at 1, wants at least 0 and below vocab_size 97$"),
    ([-1], LONG, r"^prompt: has token -1 at 0, wants"),
    ("text", LONG, r"^prompt: has text, wants token ids: the engine has no tokenizer$"),
    ([1] * 60, LONG, r"prompt has 60 tokens and max_tokens 12, together 72, wants at most max_model_len 64"),
    ([1], replace(LONG, stop=("a",)), r"^stop: has strings, wants none"),
])  # fmt: skip
def test_requests_that_cannot_be_served(prompt, params, message, tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model)
    id = engine.add([1, 2, 3], LONG)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, params)
    assert len(tokens_of(run(engine, {id: 0})[0, 0])) == 12  # the others go on


def test_a_priority_that_cannot_be_compared(tmp_path):
    engine = engine_of(make_ours("qwen3", tmp_path)[0])
    with pytest.raises(ValueError, match=r"^priority: has 'high', wants an integer"):
        engine.add([1], LONG, priority="high")  # type: ignore[arg-type]
    assert not engine.has_work


def test_a_request_larger_than_the_pool(tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model, num_blocks=8)
    with pytest.raises(ValueError, match=r"max_model_len 28"):
        engine.add([1] * 20, LONG)


def test_nan_ends_its_request_alone(tmp_path):
    model, _ = make_ours("llama", tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    engine = engine_of(model)
    bad, good = engine.add([1, 50], LONG), engine.add([1, 2], replace(LONG, logit_bias={50: -math.inf}))
    found = run(engine, {bad: 0, good: 1})
    assert found[0, 0][-1].finish_reason == "error" and "NaN" in str(found[0, 0][-1].stop_reason)
    assert found[1, 0][-1].finish_reason == "length"


def test_a_step_that_fails_ends_nobody(tmp_path, monkeypatch):
    """Whatever it had found out: the request that would have ended goes on with the next step."""
    model, _ = make_ours("qwen3", tmp_path)
    engine, params = engine_of(model), replace(LONG, max_tokens=1, seed=1)
    (prompt,) = prompts(9)
    want = engine.generate([prompt], params)[0].outputs[0].token_ids
    ids = {engine.add(prompt, params): 0, engine.add(prompt, params): 1}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(engine.scheduler, "commit", lambda batch, tokens: (_ for _ in ()).throw(MemoryError))
        engine.step()
    found = run(engine, ids)
    assert [tokens_of(found[i, 0]) for i in (0, 1)] == [want, want]


def test_what_does_not_fit_in_memory_is_said_before_loading(tmp_path, monkeypatch):
    make_ours("qwen3", tmp_path)
    monkeypatch.setattr("swiftk.decoder.loading.load_model", None)
    with pytest.raises(ValueError, match=r"^cache_gib: wants 99999\.00 GiB .*the largest that fits is --cache_gib \d"):
        Engine(tmp_path, tokenizer=None, cache_gib=99999)
    monkeypatch.setattr("swiftk.decoder.loading.available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"^model: its weights take"):
        Engine(tmp_path, cache_gib=1)


@pytest.mark.parametrize("live", [False, True])
def test_a_draft_model_counts_in_memory(live, tmp_path, monkeypatch):
    """Its weights, and a cache of as many blocks."""
    model, _ = make_ours("qwen3", tmp_path)
    each, weights = 2 * 3 * 2 * 16 * 4 * 16, 4 * sum(p.numel() for p in model.parameters())
    known = dict(block_size=16, num_blocks=10)
    free = (10 * each * 2 + weights) if live else (10 * each * 2 + 2 * weights)
    given = (model if live else tmp_path), tmp_path
    monkeypatch.setattr("swiftk.decoder.loading.available_bytes", lambda device: free)
    assert Engine(given[0], speculate=given[1], **known).drafter is not None
    monkeypatch.setattr("swiftk.decoder.loading.available_bytes", lambda device: free - 1)
    monkeypatch.setattr("swiftk.decoder.loading.load_model", None)
    with pytest.raises(ValueError, match=r"^cache_gib: wants .* GiB for 10 blocks of 16 tokens beside"):
        Engine(given[0], speculate=given[1], **known)


def test_a_damaged_checkpoint(tmp_path):
    make_ours("qwen3", tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"truncated|damaged|incomplete"):
        Engine(tmp_path, **SMALL)


def test_an_adapter_of_another_base(tmp_path):
    one, _ = make_ours("llama", tmp_path / "llama", tuner=tuner())
    save_adapter(one, tmp_path / "adapter", "x")
    model, _ = make_ours("qwen3", tmp_path / "base")
    with pytest.raises(ValueError, match=r"has shape .*wants|is missing|is not in the model"):
        engine_of(model, adapters={"a": tmp_path / "adapter"})


def test_options_that_do_not_go_together(tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    for options, message in (
        (dict(max_batched_tokens=5), "max_batched_tokens has 5, wants at least 6"),
        (dict(numerics="foo"), "Engine: numerics has 'foo', wants one of auto, invariant"),
        (dict(num_draft_tokens=-1), "num_draft_tokens has -1, wants at least 0"),
        (dict(cache_gib=math.inf, num_blocks=None), "cache_gib: has inf, wants a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_of(model, **options)
    for options in (dict(quant_bits=4), dict(device="cpu"), dict(numerics="invariant")):
        with pytest.raises(ValueError, match=r"^Engine: quant_bits, .* device or numerics has a value, wants none"):
            Engine(model, **options)
    with pytest.raises(ValueError, match="device: has 'tpu', wants one of auto, cpu, cuda"):
        Engine(tmp_path, device="tpu")
    other = Model(replace(model.config, vocab_size=50), Mesh.single())
    with pytest.raises(ValueError, match=r"^Engine: speculate has a model of vocab_size 50, wants 97"):
        engine_of(model, speculate=other)


def test_a_live_model_keeps_its_instruction_set(tmp_path):
    model, _ = make_ours("qwen3", tmp_path, isa="portable")
    engine = engine_of(model)
    assert engine.forward.isa == "portable"
    done = engine.generate(prompts(9), replace(LONG, logprobs=0))[0]
    want = trainer_logprobs(model, done.prompt_token_ids + done.outputs[0].token_ids)[-12:]
    assert torch.equal(torch.tensor([x.logprob for x in done.outputs[0].logprobs or []]), want)


def test_the_config_of_a_directory(tmp_path):
    """Loaded from disk it gives what the live model gives."""
    model, _ = make_ours("qwen3", tmp_path)
    (prompt,) = prompts(8)
    want = engine_of(model).generate([prompt], replace(LONG, seed=2))[0].outputs[0].token_ids
    for name in ("bfloat16", "float32"):
        engine = Engine(tmp_path, torch_dtype=name, tokenizer=None, **SMALL)
        got = engine.generate([prompt], replace(LONG, seed=2))[0].outputs[0].token_ids
        assert got == want or name == "bfloat16"
    quantised = Engine(tmp_path, torch_dtype="float32", quant_bits=4, quant_head=True, **SMALL)
    assert quantised.model.tuning.quantised and quantised.model.lm_head.codes is not None
    assert len(quantised.generate([prompt], LONG)[0].outputs[0].token_ids) == 12

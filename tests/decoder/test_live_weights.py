"""Several adapters beside the base, and weights that change under a running engine: the next token is the new weights'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swiftk.decoder.params import SamplingParams
from swiftk.model import Model, load_checkpoint, save_adapter
from swiftk.trainer.adamw_8bit import AdamW8bit
from tests.decoder.engines import (
    LONG,
    cached_logprobs_equal_the_trainers,
    engine_of,
    logprobs_of,
    outcome,
    prompts,
    run,
    tokens_of,
    trainer_logprobs,
)
from tests.model.families import make_ours, stir
from tests.model.test_peft_files import tuner


def test_several_adapters_and_the_base_in_one_batch(tmp_path):
    base, _ = make_ours("qwen3", tmp_path / "base")
    names, alone = {}, {}
    for name, rank in (("a", 4), ("b", 12)):
        one, _ = make_ours("qwen3", tmp_path / "other", tuner=tuner(lora_rank=rank))
        load_checkpoint(one, tmp_path / "base")
        stir(one)
        save_adapter(one, tmp_path / name, str(tmp_path / "base"))
        names[name], alone[name] = str(tmp_path / name), one
    params = replace(LONG, seed=3, logprobs=0)
    (prompt,) = prompts(7)
    engine = engine_of(tmp_path / "base", adapters=names, torch_dtype="float32")
    ids = {engine.add(prompt, params, adapter=name): i for i, name in enumerate((None, "a", "b", "a"))}
    found = run(engine, ids)
    texts = [outcome(found[i, 0]) for i in range(4)]
    for i, single in enumerate((base, alone["a"], alone["b"], alone["a"])):
        other = engine_of(single)
        assert outcome(run(other, {other.add(prompt, params): 0})[0, 0]) == texts[i]
    assert texts[1] == texts[3] and len({str(t) for t in texts}) == 3
    with pytest.raises(ValueError, match=r"^adapter: has 'c', wants one of a, b, or None$"):
        engine.add(prompt, params, adapter="c")


def test_weights_that_move_under_a_running_request(tmp_path):
    """What was cached with the old weights is not read: the next tokens are those of the new weights alone."""
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model)
    (prompt,) = prompts(20)
    params = replace(LONG, seed=9, logprobs=0)
    id = engine.add(prompt, params)
    updates = [u for _ in range(6) for u in engine.step()]
    before = tokens_of(updates)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model.weight_version += 1
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert {u.id for u in updates} == {id} and {u.weight_version for u in updates} == {1}
    text = prompt + before + tokens_of(updates)
    want = trainer_logprobs(model, text)[-len(tokens_of(updates)) :]
    assert torch.equal(torch.tensor(logprobs_of(updates)), want)
    again = engine.generate([prompt], params)[0]
    found = torch.tensor([x.logprob for x in again.outputs[0].logprobs or []])
    assert torch.equal(found, trainer_logprobs(model, prompt + again.outputs[0].token_ids)[-12:])  # cached are new values only


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_an_optimizer_of_others_moves(fused, tmp_path):
    """No loop of ours counts its steps, and fused ones raise no tensor's version either."""
    model, _ = make_ours("qwen3", tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    engine = engine_of(model)
    (prompt,) = prompts(20)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, prompt_logprobs=0)
    for version in range(3):
        done = engine.generate([prompt], params)[0]
        assert done.weight_version == version
        found = [x.logprob for x in [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]]
        assert torch.equal(torch.tensor(found), trainer_logprobs(model, prompt + done.outputs[0].token_ids))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


def test_weights_that_move_while_a_prompt_is_read(tmp_path):
    """Its log-probabilities are all those of the new weights."""
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model, max_batched_tokens=6, max_num_seqs=2)
    (prompt,) = prompts(20)
    id = engine.add(prompt, SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0))
    assert engine.step() == [] and engine.step() == []  # 12 tokens of 20
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    updates = run(engine, {id: 0})[0, 0]
    (found,) = (u.prompt_logprobs for u in updates if u.prompt_logprobs is not None)
    assert found[0] is None
    assert torch.equal(torch.tensor([x.logprob for x in found[1:]]), trainer_logprobs(model, prompt))


def data_swapped(model: Model) -> None:  # as averages of weights are swapped in
    for p in model.parameters():
        p.data = p.data * 1.2


def other_tensors(model: Model) -> None:
    model.load_state_dict({name: t * 1.2 for name, t in model.state_dict().items()}, assign=True)


def scaled_while_frozen(model: Model) -> None:
    for p in model.parameters():
        p.mul_(1.2)


def adamw_8bit_step(model: Model) -> None:
    with torch.enable_grad():
        hidden = model(torch.arange(40), torch.arange(40), torch.tensor([0, 40], dtype=torch.int32))
        model.logits(hidden).float().square().mean().backward()
    AdamW8bit(model.parameters(), lr=0.05).step()


@pytest.mark.parametrize("change", [data_swapped, other_tensors, scaled_while_frozen, adamw_8bit_step])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_changed_by_whom_ever(change, dtype, tmp_path):
    """In place or by other tensors, trained or frozen: neither tapes nor the prefix cache keep the old ones."""
    model, _ = make_ours("llama-bias-yarn", tmp_path, dtype)
    model.requires_grad_(change is not scaled_while_frozen)
    engine, (prompt,) = engine_of(model), prompts(23)
    assert cached_logprobs_equal_the_trainers(engine, model, prompt)
    with torch.no_grad():
        change(model)
    assert cached_logprobs_equal_the_trainers(engine, model, prompt)


def test_weights_of_another_shape_are_refused(tmp_path):
    model, _ = make_ours("qwen3", tmp_path)
    engine = engine_of(model)
    weight = model.model.embed_tokens.weight
    weight.data = torch.cat([weight.data, weight.data])  # more rows than the logits have room for
    with pytest.raises(ValueError, match="other shapes than they had"):
        engine.generate(prompts(3), LONG)

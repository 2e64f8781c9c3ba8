"""Schedule, clipping, weight decay, rates of their own."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

from swiftk.config import OptimConfig, TunerConfig
from swiftk.model import Model, ModelConfig
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.optimizer import build_optimizer, clip_gradients_, gradient_norm, learning_rate, set_learning_rate
from tests.model.families import FAMILIES
from tests.trainer import toy


def rates(total, **keys):
    return [learning_rate(s, total, OptimConfig(**keys)) for s in range(total)]


def test_schedules():
    assert rates(5, learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="constant") == [1.0] * 5
    assert rates(4, learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]
    cosine = rates(10, learning_rate=2.0, min_lr=0.5, warmup_ratio=0.2)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert learning_rate(10, 10, OptimConfig(learning_rate=2.0, min_lr=0.5)) == 0.5
    assert learning_rate(99, 10, OptimConfig(learning_rate=2.0, min_lr=0.5)) == 0.5
    assert learning_rate(0, 10, OptimConfig(warmup_ratio=0.0)) == 1e-5


def test_the_warmup_equals_transformers_cosine_after_one_step():
    """transformers counts from s / W, so its first step has rate 0; the decays agree from W on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 12)
    for step in range(12):
        if step >= 3:
            want = schedule.get_last_lr()[0]
            assert learning_rate(step, 12, OptimConfig(learning_rate=1.0, warmup_ratio=0.25)) == pytest.approx(want)
        optimizer.step()
        schedule.step()


def test_lr_decay_steps_fixes_the_curve():
    short = [learning_rate(s, 5, OptimConfig(learning_rate=1.0, lr_decay_steps=10)) for s in range(5)]
    assert short == [learning_rate(s, 10, OptimConfig(learning_rate=1.0)) for s in range(5)]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_equals_torch(max_norm):
    ours, theirs = ([torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(7))] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = gradient_norm(ours)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)), rel=1e-6)
    clip_gradients_(ours, norm, max_norm)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6)


def test_only_matrices_decay_and_the_settings_arrive():
    model = toy.model(dtype=torch.float32)
    names = {p: n for n, p in model.named_parameters()}
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.99))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.3, 0.0, (0.8, 0.99))
    assert all("norm" in names[p] for p in plain["params"]) and not any("norm" in names[p] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names) and decayed["fused"]


# --- rates of their own ------------------------------------------------------------------------------------------


def rates_of(model, config, rate):
    """Name -> the rate it has when the schedule says `rate`."""
    optimizer = build_optimizer(dict(model.named_parameters()), config)
    set_learning_rate(optimizer, rate)
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("all-linear", "embed_tokens", "lm_head"), "modules_to_save": ("model.norm",)},
        {"target_modules": ("q_proj", "down_proj"), "use_dora": True, "modules_to_save": ("lm_head",)},
    ],
    ids=["lora", "dora"],
)
def test_lora_plus_has_pefts_rates(settings):
    ours = Model(ModelConfig.from_hf(FAMILIES["llama"].to_dict()), Mesh.single(), tuner=TunerConfig("lora", 4, **settings))
    found = rates_of(ours, OptimConfig(learning_rate=2e-3, lorap_lr_ratio=16.0, lorap_emb_lr=3e-5), 2e-3)

    targets = [name.rsplit(".", 1)[-1] for name in ours.tuning.adapted]
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]),
        peft.LoraConfig(
            r=4, target_modules=sorted(set(targets)), modules_to_save=list(settings["modules_to_save"]),
            use_dora=settings.get("use_dora", False), task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    names = {p: name for name, p in theirs.named_parameters()}
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=3e-5
    )
    want = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[p].removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")
            want[name.removesuffix(".weight") if ".lora_" in name else name] = group["lr"]
    assert found.keys() == want.keys() and len(set(want.values())) == (3 if "use_dora" not in settings else 2)
    assert {name: pytest.approx(rate) for name, rate in want.items()} == found


def test_parameters_with_rates_of_their_own_follow_torchs_groups():
    """Five steps of a schedule against AdamW of torch with the groups made by hand, bit for bit."""
    config = OptimConfig(learning_rate=0.01, min_lr=0.001, parameter_lr={r"layers\.0\.mlp": 0.05, "norm": 0.002})
    ours, theirs = (toy.model(dtype=torch.float32, tie_word_embeddings=False) for _ in range(2))
    optimizer = build_optimizer(dict(ours.named_parameters()), config)
    rate_of = {"mlp": 5.0, "norm": 0.2}
    groups = [
        {"params": [p], "factor": next((f for part, f in rate_of.items() if part in name), 1.0),
         "weight_decay": 0.1 if p.dim() > 1 else 0.0}
        for name, p in theirs.named_parameters()
    ]  # fmt: skip
    oracle = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    assert {g["factor"] for g in groups} == {5.0, 0.2, 1.0}
    for step in range(5):
        torch.manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        rate = learning_rate(step, 5, config)
        set_learning_rate(optimizer, rate)
        for group in oracle.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
        oracle.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.zeros(2)))]})
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[-1]["lr"] == 0.5


@pytest.mark.parametrize("optim", ["adamw_8bit", "galore", "q_galore"])
def test_every_optimizer_has_the_groups(optim):
    """The update is in proportion to the rate: the same gradients move a parameter of twice the rate twice as far."""
    moves = []
    for rate in (0.01, 0.02):
        model = toy.model(dtype=torch.float32)
        settings = OptimConfig(optim=optim, learning_rate=0.01, parameter_lr={"up_proj": rate}, galore_rank=4, weight_decay=0.0)
        optimizer = build_optimizer(dict(model.named_parameters()), settings)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        moves.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, move in moves[0].items():
        factor = 2 if "up_proj" in name else 1
        assert move.any() and torch.allclose(factor * move, moves[1][name], rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize(
    ("parameter_lr", "message"),
    [
        ({"mpl": 1e-3}, "parameter_lr: 'mpl' is found in the name of no trained parameter; the nearest are mlp"),
        ({r"layers\.7\.mlp": 1e-3}, r"is found in the name of no trained parameter; the nearest are model\.layers\.0"),
        ({"mlp(": 1e-3}, r"parameter_lr: 'mlp\(' is not a regex"),
        ({"mlp": 1e-3, "up_proj": 1e-2}, r"'mlp' and 'up_proj' are both found in model.layers.0.mlp.up_proj.weight, wants one"),
    ],
)
def test_parameter_lr_that_cannot_be(parameter_lr, message):
    params = dict(toy.model(dtype=torch.float32).named_parameters())
    params["model.norm.weight"].requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        build_optimizer(params, OptimConfig(learning_rate=0.01, parameter_lr=parameter_lr))
    with pytest.raises(ValueError, match="no trained parameter"):
        build_optimizer(params, OptimConfig(learning_rate=0.01, parameter_lr={r"^model\.norm": 1.0}))

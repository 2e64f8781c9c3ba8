"""AdamW8bit: trajectories against fp32 AdamW, its state, resume, bitsandbytes' state dict and back."""

from __future__ import annotations

import copy

import pytest
import torch

from swiftk.kernels.adamw_8bit import BLOCK, Update, adamw_8bit_ref, dequantize_8bit_ref, new_moments
from swiftk.kernels.nf4 import dynamic_map
from swiftk.trainer.adamw_8bit import AdamW8bit, from_bitsandbytes, to_bitsandbytes

RATES = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
STEPS = 50


# --- trajectories ------------------------------------------------------------------------------------------------


class Problem:
    """Digits of a teacher: 64 inputs, 96 hidden units, 10 classes; gradients of a hidden unit span four decades."""

    def __init__(self):
        g = torch.Generator().manual_seed(5)
        self.x = torch.randn(512, 64, generator=g) * torch.logspace(-2, 0.5, 64)
        self.labels = (self.x @ torch.randn(64, 10, generator=g)).argmax(1)
        self.start = [torch.randn(96, 64, generator=g) / 8, torch.randn(10, 96, generator=g) / 10]

    def loss(self, params, step):
        rows = slice(step % 8 * 64, step % 8 * 64 + 64)
        return torch.nn.functional.cross_entropy((self.x[rows] @ params[0].t()).tanh() @ params[1].t(), self.labels[rows])

    def train(self, optimizer_of):
        params = [torch.nn.Parameter(p.clone()) for p in self.start]
        update = optimizer_of(params)
        losses = []
        for step in range(STEPS):
            loss = self.loss(params, step)
            grads = torch.autograd.grad(loss, params)
            losses.append(loss.item())
            update(grads)
        return torch.tensor(losses), torch.cat([p.detach().flatten() for p in params])


def with_optimizer(build):
    def make(params):
        optimizer = build(params, **RATES)

        def update(grads):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()

        return update

    return make


def perturbed(seed):
    """fp32 AdamW whose moments are moved at random by at most half the distance between two values of the map around them:
    what rounding to 8 bits does, without its arithmetic."""
    g = torch.Generator().manual_seed(seed)

    def move(x, signed):
        code_map = dynamic_map(signed)
        blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
        above = torch.searchsorted(code_map, (blocks / absmax).clamp(-0.99, 1)).clamp(1, 255)
        spread = (code_map[above] - code_map[above - 1]) * (torch.rand(blocks.shape, generator=g) - 0.5)
        moved = ((blocks / absmax + spread) * absmax).flatten()[: x.numel()].view(x.shape)
        return moved if signed else torch.maximum(moved, 1e-7 * absmax.expand_as(blocks).flatten()[: x.numel()].view(x.shape))

    def make(params):
        moments, step = [new_moments(p.detach(), min_8bit=1 << 30) for p in params], [0]

        def update(grads):
            step[0] += 1
            for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
                new, m = adamw_8bit_ref(Update(p.detach(), grad, moments[i], step[0], *RATES.values()))
                with torch.no_grad():
                    p.copy_(new)
                moments[i] = m._replace(exp_avg=move(m.exp_avg, True), exp_avg_sq=move(m.exp_avg_sq, False))

        return update

    return make


def test_fifty_steps_stay_as_close_to_fp32_as_rounding_explains(thread_count):
    """The distance to the trajectory of torch's fp32 AdamW is at most 1.5 times that of the perturbed runs (the worst of
    three): unbiased rounding errors of the map's size and nothing else. The loss falls as far."""
    problem = Problem()
    makers = [torch.optim.AdamW, lambda p, **rates: AdamW8bit(p, min_8bit=0, **rates)]
    updates = [*map(with_optimizer, makers), *map(perturbed, range(3))]
    (exact_losses, exact), (losses, params), *noisy = thread_count(1, lambda: [problem.train(update) for update in updates])
    allowed_loss = max((other - exact_losses).abs().max() for other, _ in noisy)
    allowed = max((other - exact).norm() for _, other in noisy)
    assert 0 < (params - exact).norm() <= 1.5 * allowed
    assert (losses - exact_losses).abs().max() <= 1.5 * allowed_loss
    assert exact_losses[-8:].mean() < 0.5 * exact_losses[:8].mean()  # it did train


# --- state -------------------------------------------------------------------------------------------------------


def make(build=AdamW8bit, steps=3, dtype=torch.float32, seed=0, **keys):
    g = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in ((70, 90), (5,), (64, 64))]
    groups = [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:], "lr": 0.02}]
    optimizer = build(groups, **RATES, **keys)
    for step in range(steps):
        update(params, optimizer, step)
    return params, optimizer


def update(params, optimizer, step):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_and_small_tensors_and_what_has_no_gradient(dtype):
    params, optimizer = make(dtype=dtype)
    assert [set(optimizer.state[p]) for p in params] == [
        {"step", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"}, {"step", "exp_avg", "exp_avg_sq"},
        {"step", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"},
    ]  # fmt: skip
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.uint8, torch.float32, torch.uint8]
    before = [p.detach().clone() for p in params]
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[2], before[2])
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 4, 4]


def test_each_group_has_its_own_rates():
    params, optimizer = make(steps=0)
    ones = [torch.nn.Parameter(torch.ones_like(p)) for p in params]
    for group, part in zip(optimizer.param_groups, (ones[:1], ones[1:]), strict=True):
        group["params"] = part
    for p in ones:
        p.grad = torch.ones_like(p)
    optimizer.step()  # m / sqrt(v) is 1 at the first step
    assert ones[0][0, 0].item() == pytest.approx(1 - 0.01 * 0.3 - 0.01)
    assert ones[1][0].item() == pytest.approx(1 - 0.02 * 0.01 - 0.02)


def test_a_state_dict_goes_on_bit_for_bit():
    params, optimizer = make()
    others, fresh = make(steps=0, seed=1)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (3, 4):
        update(params, optimizer, step)
        update(others, fresh, step)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(t, fresh.state[q][name]) for name, t in optimizer.state[p].items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"lr": -1.0}, "lr has -1.0, wants at least 0"), ({"eps": float("nan")}, "eps has"), ({"betas": (0.9, 1.0)}, "betas has")],
)
def test_wrong_rates(wrong, message):
    with pytest.raises(ValueError, match=f"AdamW8bit: {message}"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3))], **wrong)


def test_a_closure_and_a_wrong_dtype():
    params, optimizer = make(steps=0)
    assert optimizer.step(lambda: sum(p.sum() for p in params)) is not None
    with pytest.raises(ValueError, match=r"AdamW8bit: a parameter has dtype torch\.float64, wants torch\.float32 or"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match=r"AdamW8bit: a parameter \(4, 3\) has strides \(1, 4\), wants it contiguous"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3, 4).t())])


# --- bitsandbytes ------------------------------------------------------------------------------------------------


def decoded(s, i):
    name = ("exp_avg", "exp_avg_sq")[i]
    return dequantize_8bit_ref(s[name], s[f"{name}_absmax"], dynamic_map(i == 0)) if f"{name}_absmax" in s else s[name]


def test_to_bitsandbytes_and_back_is_exact():
    bnb = pytest.importorskip("bitsandbytes")
    params, optimizer = make()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = bnb.optim.AdamW8bit([{"params": theirs[:1], "weight_decay": 0.3}, {"params": theirs[1:], "lr": 0.02}], **RATES)
    other.load_state_dict(to_bitsandbytes(optimizer.state_dict()))
    for p, q in zip(params, theirs, strict=True):
        ours, s = optimizer.state[p], other.state[q]
        assert torch.equal(s["state1"], ours["exp_avg"]) and torch.equal(s["state2"], ours["exp_avg_sq"]) and s["step"] == 3
        if "absmax1" in s:
            assert torch.equal(s["absmax1"], ours["exp_avg_absmax"]) and torch.equal(s["qmap2"], dynamic_map(False))
    others, back = make(steps=0, seed=1)
    back.load_state_dict(from_bitsandbytes(other.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(t, back.state[q][name]) for name, t in optimizer.state[p].items())
    assert [g["lr"] for g in back.param_groups] == [0.01, 0.02]


def test_from_bitsandbytes_goes_on_where_it_was():
    """Its own three steps, then one more by each: the parameters differ by what its last-bit map differences explain."""
    bnb = pytest.importorskip("bitsandbytes")
    theirs, other = make(build=lambda groups, **rates: bnb.optim.AdamW8bit(groups, **rates))
    params, optimizer = make(steps=0)
    for p, q in zip(params, theirs, strict=True):
        p.data.copy_(q.data)
    optimizer.load_state_dict(from_bitsandbytes(other.state_dict()))
    for p, q in zip(params, theirs, strict=True):
        s = other.state[q]
        for i in (0, 1):
            want = s[f"state{i + 1}"]
            if want.dtype == torch.uint8:
                want = dequantize_8bit_ref(want, s[f"absmax{i + 1}"], s[f"qmap{i + 1}"])
            assert torch.allclose(decoded(optimizer.state[p], i), want, rtol=1e-6, atol=0)
    update(params, optimizer, 3)
    update(theirs, other, 3)
    for p, q in zip(params, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def test_another_map_is_decoded_by_itself():
    _, optimizer = make()
    state = to_bitsandbytes(optimizer.state_dict())
    linear = torch.linspace(-1, 1, 256)
    state["state"][0]["qmap1"] = linear
    found = from_bitsandbytes(state)["state"][0]
    want = linear[state["state"][0]["state1"].long()]
    got = dynamic_map(True)[found["exp_avg"].long()]
    assert (got - want).abs().max() <= 0.0075  # half the widest spacing, and 1 - 0.993 at the negative end
    del state["state"][0]["absmax2"]
    with pytest.raises(ValueError, match="from_bitsandbytes: state 0 is not AdamW's with 25 blocks of 256 elements"):
        from_bitsandbytes(state)

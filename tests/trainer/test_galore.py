"""GaLore and Q-GaLore: projections, the update against plain torch with a full SVD, laziness, resume."""

from __future__ import annotations

import copy

import pytest
import torch

from swiftk.config import OptimConfig
from swiftk.trainer.galore import GaLore, leading_directions, pack_int4, unpack_int4
from swiftk.trainer.optimizer import build_optimizer

RATES = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def spectrum(m, n, seed=0, decay=0.5):
    """A matrix with singular values decay^i and random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, generator=g, dtype=torch.float64))[0]
    return (u * decay ** torch.arange(m) @ v.t()).float()


def test_the_leading_directions_are_those_of_an_svd():
    for scale in (1.0, 1e-25, 1e25):  # squares would leave fp32
        g = spectrum(60, 100) * scale
        p = leading_directions(g, 8, "0/w/1")
        want = torch.linalg.svd(g.double() / scale)[0][:, :8]
        assert (p.t() @ p - torch.eye(8)).abs().max() < 1e-5
        assert ((p.double() * want).sum(0).abs() > 1 - 1e-4).all()
    assert torch.equal(p, leading_directions(g, 8, "0/w/1")) and not torch.equal(p, leading_directions(g, 8, "0/w/2"))
    assert leading_directions(spectrum(9, 30), 8, "k").shape == (9, 8)  # no room to oversample


def test_a_flat_spectrum_keeps_nearly_as_much_of_the_gradient_as_an_svd():
    g = torch.randn(128, 300)
    p = leading_directions(g, 16, "k")
    best = torch.linalg.svdvals(g)[:16].square().sum()
    assert (p.t() @ g).square().sum() > 0.9 * best


def test_int4():
    for n in (1, 5, 255, 256, 1000):
        x = torch.randn(n, 1)
        codes, absmax = pack_int4(x)
        assert codes.dtype == torch.uint8 and len(codes) == -(-n // 2) and len(absmax) == -(-n // 256)
        back = unpack_int4(codes, absmax, (n, 1))
        assert ((back - x).abs() <= (absmax / 14).repeat_interleave(256)[:n, None] * (1 + 1e-5)).all()
        assert torch.equal(back.abs().max(), x.abs().max()) or n > 256
    codes, absmax = pack_int4(torch.zeros(4, 3))
    assert torch.equal(unpack_int4(codes, absmax, (4, 3)), torch.zeros(4, 3))
    assert pack_int4(torch.tensor([1.0, -1.0]))[0].tolist() == [0xF1]  # element 0 in the high nibble, levels + 8


def reference(p, grads, rank, gap, scale):
    """The formula with torch's SVD in fp64."""
    p, wide = p.double(), p.shape[0] <= p.shape[1]
    beta1, beta2 = RATES["betas"]
    m = v = q = None
    for t, g in enumerate(grads, 1):
        g = g.double() if wide else g.double().t()
        if (t - 1) % gap == 0:
            new = torch.linalg.svd(g)[0][:, :rank]
            q = new if q is None else new * torch.where((new * q).sum(0) < 0, -1.0, 1.0)
        r = q.t() @ g
        m, v = (0, 0) if m is None else (m * beta1, v * beta2)
        m, v = m + (1 - beta1) * r, v + (1 - beta2) * r * r
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + RATES["eps"])
        update = q @ n if wide else (q @ n).t()
        p = p * (1 - RATES["lr"] * RATES["weight_decay"]) - RATES["lr"] * scale * update
    return p


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (24, 24)])
def test_the_update_is_the_papers(shape):
    m, n = sorted(shape)
    grads = [spectrum(m, n, seed) if shape[0] <= shape[1] else spectrum(m, n, seed).t() for seed in range(5)]
    p = torch.nn.Parameter(torch.randn(shape))
    want = reference(p.detach(), grads, 4, 3, 0.25)
    optimizer = GaLore([{"params": [("w", p)], "project": True}], **RATES, rank=4, gap=3)
    for g in grads:
        p.grad = g
        optimizer.step()
    assert (p - want).abs().max() < 1e-4
    assert optimizer.state[p]["exp_avg"].shape == (4, n) and optimizer.state[p]["projection"].shape == (m, 4)


def params(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (80, 70), "a.weight": (40, 130), "b.weight": (150, 60), "norm.weight": (40,)}
    shapes["c"] = (6, 90)
    return {n: torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in shapes.items()}


def steps(named, optimizer, first, last):
    for step in range(first, last):
        for i, p in enumerate(named.values()):
            g = torch.Generator().manual_seed(1000 * step + i)
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


def config(optim, **keys):
    return OptimConfig(optim=optim, galore_rank=32, galore_update_proj_gap=2, **keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["galore", "q_galore"])
def test_what_is_projected_and_what_is_not(optim, dtype):
    named = params(dtype=dtype)
    optimizer = build_optimizer(named, config(optim))
    assert sorted(optimizer.names.values()) == ["a.weight", "b.weight"]  # c has a side below the rank
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    before = {n: p.detach().clone() for n, p in named.items()}
    steps(named, optimizer, 0, 1)
    quantized = optim == "q_galore"
    for name, side in (("a.weight", 40), ("b.weight", 60)):
        update = (named[name] - before[name] * (1 - 0.01 * 0.1)).double()
        if dtype == torch.float32:  # rounding to bf16 has any rank
            assert torch.linalg.matrix_rank(update, rtol=1e-4) == 32
        state = optimizer.state[named[name]]
        assert state["exp_avg"].dtype == (torch.uint8 if quantized else torch.float32) or state["exp_avg"].numel() < 4096
        assert state["projection"].numel() == (side * 16 if quantized else side * 32)
    decays = {"c": 0.1, "model.embed_tokens.weight": 0.1, "norm.weight": 0}
    one = [(named[n] - before[n] * (1 - 0.01 * decay)).abs() for n, decay in decays.items()]
    if dtype == torch.float32:
        assert all(torch.allclose(u, torch.full_like(u, 0.01), rtol=1e-3) for u in one)  # AdamW's first step: lr everywhere


@pytest.mark.parametrize("optim", ["galore", "q_galore"])
def test_bf16_parameters_take_the_fp32_step_rounded_once(optim):
    narrow = params(dtype=torch.bfloat16)
    wide = {name: torch.nn.Parameter(p.detach().float()) for name, p in narrow.items()}
    for named in (narrow, wide):
        optimizer = build_optimizer(named, config(optim, weight_decay=0.5))
        for group in optimizer.param_groups:
            group["lr"] = 0.03
        g = torch.Generator().manual_seed(4)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=g).bfloat16().to(p.dtype)
        optimizer.step()
    assert all(torch.equal(narrow[name], p.detach().bfloat16()) for name, p in wide.items() if name in ("a.weight", "b.weight"))


@pytest.mark.parametrize("optim", ["galore", "q_galore"])
def test_a_state_dict_goes_on_bit_for_bit_and_ranks_agree(optim):
    named, others = params(), params()
    first, second = (build_optimizer(p, config(optim, learning_rate=0.01), seed=7) for p in (named, others))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
    steps(named, first, 0, 7)
    steps(others, second, 0, 3)
    saved = copy.deepcopy(second.state_dict())
    resumed = build_optimizer(others, config(optim), seed=7)
    resumed.load_state_dict(saved)
    steps(others, resumed, 3, 7)
    assert all(torch.equal(named[n], others[n]) for n in named)
    assert all(torch.equal(t, resumed.state[others[n]][k]) for n, p in named.items() for k, t in first.state[p].items())


@pytest.mark.parametrize("quantized", [False, True])
def test_what_the_host_reads_is_on_the_cpu_and_all_else_beside_the_parameter(quantized):
    """A state as new and as loaded, with the meta device for a GPU."""

    def where(optimizer, p):
        return {name: t.device.type for name, t in optimizer.state[p].items()}

    p, there = (torch.nn.Parameter(torch.zeros(16, 300, device=device)) for device in ("cpu", "meta"))
    ours, other = (GaLore([{"params": [("w", q)], "project": True}], rank=8, quantized=quantized) for q in (p, there))
    other.begin(there)
    want = {name: "cpu" if name in ("step", "due", "gap") else "meta" for name in other.state[there]}
    assert "projection" in want and ("cosines" in want) == quantized
    assert where(other, there) == want
    ours.begin(p)
    other.load_state_dict(ours.state_dict())
    assert where(other, there) == want


def test_the_gap_doubles_where_the_direction_has_settled():
    settled, moving = (torch.nn.Parameter(torch.randn(20, 40)) for _ in range(2))
    groups = [{"params": [("s", settled), ("m", moving)], "project": True}]
    optimizer = GaLore(groups, **RATES, rank=4, gap=2, quantized=True)
    projections = {settled: [], moving: []}
    for step in range(30):
        settled.grad, moving.grad = spectrum(20, 40) * (1 + step), torch.randn(20, 40)
        before = {p: dict(optimizer.state[p]).get("due", torch.zeros(())).clone() for p in projections}
        optimizer.step()
        for p, steps_of in projections.items():
            if optimizer.state[p]["due"] != before[p]:
                steps_of.append(step)
    assert projections[moving] == list(range(0, 30, 2))
    assert projections[settled] == [0, 2, 4, 6, 8, 10, 14, 22]  # five cosines at step 10: 4, then 8, then 16
    assert optimizer.state[settled]["cosines"].min() > 0.9 and optimizer.state[moving]["gap"] == 2


def test_a_zero_gradient_does_not_project():
    p = torch.nn.Parameter(torch.ones(20, 40))
    optimizer = GaLore([{"params": [("w", p)], "project": True}], **RATES, rank=4, gap=10)
    p.grad = torch.zeros(20, 40)
    optimizer.step()
    assert torch.allclose(p, torch.full_like(p, 1 - 0.02 * 0.1)) and not optimizer.state[p]["projection"].any()
    p.grad = spectrum(20, 40)
    optimizer.step()
    assert optimizer.state[p]["due"] == 12


@pytest.mark.parametrize("quantized", [False, True])
def test_it_trains(quantized):
    """A linear map of low rank, learnt from full-rank weights: the loss falls to a hundredth."""
    x, target = torch.randn(400, 60), spectrum(40, 60, decay=0.6)
    w = torch.nn.Parameter(torch.zeros(40, 60))
    groups = [{"params": [("w", w)], "project": True}]
    optimizer = GaLore(groups, lr=0.05, betas=(0.9, 0.99), rank=8, gap=10, scale=1.0, quantized=quantized)
    losses = []
    for step in range(120):
        loss = (x @ (w - target).t()).square().mean()
        losses.append(loss.item())
        w.grad = torch.autograd.grad(loss, w)[0]
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 120)
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("optim", ["adamw_8bit", "galore"])
def test_a_deep_copy_goes_on(optim):
    named = params()
    optimizer = build_optimizer(named, config(optim))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    steps(named, optimizer, 0, 1)
    copied, other = copy.deepcopy((named, optimizer))
    steps(named, optimizer, 1, 2), steps(copied, other, 1, 2)
    assert all(torch.equal(p, copied[name]) and p is not copied[name] for name, p in named.items())


def test_a_group_that_is_added_is_projected():
    first, later = (torch.nn.Parameter(torch.zeros(8, 40)) for _ in range(2))
    optimizer = GaLore([{"params": [("first", first)], "project": True}], rank=4)
    optimizer.add_param_group({"params": [("later", later)], "project": True})
    assert list(optimizer.names.values()) == ["first", "later"]


def test_errors():
    with pytest.raises(ValueError, match=r"GaLore: w has shape \(3, 40\), wants two sides larger than the rank, 4"):
        GaLore([{"params": [("w", torch.nn.Parameter(torch.zeros(3, 40)))], "project": True}], rank=4)
    w = torch.nn.Parameter(torch.zeros(8, 40))
    with pytest.raises(ValueError, match="GaLore: rank has 0 and gap 200, wants at least 1"):
        GaLore([{"params": [("w", w)], "project": True}], rank=0)
    w.grad = torch.full((8, 40), torch.nan)
    with pytest.raises(ValueError, match="GaLore: the gradient of w is not finite at step 1, when it is projected anew"):
        GaLore([{"params": [("w", w)], "project": True}], rank=4).step()
    with pytest.raises(ValueError, match="galore_rank: has 4096, and no trained matrix of a block has both sides"):
        build_optimizer(params(), OptimConfig(optim="galore", galore_rank=4096))

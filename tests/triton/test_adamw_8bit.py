from __future__ import annotations

import pytest
import torch

from swiftk.kernels import adamw_8bit as module
from swiftk.kernels.adamw_8bit import Moments, Update, adamw_8bit_, adamw_8bit_ref, new_moments
from tests.kernels.test_adamw_8bit import assert_equal, make
from tests.triton.conftest import ON_CUDA

# bf16 moments of bf16 parameters are the interpreter's wrong rounding
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not ON_CUDA, reason="bf16 needs a GPU"))]


def on(device, u: Update) -> Update:
    moments = Moments(*(t if t is None else t.to(device, copy=True) for t in u.moments))
    return u._replace(param=u.param.to(device, copy=True), grad=u.grad.to(device), moments=moments)


def check(device, updates: list[Update]) -> list[Update]:
    want = [adamw_8bit_ref(u) for u in updates]
    got = [on(device, u) for u in updates]
    adamw_8bit_(got)
    assert_equal([(u.param.cpu(), Moments(*(t if t is None else t.cpu() for t in u.moments))) for u in got], want)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[1, 255, 256, 257, 1024, 1025, 3000, 0, 5000], [16, 240, 1024, 2064, 4096]], ids=str)
def test_a_step_over_many_tensors_is_the_references_bit_for_bit(sizes, dtype, device, monkeypatch):
    """Sizes around a block and a program, 8-bit and fp32 moments, each tensor with its own step and rates; more tensors than
    the kernel looks at at once."""
    monkeypatch.setitem(module._CONSTANTS, "SPAN", 4)
    updates = [make(n, dtype, step=i + 2, min_8bit=0 if i % 3 else 10**9) for i, n in enumerate(sizes)]
    updates = [u._replace(lr=1e-3 * (i + 1)) for i, u in enumerate(updates)]
    got = check(device, updates)
    assert all(u.param.numel() == 0 or not torch.equal(u.param.cpu(), old.param) for u, old in zip(got, updates, strict=True))


def test_codes_of_every_bucket_and_edge(device):
    """Magnitudes over all decades, on and beside each middle of the map, negative ones too."""
    middles = []
    for signed in (True, False):
        code_map = module.dynamic_map(signed).double()
        middles.append(((code_map[1:] + code_map[:-1]) / 2).float())
    near = [m for x in middles for m in (x, torch.nextafter(x, 2 * x), torch.nextafter(x, 0 * x), -x, x.abs().sqrt())]
    x = torch.cat([*near, torch.randn(500) * 10.0 ** (-9 * torch.rand(500)), torch.tensor([0, -0.0, 1, -1, 1e-30, 1e-42])])
    blocks = x[: len(x) // 255 * 255].view(-1, 255)
    g = torch.cat([blocks, torch.ones(len(blocks), 1)], 1).flatten()
    zero = Update(torch.zeros_like(g), g, new_moments(g, min_8bit=0), 1, 0.0, (0.0, 0.0), 1e-8, 0.0)
    check(device, [zero, zero._replace(grad=g.abs().sqrt(), moments=new_moments(g, min_8bit=0))])


def test_blocks_that_have_no_scale(device):
    """Zero, tiny, infinite and NaN blocks, then one step more."""
    g = torch.randn(5 * 256 + 9)
    g[:256], g[256:512] = 0, 1e-39
    g[600], g[900] = torch.inf, torch.nan
    start = Update(torch.randn_like(g), g, new_moments(g, min_8bit=0), 1, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    (after,) = check(device, [start])
    moments = Moments(*(t if t is None else t.cpu() for t in after.moments))
    check(device, [start._replace(param=after.param.cpu(), moments=moments, step=2)])


def test_errors(device):
    u = on(device, make(300))
    with pytest.raises(ValueError, match="adamw_8bit_: step has 0"):
        adamw_8bit_([u._replace(step=0)])


@pytest.mark.skipif(not ON_CUDA, reason="CUDA graphs")
def test_a_graph_that_would_replay_stale_addresses_is_refused(device):
    updates = [on(device, make(1000, torch.float32, step=2, min_8bit=0))]
    adamw_8bit_(updates)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="CUDA graph"):
        adamw_8bit_(updates)

import pytest
import torch

from swiftk.kernels.rms_norm import rms_norm_bwd_triton, rms_norm_ref, rms_norm_triton


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 64), (33, 100), (5, 513), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_it(shape, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape[1]).to(dtype).requires_grad_()
    y, rstd = rms_norm_triton(x.detach(), w.detach(), 1e-6)
    want = rms_norm_ref(x.double(), w.double())
    assert torch.allclose(y.double(), want, rtol=1e-3, atol=1e-3)
    dy = torch.randn(shape).to(dtype)
    dx, dw = rms_norm_bwd_triton(dy, x.detach(), w.detach(), rstd)
    gx, gw = torch.autograd.grad(want, (x, w), dy.double())
    assert torch.allclose(dx.double(), gx.double(), rtol=2e-3, atol=4e-3)
    assert torch.allclose(dw.double(), gw.double(), rtol=2e-3, atol=2e-2)

"""Outputs may be changed in place, as torch's own may: `y = op(x); y += residual` under autograd. Attention's may not: its
backward reads it, and torch says so."""

from __future__ import annotations

import pytest
import torch

from swiftk.kernels.dropout import Dropout, dropout
from swiftk.kernels.linear import linear
from swiftk.kernels.lora_linear import Adapter, lora_linear, lora_linear_group
from swiftk.kernels.nf4 import nf4_quantize
from swiftk.kernels.nf4_linear import nf4_linear
from swiftk.kernels.rms_norm import rms_norm
from swiftk.kernels.rope import rope, rope_table
from swiftk.kernels.swiglu import swiglu

W = torch.randn(8, 8)
ADAPTER = Adapter(torch.randn(2, 8), torch.randn(8, 2), 0.5)
COS, SIN = rope_table(8, 16)
OPS = {
    "linear": lambda x: linear(x, W),
    "nf4_linear": lambda x: nf4_linear(x, nf4_quantize(W)),
    "lora_linear": lambda x: lora_linear(x, W, ADAPTER),
    "lora_linear_group": lambda x: lora_linear_group(x, [W, W], [ADAPTER, ADAPTER])[1],
    "dropout": lambda x: dropout(x, Dropout(0.5, torch.tensor([1, 2]), 0, torch.arange(6))),
    "rms_norm": lambda x: rms_norm(x, torch.ones(8)),
    "swiglu": lambda x: swiglu(x, x),
    "rope": lambda x: rope(x, COS, SIN, torch.arange(2)),
}


@pytest.mark.parametrize("name", OPS)
def test_in_place(name):
    x = torch.randn(2, 3, 8, requires_grad=True)
    apart = torch.autograd.grad((OPS[name](x) * 2).square().sum(), x)[0]
    y = OPS[name](x)
    y *= 2
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], apart)

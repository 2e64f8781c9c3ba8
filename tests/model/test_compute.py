"""Device, path and dtype that names mean on a machine; a machine with GPUs is made up by what torch says of it."""

from __future__ import annotations

import pytest
import torch

from swiftk.model.compute import compute_dtype, pick_device


@pytest.fixture
def gpus(monkeypatch):
    def make(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return make


def test_devices(gpus):
    gpus(0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device: has cuda, but torch .*; wants cpu"):
        pick_device("cuda")
    gpus(2)
    assert pick_device("auto", 1) == pick_device("cuda", 1) == torch.device("cuda", 1)
    assert pick_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="rank 2 of this machine has no GPU of its own, torch sees 2; wants at most 2 ranks"):
        pick_device("auto", 2)
    with pytest.raises(ValueError, match="device: has 'gpu', wants one of auto, cpu, cuda"):
        pick_device("gpu")


def test_bf16_on_a_gpu():
    assert compute_dtype(None, "portable", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(None, "portable") == torch.float32
    assert compute_dtype("float32", "auto", torch.device("cuda")) == torch.float32
    with pytest.raises(ValueError, match="torch_dtype: has 'float16'"):
        compute_dtype("float16", "auto")

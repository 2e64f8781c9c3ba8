"""What a machine computes in: its device, the path of the CPU kernels that `isa` means there, the dtype that goes with both."""

from __future__ import annotations

import torch

from swiftk.kernels._native import ISAS, native

DEVICES = ("auto", "cpu", "cuda")
CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def isa_path(isa: str) -> str:
    """What `isa` means on this machine; ValueError if it has no such instructions."""
    best = native().best_isa()
    try:
        native().resolve_isa(isa)
    except ValueError:
        has = ", ".join(ISAS[ISAS.index(best) :])
        raise ValueError(f"isa: has {isa!r}, wants what this CPU has: auto, {has}") from None
    return best if isa == "auto" else isa


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means for a process that is the local_rank-th of its machine.

    Raises: ValueError for another name, and for cuda where torch sees no such device.
    """
    if name not in DEVICES:
        raise ValueError(f"device: has {name!r}, wants one of {', '.join(DEVICES)}")
    found = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if not found:
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise ValueError(f"device: has cuda, but {why}; wants cpu, or a CUDA build of torch and NVIDIA's driver")
    if local_rank >= found:
        wants = f"wants at most {found} ranks here (torchrun --nproc-per-node {found}), or --device cpu"
        raise ValueError(f"device: rank {local_rank} of this machine has no GPU of its own, torch sees {found}; {wants}")
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """"cpu", or the GPU's name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def compute_dtype(name: str | None, isa: str, device: torch.device = CPU) -> torch.dtype:
    """That of a name (torch_dtype); None: bf16 on a GPU and where the CPU multiplies it (the kernels' avx512 path means AVX-512
    with BF16), else fp32."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" or isa_path(isa) == "avx512" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"torch_dtype: has {name!r}, wants one of {', '.join(DTYPES)}")
    return DTYPES[name]

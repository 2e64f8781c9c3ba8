"""Every Triton kernel as it is shipped and every CUDA source compile, without spills: for sm_90 here, for all chips in the long
tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swiftk.benchmarks import compile_gpu

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = compile_gpu.shipped()


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 100))])
@pytest.mark.parametrize("one", SHIPPED, ids=lambda one: one.label.replace(" ", "-"))
def test_compiles(one, arch):
    if arch in one.archs:
        assert compile_gpu.compile_triton(one, arch).wrong() is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 100))])
@pytest.mark.parametrize("source", compile_gpu.cuda_sources(), ids=lambda source: source.stem)
def test_cuda_compiles(source, arch):
    found = compile_gpu.compile_cuda(source, arch)
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", source.read_text())
    assert kernels and {one.label.split("<")[0] for one in found} == set(kernels)
    assert [one.wrong() for one in found if one.wrong()] == []


def test_spills_and_shared_memory_are_errors():
    fine = compile_gpu.Compiled("k", 80, 4, 255, 163 << 10, 0, 0, False, False)
    assert fine.wrong() is None
    assert "spilled" in (fine._replace(spills=8).wrong() or "")
    assert fine._replace(spills=8, allowed=8).wrong() is None
    assert "shared memory" in (fine._replace(shared=fine.shared + 1).wrong() or "")


def test_without_triton_kernels_import_and_a_launch_says_what_to_install():
    code = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil, torch, swiftk.kernels
for module in pkgutil.walk_packages(swiftk.kernels.__path__, "swiftk.kernels."):
    importlib.import_module(module.name)
from swiftk.kernels import _triton
from swiftk.kernels.rms_norm import _rms_norm_fwd_kernel, rms_norm
rms_norm(torch.ones(2, 3), torch.ones(3))
try:
    _triton.launch(_rms_norm_fwd_kernel, (1,), torch.ones(2))
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "_rms_norm_fwd_kernel is a Triton kernel" in out.stdout and "pip install triton" in out.stdout

"""Every Triton kernel as it is shipped and every CUDA source compile, without spills: for sm_90 here, for all chips in the long
tests."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swiftk.benchmarks import compile_gpu
from swiftk.kernels import _triton

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = compile_gpu.shipped()


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 100))])
@pytest.mark.parametrize("one", SHIPPED, ids=lambda one: one.label.replace(" ", "-"))
def test_compiles(one, arch):
    if arch in one.archs:
        assert compile_gpu.compile_triton(one, arch).wrong() is None


@pytest.mark.skipif(compile_gpu.find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 100))])
@pytest.mark.parametrize("source", compile_gpu.cuda_sources(), ids=lambda source: source.stem)
def test_cuda_compiles(source, arch):
    found = compile_gpu.compile_cuda(source, arch)
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", source.read_text())
    assert kernels and {one.label.split("<")[0] for one in found} == set(kernels)
    assert [one.wrong() for one in found if one.wrong()] == []


LAUNCH = """
#include "cuda/check.h"
#include <iostream>
cudaError_t last;  // what cudaGetLastError gives and forgets
int main() {
  auto say = [](cudaError_t before, cudaError_t after) {
    try {
      last = before, swiftk::gpu::check_earlier("op");
      last = after, swiftk::gpu::check_launch("op");
      std::cout << "fine\\n";
    } catch (const std::exception& e) { std::cout << e.what() << "\\n"; }
  };
  say(cudaSuccess, cudaSuccess), say(cudaErrorOther, cudaSuccess), say(cudaSuccess, cudaErrorOther);
  say(cudaSuccess, cudaErrorNoKernelImageForDevice);
}
"""
RUNTIME = """
enum cudaError_t { cudaSuccess, cudaErrorOther, cudaErrorNoKernelImageForDevice };
extern cudaError_t last;
inline cudaError_t cudaGetLastError() { cudaError_t is = last; return last = cudaSuccess, is; }
inline const char* cudaGetErrorString(cudaError_t) { return "words"; }
"""


def test_a_launch_is_not_blamed_for_an_earlier_error(tmp_path):
    (tmp_path / "main.cpp").write_text(LAUNCH)
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)  # in the place of CUDA's
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, tmp_path / "main.cpp", "-o", tmp_path / "main"], check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, text=True).stdout.splitlines()
    assert said[0] == "fine" and "op: an earlier CUDA error, of another call (words)" in said[1]
    assert said[2] == "op: CUDA refuses the launch (words)"
    assert said[3].startswith(said[2]) and "SWIFTK_CUDA_ARCHS" in said[3]
    for source in compile_gpu.cuda_sources():  # each launch has both
        text = source.read_text()
        assert 0 < text.count('check_launch("') == text.count('check_earlier("'), source


def test_spills_and_shared_memory_are_errors():
    fine = compile_gpu.Compiled("k", 80, 4, 255, 163 << 10, 0, 0, False, False)
    assert fine.wrong() is None
    assert "spilled" in (fine._replace(spills=8).wrong() or "")
    assert fine._replace(spills=8, allowed=8).wrong() is None
    assert "shared memory" in (fine._replace(shared=fine.shared + 1).wrong() or "")


def row(label, archs=(80, 90, 100)):
    return _triton.Shipped(label, None, {}, frozenset(), {}, 4, 2, True, archs, 0)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Kernels `fine` and `broken`, a CUDA source that is no C++, and compiled: the (label, chip) that reached Triton."""
    reached = []

    def compile_triton(one, arch):
        reached.append((one.label, arch))
        if one.label == "broken":
            raise RuntimeError("at 3:4:\n  x = y\n") from ValueError("an error\nof two lines")
        return compile_gpu.Compiled(one.label, arch, 4, 32, 0, 0, 0, False, False)

    source = tmp_path / "source.cu"
    source.write_text("no C++")
    monkeypatch.setattr(compile_gpu, "shipped", lambda: [row("broken"), row("fine", (90,))])
    monkeypatch.setattr(compile_gpu, "compile_triton", compile_triton)
    monkeypatch.setattr(compile_gpu, "cuda_sources", lambda: [source])
    return reached


def test_a_kernel_that_does_not_compile_is_one_line_and_the_others_go_on(fakes, capsys):
    assert compile_gpu.main(["--arch", "sm_90", "80", "--no-cuda-sources"]) == 1
    assert fakes == [("broken", 90), ("broken", 80), ("fine", 90)]
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"compile-gpu: broken on sm_{arch}: an error" for arch in (90, 80)]
    assert re.search(r"^fine +90 +4 +32 ", out, re.M) and re.search("^broken +80 +failed$", out, re.M)
    assert compile_gpu.main(["--only", "fine"]) == 0


def test_the_line_of_an_error_is_that_of_the_compiler():
    said = "codegen error\n`ptxas` stderr:\nptxas /tmp/k.ptx, line 30; error   : Not a name\nRepro: ptxas\n"
    assert compile_gpu.what_failed(RuntimeError(said)) == "ptxas /tmp/k.ptx, line 30; error   : Not a name"
    assert compile_gpu.what_failed(AssertionError()) == "AssertionError"


def test_a_label_that_nothing_begins_with_is_an_error(fakes, capsys):
    assert compile_gpu.main(["--only", "fine", "fime"]) == 1
    assert "--only has 'fime'" in capsys.readouterr().err and fakes == [("fine", 90)]
    assert compile_gpu.main(["--only", "fine", "--arch", "80"]) == 1  # shipped for another chip
    assert "--only has 'fine', and nothing that is shipped for sm_80" in capsys.readouterr().err and len(fakes) == 1


def test_cuda_sources_without_nvcc_are_an_error_unless_they_are_left_out(fakes, capsys, monkeypatch):
    if compile_gpu.find_nvcc():
        assert compile_gpu.main(["--arch", "90", "--only", "source"]) == 1
        assert re.search("^compile-gpu: source.cu on sm_90: .*error", capsys.readouterr().err, re.M)
    monkeypatch.setattr(compile_gpu, "find_nvcc", lambda: None)
    assert compile_gpu.main(["--arch", "90", "--only", "fine", "source"]) == 1 and fakes == [("fine", 90)]
    assert "not compiled: source.cu" in capsys.readouterr().err
    assert compile_gpu.main(["--only", "fine", "--no-cuda-sources"]) == 0


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


def test_the_interpreter_without_triton_is_an_error():
    """The CPU's kernels would run, and look as if they were Triton's."""
    code = "import sys; sys.modules['triton'] = None; import swiftk.kernels.rms_norm"
    for value, fails in (("1", True), ("yes", True), ("0", False), ("", False)):
        environment = {**os.environ, "TRITON_INTERPRET": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert (done.returncode != 0) == fails, (value, done.stderr)
        assert ("ImportError: swiftk: TRITON_INTERPRET is set and Triton cannot be imported" in done.stderr) == fails

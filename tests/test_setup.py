"""setup.py on machines that lack something: pybind11, ninja, an nvcc that knows every chip."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import setuptools

from swiftk.benchmarks import compile_gpu
from swiftk.kernels import _native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, without its call of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("swiftk_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(folder: Path, name: str, says: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_headers_of_pybind11_come_from_torch_where_it_is_not_installed(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    include = Path(build.find_pybind11())
    assert "torch" in include.parts and (include / "pybind11" / "pybind11.h").exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install pybind11"):
        build.find_pybind11()


def test_a_build_of_other_sources_is_refused(build, monkeypatch):
    """Those that lie in the tree; a wheel has none, and takes what was built with it."""
    assert build.digest() == _native.digest(ROOT / "csrc") == _native.native().__sources__
    head = {"__name__": "_swiftk_cuda", "__version__": _native.VERSION}
    for loaded in (types.SimpleNamespace(**head, __sources__="0" * 16), types.SimpleNamespace(**head)):
        monkeypatch.setitem(sys.modules, "_swiftk_cuda", loaded)
        with pytest.raises(ImportError, match=r"_swiftk_cuda was built of other sources than lie in .*; build it, with nvcc"):
            _native.native_cuda.__wrapped__()
    monkeypatch.setattr(_native, "__file__", str(ROOT / "docs" / "swiftk" / "kernels" / "_native.py"))
    assert _native.native_cuda.__wrapped__() is loaded


def test_ninja_is_the_package_or_the_one_in_path_or_none(build, monkeypatch, tmp_path):
    path = program(tmp_path, "ninja")
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_ninja() == [str(path)]
    path.unlink()
    assert build.find_ninja() is None


@pytest.mark.parametrize("threads", [False, True], ids=["ninja", "threads"])
def test_ninja_and_threads_build_the_same(build, monkeypatch, tmp_path, threads):
    """Two C sources in a folder with a blank in its name; an error of the compiler ends the build."""
    root = tmp_path / "a folder"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "one.cpp").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
    (root / "csrc" / "bindings.cpp").write_text(
        '#include <cstring>\nextern "C" int one();\n'
        'extern "C" __attribute__((visibility("default"))) int size() { return one() + std::strlen(SWIFTK_VERSION); }\n'
        'extern "C" __attribute__((visibility("default"))) const char* made_of() { return SWIFTK_SOURCES; }'
    )
    monkeypatch.setattr(build, "ROOT", root)
    if threads:
        monkeypatch.setattr(build, "find_ninja", lambda: None)

    def run():
        command = build.NinjaBuild(setuptools.Distribution())
        command.build_lib, command.inplace = str(tmp_path / "lib"), False
        command.ensure_finalized()
        command.build_extension(build.Extension("_tiny", build.sources("*.cpp")))
        return command.get_ext_fullpath("_tiny")

    assert ctypes.CDLL(run()).size() == 1 + len(build.VERSION)
    (root / "csrc" / "one.cpp").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 2; }')
    (path := tmp_path / "again.so").write_bytes(Path(run()).read_bytes())  # a library of the same path is not loaded again
    again = ctypes.CDLL(str(path))
    again.made_of.restype = ctypes.c_char_p
    assert again.size() == 2 + len(build.VERSION) and again.made_of().decode() == _native.digest(root / "csrc")
    (root / "csrc" / "bindings.cpp").write_text("no C++")
    with pytest.raises(build.subprocess.CalledProcessError):
        run()


def test_nvcc_is_in_path_or_where_cuda_home_says_for_setup_and_for_compile_gpu(build, monkeypatch, tmp_path):
    path = program(tmp_path / "bin", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == compile_gpu.find_nvcc() == str(path)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.delenv("CUDA_HOME")
    assert build.find_nvcc() == compile_gpu.find_nvcc() == str(path)


def test_an_nvcc_that_does_not_know_a_chip_says_what_to_set(build, monkeypatch, tmp_path):
    program(tmp_path, "nvcc", "compute_80\ncompute_90")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SWIFTK_CUDA_ARCHS", raising=False)
    with pytest.raises(SystemExit, match=r'sm_100 .*SWIFTK_CUDA_ARCHS="80 90" .*SWIFTK_CUDA=0'):
        build.cuda_archs()
    monkeypatch.setenv("SWIFTK_CUDA_ARCHS", "120")
    with pytest.raises(SystemExit, match=r"sm_120 .*; SWIFTK_CUDA=0"):
        build.cuda_archs()
    monkeypatch.setenv("SWIFTK_CUDA_ARCHS", "80 90")
    assert build.cuda_archs()[-1] == "-gencode=arch=compute_90,code=compute_90"

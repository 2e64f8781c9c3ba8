"""Build of swiftk: the Python packages, `_swiftk_C`, the C++ kernels, and on a machine with an NVIDIA driver and nvcc
`_swiftk_cuda`, the CUDA ones (SWIFTK_CUDA=1: wherever nvcc is; SWIFTK_CUDA=0: nowhere).

`kernels/`, `parallel/`, `trainer/` and `benchmarks/` stand beside `swiftk/` on disk and are its subpackages by name;
`package_dir` is the truth for wheels and sdists, the committed links `swiftk/kernels -> ../kernels` for the source tree.

The C++ build is driven by ninja (incremental, header dependencies tracked), includes no torch header and uses no
`-march`: each source compiles its kernels once per instruction set (csrc/cpu/for_each_isa.h) and picks at run time.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CXX_FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wno-psabi",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # false positives inside GCC 12's immintrin.h
]  # fmt: skip
# SWIFTK_EMULATE_AVX512=1: the avx512 bodies through SIMDe (libsimde-dev), to test them with isa="avx512" on an AVX2 machine
EMULATE = os.environ.get("SWIFTK_EMULATE_AVX512", "0") == "1"
EMULATE_FLAGS = ["-DSWIFTK_EMULATE_AVX512", "-mavx2", "-mfma", "-mbmi2", "-O1", "-fno-tree-sra"]  # GCC 12 crashes
LINK_FLAGS = ["-shared", "-fopenmp"]
# cudart is linked in: the module loads on a machine without a driver, and beside any torch
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "--threads=4", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]
CUDA_ARCHS = "80 90 100"
BINDINGS_CUDA = "csrc/bindings_cuda.cpp"


def find_nvcc() -> str | None:
    """In PATH, or where the toolkit is by itself."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return shutil.which("nvcc") or next((str(p) for home in homes if home and (p := Path(home) / "bin/nvcc").exists()), None)


def wants_cuda() -> bool:
    wanted = os.environ.get("SWIFTK_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"swiftk: SWIFTK_CUDA has {wanted!r}, wants 0, 1 or nothing (nvcc and a driver decide)")
    if wanted == "1" and find_nvcc() is None:
        raise SystemExit("swiftk: SWIFTK_CUDA=1 wants nvcc (the CUDA toolkit, 12.8 or newer) in PATH or CUDA_HOME")
    driver = shutil.which("nvidia-smi") or any(Path(p).exists() for p in ("/proc/driver/nvidia/version", "/dev/nvidiactl"))
    return wanted == "1" or (wanted == "auto" and bool(driver) and find_nvcc() is not None)


def cuda_archs() -> list[str]:
    """-gencode for each chip that is asked for, and PTX of the newest one for those to come."""
    archs = os.environ.get("SWIFTK_CUDA_ARCHS", CUDA_ARCHS).split()
    if not archs or not all(a.isdigit() and int(a) >= 80 for a in archs):
        raise SystemExit(f"swiftk: SWIFTK_CUDA_ARCHS has {' '.join(archs)!r}, wants capabilities from 80, as in {CUDA_ARCHS!r}")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    newest = max(archs, key=int)
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def ninja_path(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_time(source) -> int:
    """Longer for more: the size of a source and of the bodies (.inc) that it compiles per instruction set."""
    text = (ROOT / source).read_text()
    return len(text) + sum((ROOT / "csrc" / body).stat().st_size for body in re.findall(r'"(\S+\.inc)"', text))


def sources(pattern: str) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob(pattern))


def shell_quote(path) -> str:
    return '"' + str(path) + '"'


class NinjaBuild(build_ext):
    """Writes a ninja file for the extension and runs it: `python setup.py build_ext` and pip both come here."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = "-emulated" if EMULATE else ""
        work = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sysconfig.get_python_version()}{kind}"
        work.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"], ROOT / "csrc"]
        flags = [*CXX_FLAGS, *(EMULATE_FLAGS if EMULATE else [])]
        flags += [f'-DSWIFTK_VERSION=\\"{VERSION}\\"', *(f"-I{shell_quote(p)}" for p in includes)]
        if sys.platform == "darwin":
            raise SystemExit("swiftk: the C++ kernels build with GCC or Clang on Linux; macOS is not supported yet")
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"flags = {' '.join(flags).replace('$', '$$')}",
            "rule cc\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",  # ninja quotes $in and $out itself
            "  depfile = $out.d\n  deps = gcc\n  description = CXX $in",
            f"rule link\n  command = $cxx $in -o $out {' '.join(LINK_FLAGS)}\n  description = LINK $out",
        ]
        link = "link"
        if any(source.endswith(".cu") for source in ext.sources):
            cuda_flags, link = " ".join([*NVCC_FLAGS, *cuda_archs(), f"-I{shell_quote(ROOT / 'csrc')}"]), "link_cuda"
            lines += [
                f"nvcc = {shell_quote(find_nvcc())}\ncuda_flags = {cuda_flags.replace('$', '$$')}",
                "rule cu\n  command = $nvcc $cuda_flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc\n  description = NVCC $in",
                "rule link_cuda\n  command = $nvcc -shared -cudart=static $in -o $out\n  description = LINK $out",
            ]
        objects = []
        for source in sorted(ext.sources, key=compile_time, reverse=True):  # none is left to wait for
            obj = Path(source).with_suffix(".o").as_posix().replace("/", "_")
            rule = "cu" if source.endswith(".cu") else "cc"
            lines.append(f"build {ninja_path(obj)}: {rule} {ninja_path(ROOT / source)}")
            objects.append(obj)
        lines.append(f"build {ninja_path(ext.name)}.so: {link} {' '.join(map(ninja_path, objects))}")
        lines.append(f"default {ninja_path(ext.name)}.so")
        file = f"{ext.name}.ninja"
        (work / file).write_text("\n".join(lines) + "\n")
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(work), "-f", file])
        target.unlink(missing_ok=True)  # a running process keeps its old mapping
        target.write_bytes((work / f"{ext.name}.so").read_bytes())


setup(
    packages=[
        "swiftk", "swiftk.decoder", "swiftk.model", "swiftk.testing",
        "swiftk.kernels", "swiftk.kernels.attention", "swiftk.parallel", "swiftk.trainer",
        "swiftk.benchmarks", "swiftk.benchmarks.kernels",
    ],
    package_dir={
        "swiftk": "swiftk",
        "swiftk.kernels": "kernels",
        "swiftk.parallel": "parallel",
        "swiftk.trainer": "trainer",
        "swiftk.benchmarks": "benchmarks",
    },
    package_data={"swiftk": ["py.typed", "*.yaml"]},
    ext_modules=[
        Extension("_swiftk_C", [p for p in sources("**/*.cpp") if p != BINDINGS_CUDA]),
        *([Extension("_swiftk_cuda", [BINDINGS_CUDA, *sources("cuda/*.cu")])] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": NinjaBuild},
)

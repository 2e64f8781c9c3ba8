"""Build of swiftk: the Python packages, `_swiftk_C`, the C++ kernels, and on a machine with an NVIDIA driver and nvcc
`_swiftk_cuda`, the CUDA ones (SWIFTK_CUDA=1: wherever nvcc is; SWIFTK_CUDA=0: nowhere).

`kernels/`, `parallel/`, `trainer/` and `benchmarks/` stand beside `swiftk/` on disk and are its subpackages by name;
`package_dir` is the truth for wheels and sdists, the committed links `swiftk/kernels -> ../kernels` for the source tree.

The C++ build is driven by ninja (incremental, header dependencies tracked), includes no torch header and uses no
`-march`: each source compiles its kernels once per instruction set (csrc/cpu/for_each_isa.h) and picks at run time.
A machine without pybind11 and ninja, and without a network, builds too: torch brings pybind11's headers, and threads take
ninja's place, which compile every source each time.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def find_pybind11() -> str:
    """The folder of the headers. torch's is found without importing it."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")
        include = Path(torch.origin).parent / "include" if torch and torch.origin else Path()
        if not (include / "pybind11" / "pybind11.h").exists():
            raise SystemExit("swiftk: pybind11's headers are neither installed nor in torch: pip install pybind11") from None
        return str(include)


def find_ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return [path] if (path := shutil.which("ninja")) else None


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
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if missing := [a for a in archs if f"compute_{a}" not in known]:
        rest = " ".join(a for a in archs if a not in missing)
        leave = f'SWIFTK_CUDA_ARCHS="{rest}" builds for the others, ' if rest else ""
        raise SystemExit(
            f"swiftk: {nvcc} cannot compile for sm_{', sm_'.join(missing)} (CUDA 12.8 or newer is for {CUDA_ARCHS}); "
            f"{leave}SWIFTK_CUDA=0 no CUDA kernels"
        )
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


def digest() -> str:
    """Of everything below csrc, as kernels/_native.py has it of the sources that it finds."""
    files = sorted(p for p in (ROOT / "csrc").rglob("[!.]*") if p.suffix in (".h", ".inc", ".cpp", ".cu") and p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:16]


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
        includes = [find_pybind11(), sysconfig.get_paths()["include"], ROOT / "csrc"]
        flags = [*CXX_FLAGS, *(EMULATE_FLAGS if EMULATE else [])]
        flags += [f'-DSWIFTK_VERSION=\\"{VERSION}\\"', *(f"-I{shell_quote(p)}" for p in includes)]
        if sys.platform == "darwin":
            raise SystemExit("swiftk: the C++ kernels build with GCC or Clang on Linux; macOS is not supported yet")
        cxx = os.environ.get("CXX", "g++")
        compilers = {"cc": f"{cxx} {' '.join(flags)}"}
        compilers["bind"] = f'{compilers["cc"]} -DSWIFTK_SOURCES=\\"{digest()}\\"'  # of another command, so built again
        linker = f"{cxx} {' '.join(LINK_FLAGS)}"
        if any(source.endswith(".cu") for source in ext.sources):
            nvcc = shell_quote(find_nvcc())
            compilers["cu"] = " ".join([nvcc, *NVCC_FLAGS, *cuda_archs(), f"-I{shell_quote(ROOT / 'csrc')}"])
            linker = f"{nvcc} -shared -cudart=static"
        objects = {  # the longest first: none is left to wait for
            Path(s).with_suffix(".o").as_posix().replace("/", "_"): (
                "cu" if s.endswith(".cu") else "bind" if Path(s).name.startswith("bindings") else "cc", ROOT / s,
            )
            for s in sorted(ext.sources, key=compile_time, reverse=True)
        }
        library = f"{ext.name}.so"
        if ninja := find_ninja():
            lines = [f"rule link\n  command = {linker.replace('$', '$$')} $in -o $out\n  description = LINK $out"]
            for rule, compiler in compilers.items():  # ninja quotes $in and $out itself
                lines.append(f"rule {rule}\n  command = {compiler.replace('$', '$$')} -MMD -MF $out.d -c $in -o $out")
                lines.append(f"  depfile = $out.d\n  deps = gcc\n  description = {rule.upper()} $in")
            lines += [f"build {ninja_path(obj)}: {rule} {ninja_path(s)}" for obj, (rule, s) in objects.items()]
            lines.append(f"build {ninja_path(library)}: link {' '.join(map(ninja_path, objects))}")
            (work / f"{ext.name}.ninja").write_text("\n".join(lines) + "\n")
            subprocess.check_call([*ninja, "-C", str(work), "-f", f"{ext.name}.ninja"])
        else:
            commands = [f"{compilers[r]} -c {shlex.quote(str(s))} -o {shlex.quote(obj)}" for obj, (r, s) in objects.items()]
            shell = functools.partial(subprocess.check_call, shell=True, cwd=work)
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(shell, commands))
            shell(f"{linker} {shlex.join(objects)} -o {shlex.quote(library)}")
        target.unlink(missing_ok=True)  # a running process keeps its old mapping
        target.write_bytes((work / library).read_bytes())


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
        # first: an nvcc that is too old says so at once
        *([Extension("_swiftk_cuda", [BINDINGS_CUDA, *sources("cuda/*.cu")])] if wants_cuda() else []),
        Extension("_swiftk_C", [p for p in sources("**/*.cpp") if p != BINDINGS_CUDA]),
    ],
    cmdclass={"build_ext": NinjaBuild},
)

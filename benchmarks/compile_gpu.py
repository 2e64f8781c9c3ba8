"""`make compile-gpu`, or `python -m swiftk.bench compile-gpu [--arch 90 ...] [--only LABEL ...]`: compiles every Triton kernel
as it is shipped and every CUDA source, on a machine without a GPU, and prints what ptxas says: registers, shared memory,
spilled bytes, and whether Hopper's instructions (wgmma, TMA) are there.

A kernel that does not compile, spills more than its entry says, or wants more shared memory than a block can have, is an error,
and so is a CUDA source without an nvcc (--no-cuda-sources leaves them out). Values are not proven by this: fp32 and fp16 by the
interpreter (tests/triton), bf16 on a GPU alone.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from swiftk.benchmarks.harness import Parser

ARCHS = (80, 90, 100)
ROOT = Path(__file__).resolve().parent.parent
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false"]  # as in setup.py
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can have (CUDA C++ programming guide, technical data)


class Compiled(NamedTuple):
    label: str
    arch: int
    warps: int  # 0: a CUDA source, whose launch is not known here
    registers: int
    shared: int
    spills: int
    allowed: int  # spills
    wgmma: bool
    tma: bool

    def row(self) -> str:
        """What follows the label and the chip."""
        wgmma, tma = ("yes" if has else "-" for has in (self.wgmma, self.tma))
        return f"{self.warps or '-':>5} {self.registers:>9} {self.shared:>7} {self.spills:>6}  {wgmma:5}  {tma}"

    def wrong(self) -> str | None:
        if self.spills > self.allowed:
            return f"{self.label} on sm_{self.arch}: {self.spills} bytes spilled, wants at most {self.allowed}"
        if self.shared > SHARED[self.arch]:
            return f"{self.label} on sm_{self.arch}: {self.shared} bytes of shared memory, wants at most {SHARED[self.arch]}"
        return None


HEAD = f"{'kernel':44} {'sm':>4} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6}  wgmma  tma"


def shipped() -> list[Any]:
    """The list that kernels/_triton.py keeps, after every kernel file has been imported."""
    import swiftk.kernels
    from swiftk.kernels import _triton

    for module in pkgutil.walk_packages(swiftk.kernels.__path__, "swiftk.kernels."):
        importlib.import_module(module.name)
    return _triton.SHIPPED


def _ptxas_says(said: str) -> tuple[int, int]:
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers and spills, said
    return int(registers[1]), int(spills[1]) + int(spills[2])


def find_nvcc() -> str | None:
    """As setup.py finds it, which is no part of an installation."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return shutil.which("nvcc") or next((str(p) for home in homes if home and (p := Path(home) / "bin/nvcc").exists()), None)


def compile_triton(one: Any, arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    names = one.kernel.arg_names
    source = ASTSource(
        fn=one.kernel,
        signature={name: one.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in one.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in one.divisible},
    )
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": one.fuse}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(path), "-o", f"{path}.o"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spills = _ptxas_says(said)
    return Compiled(
        one.label, arch, one.num_warps, registers, built.metadata.shared, spills, one.spills, "wgmma.mma_async" in ptx,
        "cp.async.bulk.tensor" in ptx,
    )


def cuda_sources() -> list[Path]:
    """csrc/cuda/*.cu; none in an installation without the source tree."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_cuda(source: Path, arch: int) -> list[Compiled]:
    """Each kernel of a CUDA source. What it asks for at launch beyond its static shared memory is checked where it is launched.
    A stack frame counts as spilled: an array that is indexed at run time lies in memory too."""
    with tempfile.TemporaryDirectory() as folder:
        command = [find_nvcc() or "nvcc", *NVCC_FLAGS, "-cubin", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
        built = subprocess.run([*command, "-o", f"{folder}/out", str(source)], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(built.stderr)
    said = subprocess.run(["c++filt"], input=built.stderr, check=True, capture_output=True, text=True).stdout
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        name = part.split("'")[1].removeprefix("void ").replace("swiftk::gpu::", "").split("(")[0]
        registers, spills = _ptxas_says(part)
        stack = re.search(r"(\d+) bytes stack frame", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spills = max(spills, int(stack[1]) if stack else 0)
        found.append(Compiled(name, arch, 0, registers, int(shared[1]) if shared else 0, spills, 0, False, False))
    return found


def what_failed(error: BaseException) -> str:
    """One line: a compiler's first error, or what it says first. Triton wraps an error once per nested function."""
    while error.__cause__:
        error = error.__cause__
    said = str(getattr(error, "error_message", None) or getattr(error, "stderr", None) or error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if re.search(r"\b(error|fatal)\s*:", line)), lines[0])


def chip(name: str) -> int:
    return int(name.removeprefix("sm_"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("compile-gpu", description=__doc__)
    parser.add_argument("--arch", type=chip, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help="kernels whose label begins with one of these")
    parser.add_argument("--no-cuda-sources", action="store_true", help="Triton kernels only")
    args = parser.parse_args(argv)
    from swiftk.kernels import _triton

    if _triton.triton is None or _triton.INTERPRETED:
        why = "Triton is not installed: pip install triton" if _triton.triton is None else "unset TRITON_INTERPRET"
        print(f"compile-gpu: {why}", file=sys.stderr)
        return 1
    print(f"Triton {_triton.triton.__version__}\n{HEAD}")
    wanted = tuple(args.only) or ("",)
    work: list[tuple[str, int, Any]] = [
        (one.label, arch, one) for one in shipped() if one.label.startswith(wanted) for arch in args.arch if arch in one.archs
    ]
    sources = [] if args.no_cuda_sources else [s for s in cuda_sources() if s.name.startswith(wanted)]
    work += [(source.name, arch, source) for source in sources for arch in args.arch]
    failed = [
        f"--only has {only!r}, and nothing that is shipped for sm_{', sm_'.join(map(str, args.arch))} begins with it"
        for only in args.only
        if not any(label.startswith(only) for label, *_ in work)
    ]
    if sources and find_nvcc() is None:
        names = ", ".join(source.name for source in sources)
        failed.append(
            f"nvcc is not in PATH, CUDA_HOME or /usr/local/cuda, not compiled: {names}; install CUDA 12.8 or newer, or say "
            "--no-cuda-sources"
        )
        work = [each for each in work if each[2] not in sources]
    for label, arch, one in work:
        print(f"{label:44} {arch:>4} ", end="", flush=True)  # before it is compiled: a slow one is known
        try:
            found = compile_cuda(one, arch) if isinstance(one, Path) else [compile_triton(one, arch)]
        except Exception as error:  # the others go on
            print("failed", flush=True)
            failed.append(f"{label} on sm_{arch}: {what_failed(error)}")
            continue
        rows = [f"\n{k.label:44} {arch:>4} {k.row()}" for k in found] if isinstance(one, Path) else [found[0].row()]
        print("".join(rows), flush=True)
        failed += [line for k in found if (line := k.wrong())]
    for line in failed:
        print(f"compile-gpu: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

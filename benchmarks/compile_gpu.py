"""`python -m swiftk.bench compile-gpu [--arch 90 ...]`: compiles every Triton kernel as it is shipped, without a GPU, and prints
what ptxas says of it: registers, shared memory, spilled bytes, and whether Hopper's instructions are there.

A kernel that spills, or that wants more shared memory than a block can have, is an error. bf16 values are not proven by this.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can have (CUDA C++ programming guide, table of technical data)
OPS = ("rms_norm",)


def compiled(one: Any, arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    signature = {**one.types, **dict.fromkeys(one.constants, "constexpr")}
    constants = {(one.kernel.arg_names.index(name),): value for name, value in one.constants.items()}
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constants)
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(built.asm["ptx"])
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(path), "-o", str(path) + ".o"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers and spills, said
    return {
        "kernel": one.label, "arch": arch, "warps": one.num_warps, "registers": int(registers[1]),
        "shared": built.metadata.shared, "spills": int(spills[1]) + int(spills[2]),
        "wgmma": "wgmma.mma_async" in built.asm["ptx"], "tma": "cp.async.bulk.tensor" in built.asm["ptx"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m swiftk.bench compile-gpu", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    args = parser.parse_args(argv)
    from swiftk.kernels import _triton

    if _triton.triton is None:
        print("compile-gpu: Triton is not installed; pip install triton", file=sys.stderr)
        return 1
    for op in OPS:
        importlib.import_module(f"swiftk.kernels.{op}")
    wrong = []
    print(f"{'kernel':28} {'sm':>4} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6}  wgmma  tma")
    for arch in args.arch:
        for one in _triton.SHIPPED:
            found = compiled(one, arch)
            yes = {True: "yes", False: "-"}
            print(
                f"{found['kernel']:28} {arch:>4} {found['warps']:>5} {found['registers']:>9} {found['shared']:>7} "
                f"{found['spills']:>6}  {yes[found['wgmma']]:5}  {yes[found['tma']]}"
            )
            if found["spills"] or found["shared"] > SHARED[arch]:
                wrong.append(f"{one.label} on sm_{arch}: {found['spills']} bytes spilled, {found['shared']} of shared memory")
    for line in wrong:
        print(f"compile-gpu: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

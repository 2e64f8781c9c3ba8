"""The house: imports point down, kernels stay light, every file has its twins."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import torch

from swiftk.kernels._native import VERSION, native

ROOT = Path(__file__).resolve().parent.parent
# floor of each folder or file; a file imports its own floor and those below (trainer and decoder never each other)
FLOORS = {
    "swiftk/config.py": 0, "swiftk/__init__.py": 0, "kernels": 1, "swiftk/testing": 1, "parallel": 2, "swiftk/model": 3,
    "trainer": 4, "swiftk/decoder": 4, "swiftk": 5, "benchmarks": 5,
}  # fmt: skip
MODULES = {
    "swiftk.config": "swiftk/config.py", "swiftk.kernels": "kernels", "swiftk.testing": "swiftk/testing",
    "swiftk.parallel": "parallel", "swiftk.model": "swiftk/model", "swiftk.trainer": "trainer",
    "swiftk.decoder": "swiftk/decoder", "swiftk.benchmarks": "benchmarks", "swiftk": "swiftk",
}  # fmt: skip


def place_of(path: str, table) -> str:
    """The longest entry of `table` that `path` lies under."""
    return max((p for p in table if path == p or path.startswith(p + "/") or path.startswith(p + ".")), key=len)


def sources(*folders: str) -> list[Path]:
    files = (p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return sorted(p for p in files if not any(parent.is_symlink() for parent in p.parents))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_imports_point_down():
    upward = []
    for path in sources("swiftk", "kernels", "parallel", "trainer", "benchmarks"):
        here = place_of(path.relative_to(ROOT).as_posix(), FLOORS)
        for name in imports(path):
            if name.split(".")[0] != "swiftk" or name == "swiftk.__version__":
                continue
            there = MODULES[place_of(name, MODULES)]
            sideways = {here, there} == {"trainer", "swiftk/decoder"}
            if FLOORS[there] > FLOORS[here] or sideways:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward, upward


def test_kernels_stay_light():
    """No torch.distributed, nn.Module or config in a kernel file; the environment is the next test's."""
    for path in sources("kernels"):
        names, text = imports(path), path.read_text()
        assert not [n for n in names if n.startswith(("torch.distributed", "torch.nn.Module", "swiftk.config"))], path
        assert "nn.Module" not in text, path


def test_environment_is_read_on_floor_5_only():
    """But for Triton's own switch, which kernels/_triton.py reads where there is no Triton to ask."""
    for path in sources("kernels", "parallel", "trainer", "swiftk/model", "swiftk/decoder"):
        text = path.read_text().replace('os.environ.get("TRITON_INTERPRET"', "")
        assert "os.environ" not in text and "getenv" not in text, path


def test_importing_one_kernel_adds_nothing_but_torch_triton_numpy():
    code = """
import sys, torch, numpy
try:
    import triton
except ImportError:
    pass
before = set(sys.modules)
import importlib
importlib.import_module(sys.argv[1])
new = {m for m in set(sys.modules) - before if m.split(".")[0] not in ("swiftk", "torch", "triton", "numpy", "_swiftk_C")}
std = {m for m in new if m.split(".")[0] in sys.stdlib_module_names}
print(sorted(new - std))
print(sorted(m for m in sys.modules if m.startswith(("swiftk.trainer", "swiftk.model", "swiftk.parallel", "swiftk.config"))))
"""
    for module in ("swiftk.kernels.rms_norm", "swiftk.kernels.linear_cross_entropy", "swiftk.kernels.attention"):
        out = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, cwd=ROOT, check=True)
        assert out.stdout.split() == ["[]", "[]"], (module, out.stdout)


def test_every_operator_is_registered_for_cuda():
    """With a kernel, or with the error that says what to do instead; backward operators too."""
    for path in sources("kernels"):
        if not path.stem.startswith("_"):
            importlib.import_module(".".join(("swiftk", *path.relative_to(ROOT).with_suffix("").parts)))
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("swiftk::")}
    assert len(operators) > 10
    assert not operators - set(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))


def test_twins():
    """kernels/x.py <-> tests/kernels/test_x.py <-> benchmarks/kernels/bench_x.py; each csrc/*/x.cpp has its kernel file."""
    ops = {p.stem for p in sources("kernels") if not p.stem.startswith("_")}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests/kernels").glob("test_*.py")}
    benches = {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks/kernels").glob("bench_*.py")}
    native = {p.stem for p in (ROOT / "csrc").glob("*/*") if p.suffix in (".cpp", ".cu", ".inc")}
    assert ops == tests, f"kernels without tests, or tests without kernels: {ops ^ tests}"
    assert ops == benches, f"kernels without benchmarks, or benchmarks without kernels: {ops ^ benches}"
    assert native <= ops, f"csrc files without a kernel file: {native - ops}"


def test_the_stub_names_what_the_compiled_module_has():
    found = ast.parse((ROOT / "_swiftk_C.pyi").read_text()).body
    stub = {node.name for node in found if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    module = {name for name in dir(native()) if not name.startswith("_")}
    assert stub == module


def test_the_stub_names_what_the_cuda_module_binds():
    """By its source, which is there where no GPU build is."""
    stub = {node.name for node in ast.parse((ROOT / "_swiftk_cuda.pyi").read_text()).body if isinstance(node, ast.FunctionDef)}
    assert stub == set(re.findall(r'm\.def\(\s*"(\w+)"', (ROOT / "csrc/bindings_cuda.cpp").read_text()))


def test_the_version_is_the_same_everywhere():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION == native().__version__

"""`make gpu`: what a CUDA device is asked to do, in parts of at most four minutes, one JSON each.

First form: `build` (versions, device), `test` (the op tests marked `gpu`: each op on CUDA against its reference on the CPU,
or the error that says there is no CUDA kernel yet) and `bench-<op>` (the op and its peers; where the op has no kernel the
peers are timed alone, as the figures to beat).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

BUDGET_SECONDS = 9 * 60


def parts(kernels: list[str]) -> list[str]:
    return ["build", "test", *(f"bench-{k}" for k in kernels)]


def run(wanted: list[str], kernels: list[str], save: Callable[[str, dict], Path], root: Path) -> int:
    """Runs the wanted parts (all, most important first, that fit into nine minutes, where none is named)."""
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch sees no CUDA device; run it on a machine with one, with a CUDA build of torch")
    unknown = [p for p in wanted if p not in parts(kernels)]
    if unknown:
        raise SystemExit(f"make gpu: PART has {unknown[0]!r}, wants one of {', '.join(parts(kernels))}")
    begin, failed = time.monotonic(), 0
    for part in wanted or parts(kernels):
        if not wanted and time.monotonic() - begin > BUDGET_SECONDS - 240:
            print(f"make gpu: stopped before {part}, nine minutes are nearly over; run `make gpu PART={part}`")
            break
        print(f"== {part}", flush=True)
        if part == "build":
            free, total = torch.cuda.mem_get_info()
            major, minor = torch.cuda.get_device_capability()
            payload = {"device": torch.cuda.get_device_name(), "sm": f"{major}{minor}", "free": free, "total": total}
            save("gpu-build", payload | {"cuda": torch.version.cuda})
            print(json.dumps(payload))
            continue
        if part == "test":
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rsx", "tests"]
        else:
            only = part.removeprefix("bench-")
            command = [sys.executable, "-m", "swiftk.bench", "kernels", "--device", "cuda", "--only", only, "--save"]
        out = subprocess.run(command, cwd=root, capture_output=True, text=True)
        print(out.stdout[-6000:], out.stderr[-3000:], flush=True)
        failed += out.returncode != 0
        if part == "test":
            save("gpu-test", {"exit": out.returncode, "summary": out.stdout.strip().splitlines()[-1:]})
    return 1 if failed else 0

"""`make gpu [PART=...]`: everything that a CUDA device is asked to do, in parts of at most four minutes, one JSON each.

    build         both native modules, the device, versions
    test          the Triton and CUDA kernels on the device in bf16 and fp32, the decoder and a training step (tests/triton,
                  tests/gpu, and what is marked `gpu`)
    sanitize      compute-sanitizer (memcheck, racecheck) over the tests of the CUDA C++ kernels
    bench-<op>    the op and its peers (benchmarks/kernels/bench_<op>.py)
    train         a LoRA and a QLoRA step of an 8B shape against transformers + peft (+ bitsandbytes)
    decode        the decoder at an 8B shape

Without a part: all of them in this order while nine minutes last; a part whose JSON is of this commit and without a failure
is passed over, so that the command goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

BUDGET_SECONDS = 9 * 60
PART_SECONDS = 4 * 60
FIRST = ("varlen", "nf4", "nf4_linear", "paged", "lora_linear", "linear_cross_entropy")  # ops, by what hangs on them


def parts(kernels: list[str]) -> list[str]:
    order = [*(k for k in FIRST if k in kernels), *(k for k in kernels if k not in FIRST)]
    return ["build", "test", "sanitize", "train", "decode", *(f"bench-{k}" for k in order)]


def command(part: str) -> list[str]:
    python = [sys.executable, "-m"]
    if part == "build":
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if part == "test":
        return [*python, "pytest", "-q", "-rsx", "-m", "not long", "tests/triton", "tests/gpu", "tests/test_gpu.py"]
    if part == "sanitize":
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        check = [*python, "pytest", "-q", "-x", "-m", "not long", "tests/gpu/test_nf4_cuda.py"]
        return ["bash", "-c", " && ".join(
            " ".join([tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all", *check])
            for kind in ("memcheck", "racecheck")
        )]  # fmt: skip
    if part in ("train", "decode"):
        return [*python, "swiftk.bench", part, "--device", "cuda", "--save"]
    return [*python, "swiftk.bench", "kernels", "--device", "cuda", "--only", part.removeprefix("bench-"), "--save"]


def run_part(part: str, root: Path) -> dict[str, Any]:
    """What its JSON keeps: exit code (124: four minutes were not enough), seconds, the end of what it printed."""
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command(part), cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PART_SECONDS
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, said = 124, late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
    except OSError as error:
        code, said = 127, str(error)
    print(said[-6000:], flush=True)
    return {"part": part, "exit": code, "seconds": round(time.monotonic() - begin, 1), "output": said.splitlines()[-60:]}


def device_facts() -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    facts = {"device": torch.cuda.get_device_name(), "sm": f"{major}{minor}", "free": free, "total": total}
    return facts | {"cuda": torch.version.cuda}


def run(
    wanted: list[str], kernels: list[str], save: Callable[[str, dict], Path], known: Callable[[str], Mapping[str, Any] | None],
    root: Path,
) -> int:  # fmt: skip
    """Runs the wanted parts, or all that are left. known: name -> its JSON of this commit, if there is one."""
    unknown = [p for p in wanted if p not in parts(kernels)]
    if unknown:
        raise SystemExit(f"make gpu: PART has {unknown[0]!r}, wants one of {', '.join(parts(kernels))}")
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch sees no CUDA device; run it on a machine with one, with a CUDA build of torch")
    begin, failed = time.monotonic(), []
    for part in wanted or parts(kernels):
        if not wanted:
            before = known(f"gpu-{part}")
            if before is not None and before["exit"] == 0:
                print(f"== {part}: done at this commit", flush=True)
                continue
            if time.monotonic() - begin > BUDGET_SECONDS - PART_SECONDS:
                print(f"make gpu: stopped before {part}, nine minutes are nearly over; `make gpu` goes on from here")
                break
        print(f"== {part}", flush=True)
        found = run_part(part, root)
        if part == "build":
            found |= device_facts()
            print(json.dumps(device_facts()))
        save(f"gpu-{part}", found)
        failed += [part] if found["exit"] else []
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0

"""`make gpu [PART=...] [BUDGET=seconds]`: everything that a CUDA device is asked to do, in parts of at most four minutes, one
JSON each.

    build         both native modules, where their sources have changed; the device, versions
    test          the Triton and CUDA kernels on the device in bf16 and fp32, the decoder and a training step (tests/triton,
                  tests/gpu, and what is marked `gpu`)
    sanitize      compute-sanitizer (memcheck, racecheck) over the tests of the CUDA C++ kernels
    train-lora, train-qlora
                  a step of an 8B shape against transformers + peft (+ bitsandbytes), both at their defaults
    train-lora-none, train-qlora-none
                  nothing computed again by either: the fastest of both
    train-lora-full, train-qlora-full
                  every block computed again by both: the least memory of both
    train-qlora-7b
                  the same for a 7B shape
    decode        the decoder at an 8B shape
    bench-<op>    the op and its peers (benchmarks/kernels/bench_<op>.py)

Without a part: all of them in this order, or as many as the budget has time for; a part whose JSON is of this very commit and
without a failure is passed over, so that the command goes on where it stopped. The build comes first where the modules are
not those of the sources, and nothing after it where it fails. Exit code 0: everything is done and has passed; 3: parts are
left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

PART_SECONDS = 4 * 60
RECOMPUTE = {"none": ["--recompute", "none"], "full": ["--recompute", "full", "--peer_checkpointing"]}
TRAIN = {  # part -> arguments of `bench train`
    "train-lora": ["--tuner", "lora"],
    "train-qlora": ["--tuner", "qlora"],
    "train-lora-none": ["--tuner", "lora", *RECOMPUTE["none"]],
    "train-qlora-none": ["--tuner", "qlora", *RECOMPUTE["none"]],
    "train-lora-full": ["--tuner", "lora", *RECOMPUTE["full"]],
    "train-qlora-full": ["--tuner", "qlora", *RECOMPUTE["full"]],
    "train-qlora-7b": ["--tuner", "qlora", "--shape", "7b", *RECOMPUTE["full"]],
}
FIRST = ("varlen", "nf4", "nf4_linear", "paged", "lora_linear", "linear_cross_entropy")  # ops, by what hangs on them


def parts(kernels: list[str]) -> list[str]:
    order = [*(k for k in FIRST if k in kernels), *(k for k in kernels if k not in FIRST)]
    return ["build", "test", "sanitize", *TRAIN, "decode", *(f"bench-{k}" for k in order)]


def command(part: str) -> list[str]:
    python = [sys.executable, "-m"]
    if part == "build":
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if part == "test":
        return [*python, "pytest", "-q", "-rsx", "-m", "not long", "tests/triton", "tests/gpu", "tests/test_gpu.py"]
    if part == "sanitize":
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        check = [*python, "pytest", "-q", "-x", "-m", "not long", "-k", "not graph", "tests/gpu/test_nf4_cuda.py"]
        # only our kernels, and every tensor an allocation of its own: in torch's shared blocks an overrun is not one
        options = ["--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=nf4"]
        runs = (shlex.join([tool, "--tool", kind, *options, *check]) for kind in ("memcheck", "racecheck"))
        return ["bash", "-c", f"export PYTORCH_NO_CUDA_MEMORY_CACHING=1; {' && '.join(runs)}"]
    if part in TRAIN:
        return [*python, "swiftk.bench", "train", "--device", "cuda", *TRAIN[part], "--save"]
    if part == "decode":
        return [*python, "swiftk.bench", "decode", "--device", "cuda", "--save"]
    return [*python, "swiftk.bench", "kernels", "--device", "cuda", "--only", part.removeprefix("bench-"), "--save"]


def run_part(part: str, root: Path) -> dict[str, Any]:
    """What its JSON keeps: exit code (124: four minutes were not enough), seconds, the end of what it printed as it came."""
    begin, lines = time.monotonic(), list[str]()
    try:
        process = subprocess.Popen(
            command(part), cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        return {"part": part, "exit": 127, "seconds": 0.0, "output": [str(error)]}
    late = threading.Event()

    def stop() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its children, which would be timed along with the next part

    timer = threading.Timer(PART_SECONDS, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        code = process.wait()
    finally:
        timer.cancel()
    code = 124 if late.is_set() else code
    return {"part": part, "exit": code, "seconds": round(time.monotonic() - begin, 1), "output": lines[-60:]}


def is_built(root: Path) -> bool:
    """Whether both modules can be imported and are of these sources: without ninja a build compiles everything anew."""
    check = "from swiftk.kernels._native import native, native_cuda; native(); native_cuda()"
    return subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True).returncode == 0


def device_facts() -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    facts = {"device": torch.cuda.get_device_name(), "sm": f"{major}{minor}", "free": free, "total": total}
    return facts | {"cuda": torch.version.cuda}


def run(
    wanted: list[str], kernels: list[str], save: Callable[[str, dict], Path], known: Callable[[str], Mapping[str, Any] | None],
    root: Path, budget: float | None = None,
) -> int:  # fmt: skip
    """Runs the wanted parts, or all that are left. known: name -> its JSON of this commit, if there is one; budget: seconds."""
    unknown = [p for p in wanted if p not in parts(kernels)]
    if unknown:
        raise SystemExit(f"make gpu: PART has {unknown[0]!r}, wants one of {', '.join(parts(kernels))}")
    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu: torch of {sys.executable} sees no CUDA device; wants one, and a CUDA build of torch")
    begin, failed = time.monotonic(), list[str]()
    todo = ["build", *(p for p in wanted or parts(kernels) if p != "build")]
    for number, part in enumerate(todo):
        before = known(f"gpu-{part}")
        if part == "build" and (wanted or before is not None) and "build" not in wanted and is_built(root):
            continue
        if not wanted and part != "build":
            if before is not None and before["exit"] == 0:
                print(f"== {part}: done at this commit", flush=True)
                continue
            if budget is not None and time.monotonic() - begin > budget - PART_SECONDS:
                print(f"make gpu: {len(todo) - number} parts are left, from {part} on; make gpu goes on there", file=sys.stderr)
                return 1 if failed else 3
        print(f"== {part}", flush=True)
        found = run_part(part, root)
        if part == "build":
            if found["exit"]:  # what an earlier build has left is not measured; no JSON: it would name that build's properties
                print("make gpu: the build has failed", file=sys.stderr)
                return 1
            found |= device_facts()
            print(json.dumps(device_facts()))
        save(f"gpu-{part}", found)
        failed += [part] if found["exit"] else []
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0

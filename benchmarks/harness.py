"""What a microbenchmark is, and how one is timed.

A `Case` per (op, shape, dtype) is made by `cases(options)` of benchmarks/kernels/bench_<op>.py. `measure` first checks the
case's values, then times it, each peer and the op against itself (the self-pair: the noise floor), interleaved call by call,
in three runs; it reports the median of the three medians, their spread, and percent of limits measured in the same process.
Bytes and FLOPs are counted by the case, in a comment beside the numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from swiftk.decoder.pages import huge_pages
from swiftk.kernels._native import ISAS, native, threads

RUNS = 3
MIN_CALLS = 3  # per candidate and run
MAX_CALLS = 200
RUN_SECONDS = 1.0  # per run, over all candidates
LONG_ROUND = 20.0  # seconds: a round over all candidates that takes longer is a run by itself
PEERS = {  # by part of `python -m swiftk.bench`: what --peers takes
    "kernels": (
        "torch", "torch fused", "transformers", "peft", "bitsandbytes", "sdpa per document", "sdpa dense",
        "sdpa on gathered keys", "flash_attn", "cudnn", "flex_attention", "liger", "transformer_engine", "bare GEMM",
        "two GEMMs", "frozen linear", "addmm", "LoRA", "copy",
    ),
    "train": ("transformers",),
    "memory": ("transformers",),
    "decode": ("transformers", "llama.cpp"),
}  # fmt: skip
SLOW_SECONDS, SLOW_RATIO = 2.0, 20  # a peer slower than both, ratio to ours, is timed once: its ratio needs no three runs


@dataclass(frozen=True)
class Options:
    isa: str = "auto"
    device: str = "cpu"
    peers: frozenset[str] | None = None  # None: all that are installed
    quick: bool = False  # the smallest shape of each op, for the tests of the benchmarks themselves
    dtypes: tuple[str, ...] = ()  # names; none: all (kernels), the CPU's own (train, memory)

    def wants(self, peer: str) -> bool:
        if not any(peer in names for names in PEERS.values()):  # --peers would refuse it
            raise ValueError(f"harness.PEERS lacks {peer!r}")
        return self.peers is None or peer in self.peers


class Parser(argparse.ArgumentParser):
    """Of one part of `python -m swiftk.bench`. An error is one line, without the usage."""

    def __init__(self, part: str, **more: Any) -> None:
        prog, raw = f"python -m swiftk.bench {part}".strip(), argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=raw, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def shared_arguments(part: str) -> Parser:
    """What every part that measures takes; `options_of` reads it."""
    parser, peers = Parser(part, add_help=False), PEERS[part]
    parser.add_argument("--peers", nargs="+", choices=[*peers, "none"], metavar="NAME",
                        help=f"only some of {', '.join(peers)}, or none; default: all that are installed")  # fmt: skip
    parser.add_argument("--isa", default="auto", choices=ISAS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=[], choices=["float32", "bfloat16", "float64"],
                        help="default: all; train and decode: one, bfloat16 where the device multiplies it")  # fmt: skip
    parser.add_argument("--threads", type=int, help="intra-op threads; default: torch's")
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/<machine>/")
    parser.add_argument("--quick", action="store_true", help="smallest shapes, one run: tests the benchmark, not the speed")
    return parser


def options_of(args: argparse.Namespace, parser: Parser) -> Options:
    """What this machine cannot do is refused here, before anything runs; sets the number of threads."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device has cuda, but torch sees no CUDA device; wants cpu, or a CUDA build of torch and its driver")
    try:
        native().resolve_isa(args.isa)
    except ValueError as error:
        parser.error(f"--{error}")
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = None if args.peers is None else frozenset(args.peers) - {"none"}
    return Options(isa=args.isa, device=args.device, peers=peers, quick=args.quick, dtypes=tuple(args.dtypes))


@dataclass(frozen=True)
class Case:
    """run() is ours and returns the result that `check` looks at; peers do the same work on the same inputs."""

    op: str  # "linear"
    name: str  # shape and what is timed: "fwd M=2048 N=3072 K=1024"
    dtype: torch.dtype
    run: Callable[[], Any]
    check: Callable[[Any], None]  # raises AssertionError where run()'s result is wrong
    bytes: int  # moved at least, per run
    flops: int = 0  # 0: bandwidth-bound, percent of the limit is of the bandwidth
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)  # {"torch": f}
    peer_memory: bool = False  # also the peak extra memory of run() and of each peer
    goal: str = ""  # as stated: "<= 1.25x torch"


@dataclass(frozen=True)
class Record:
    """One measured case. Times in milliseconds; ratios are peer / swiftk, so above 1 swiftk is faster."""

    op: str
    name: str
    dtype: str
    ms: float
    ms_runs: list[float]
    self_spread: float  # largest |self / swiftk - 1| over the runs
    gb_per_s: float
    tflop_per_s: float
    percent_of_limit: float
    limit: str  # which one, and its value
    peers_ms: dict[str, float]
    ratios: dict[str, float]
    ratio_runs: dict[str, list[float]]
    extra_mib: dict[str, float]
    goal: str


def liger(options: Options) -> Any:
    """liger_kernel.transformers.functional where it can be a peer: on a GPU that has it installed; else None."""
    if options.device != "cuda" or not options.wants("liger"):
        return None
    try:
        return importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None


class Limits:
    """The device's bandwidth and matmul rate, measured once per process when first asked for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._cache: dict[str, float] = {}

    def _best(self, f: Callable[[], Any], calls: int = 7) -> float:
        f()
        return min(_seconds(f, self.device) for _ in range(calls))

    def bandwidth(self) -> float:
        """Bytes/s: the better of reading and of copying 256 MiB; on a GPU of copying 2 GiB."""
        if "bandwidth" not in self._cache:
            n = 64 << 20 if self.device == "cpu" else 512 << 20
            a, b = torch.ones(n, device=self.device), torch.empty(n, device=self.device)
            rates = [8 * n / self._best(lambda: b.copy_(a))]
            if self.device == "cpu":
                huge_pages([a], written=True)
                rates.append(4 * n / self._best(lambda: native().read_memory(a.data_ptr(), 4 * n, threads())))
            self._cache["bandwidth"] = max(rates)
        return self._cache["bandwidth"]

    def matmul(self, dtype: torch.dtype) -> float:
        """FLOP/s of torch.matmul at 2048^3, 8192^3 on a GPU; for bf16 the better of bf16 and fp32: a CPU may lack bf16."""
        key = str(dtype)
        if key not in self._cache:
            n = 2048 if self.device == "cpu" else 8192
            rates = []
            for d in {dtype, torch.float32} if dtype == torch.bfloat16 else {dtype}:
                a, b = (torch.randn(n, n, device=self.device).to(d) for _ in range(2))
                rates.append(2 * n**3 / self._best(lambda a=a, b=b: a @ b, calls=3))  # type: ignore[misc]
            self._cache[key] = max(rates)
        return self._cache[key]

    def known(self) -> dict[str, float]:
        return dict(self._cache)


@functools.cache
def _l2_sized() -> torch.Tensor:
    """Written before every timed call: then nothing of its inputs is in the L2 cache (50 MB on an H200), as in a step that has
    done other work between, and while the device writes these 256 MiB the host gets ahead with the launches that are timed."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def _seconds(f: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        _l2_sized().zero_()
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def peak_extra_mib(f: Callable[[], Any], device: str = "cpu") -> float | None:
    """Peak memory during f() beyond what was resident before it, MiB; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed heap goes back first, or it would hide what f() takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
        before = _status_kib("VmRSS")
        f()
        return (_status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def peak_resident_mib() -> float:
    """The high-water mark of this process's resident set, MiB, since its start or the last peak_extra_mib."""
    return _status_kib("VmHWM") / 1024


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def measure(case: Case, limits: Limits, options: Options) -> Record:
    dtype = str(case.dtype).removeprefix("torch.")
    case.check(case.run())
    peers = {name: f for name, f in case.peers.items() if options.wants(name)}
    candidates: dict[str, Callable[[], Any]] = {"swiftk": case.run, "self": case.run} | peers
    medians: dict[str, list[float]] = {name: [] for name in candidates}
    warm = {name: _seconds(f, options.device) for name, f in candidates.items()}
    bound = max(SLOW_SECONDS, SLOW_RATIO * warm["swiftk"])
    slow = {name: t for name, t in warm.items() if name in peers and t > bound}
    for name, seconds in slow.items():
        del candidates[name]
        medians[name] = [seconds * 1e3] * (1 if options.quick else RUNS)
    for _ in range(1 if options.quick else RUNS):
        first = {name: _seconds(f, options.device) for name, f in candidates.items()}
        once = sum(first.values())
        long = once > LONG_ROUND
        calls = MIN_CALLS if options.quick else max(MIN_CALLS, min(MAX_CALLS, int(RUN_SECONDS / max(once, 1e-9))))
        times: dict[str, list[float]] = {name: [first[name]] if long else [] for name in candidates}
        for call in range(0 if long else calls):
            order = list(candidates) if call % 2 == 0 else list(reversed(candidates))
            for name in order:
                times[name].append(_seconds(candidates[name], options.device))
        for name, calls_of in times.items():
            medians[name].append(statistics.median(calls_of) * 1e3)
    peers_ms = {name: statistics.median(medians[name]) for name in peers}
    extra = {}
    if case.peer_memory:
        measured = {name: peak_extra_mib(f, options.device) for name, f in candidates.items() if name != "self"}
        extra = {name: mib for name, mib in measured.items() if mib is not None}
    ms = statistics.median(medians["swiftk"])
    ratio_runs = {n: [p / s for p, s in zip(medians[n], medians["swiftk"], strict=True)] for n in peers}
    if case.flops:
        peak = limits.matmul(case.dtype)
        percent, limit = 100 * case.flops / (ms / 1e3) / peak, f"{peak / 1e12:.3f} TFLOP/s"
    else:
        peak = limits.bandwidth()
        percent, limit = 100 * case.bytes / (ms / 1e3) / peak, f"{peak / 1e9:.1f} GB/s"
    return Record(
        op=case.op, name=case.name, dtype=dtype, peers_ms=peers_ms, extra_mib=extra, goal=case.goal, ms=ms,
        ms_runs=medians["swiftk"], gb_per_s=case.bytes / ms / 1e6, tflop_per_s=case.flops / ms / 1e9,
        self_spread=max(abs(b / a - 1) for a, b in zip(medians["swiftk"], medians["self"], strict=True)),
        percent_of_limit=percent, limit=limit, ratios={n: statistics.median(r) for n, r in ratio_runs.items()},
        ratio_runs=ratio_runs,
    )  # fmt: skip


def machine_name(device: str = "cpu") -> str:
    """A folder name for results: the GPU's name, or the CPU's model and its number of threads."""
    if device == "cuda":
        name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    else:
        fields: dict[str, str] = {}
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
        except OSError:
            pass
        family, model = fields.get("cpu family", ""), fields.get("model", "")
        cpu = fields.get("model name", platform.machine() or "cpu")
        name = f"{cpu} f{family} m{model} {torch.get_num_threads()}t"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def environment(options: Options) -> dict[str, Any]:
    versions: dict[str, str] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in (
        "triton", "transformers", "liger_kernel", "flash_attn", "torchao", "bitsandbytes", "peft", "llama_cpp_python",
    ):  # fmt: skip
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine_name(options.device), "device": options.device, "threads": torch.get_num_threads(),
        "isa": native().best_isa() if options.isa == "auto" else options.isa, "versions": versions,
    }  # fmt: skip


def as_json(record: Record) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    return short(asdict(record))

"""Microbenchmarks with their peers, the time (train) and the memory (memory) of a training step, the decoder (decode), and what
`make gpu` runs; from the source tree, where benchmarks/ lies. Values are checked before anything is timed; --save keeps the
JSON, `readme` writes README's tables."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from swiftk.allocator import keep_freed_memory
from swiftk.benchmarks import compile_gpu, gpu, report
from swiftk.benchmarks.harness import Limits, Options, as_json, environment, machine_name, measure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = (":!benchmarks/results", ":!README.md", ":!docs/benchmarks.md")
WORKS = ("kernels", "train", "memory", "decode", "compile-gpu", "gpu", "readme")


def kernel_names() -> list[str]:
    import swiftk.benchmarks.kernels as package

    return sorted(p.stem.removeprefix("bench_") for p in Path(package.__path__[0]).glob("bench_*.py"))


def commit() -> str:
    """Short hash of the tree's commit, with + where the tree differs from it, results and the tables of them apart."""
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
        changed = run("status", "--porcelain", "--untracked-files=no", "--", ".", *GENERATED)
        return run("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(name: str, options: Options, payload: dict[str, Any]) -> Path:
    folder = RESULTS / machine_name(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    head = {"date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment(options)}
    path.write_text(json.dumps(head | payload, indent=1) + "\n")
    return path


def saved(name: str, options: Options) -> dict[str, Any] | None:
    """The JSON of that name, if it is of this very commit: none where the tree differs from it, or is no git tree."""
    path = RESULTS / machine_name(options.device) / f"{name}.json"
    found = json.loads(path.read_text()) if path.is_file() else None
    here = commit()
    known = not here.endswith("+") and here != "unknown"
    return found if found is not None and known and found["commit"] == here else None


def run_kernels(options: Options, only: list[str], keep: bool, plot: Path | None) -> int:
    names = kernel_names()
    unknown = [n for n in only if n not in names]
    if unknown:
        raise SystemExit(f"swiftk.bench: --only has {unknown[0]!r}, wants some of {', '.join(names)}")
    limits, everything, failed = Limits(options.device), [], 0
    for name in only or names:
        module = importlib.import_module(f"swiftk.benchmarks.kernels.bench_{name}")
        records = []
        for case in module.cases(options):
            if options.dtypes and str(case.dtype).removeprefix("torch.") not in options.dtypes:
                continue
            try:
                records.append(as_json(measure(case, limits, options)))
            except AssertionError as error:  # wrong values are never timed
                failed += 1
                print(f"{case.op} {case.name} {case.dtype}: WRONG VALUES, not timed: {error}", file=sys.stderr)
                continue
            print(report.table(records[-1:]).splitlines()[1], flush=True)
            if keep:  # after each case: a run that is cut off keeps what it has
                save(f"kernels-{name}", options, {"limits": limits.known(), "records": records})
        everything += records
    print("\n" + report.table(everything))
    print(report.closing(everything, limits.known()))
    if plot:
        report.plot(everything, plot)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compile-gpu"]:
        return compile_gpu.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m swiftk.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", nargs="?", choices=WORKS, default="kernels")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="of kernels: ops; of decode: works")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these peers (none: no peer); default: all installed")
    parser.add_argument("--isa", default="auto", choices=["auto", "avx512", "avx2", "portable"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=[], choices=["float32", "bfloat16", "float64"], help="default: all")
    parser.add_argument("--threads", type=int, help="intra-op threads; default: torch's")
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/<machine>/")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart of the ratios (png, svg, pdf)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two saved results")
    parser.add_argument("--parts", nargs="*", default=[], help="of `gpu`: build, test, sanitize, train-lora, ..., bench-<op>")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of `gpu`: stop before a part that may not fit")
    parser.add_argument("--quick", action="store_true", help="smallest shapes, one run: tests the benchmark, not the speed")
    args, rest = parser.parse_known_args(argv)
    if rest and args.what not in ("train", "memory", "decode"):
        parser.error(f"unknown arguments {' '.join(rest)}")
    if args.compare:
        print(report.compare(*args.compare))
        return 0
    if args.what == "readme":
        report.write_readme(ROOT / "README.md", RESULTS)
        (ROOT / "docs" / "benchmarks.md").write_text(report.page(RESULTS))
        return 0
    if args.what == "gpu":
        on_gpu = Options(isa=args.isa, device="cuda")
        known = functools.partial(saved, options=on_gpu)
        return gpu.run(args.parts, kernel_names(), lambda name, payload: save(name, on_gpu, payload), known, ROOT, args.budget)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device has cuda, but torch sees no CUDA device; wants cpu, or a CUDA build of torch and its driver")
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = None if args.peers is None else frozenset(args.peers) - {"none"}
    options = Options(isa=args.isa, device=args.device, peers=peers, quick=args.quick, dtypes=tuple(args.dtypes))
    torch.manual_seed(0)
    if args.what == "kernels":
        keep_freed_memory()
        return run_kernels(options, args.only, args.save, args.plot)
    keep = (lambda name, payload: save(name, options, payload)) if args.save else None
    if args.only:
        rest += ["--only", *args.only]
    importlib.import_module(f"swiftk.benchmarks.bench_{args.what}").run(options, rest, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Microbenchmarks with their peers, the time (train) and the memory (memory) of a training step, the decoder (decode), and what
`make gpu` runs; from the source tree, where benchmarks/ lies. Values are checked before anything is timed; --save keeps the
JSON, `readme` writes README's tables."""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from swiftk.allocator import keep_freed_memory
from swiftk.benchmarks import compile_gpu, gpu, report
from swiftk.benchmarks.harness import (
    Limits,
    Options,
    Parser,
    as_json,
    environment,
    machine_name,
    measure,
    options_of,
    shared_arguments,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = (":!benchmarks/results", ":!README.md", ":!docs/benchmarks.md")
PARTS = {
    "kernels": "every op, or some, with their peers",
    "train": "a step of full tuning, LoRA, QLoRA against transformers, peft, bitsandbytes",
    "memory": "a QLoRA step's memory, component by component",
    "decode": "the decoder against transformers and llama.cpp",
    "compile-gpu": "compiles every GPU kernel, without a GPU (make compile-gpu)",
    "gpu": "all that a CUDA device is asked to do (make gpu)",
    "readme": "README's tables and docs/benchmarks.md from the saved JSON",
}


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
    limits, everything, failed = Limits(options.device), [], 0
    for name in only or kernel_names():
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
    parts = "\n".join(f"  {name:12} {what}" for name, what in PARTS.items())
    parser = Parser("", description=__doc__, epilog=f"parts:\n{parts}",
                    usage="%(prog)s PART [options]")  # fmt: skip
    parser.add_argument("part", choices=PARTS, metavar="PART", help="one of those below; each has a --help")
    if not argv:
        parser.print_help()
        return 2
    part = parser.parse_args(argv[:1]).part
    if part == "compile-gpu":
        return compile_gpu.main(argv[1:])
    if part == "gpu":
        return main_gpu(argv[1:])
    if part == "kernels":
        return main_kernels(argv[1:])
    if part == "readme":
        Parser(part, description=PARTS[part]).parse_args(argv[1:])
        report.write_readme(ROOT / "README.md", RESULTS)
        (ROOT / "docs" / "benchmarks.md").write_text(report.page(RESULTS))
        return 0
    shared = shared_arguments(part)
    args, rest = shared.parse_known_args(argv[1:])  # the rest, and --help, is the part's own
    own = importlib.import_module(f"swiftk.benchmarks.bench_{part}")
    if {"-h", "--help"} & set(rest):
        own.run(Options(), ["--help"])
    options = options_of(args, shared)
    torch.manual_seed(0)
    own.run(options, rest, (lambda name, payload: save(name, options, payload)) if args.save else None)
    return 0


def main_kernels(argv: list[str]) -> int:
    parser = Parser("kernels", description=PARTS["kernels"], parents=[shared_arguments("kernels")])
    parser.add_argument("--only", nargs="+", default=[], choices=kernel_names(), metavar="OP",
                        help=f"some of {', '.join(kernel_names())}")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart of the ratios (png, svg, pdf)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two saved results, nothing is run")
    args = parser.parse_args(argv)
    if args.compare:
        print(report.compare(*args.compare))
        return 0
    if args.plot:  # said before minutes of timing
        if not importlib.util.find_spec("matplotlib"):
            parser.error('--plot wants matplotlib: pip install -e ".[bench]"')
        if args.plot.suffix not in (".png", ".svg", ".pdf") or not args.plot.parent.is_dir():
            parser.error(f"--plot has {args.plot}, wants a .png, .svg or .pdf in a folder that is there")
    options = options_of(args, parser)
    torch.manual_seed(0)
    keep_freed_memory()
    return run_kernels(options, args.only, args.save, args.plot)


def main_gpu(argv: list[str]) -> int:
    parser = Parser("gpu", description=PARTS["gpu"])
    parser.add_argument("--parts", nargs="*", default=[], metavar="PART", help=f"of {', '.join(gpu.parts(kernel_names()))}")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop before a part that may not fit")
    args = parser.parse_args(argv)
    options = Options(device="cuda")
    known = functools.partial(saved, options=options)
    return gpu.run(args.parts, kernel_names(), lambda name, payload: save(name, options, payload), known, ROOT, args.budget)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m swiftk.benchmarks.data [--save]`: how long 100,000 rows take to read, to encode and to pack.

The rows are generated: two messages each, lengths log-normal as in instruction data (a median of about 60 words).
Times are CPU seconds of the process where one thread works and wall seconds for the tokenizer, which uses all cores.
"""

from __future__ import annotations

import argparse
import json
import keyword
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from swiftk.bench import save
from swiftk.benchmarks.harness import Options
from swiftk.config import DataConfig
from swiftk.trainer.data import load_dataset
from swiftk.trainer.packing import BatchPlan
from swiftk.trainer.rows import read_rows
from swiftk.trainer.tokenizer import train_tokenizer


def write_rows(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.4, 0.8, (count, 2)), 1, 1500).astype(int)
    with path.open("w") as file:
        for query, response in lengths.tolist():
            texts = (
                " ".join(keyword.kwlist[i] for i in rng.integers(0, len(keyword.kwlist), n).tolist()) for n in (query, response)
            )
            file.write(json.dumps(dict(zip(("query", "response"), texts, strict=True))) + "\n")


def run(count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": count}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path, count)
        config = DataConfig(dataset=(str(path),))

        start = time.process_time()
        rows, _ = read_rows(config)
        found["read_s"] = time.process_time() - start
        assert len(rows) == count

        tokenizer = train_tokenizer((m["content"] for row in rows[:1000] for m in row.messages), 280)
        start = time.perf_counter()
        dataset = load_dataset(config, tokenizer, 1 << 20)
        found["read_and_encode_wall_s"] = time.perf_counter() - start
        found["tokens"] = dataset.report["tokens"]

    lengths = np.minimum(dataset.lengths, 4096)
    start = time.process_time()
    plan = BatchPlan(lengths, packing_length=4096, micro_batch_size=1, global_batch_size=64, seed=0)
    plan.packs(0)
    found["pack_s"] = time.process_time() - start
    start = time.process_time()
    plan.packs(1)
    found["next_epoch_s"] = time.process_time() - start
    fewest = -(-int(lengths.sum()) // 4096)
    assert sorted(row for pack in plan.packs(1) for row in pack) == list(range(count))
    found |= {"packs": plan.num_packs, "packs_at_least": fewest, "efficiency": plan.efficiency}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m swiftk.benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/<machine>/")
    args = parser.parse_args()
    found = run(args.rows)
    for name, value in found.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value:,}")
    if args.save:
        print(save("data", Options(), {"records": [found]}))


if __name__ == "__main__":
    main()

"""Dataset files to encoded rows of at most max_length tokens, with an account of every row that did not get through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from swiftk.config import DataConfig
from swiftk.trainer.rows import Row, read_rows
from swiftk.trainer.shuffle import shuffle_keys
from swiftk.trainer.template import Encoded, encode_batch

STRATEGIES = ("delete", "left", "right", "split")
ENCODE_ROWS = 1000  # rows per call of the tokenizer: enough for its threads, few enough to hold their offsets in memory


@dataclass(frozen=True)
class Dataset:
    """Encoded rows in file order. report: how many rows were read, skipped, deleted, cut, and are left."""

    rows: list[Encoded]
    report: dict[str, int]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 (rows,)."""
        return np.array([len(row.input_ids) for row in self.rows], np.int64)


def load_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, dataset: tuple[str, ...] | None = None
) -> Dataset:
    """Reads, renders, masks and cuts the rows of `dataset` (None: config.dataset).

    truncation_strategy, for rows of more than max_length tokens: delete (the row; counted), right (keep the first tokens),
    left (keep the last ones), split (stage pt: pieces of max_length that share one token, the last one shorter).
    The report's keys, each counted in rows: read, skipped (strict false: no format or no provable mask), those longer than
    max_length (too_long: left out by delete; cut: by the others), untrained (no token to train is left), rows; and tokens,
    trained_tokens, lost_tokens (left and right: of the cut rows, what no row holds).
    Raises: ValueError for bad input (`read_rows`, `encode`), and when no row is left.
    """
    strategy = config.truncation_strategy or ("split" if config.stage == "pt" else "delete")
    if strategy not in STRATEGIES:
        raise ValueError(f"truncation_strategy: {strategy!r} is unknown, wants one of {', '.join(STRATEGIES)}")
    if strategy == "split" and config.stage != "pt":
        raise ValueError(
            f"truncation_strategy: split cuts documents of stage pt, stage {config.stage} wants delete, left or right"
        )
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} tokens hold nothing to predict, wants at least 2")
    rows, skipped = read_rows(config, dataset)
    over = "too_long" if strategy == "delete" else "cut"
    report: Counter[str] = Counter({"read": len(rows) + len(skipped), "skipped": len(skipped), over: 0, "untrained": 0})
    kept: list[Encoded] = []
    shortest = None
    for encoded in _encode(rows, tokenizer, config, report):
        length = len(encoded.input_ids)
        if length > max_length:
            report[over] += 1
            shortest = min(length, shortest or length)
            if strategy in ("left", "right"):
                report["lost_tokens"] += length - max_length
        for piece in _cut(encoded, max_length, strategy):
            if piece.loss_mask[1:].any():
                kept.append(piece)
            else:
                report["untrained"] += 1
    report["rows"] = len(kept)
    report["tokens"] = sum(len(row.input_ids) for row in kept)
    report["trained_tokens"] = sum(int(row.loss_mask[1:].sum()) for row in kept)
    if not kept:
        reasons = [f"{report['read']} read", f"{report['skipped']} skipped (first: {skipped[0]})" if skipped else ""]
        if report[over]:
            bound = config.max_length is None or config.max_length > max_length
            limit = "the model's limit of {} tokens" if bound else "max_length {}"
            more = "" if bound else "raise --max_length or "
            cutting = "split" if config.stage == "pt" else "right"
            advice = f"; {more}use --truncation_strategy {cutting}" if strategy == "delete" else ""
            reasons.append(f"{report[over]} longer than {limit.format(max_length)} (the shortest has {shortest}{advice})")
        if report["untrained"]:
            reasons.append(f"{report['untrained']} without a token to train")
        raise ValueError(f"dataset: no rows are left: {', '.join(filter(None, reasons))}")
    return Dataset(kept, dict(report))


def load_splits(config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and the held-out ones: val_dataset, or split_dataset_ratio of dataset chosen by the seed.

    The ratio is taken of rows after cutting, so a single long document can be split too; at least one row on either side.
    """
    whole = load_dataset(config, tokenizer, max_length)
    if config.val_dataset:
        return whole, load_dataset(config, tokenizer, max_length, config.val_dataset)
    ratio, n = config.split_dataset_ratio, len(whole.rows)
    if not 0 <= ratio < 1:
        raise ValueError(f"split_dataset_ratio: {ratio}, wants 0 <= ratio < 1")
    if ratio == 0:
        return whole, None
    if n < 2:
        advice = (
            ""
            if config.stage != "pt"
            else (
                "; --truncation_strategy split makes rows of a long text"
                if whole.report.get("lost_tokens")
                else f"; a --max_length below its {whole.report['tokens']} tokens makes more of it"
            )
        )
        raise ValueError(f"split_dataset_ratio: there is one row, wants at least two to hold one out{advice}")
    held = set(np.argsort(shuffle_keys(n, config.seed), kind="stable")[: min(max(round(n * ratio), 1), n - 1)].tolist())
    parts = []
    for inside in (False, True):
        rows = [row for index, row in enumerate(whole.rows) if (index in held) == inside]
        counts = {
            "rows": len(rows),
            "tokens": sum(len(row.input_ids) for row in rows),
            "trained_tokens": sum(int(row.loss_mask[1:].sum()) for row in rows),
        }
        parts.append(Dataset(rows, {**whole.report, **counts, "held_out": len(held)}))
    return parts[0], parts[1]


def trained_bytes(rows: Iterable[Encoded], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text in the trained tokens, special tokens not counted: the divisor of "nats per byte"."""
    total = 0
    for row in rows:
        text = tokenizer.decode(row.input_ids[1:][row.loss_mask[1:]].tolist(), skip_special_tokens=True)
        total += len(str(text).encode())
    return total


def token_statistics(lengths: np.ndarray) -> dict[str, float]:
    """rows, sum, min, mean, median, p95 and max of the lengths in tokens."""
    return {
        "rows": len(lengths), "sum": int(lengths.sum()), "min": int(lengths.min()), "mean": float(lengths.mean()),
        "median": float(np.median(lengths)), "p95": float(np.percentile(lengths, 95)), "max": int(lengths.max()),
    }  # fmt: skip


def _encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, report: Counter[str]) -> Iterable[Encoded]:
    for start in range(0, len(rows), ENCODE_ROWS):
        chunk = rows[start : start + ENCODE_ROWS]
        for row, encoded in zip(chunk, encode_batch([row.messages for row in chunk], tokenizer, config.stage), strict=True):
            if isinstance(encoded, Encoded):
                yield replace(encoded, source=row.source)
            elif config.strict:
                raise ValueError(f"dataset: {row.source} {encoded}; --strict false skips such rows and counts them")
            else:
                report["skipped"] += 1


def _cut(row: Encoded, max_length: int, strategy: str) -> list[Encoded]:
    length = len(row.input_ids)
    if length <= max_length:
        return [row]
    # pieces share one token, the last of one and the first of the next, so that each token but the first is a label once
    split = range(0, length - 1, max_length - 1)
    starts = {"delete": [], "right": [0], "left": [length - max_length], "split": split}[strategy]
    return [
        Encoded(row.input_ids[start : start + max_length], row.loss_mask[start : start + max_length], row.source)
        for start in starts
    ]

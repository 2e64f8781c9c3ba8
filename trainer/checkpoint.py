"""Checkpoints that are whole or absent, and how a run finds the one to go on from.

    <output_dir>/v0-20250101-120000/    one run: args.json, the YAML, logging.jsonl, runs/
        checkpoint-<step>/              model*.safetensors, config.json, the tokenizer (Hugging Face's format), or
                                        adapter_model.safetensors, adapter_config.json (PEFT's); args.json, trainer_state.json;
                                        resume/ (trained weights in fp32, the optimizer's state, what PiSSA started with;
                                        torch DCP);
                                        manifest.json (name, size and SHA-256 of each file: the last to be written)
        last, best                      links to a checkpoint
    <output_dir>/last                   link to the newest run's last checkpoint

A save goes to a directory of another name; its files are synced, then the manifest, then the directory gets its name and
the parent is synced. Whatever is killed in between leaves the previous checkpoint valid; the remains are removed at
the next start. The state names no layout: it is whole tensors and a count of steps, from which the data order follows,
so a run may go on with another number of data-parallel ranks. All tensors are replicated so far, so rank 0 writes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from swiftk.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TunerConfig
from swiftk.trainer.optimizer import state_of

MANIFEST, STATE, ARGS, RESUME = "manifest.json", "trainer_state.json", "args.json", "resume"
SAVING = ".saving-"  # .saving-<checkpoint>@<host>@<pid>-<its start>: not a checkpoint yet, or not any more
# args.json may differ in these and the runs still be equal: paths, how long, how often to report or save
FREE_KEYS = frozenset(
    ("output_dir", "add_version", "resume_from_checkpoint", "max_steps", "num_train_epochs", "preview", "ddp_timeout",
     "heartbeat_timeout", "save_steps", "save_total_limit", "logging_steps", "eval_steps", "report_to", "peak_tflops",
     "check_trained")
)  # fmt: skip
PATH_KEYS = frozenset(("model", "adapters", "tokenizer", "dataset", "val_dataset"))  # compared by file name only


class CheckpointError(RuntimeError):
    """Nothing was lost: the message says what failed and which checkpoint is still good."""


@dataclass(frozen=True)
class TrainerState:
    """trainer_state.json: all that is needed besides tensors. Data order and schedule follow from `step`."""

    step: int  # optimizer steps done
    total_steps: int
    consumed_tokens: int
    data_fingerprint: str  # of the tokenised rows
    best_loss: float | None
    best_step: int | None
    saved_at: float  # seconds since 1970


def new_state(step: int, total_steps: int, tokens: int, fingerprint: str, best: tuple[float, int] | None) -> TrainerState:
    """`best`: held-out loss and its step."""
    loss, at = best or (None, None)
    return TrainerState(step, total_steps, tokens, fingerprint, loss, at, time.time())


# --- writing -----------------------------------------------------------------------------------------------------


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Whole or absent."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    fsync_path(aside)
    os.replace(aside, path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start_state(start: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {f"start/{name}": t for name, t in start.items()}


def _resume_state(
    params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, start: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """name -> trained weight and what the optimizer keeps of it, as whole tensors, made where there are none yet, to be read
    into; and what PiSSA started with. What is frozen is read from `model` again."""
    state = _start_state(start)
    for name, p in params.items():
        if p.requires_grad:
            state |= {f"weight/{name}": p.detach()} | {f"{key}/{name}": t for key, t in state_of(optimizer, p).items()}
    return state


def _started(pid: int) -> str | None:
    """Ticks from boot to the start of a process, None where there is none: pids come round again, a pair does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


def _aside(run_dir: Path, name: str) -> Path:
    return run_dir / f"{SAVING}{name}@{socket.gethostname()}@{os.getpid()}-{_started(os.getpid())}"


def _why_unwritten(error: BaseException) -> str | None:
    """The operating system's reason where it is the cause, whichever library reports it; None: another kind of error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, CheckpointException):  # DCP: rank -> (what it raised, where)
        return next(filter(None, (_why_unwritten(e) for e, _ in error.failures.values())), None)
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))  # safetensors and tokenizers: Rust's words
    if found:
        return found[1].strip()
    return "a file could not be written whole" if "inline_container" in str(error) else None  # torch.save


def _link(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


def save(
    run_dir: Path, state: TrainerState, params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
    start: Mapping[str, torch.Tensor], *, write_model: Callable[[Path], None], args: dict[str, Any],
    save_total_limit: int | None, is_best: bool,
) -> Path:  # fmt: skip
    """Writes checkpoint-<step>, moves the links, removes what the limit leaves over. One process per run directory.

    Args:
        start: `Model.pissa_start()`.
        write_model: writes weights, config and tokenizer in Hugging Face's format into a directory.
        args: args.json of the run.
        save_total_limit: checkpoints kept in the run, at least this one and the best; None keeps all.
    Raises: CheckpointError if the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = run_dir / f"checkpoint-{state.step}"
    aside = _aside(run_dir, final.name)
    replaced: Path | None = None
    try:
        aside.mkdir()
        write_model(aside)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process": it is
            dcp.save(_resume_state(params, optimizer, start), checkpoint_id=aside / RESUME, no_dist=True)
        (aside / ARGS).write_text(json.dumps(args, indent=1, sort_keys=True))
        (aside / STATE).write_text(json.dumps(vars(state), indent=1))
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        for path in files:
            fsync_path(path)
        listing = {p.relative_to(aside).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        write_text(aside / MANIFEST, json.dumps({"files": listing}, indent=1))
        for folder in (aside / RESUME, aside):
            fsync_path(folder)
        if final.exists():  # of a run that went on from an earlier step
            replaced = _unname(final)
        os.replace(aside, final)
        fsync_path(run_dir)
    except (Exception, CheckpointException) as error:  # the second is a BaseException
        shutil.rmtree(aside, ignore_errors=True)
        if replaced is not None and not final.exists():
            os.replace(replaced, final)
        reason = _why_unwritten(error)
        if reason is None:
            raise
        last = newest(run_dir)
        raise CheckpointError(
            f"checkpoint: step {state.step} could not be saved to {run_dir}: {reason}; "
            + (f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint")
            + "; make room or choose another --output_dir, then --resume_from_checkpoint auto"
        ) from error
    try:
        _link(run_dir / "last", final.name)
        if is_best:
            _link(run_dir / "best", final.name)
        top = run_dir.parent if re.match(r"v\d+-", run_dir.name) else None
        if top:
            _link(top / "last", f"{run_dir.name}/{final.name}")
        if replaced:
            shutil.rmtree(replaced)
        if save_total_limit is not None:
            keep = {final.name, os.readlink(run_dir / "best") if (run_dir / "best").is_symlink() else final.name}
            others = [c for c in checkpoints(run_dir) if c.name not in keep]
            for old in others[: max(0, len(others) + len(keep) - max(save_total_limit, len(keep)))]:
                shutil.rmtree(_unname(old))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: {final} is saved, but {error.filename or run_dir} could not be changed: {error.strerror}; "
            "--resume_from_checkpoint auto goes on from it"
        ) from error
    return final


def _unname(checkpoint: Path) -> Path:
    """Takes the name away first, so that a half-removed directory is never found."""
    doomed = _aside(checkpoint.parent, f"{checkpoint.name}.old")
    os.replace(checkpoint, doomed)
    return doomed


# --- finding -----------------------------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """checkpoint-* of a run by step."""
    found = [p for p in run_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def invalid(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """Why the checkpoint cannot be trusted, or None. `hashes` reads every byte; without, sizes only."""
    try:
        listing = dict(json.loads((checkpoint / MANIFEST).read_text())["files"])
    except FileNotFoundError:
        if not (checkpoint / STATE).exists() and not (checkpoint / RESUME).exists():
            return f"it is not a checkpoint of a run (no {MANIFEST}, {STATE}, {RESUME}); weights alone start anew with --model"
        return f"{MANIFEST} is missing: the save did not finish"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    for name in sorted({STATE, ARGS} - listing.keys()):
        return f"{MANIFEST} does not list {name}"
    for name, want in listing.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != want["size"]:
            return f"{name} has {path.stat().st_size} bytes, wants {want['size']}"
        if hashes and _sha256(path) != want["sha256"]:
            return f"{name} has another SHA-256 than the manifest"
    return None


def read_state(checkpoint: Path) -> TrainerState:
    return TrainerState(**json.loads((checkpoint / STATE).read_text()))


def newest(*run_dirs: Path) -> Path | None:
    """The valid checkpoint that was saved last."""
    found = [c for d in run_dirs for c in checkpoints(d)]
    return next((c for c in sorted(found, key=_saved_at, reverse=True) if invalid(c) is None), None)


def _saved_at(checkpoint: Path) -> float:
    """Seconds since 1970; not the files' times, which a copy changes. 0 for what is damaged."""
    try:
        return float(read_state(checkpoint).saved_at)
    except (OSError, ValueError, TypeError):
        return 0.0


def differing(saved: dict[str, Any], args: dict[str, Any]) -> list[str]:
    """Keys that make two runs unequal, as "key: saved -> now". A key that is newer than the saved run had its default there."""

    def comparable(key: str, value: Any) -> Any:
        if key in PATH_KEYS:
            return [Path(v).name for v in value] if isinstance(value, list | tuple) else value and Path(value).name
        return list(value) if isinstance(value, tuple) else value

    configs = (DataConfig, TunerConfig, OptimConfig, ParallelConfig, RunConfig)
    names = sorted((set(saved) | set(args)) - FREE_KEYS)
    saved = {**{key: value for config in configs for key, value in vars(config()).items()}, **saved}
    pairs = [(k, saved.get(k), args.get(k)) for k in names]
    return [f"{k}: {was!r} -> {now!r}" for k, was, now in pairs if comparable(k, was) != comparable(k, now)]


def find_resumable(output_dir: Path, args: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """`auto`: the newest valid checkpoint under output_dir whose arguments are equal, and why newer ones were passed over."""
    found = [c for d in run_dirs(output_dir) for c in checkpoints(d)]
    notes: list[str] = []
    for candidate in sorted(found, key=_saved_at, reverse=True):
        why = invalid(candidate)
        if why is None:
            different = differing(json.loads((candidate / ARGS).read_text())["arguments"], args)
            if not different:
                return candidate, notes
            why = "it belongs to another run: " + "; ".join(different)
        notes.append(f"{candidate} is passed over: {why}")
    return None, notes


def load(
    checkpoint: Path, params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
    start: Mapping[str, torch.Tensor],
) -> TrainerState:  # fmt: skip
    """Fills weights and moments in place. Raises CheckpointError for a checkpoint that is not whole or does not fit."""
    why = invalid(checkpoint) if checkpoint.is_dir() else "there is no such directory"
    if why is not None:
        raise CheckpointError(f"checkpoint: {checkpoint} cannot be resumed: {why}")
    _read(checkpoint, _resume_state(params, optimizer, start), whole=True)
    return read_state(checkpoint)


def load_start(checkpoint: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Fills what PiSSA started with, which the base has to be without before the rest can be loaded."""
    _read(checkpoint, _start_state(start), whole=False)


def _read(checkpoint: Path, state: dict[str, Any], *, whole: bool) -> None:
    """Fills `state` in place; whole: the checkpoint may hold nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        saved = dcp.FileSystemReader(checkpoint / RESUME).read_metadata().state_dict_metadata
        problems = [f"{name} is missing" for name in state.keys() - saved.keys()]
        problems += [f"{name} is not of this model" for name in saved.keys() - state.keys() if whole]
        shapes = {name: tuple(getattr(entry, "size", ())) for name, entry in saved.items()}
        problems += [
            f"{name} has {shapes[name]}, wants {tuple(t.shape)}"
            for name, t in state.items() if name in shapes and shapes[name] != tuple(t.shape)
        ]  # fmt: skip
        dtypes = {name: entry.properties.dtype for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
        problems += [  # it would be cast: codes are not moments, and moments are not codes
            f"{name} has {dtypes[name]}, wants {t.dtype}"
            for name, t in state.items() if dtypes.get(name, t.dtype) != t.dtype and (torch.uint8 in (dtypes[name], t.dtype))
        ]  # fmt: skip
        if problems:
            raise CheckpointError(f"checkpoint: {checkpoint} does not fit the model: " + "; ".join(sorted(problems)[:20]))
        with torch.no_grad():
            dcp.load(state, checkpoint_id=checkpoint / RESUME, no_dist=True)


# --- the run's directory -------------------------------------------------------------------------------------------


def run_dirs(output_dir: Path) -> list[Path]:
    """The runs under output_dir by version; itself too, for runs with add_version false."""
    versions = [p for p in output_dir.glob("v*-*") if p.is_dir() and re.match(r"v\d+-", p.name)]
    return [output_dir, *sorted(versions, key=lambda p: int(p.name[1:].split("-")[0]))]


def new_run_dir(output_dir: Path, add_version: bool) -> Path:
    """Makes and returns <output_dir>/v{N}-{YYYYmmdd-HHMMSS}; N counts the runs under output_dir."""
    if not add_version:
        output_dir.mkdir(parents=True, exist_ok=True)
        return output_dir
    version = 1 + max((int(p.name[1:].split("-")[0]) for p in run_dirs(output_dir)[1:]), default=-1)
    path = output_dir / f"v{version}-{time.strftime('%Y%m%d-%H%M%S')}"
    path.mkdir(parents=True)
    return path


def remove_leftovers(output_dir: Path) -> list[Path]:
    """Unfinished saves whose process is gone. One that may still be writing (alive, or on another host) is left alone."""
    removed = []
    for directory in run_dirs(output_dir):
        for path in directory.glob(f"{SAVING}*@*@*"):
            found = re.fullmatch(r".*@([^@]*)@(\d+)-(\w+)", path.name)
            if not found or found[1] != socket.gethostname():
                continue
            if int(found[2]) == os.getpid() or _started(int(found[2])) != found[3]:
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


def check_writable(output_dir: Path) -> None:
    """Before anything is read: the directory, or the nearest one above that exists, can be written. Makes nothing."""
    there = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is not a directory"
        raise CheckpointError(
            f"checkpoint: output_dir {output_dir} cannot be written: {there} {reason}; choose another --output_dir"
        )


def check_room(output_dir: Path, bytes_needed: int) -> None:
    """Before training: the directory can be written, and one checkpoint fits beside what is there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: output_dir {output_dir} cannot be written: {error.strerror}; choose another --output_dir"
        ) from error
    free = shutil.disk_usage(output_dir).free
    if free < bytes_needed:
        raise CheckpointError(
            f"checkpoint: output_dir {output_dir} has {free / 2**30:.2f} GiB free, a checkpoint takes "
            f"{bytes_needed / 2**30:.2f} GiB; make room or choose another --output_dir"
        )

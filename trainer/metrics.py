"""What a run says of itself: the start page, a line per logging_steps, logging.jsonl, TensorBoard, a bar on a terminal.

FLOPs of a step (forward + backward, recomputation not counted), P the parameters in matrix products, L layers:
    6 P tokens + 12 L D sum over documents of len^2          mfu: the whole attention square
    6 P tokens +  6 L D sum over documents of len^2          mfu_causal: half of it, which is what is computed
A parameter counts a third for the forward, one where its own gradient is formed (it is trained), one where its input's is
(something before it is trained); a layer's attention a third for the forward, two where something before it is trained.
A sliding window is counted as full attention. MFU divides by the peak of all ranks: given, or measured with a matrix
product at the start, all ranks at once.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from swiftk.model import ModelConfig
from swiftk.model.adapter import EMBED, LM_HEAD
from swiftk.model.parameters import EMBEDDING
from swiftk.parallel.comm import Comm
from swiftk.parallel.spec import ParamSpec


class Work(NamedTuple):
    """What a token costs: P and L of the formulas above."""

    parameters: float
    layers: float


# what a block does in turn; parts that read the same input share a place
BLOCK = {
    "input_layernorm": 0, "q_proj": 1, "k_proj": 1, "v_proj": 1, "q_norm": 2, "k_norm": 2, "o_proj": 4,
    "post_attention_layernorm": 5, "gate_proj": 6, "up_proj": 6, "down_proj": 7,
}  # fmt: skip
ATTENTION, PLACES = 3, 8


def model_work(config: ModelConfig, specs: Mapping[str, ParamSpec], trained: Collection[str]) -> Work:
    """Every parameter that tokens are multiplied by: all but the embedding, whose rows are gathered; tied, it is the head."""
    end = PLACES * config.num_hidden_layers

    def place(name: str) -> int:
        if name.startswith("model.layers."):
            _, _, layer, *rest = name.split(".")
            return PLACES * int(layer) + next(BLOCK[part] for part in rest if part in BLOCK)
        return -1 if name.startswith(EMBED) else end + (name.startswith(LM_HEAD))

    first = min((place(name) for name in trained), default=end + 2)
    parameters = 0.0
    for name, spec in specs.items():
        at = end + 1 if name == EMBEDDING and config.tie_word_embeddings else place(name)
        if name.endswith(".lora_embedding_A") or (name == EMBEDDING and not config.tie_word_embeddings):
            continue
        after = first < at or name.endswith("_B")  # B reads what A, always trained, made
        parameters += math.prod(spec.shape) * (1 + (name in trained) + after) / 3
    attentions = (PLACES * layer + ATTENTION for layer in range(config.num_hidden_layers))
    return Work(parameters, sum(1.0 if first < at else 1 / 3 for at in attentions))


def step_flops(config: ModelConfig, work: Work, tokens: int, squares: int) -> tuple[float, float]:
    """With the whole attention square, and with its causal half. `squares` is the sum of len^2 over the documents."""
    products = 6.0 * work.parameters * tokens
    attention = 12.0 * work.layers * config.num_attention_heads * config.head_dim * squares
    return products + attention, products + attention / 2


def measure_peak(dtype: torch.dtype, comm: Comm, device: torch.device, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, summed over the ranks while all are at it (CPU ranks share the machine)."""
    size = size or (768 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    torch.mm(a, b)
    comm.barrier()
    for _ in range(5):
        wait()
        start = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return float(comm.all_reduce_(torch.tensor([2 * size**3 / best], dtype=torch.float64))[0])


def peak_memory_gib() -> float:
    """The most that this process has held so far: of the GPU's memory where it has used one, else its resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h {m}m {s}s" if hours else f"{m}m {s}s" if minutes else f"{s}s"


@dataclass
class Window:
    """What has been summed since the last log line. All numbers are over all ranks."""

    loss: float = 0.0
    correct: float = 0.0
    trained: int = 0
    tokens: int = 0
    squares: int = 0
    capacity: int = 0
    steps: int = 0
    paused: float = 0.0  # seconds of evaluation and saving
    start: float = field(default_factory=time.monotonic)

    def add(self, loss: float, correct: float, trained: int, tokens: int, squares: int, capacity: int) -> None:
        self.loss, self.correct, self.trained = self.loss + loss, self.correct + correct, self.trained + trained
        self.tokens, self.squares, self.capacity = self.tokens + tokens, self.squares + squares, self.capacity + capacity
        self.steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - begin

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.start - self.paused)


class Reporter:
    """Writes for one rank; `quiet` ones (all but rank 0) write nothing. `out` is a terminal or a plain stream."""

    def __init__(
        self, run_dir: Path, total_steps: int, report_to: tuple[str, ...], *, quiet: bool, start_step: int = 0,
        out: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.quiet, self.out, self.total_steps, self.start_step = quiet, out or sys.stdout, total_steps, start_step
        self.begin = time.monotonic()
        self.lines: TextIO | None = None
        self.board: Any = None
        self.bar: Any = None
        if quiet:
            return
        self.lines = open(run_dir / "logging.jsonl", "a", buffering=1)  # noqa: SIM115 (closed by close)
        if "tensorboard" in report_to:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"report_to: tensorboard cannot be imported ({error}); pip install tensorboard, or --report_to none"
                ) from error
            self.board = SummaryWriter(str(run_dir / "runs"), purge_step=start_step or None)
        if self.out.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self.bar = progress.Progress(*columns, console=Console(file=self.out))
            self.task = self.bar.add_task("train", total=total_steps, completed=start_step, note="")

    def progress(self) -> AbstractContextManager[Any]:
        """Shows the bar while it is open: not before, when other things are printed, nor below the last words."""
        return self.bar or nullcontext()

    def say(self, text: str = "") -> None:
        """A line for people."""
        if self.quiet:
            return
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)  # as it is: to be pasted
        else:
            print(text, file=self.out, flush=True)

    def step(self, done: int, note: str = "") -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """One JSON line, the TensorBoard scalars, and one printed line."""
        if self.quiet:
            return
        assert self.lines is not None
        try:
            self.lines.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.lines.name) from error  # a write does not know its file
        for name, value in values.items():
            if self.board and isinstance(value, int | float):
                self.board.add_scalar(f"train/{name}" if not name.startswith("eval_") else f"eval/{name[5:]}", value, step)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None)
        self.say("  ".join(shown))

    def training(self, done: int, window: Window, *, grad_norm: float, rate: float, epoch: float, peak: float | None,
                 flops: tuple[float, float]) -> None:  # fmt: skip
        """The line of `logging_steps`. flops: of the window, full and causal."""
        elapsed = time.monotonic() - self.begin
        left = elapsed / max(1, done - self.start_step) * (self.total_steps - done)
        full, causal = ((f / window.seconds / peak if peak else None) for f in flops)
        values = {
            "loss": window.loss / max(1, window.trained), "grad_norm": grad_norm, "learning_rate": rate,
            "token_acc": window.correct / max(1, window.trained), "epoch": round(epoch, 4),
            "global_step/max_steps": f"{done}/{self.total_steps}", "elapsed_time": duration(elapsed),
            "remaining_time": duration(left), "memory(GiB)": round(peak_memory_gib(), 3),
            "train_speed(s/it)": round(window.seconds / window.steps, 4), "tokens/s": round(window.tokens / window.seconds, 1),
            "mfu": full, "mfu_causal": causal,
            "pack_eff": round(window.tokens / window.capacity, 4) if window.capacity else 1.0,
        }  # fmt: skip
        self.record(done, values)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        if self.board:
            self.board.close()
        if self.lines:
            with suppress(OSError):  # what could not be written the first time; `record` has said so
                self.lines.close()

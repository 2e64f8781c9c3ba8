"""The loop: plan -> micro-batches -> loss sum / global token count -> backward -> sum over ranks -> clip -> optimizer -> log,
evaluate, save. Everything a step does is in `train` below, in the order in which it happens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swiftk.config import OptimConfig, RunConfig
from swiftk.model import Model, save_adapter, save_checkpoint
from swiftk.model.checkpoint import write_json
from swiftk.parallel.data import sum_gradients_
from swiftk.parallel.mesh import Mesh
from swiftk.trainer import checkpoint
from swiftk.trainer.data import Dataset
from swiftk.trainer.evaluation import Evaluation, evaluate
from swiftk.trainer.loss import TokenLoss, non_finite_documents, token_loss
from swiftk.trainer.metrics import Reporter, Window, model_work, step_flops
from swiftk.trainer.optimizer import clip_gradients_, gradient_norm, learning_rate, set_learning_rate
from swiftk.trainer.packing import Batch, BatchPlan, collate
from swiftk.trainer.stop import StopFlag
from swiftk.trainer.template import GENERATION_CONFIG, generation_config
from swiftk.trainer.trained import TrainedCheck


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; weights and the last checkpoint are untouched."""


@dataclass(frozen=True)
class HeldOut:
    dataset: Dataset
    num_bytes: int
    plan: BatchPlan  # of one step


@dataclass
class Training:
    """The parts of a run, put together by run.py. The last four change while it trains."""

    config: RunConfig
    optim: OptimConfig
    mesh: Mesh
    model: Model
    optimizer: torch.optim.Optimizer
    tokenizer: Any
    dataset: Dataset
    plan: BatchPlan
    held_out: HeldOut | None
    run_dir: Path
    args: dict[str, Any]  # args.json
    fingerprint: str  # of the data
    total_steps: int
    peak: float | None  # FLOP/s of all ranks
    reporter: Reporter
    stop: StopFlag
    step: int = 0  # optimizer steps done
    consumed_tokens: int = 0
    best: tuple[float, int] | None = None  # held-out nats per token, step
    saved_step: int = -1


def train(t: Training) -> bool:
    """Trains from t.step to t.total_steps. True: finished; False: stopped by a signal. Either way the last step is saved."""
    params, comm, config = dict(t.model.named_parameters()), t.mesh.dp.comm, t.config
    shape = t.model.config
    work = model_work(shape, t.model.specs, {name for name, p in params.items() if p.requires_grad})
    seed_step = torch.tensor([config.seed, 0], device=t.model.device)
    eval_steps = config.eval_steps if config.eval_steps is not None else config.save_steps
    evaluation = evaluate_and_report(t) if t.step == 0 else None
    window = Window()
    check = TrainedCheck(params, comm, t.reporter.say) if config.check_trained else None
    while t.step < t.total_steps:
        # what the step holds, over all ranks, known before the first backward; the wish to stop travels along
        micro_batches = t.plan.step(t.step)
        batches = [collate(t.dataset, micro_batch) for micro_batch in micro_batches]
        counts = torch.tensor([*count(batches), sum(map(len, micro_batches)), t.stop.at_boundary()])
        trained, tokens, squares, packs, stop = comm.all_reduce_(counts).tolist()
        if stop:
            t.stop.agreed()
            break

        losses: list[TokenLoss] = []
        seed_step[1] = t.step
        for batch in batches:
            loss = token_loss(t.model, batch.to(t.model.device), seed_step=seed_step, isa=config.isa)
            (loss.total / max(1, trained)).backward()
            losses.append(TokenLoss(loss.total.detach(), loss.correct, loss.per_token))
        sum_gradients_(params, t.model.specs, t.mesh)
        sums = [sum(float(loss.total) for loss in losses), sum(float(loss.correct) for loss in losses)]
        loss_sum, correct = comm.all_reduce_(torch.tensor(sums, dtype=torch.float64)).tolist()

        norm = gradient_norm(params.values())
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            path = write_rows(t, t.step + 1, batches, [loss.per_token for loss in losses])
            raise NonFiniteError(
                f"step {t.step + 1}: the loss is {loss_sum / max(1, trained)}, the gradient norm {norm}; the weights were not "
                f"updated. {advice(t, path)}"
            )
        clip_gradients_(params.values(), norm, t.optim.max_grad_norm)
        rate = learning_rate(t.step, t.total_steps, t.optim)
        set_learning_rate(t.optimizer, rate)
        if trained:  # a step without a trained token changes nothing, not even by momentum or decay
            t.optimizer.step()
            t.model.weight_version += 1
        if trained and check is not None:
            check.after_step(t.step + 1, t.optimizer)
        t.optimizer.zero_grad(set_to_none=True)
        t.step, t.consumed_tokens = t.step + 1, t.consumed_tokens + tokens

        window.add(loss_sum, correct, trained, tokens, squares, packs * (t.plan.packing_length or 0))
        t.reporter.step(t.step, f"loss {loss_sum / max(1, trained):.4f}")
        last = t.step == t.total_steps
        if t.step % config.logging_steps == 0 or last:
            flops = step_flops(shape, work, window.tokens, window.squares)
            epoch = t.step / t.plan.steps_per_epoch(0)
            t.reporter.training(t.step, window, grad_norm=norm, rate=rate, epoch=epoch, peak=t.peak, flops=flops)
            window = Window()
        evaluation = evaluate_and_report(t, window) if last or (eval_steps and t.step % eval_steps == 0) else None
        if last or (config.save_steps and t.step % config.save_steps == 0):
            save(t, evaluation, window)
    finished = t.step >= t.total_steps  # beyond: of a resumed run whose max_steps is lower now
    t.stop.agreed()  # from here on the run ends by itself
    if t.saved_step != t.step:
        save(t, evaluation, window)
    if finished and check is not None:
        check.at_end()
    return finished


def count(batches: list[Batch]) -> tuple[int, int, int]:
    """Trained tokens, tokens, and the sum over documents of length^2."""
    squares = sum(int((b.cu_seqlens[1:] - b.cu_seqlens[:-1]).long().square().sum()) for b in batches)
    return sum(b.num_loss_tokens for b in batches), sum(len(b.input_ids) for b in batches), squares


def evaluate_and_report(t: Training, window: Window | None = None) -> Evaluation | None:
    if t.held_out is None:
        return None
    with t.stop.unhurried(), (window or Window()).pause():
        found = evaluate(t.model, t.held_out.dataset, t.held_out.num_bytes, t.held_out.plan, t.mesh, isa=t.config.isa)
    t.reporter.record(t.step, {
        "eval_loss": found.nats_per_token, "eval_nats_per_byte": found.nats_per_byte, "eval_token_acc": found.token_acc,
        "global_step/max_steps": f"{t.step}/{t.total_steps}",
    })  # fmt: skip
    return found


def save(t: Training, evaluation: Evaluation | None, window: Window) -> None:
    """checkpoint-<step>, written by rank 0; the others wait, and raise too if it could not be written.

    `best` is the checkpoint with the lowest held-out loss among those that were saved at a step with an evaluation.
    """
    if not all(bool(p.isfinite().all()) for p in t.model.parameters() if p.requires_grad):  # on every rank: they hold the same
        path = write_rows(t, t.step, [collate(t.dataset, micro_batch) for micro_batch in t.plan.step(t.step - 1)])
        raise NonFiniteError(
            f"step {t.step}: the weights are NaN or infinite after its update and are not saved. {advice(t, path)}"
        )
    is_best = evaluation is not None and (t.best is None or evaluation.nats_per_token < t.best[0])
    if evaluation is not None and is_best:
        t.best = (evaluation.nats_per_token, t.step)

    def write_model(directory: Path) -> None:
        if t.model.tuning.lora:
            save_adapter(t.model, directory, str(Path(t.config.model or "").resolve()))
        else:
            save_checkpoint(t.model, directory)
            base = None if t.config.model is None else Path(t.config.model)
            write_json(directory / GENERATION_CONFIG, generation_config(t.tokenizer, base))
        t.tokenizer.save_pretrained(directory)

    error: str | None = None
    with t.stop.unhurried(), window.pause():
        if t.mesh.world.rank == 0:
            state = checkpoint.new_state(t.step, t.total_steps, t.consumed_tokens, t.fingerprint, t.best)
            try:
                path = checkpoint.save(
                    t.run_dir, state, dict(t.model.named_parameters()), t.optimizer, t.model.pissa_start(),
                    write_model=write_model, args=t.args, save_total_limit=t.config.save_total_limit, is_best=is_best,
                )  # fmt: skip
                t.reporter.say(f"saved {path}")
            except checkpoint.CheckpointError as failure:
                error = str(failure)
        error = t.mesh.world.comm.broadcast_object(error)
    if error is not None:
        raise checkpoint.CheckpointError(error)
    t.saved_step = t.step


def write_rows(t: Training, step: int, batches: list[Batch], per_token: list[torch.Tensor] | None = None) -> Path:
    """Writes this rank's rows of a step (counted from 1) to a file, with their losses where given; returns its path."""
    path = t.run_dir / f"non-finite-step-{step}-rank-{t.mesh.world.rank}.jsonl"
    with open(path, "w") as file:
        for number, batch in enumerate(batches):
            losses = None if per_token is None else per_token[number]
            guilty = set() if losses is None else set(non_finite_documents(batch, losses))
            bounds = batch.cu_seqlens.tolist()
            for i, row in enumerate(batch.rows):
                inside = slice(bounds[i], bounds[i + 1])
                ids = batch.input_ids[inside].tolist()
                line = {"row": row, "source": t.dataset.rows[row].source, "text": t.tokenizer.decode(ids), "input_ids": ids}
                if losses is not None:
                    line |= {"finite": i not in guilty, "loss": repr(float(losses[inside].sum()))}
                file.write(json.dumps(line) + "\n")
    return path


def advice(t: Training, rows: Path) -> str:
    """Where the rows of the step are, what is still good, what to try."""
    return (
        f"The rows of the step are in {rows.with_name(rows.name.rsplit('-', 1)[0])}-*.jsonl; "
        f"the last good checkpoint is {checkpoint.newest(t.run_dir) or 'none yet'}. "
        "Try a lower learning_rate" + (", or --torch_dtype float32" if t.model.compute_dtype == torch.bfloat16 else "")
    )

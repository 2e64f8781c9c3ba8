"""Puts a run together: tokenizer, rows, model, optimizer, the place on disk, the checkpoint to go on from; then trains it."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swiftk import __version__
from swiftk.config import DataConfig, OptimConfig, RunConfig, TunerConfig
from swiftk.model import Model, ModelConfig, load_adapter, load_checkpoint
from swiftk.model.compute import CPU, compute_dtype, device_name, isa_path
from swiftk.model.freezing import ambiguous_prefixes
from swiftk.parallel.mesh import Mesh
from swiftk.trainer import checkpoint
from swiftk.trainer.data import Dataset, load_splits, token_statistics, trained_bytes
from swiftk.trainer.evaluation import greedy
from swiftk.trainer.loop import HeldOut, Training, train
from swiftk.trainer.metrics import Reporter, measure_peak, peak_memory_gib
from swiftk.trainer.optimizer import build_optimizer, peak_rate
from swiftk.trainer.packing import BatchPlan
from swiftk.trainer.preview import preview
from swiftk.trainer.rows import read_rows
from swiftk.trainer.stop import StopFlag
from swiftk.trainer.tokenizer import check_vocab, load_tokenizer, train_tokenizer

NEW_TOKENS, NEW_LINES = 64, 8  # of the completion printed at the end


@dataclass(frozen=True)
class Commands:
    """What people are told to paste next, with the names that the shell which started the run finds."""

    train: str  # up to the arguments
    tensorboard: str
    resume: str  # the whole line
    merge: str  # up to the arguments
    generate: str


def fingerprint(dataset: Dataset) -> str:
    """Of all tokens and masks in order: equal data on every rank and on resume."""
    digest = hashlib.sha256()
    for row in dataset.rows:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(row.loss_mask.tobytes())
    return digest.hexdigest()[:32]


def plan_of(
    dataset: Dataset, config: RunConfig, data: DataConfig, max_length: int, mesh: Mesh, *, whole: bool = False
) -> BatchPlan:
    """`whole`: one step that holds every row, for evaluation."""
    return BatchPlan(
        dataset.lengths, packing_length=(data.packing_length or max_length) if data.packing else None,
        micro_batch_size=config.micro_batch_size, global_batch_size=len(dataset.rows) if whole else config.global_batch_size,
        seed=data.seed, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size,
    )  # fmt: skip


def output_dir_of(config: RunConfig, yaml_path: str | None) -> Path:
    name = Path(config.model).name if config.model else Path(yaml_path).stem if yaml_path else "model"
    return Path(config.output_dir or f"output/{name}")


def build_tokenizer(config: RunConfig, data: DataConfig, vocab_size: int, resume: Path | None, mesh: Mesh) -> Any:
    """The checkpoint's on resume, else a directory's, else trained on the dataset by rank 0 and sent to the others."""
    if config.tokenizer != "train" or resume is not None:
        return load_tokenizer(str(resume or config.tokenizer or config.model))
    made: Any = None
    if mesh.world.rank == 0:
        try:
            rows, _ = read_rows(data)
            made = train_tokenizer((str(m["content"]) for row in rows for m in row.messages), vocab_size)
        except ValueError as error:
            made = error
    made = mesh.world.comm.broadcast_object(made)
    if isinstance(made, ValueError):
        raise made
    return made


def unusual(checkpoint_dir: Path, args: dict[str, Any]) -> list[str]:
    saved = json.loads((checkpoint_dir / checkpoint.ARGS).read_text())["arguments"]
    return checkpoint.differing(saved, args)


def find_resume(config: RunConfig, output_dir: Path, args: dict[str, Any], mesh: Mesh, say: list[str]) -> Path | None:
    """The checkpoint to go on from, the same on all ranks: rank 0 looks, and removes what killed saves left behind. That
    output_dir can be written is looked at here too, before minutes are spent on the rows."""
    found: Path | None = None
    problem: str | None = None
    if mesh.world.rank == 0 and not config.preview:
        try:
            checkpoint.check_writable(output_dir)
        except checkpoint.CheckpointError as error:
            problem = str(error)
    if mesh.world.rank == 0 and not problem:
        say += [f"removed {path}, left by a save that did not finish" for path in checkpoint.remove_leftovers(output_dir)]
        if config.resume_from_checkpoint == "auto":
            found, notes = checkpoint.find_resumable(output_dir, args)
            say += [*notes, f"resuming from {found}" if found else f"nothing to resume under {output_dir}: starting anew"]
        elif config.resume_from_checkpoint:
            found = Path(config.resume_from_checkpoint)
            why = checkpoint.invalid(found) if found.is_dir() else "there is no such directory"
            if why:
                problem = f"resume_from_checkpoint: {found} cannot be resumed: {why}; `auto` takes the newest valid one"
            else:
                say += [f"resuming from {found}", *(f"careful: the run differs in {d}" for d in unusual(found, args))]
    found, problem = mesh.world.comm.broadcast_object((found, problem))
    if problem:
        raise checkpoint.CheckpointError(problem)
    return found.resolve() if found else None


def tuner_of_checkpoint(tuner: TunerConfig, shape: ModelConfig, config: RunConfig) -> TunerConfig:
    """A checkpoint in NF4 is used as it is: quant_bits need not be given, and full tuning is not possible."""
    if not shape.quantised:
        return tuner
    if tuner.tuner_type != "lora":
        raise ValueError(
            f"tuner_type: has full, wants lora: {config.model} is quantised (NF4), which cannot be trained whole; "
            "--tuner_type lora, or --model <the checkpoint that is not quantised>"
        )
    return replace(tuner, quant_method="bnb", quant_bits=4)


def prepare_run_dir(config: RunConfig, output_dir: Path, resume: Path | None, arguments: dict[str, Any], yaml_path: str | None,
                    bytes_needed: int, mesh: Mesh) -> Path:  # fmt: skip
    """An equal run under output_dir goes on in the directory of its checkpoint; any other gets a new one, so that a resume
    from elsewhere, or with other arguments, writes over nothing."""
    run_dir: Path | None = None
    problem: str | None = None
    if mesh.world.rank == 0:
        try:
            checkpoint.check_room(output_dir, bytes_needed)
            inside = resume is not None and resume.parent in [d.resolve() for d in checkpoint.run_dirs(output_dir)]
            if resume is not None and inside and not unusual(resume, arguments["arguments"]):
                run_dir = resume.parent
            else:
                run_dir = checkpoint.new_run_dir(output_dir, config.add_version)
            checkpoint.write_text(run_dir / checkpoint.ARGS, json.dumps(arguments, indent=1, sort_keys=True))
            if yaml_path and Path(yaml_path).resolve() != (run_dir / Path(yaml_path).name).resolve():
                shutil.copyfile(yaml_path, run_dir / Path(yaml_path).name)
        except checkpoint.CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"output_dir: {output_dir} cannot be written: {error.strerror}; choose another --output_dir"
    run_dir, problem = mesh.world.comm.broadcast_object((run_dir, problem))
    if problem or run_dir is None:
        raise checkpoint.CheckpointError(str(problem))
    return run_dir


def run(
    config: RunConfig, tuner: TunerConfig, data: DataConfig, optim: OptimConfig, mesh: Mesh, stop: StopFlag, *,
    arguments: dict[str, Any], yaml_path: str | None, commands: Commands, device: torch.device = CPU,
) -> bool:  # fmt: skip
    """One training run, on every rank.

    Args:
        arguments: every key with its value, for args.json and for the comparison on resume.
        yaml_path: the configuration file, copied to the output.
        commands: printed at the end; `resume` when a signal stops the run.
        device: this rank's own, of the model and the optimizer.
    Returns: True if the run finished, or printed its preview; False if a signal stopped it (saved).
    Raises: ValueError for bad input, CheckpointError, NonFiniteError.
    """
    quiet = mesh.world.rank != 0
    notes: list[str] = []
    output_dir = output_dir_of(config, yaml_path)
    resume = find_resume(config, output_dir, arguments, mesh, notes)
    if not quiet:
        print(*notes, sep="\n", end="\n" if notes else "", flush=True)

    try:
        shape = ModelConfig.from_hf(config.model or config.model_config)
    except ValueError as error:
        where = f" (model_config of {yaml_path})" if config.model_config and yaml_path else ""
        raise ValueError(f"{error}{where}") from None
    tuner = tuner_of_checkpoint(tuner, shape, config)
    tokenizer = build_tokenizer(config, data, shape.vocab_size, resume, mesh)
    check_vocab(tokenizer, shape.vocab_size)
    max_length = min(data.max_length or shape.max_position_embeddings, shape.max_position_embeddings)
    if data.max_length and data.max_length > max_length and not quiet:
        print(f"careful: max_length has {data.max_length}, the model ends at {max_length} positions, which is used", flush=True)
    dataset, held_out = load_splits(data, tokenizer, max_length)
    plan = plan_of(dataset, config, data, max_length, mesh)
    if (lost := dataset.report.get("lost_tokens")) and not quiet:
        print(f"careful: {lost} tokens of {dataset.report['cut']} rows are cut off at max_length {max_length}"
              f" (truncation_strategy {data.truncation_strategy}{'; split would keep them' if data.stage == 'pt' else ''})",
              flush=True)  # fmt: skip
    if config.preview:
        if not quiet:
            preview(dataset, plan, tokenizer, config.preview)
            print("preview only, nothing is trained: leave out --preview to train", flush=True)
        return True
    mark = fingerprint(dataset)
    if len(set(mesh.world.comm.all_gather_object(mark))) > 1:
        raise ValueError("dataset: the ranks read different rows; every rank needs the same files")

    dtype = compute_dtype(config.torch_dtype, config.isa, device)
    model = Model(
        shape, mesh, compute_dtype=dtype, seed=None if config.model else config.seed, isa=config.isa,
        numerics=config.numerics, recompute=config.recompute_granularity, tuner=tuner, adapter_seed=config.seed,
    )  # fmt: skip
    params = dict(model.named_parameters())
    start = model.pissa_start()
    if resume is not None and start:
        checkpoint.load_start(resume, start)
    if config.model and (resume is None or not all(p.requires_grad for p in params.values())):
        load_checkpoint(model, config.model, started=resume is not None)
    if tuner.adapters and resume is None:
        load_adapter(model, tuner.adapters[0])
    model.to(device)
    params, start = dict(model.named_parameters()), model.pissa_start()  # as they are there
    if config.torch_compile:
        model.compile_blocks()
    optimizer = build_optimizer(params, optim, config.seed)
    total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * plan.steps_per_epoch(0))

    trained = [p for p in params.values() if p.requires_grad]
    written = trained if model.tuning.lora else params.values()  # what is frozen in a whole checkpoint too
    bytes_needed = sum(p.numel() * dtype.itemsize for p in written) + sum(3 * p.nbytes for p in trained) + (16 << 20)
    bytes_needed += 2 * sum(p.nbytes for p in start.values())
    facts = {
        "arguments": arguments, "version": __version__, "torch": torch.__version__, "isa": isa_path(config.isa),
        "device": device_name(device), "compute_dtype": str(dtype).removeprefix("torch."), "data_parallel_size": mesh.dp.size,
        "threads_per_rank": torch.get_num_threads(), "total_steps": total_steps,
    }  # fmt: skip
    run_dir = prepare_run_dir(config, output_dir, resume, facts, yaml_path, bytes_needed, mesh)
    peak = config.peak_tflops * 1e12 * mesh.world.size if config.peak_tflops else measure_peak(dtype, mesh.world.comm, device)

    t = Training(
        config=config, optim=optim, mesh=mesh, model=model, optimizer=optimizer, tokenizer=tokenizer, dataset=dataset,
        plan=plan, held_out=None, run_dir=run_dir, args=facts, fingerprint=mark, total_steps=total_steps, peak=peak, stop=stop,
        reporter=Reporter(
            run_dir, total_steps, config.report_to, quiet=quiet,
            start_step=checkpoint.read_state(resume).step if resume and resume.parent == run_dir else 0,
        ),
    )  # fmt: skip
    if held_out is not None:
        whole = plan_of(held_out, config, data, max_length, mesh, whole=True)
        t.held_out = HeldOut(held_out, trained_bytes(held_out.rows, tokenizer), whole)
    try:
        if resume is not None:
            restore(t, checkpoint.load(resume, params, optimizer, start))
            saved = json.loads((resume / checkpoint.ARGS).read_text())
            for key in ("device", "isa", "compute_dtype"):  # what `auto` chose: equal arguments, but another machine
                if saved.get(key, facts[key]) != facts[key]:
                    t.reporter.say(f"careful: {key} was {saved.get(key)} and is {facts[key]}, so the numbers round differently")
        introduce(t)
        if not quiet:
            show_first_row(dataset, tokenizer)
        with t.reporter.progress():
            finished = train(t)
        if not finished:
            name = stop.signal_name or "a signal to another rank"
            t.reporter.say(f"stopped by {name} after step {t.step}, saved; go on with:\n  {commands.resume}")
        elif not quiet:
            closing_words(t, commands)
    except ConnectionError:  # of a collective
        raise
    except OSError as error:  # of the log, or of the rows of a step
        raise checkpoint.CheckpointError(
            f"{error.filename or run_dir} cannot be written: {error.strerror or error}; "
            f"the last good checkpoint is {checkpoint.newest(run_dir) or 'none yet'}"
        ) from error
    finally:
        t.reporter.close()
    return finished


def show_first_row(dataset: Dataset, tokenizer: Any) -> None:
    """Decoded, with its mask visible: a wrong template shows here and nowhere else."""
    first = Dataset(dataset.rows[:1], {})
    preview(first, BatchPlan(first.lengths, packing_length=None, micro_batch_size=1, global_batch_size=1, seed=0), tokenizer, 1)


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def introduce(t: Training) -> None:
    """What is about to be trained, on what, where to."""
    say, facts = t.reporter.say, t.args
    size = sum(math.prod(spec.shape) for spec in t.model.specs.values())
    trained = [p for p in t.model.parameters() if p.requires_grad]
    share = sum(p.numel() for p in trained) / size
    master = "fp64" if t.model.compute_dtype == torch.float64 else "fp32"
    kind = t.model.config.model_type
    say(f"model       {kind}, {size / 1e6:.2f} M parameters, {share:.{0 if share > 0.1 else 2}%} trainable ({master})")
    if t.model.tuning.lora:
        tuner, tuning = t.model.tuning.config, t.model.tuning
        name = ("rs" if tuner.use_rslora else "") + ("DoRA" if tuner.use_dora else "LoRA")
        whole = f", {len(tuning.saved)} modules whole" if tuning.saved else ""
        say(f"tuner       {name} on {len(tuning.adapted)} modules{whole}: rank {tuner.lora_rank}, scale {tuning.scale:g}, "
            f"dropout {tuner.lora_dropout:g}{', PiSSA' if tuning.pissa else ''}; "
            f"{len(tuning.quantised)} weights in NF4")  # fmt: skip
    elif len(trained) < len(t.model.specs):
        names = [name for name, p in t.model.named_parameters() if p.requires_grad]
        say(f"trained     {len(names)} of {len(t.model.specs)} tensors, from {names[0]} to {names[-1]}; the others are frozen")
        for prefix in ambiguous_prefixes(t.model.tuning.config, t.model.specs):
            say(f"careful: {prefix} is the beginning of {prefix}0 too; {prefix}. means it alone")
    base = sum(p.nbytes for p in t.model.parameters() if not p.requires_grad) + sum(b.nbytes for b in t.model.buffers())
    learnt = sum(p.nbytes for p in trained)
    peak = f"at most {peak_memory_gib():.3f} GiB so far"
    say(f"memory      {mib(base)} frozen, {mib(learnt)} trained, as much for gradients; {peak}")
    how = "given" if t.config.peak_tflops else "measured with a matrix product"
    ranks = f"{t.mesh.dp.size} data-parallel ranks"
    where = facts["device"] if t.model.device.type == "cuda" else f"{facts['isa']}, {facts['threads_per_rank']} threads"
    say(f"compute     {facts['compute_dtype']}, {ranks} x {where}, {(t.peak or 0) / 1e9:.0f} GFLOP/s {how}")
    say("rows        " + ", ".join(f"{name} {count}" for name, count in t.dataset.report.items()))
    lengths = token_statistics(t.dataset.lengths)
    shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in lengths.items())
    say(f"tokens/row  {', '.join(shown)}; packs are {t.plan.efficiency:.1%} full")
    if t.held_out is not None:
        report = t.held_out.dataset.report
        text = f"{t.held_out.num_bytes} bytes of text"
        say(f"held out    rows {report['rows']}, trained_tokens {report['trained_tokens']}, {text}")
    unit = "rows" if t.plan.packing_length is None else f"packs of {t.plan.packing_length} tokens"
    epochs = t.total_steps / t.plan.steps_per_epoch(0)
    if own := [group for group in t.optimizer.param_groups if group["lr_scale"] != 1]:
        usual = peak_rate(t.optim)
        sizes = [(usual * group["lr_scale"], len(group["params"])) for group in own]
        apart = ", ".join(f"{rate:.3g} ({n} tensor{'s' if n > 1 else ''})" for rate, n in sizes)
        say(f"rates       {usual:.3g}, except {apart}")
    say(f"steps       {t.total_steps} of {t.config.global_batch_size} {unit} ({epochs:.2f} epochs), from step {t.step}")
    say(f"output      {t.run_dir}")


def restore(t: Training, state: checkpoint.TrainerState) -> None:
    """The counters of a checkpoint whose tensors are loaded."""
    if state.data_fingerprint != t.fingerprint:
        raise checkpoint.CheckpointError(
            "resume_from_checkpoint: the dataset's tokens are not those of the checkpoint; the data order would be another. "
            "Start anew from its weights with --model <checkpoint>"
        )
    if state.total_steps != t.total_steps and t.optim.lr_decay_steps is None and t.optim.lr_scheduler_type != "constant":
        t.reporter.say(
            f"careful: the run had {state.total_steps} steps and has {t.total_steps} now, so the learning rate follows another "
            "curve from here on; --lr_decay_steps fixes it"
        )
    if state.step >= t.total_steps:
        t.reporter.say(f"the checkpoint is of step {state.step} of {t.total_steps}: nothing is left to train")
    t.step, t.consumed_tokens = state.step, state.consumed_tokens
    t.saved_step = state.step if (t.run_dir / f"checkpoint-{state.step}").is_dir() else -1
    t.reporter.start_step = state.step
    if state.best_loss is not None and state.best_step is not None:
        t.best = (state.best_loss, state.best_step)


def completion_lines(text: str) -> list[str]:
    """Without its empty lines, and not all of them: a model of few steps may write nothing else."""
    lines = [line for line in text.split("\n") if line.strip()] or ["(nothing but white space)"]
    return lines if len(lines) <= NEW_LINES else [*lines[:NEW_LINES], "..."]


def closing_words(t: Training, commands: Commands) -> None:
    """One greedy completion of an unseen row, and what to do next."""
    say, shape = t.reporter.say, t.model.config
    if t.held_out is not None:
        row = t.held_out.dataset.rows[0]
        ids, trained = row.input_ids.tolist(), row.loss_mask.tolist()
        stops = {t.tokenizer.eos_token_id}
        if all(trained[1:]):  # pre-training text: go on from its first quarter
            start = max(1, len(ids) // 4)
        else:
            start = trained.index(True, 1)
            stops.add(ids[max(i for i, on in enumerate(trained) if on)])  # the end of the turn
        found = greedy(t.model, torch.tensor(ids[:start]), stops, NEW_TOKENS)
        say("\na row that was held out, completed greedily:")
        say("  " + t.tokenizer.decode(ids[:start]).strip().replace("\n", "\n  "))
        say("  > " + "\n  > ".join(completion_lines(t.tokenizer.decode(found))))
    last = t.run_dir / "last"
    if t.model.tuning.lora:
        source = f"--adapters {shlex.quote(str(last))}"
        say(f"\nthe adapter is {last}; peft loads it over {t.config.model}: PeftModel.from_pretrained(model, {str(last)!r})")
        onto = ""
        if t.model.tuning.quantised and not shape.quantised:
            if t.model.tuning.pissa:
                say("over the 16-bit weights its logits are those of training up to the quantisation error of PiSSA's base")
            else:
                say("its logits are those of training over these weights in NF4 (load_in_4bit, bnb_4bit_quant_type nf4);\n"
                    "over them in 16 bits they are off by the quantisation error")  # fmt: skip
                onto = " --base nf4"
        say(f"base and adapter as one checkpoint:\n  {commands.merge} {source} --output_dir merged{onto}")
    else:
        say(f"\nthe checkpoint is {last}; transformers loads it: AutoModelForCausalLM.from_pretrained({str(last)!r})")
        source = f"--model {shlex.quote(str(last))}"
    model = f"--model {shlex.quote(str(t.config.model))} {source}" if t.model.tuning.lora else source
    say(f"talk to it (and `python -m swiftk.serve` serves it):\n  {commands.generate} {model}")
    say("next, train it on your own rows:")
    if not t.model.tuning.lora and t.config.model_config and t.optim.learning_rate:  # trained for minutes: the default, for
        source += f" --tuner_type full --learning_rate {t.optim.learning_rate:g}"  # checkpoints, hardly moves it
    say(f"  {commands.train} {source} --dataset yours.jsonl --split_dataset_ratio 0.05")
    if "tensorboard" in t.config.report_to:
        say("look at the curves:")
        say(f"  {commands.tensorboard} --logdir {shlex.quote(str(t.run_dir / 'runs'))}")
    say("see which tokens are trained: add --preview 2; all keys: add --help")

"""Texts by a model: one prompt, a file of prompts, or a conversation on the terminal.

    python -m swiftk.generate --model DIR --prompt TEXT
    python -m swiftk.generate --model DIR --prompts rows.jsonl --output out.jsonl
    python -m swiftk.generate --model DIR --adapters DIR            (a conversation; /clear forgets it, /exit or Ctrl-D ends it)

Rows of a file are {"prompt": text or token ids} or {"messages": [...]}; any sampling key in a row goes before the command
line's, "adapter" names one of --adapters. Each row's result is written when it is there; the same command after a stop goes on
with the rows that are missing. Exit codes: 0 done; 2 wrong arguments or rows; 1 any other error; 130 stopped by Ctrl-C."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.results import Output, Update
from swiftk.decoder.sampler import TokenLogprob
from swiftk.decoder.text import chat_tokens
from swiftk.decoder_arguments import (
    BASE,
    SAMPLING,
    Parser,
    add_engine_keys,
    add_sampling_keys,
    boolean,
    finite,
    make_engine,
    named_adapters,
    read_sampling,
    turn_ends,
)

MAX_TOKENS = 512  # of an output, where nothing is said and the context has as many left
CONTROLS = [c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"]
HARMLESS = {c: chr(0x2400 + c) if c < 0x20 else "\ufffd" for c in CONTROLS}  # a model must not drive the terminal
EVERY = 10.0  # seconds between two lines of progress where there is no terminal


class Stop:
    """Set by the first Ctrl-C or SIGTERM, looked at between steps; the second ends the process as usual."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        def ask(number: int, frame: object) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Prompter:
    """Prompts and messages as tokens with their parameters, by the command line's settings."""

    engine: Engine
    chat: bool
    system: str | None
    adapter: str | None
    params: SamplingParams
    max_tokens_given: bool
    turn_ends: tuple[int, ...]  # what ends a reply by the template

    def request(self, row: dict[str, Any]) -> tuple[list[int], SamplingParams, str | None]:
        """Raises: ValueError that says what is wrong with the row."""
        engine, given = self.engine, {name: row[name] for name in SAMPLING if name in row}
        params = read_sampling(given, self.params)
        adapter = row.get("adapter", self.adapter)
        adapter = None if adapter == BASE else adapter
        if (adapter is None and not engine.serves_base) or (adapter is not None and adapter not in engine.adapters):
            names = [*([BASE] if engine.serves_base else []), *engine.adapters]
            raise ValueError(f"adapter: has {adapter or BASE!r}, wants {' or '.join(names)}")
        messages, tokenizer = row.get("messages"), engine.tokenizer
        assert tokenizer is not None
        if messages is None and self.chat and isinstance(row["prompt"], str):
            messages = [{"role": "user", "content": row["prompt"]}]
        if messages is None:
            if not isinstance(row["prompt"], str) and not (
                isinstance(row["prompt"], list) and all(type(token) is int for token in row["prompt"])
            ):
                raise ValueError(f"prompt: has {row['prompt']!r}, wants text or a list of token ids")
            tokens = engine.encode(row["prompt"])
        else:
            if self.system is not None and isinstance(messages, list) and _role(messages) != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            tokens = chat_tokens(tokenizer, messages)
            if not params.ignore_eos:
                ends = dict.fromkeys([*params.stop_token_ids, *self.turn_ends])
                params = dataclasses.replace(params, stop_token_ids=tuple(ends))
        left = engine.scheduler.config.max_model_len - len(tokens)
        if given.get("max_tokens") is None and not self.max_tokens_given:
            params = dataclasses.replace(params, max_tokens=max(1, min(MAX_TOKENS, left)))
        if params.max_tokens > left:
            raise ValueError(
                f"prompt has {len(tokens)} tokens and max_tokens {params.max_tokens}, together they want at most max_model_len "
                f"{engine.scheduler.config.max_model_len}"
            )
        params.check(engine.config.vocab_size)
        return tokens, params, adapter


def _role(messages: list[Any]) -> Any:
    return messages[0].get("role") if messages and isinstance(messages[0], dict) else None


# --- one prompt, and a conversation ----------------------------------------------------------------------------------


def shown(text: str, out: IO[str]) -> str:
    return text.translate(HARMLESS) if out.isatty() else text


def stream(engine: Engine, request: tuple[list[int], SamplingParams, str | None], stop: Stop, out: IO[str]) -> list[Output]:
    """Prints a text as it comes; of several (n) each when all are there."""
    tokens, params, adapter = request
    id = engine.add(tokens, params, adapter=adapter)
    outputs = [Output() for _ in range(params.n)]
    with stop.listening():
        while engine.has_work:
            for update in engine.step():
                outputs[update.index].add(update)
                if update.finish_reason == "error":
                    raise RuntimeError(f"output {update.index}: {update.stop_reason}")
                if params.n == 1 and update.text:
                    out.write(shown(update.text, out))
                    out.flush()
            if stop.asked:
                engine.abort(id)
    if params.n > 1:
        out.write("\n".join(f"--- {i} of {params.n}\n{shown(one.text, out)}" for i, one in enumerate(outputs, 1)))
    out.write("\n")
    out.flush()
    return outputs


def one_prompt(prompter: Prompter, prompt: str) -> int:
    request, stop, start = prompter.request({"prompt": prompt}), Stop(), time.perf_counter()
    outputs = stream(prompter.engine, request, stop, sys.stdout)
    count, seconds = sum(len(one.token_ids) for one in outputs), time.perf_counter() - start
    if sys.stderr.isatty():
        print(f"({len(request[0])} tokens in, {count} out, {count / seconds:.1f} tokens/s)", file=sys.stderr)
    return 130 if stop.asked else 0


def conversation(prompter: Prompter) -> int:
    """Ctrl-C ends a reply, Ctrl-D or /exit the conversation. Lines may also come from a pipe."""
    mark = "> " if sys.stdin.isatty() else ""
    messages: list[dict[str, str]] = []
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then has history and editing
    while True:
        try:
            line = input(mark)
        except EOFError:
            return 0
        if line.strip() in ("/exit", "/quit"):
            return 0
        if line.strip() == "/clear":
            messages = []
        elif line.strip():
            turn = [*messages, {"role": "user", "content": line}]
            try:
                request = prompter.request({"messages": turn} if prompter.chat else {"prompt": line})
                reply = stream(prompter.engine, request, Stop(), sys.stdout)[0].text
                messages = [*turn, {"role": "assistant", "content": reply}]
            except ValueError as error:
                print(f"swiftk.generate: {error} (/clear forgets the conversation)", file=sys.stderr)


# --- a file ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    index: int
    row: dict[str, Any]
    tokens: list[int]
    params: SamplingParams
    adapter: str | None
    fingerprint: str  # of everything that decides about the output


def read_jobs(path: str, prompter: Prompter, settings: dict[str, Any]) -> list[Job]:
    """Every row of the file, checked before anything is generated.

    Raises: ValueError that names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines also cuts at U+2028, which a text may have
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"prompts: {path} cannot be read ({why})") from None
    jobs: list[Job] = []
    keys = {*SAMPLING, "prompt", "messages", "adapter"}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"is {line[:40]!r}, wants an object")
            if ("prompt" in row) == ("messages" in row):
                raise ValueError(f"has the keys {', '.join(row) or '(none)'}, wants 'prompt' or 'messages'")
            for key in row.keys() - keys:
                if near := difflib.get_close_matches(key, keys, 1, 0.8):
                    raise ValueError(f"has {key!r}, which is no key; did you mean {near[0]!r}?")
            index = len(jobs)
            tokens, params, adapter = prompter.request(row)
            if params.seed is not None and "seed" not in row:
                params = dataclasses.replace(params, seed=params.seed + index)  # rows are not to share their noise
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"prompts: {path} line {number} is not JSON ({error})") from None
        except ValueError as error:
            raise ValueError(f"prompts: {path} line {number}: {error}") from None
        what = json.dumps([row, tokens, dataclasses.asdict(params), adapter, settings], sort_keys=True)
        jobs.append(Job(index, row, tokens, params, adapter, hashlib.sha256(what.encode()).hexdigest()[:16]))
    if not jobs:
        raise ValueError(f"prompts: {path} has no rows, wants at least one")
    return jobs


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The output file, to be gone on with, for this process alone."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output: another process is writing {path}") from None
        yield file


def rows_done(file: IO[bytes], path: str, jobs: Sequence[Job]) -> dict[int, bytes]:
    """The rows that are in the output already, by index; a line that was cut off at the end is removed.

    Raises: ValueError where a row does not come from these jobs; the file is as before.
    """
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    done: dict[int, bytes] = {}
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            index, fingerprint = row["index"], row["fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"output: {path} line {number} is no row of swiftk.generate; give another --output") from None
        if not (isinstance(index, int) and 0 <= index < len(jobs)) or jobs[index].fingerprint != fingerprint:
            raise ValueError(
                f"output: {path} line {number} was made of another row, model or parameter than row {index} has now; give "
                "another --output, or what it was made of"
            )
        done[index] = line
    file.truncate(len(whole))
    return done


def as_json(job: Job, outputs: Sequence[Output], last: Update, prompt: list[TokenLogprob | None] | None) -> bytes:
    found: list[dict[str, Any]] = []
    for one in outputs:
        entry: dict[str, Any] = {"text": one.text, "finish_reason": one.finish_reason, "num_tokens": len(one.token_ids)}
        if one.stop_reason is not None:
            entry["stop_reason"] = one.stop_reason
        if one.logprobs is not None:
            entry["logprobs"] = [_logprob(x) for x in one.logprobs]
        found.append(entry)
    row: dict[str, Any] = {"index": job.index, "input": job.row, "outputs": found, "num_prompt_tokens": len(job.tokens)}
    if prompt is not None:
        row["prompt_logprobs"] = [None if x is None else _logprob(x) for x in prompt]
    row |= {"weight_version": last.weight_version, "fingerprint": job.fingerprint}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _logprob(x: TokenLogprob) -> dict[str, Any]:
    top = {str(token): finite(value) for token, value in x.top.items()}
    return {"token_id": x.token_id, "logprob": finite(x.logprob), "rank": x.rank, "top": top}


@contextmanager
def progress(rows: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """Shows rows and tokens/s: a bar on a terminal, else a line every ten seconds and at the end."""
    start, said, was = time.perf_counter(), time.perf_counter(), done

    def text(rows_done: int, tokens: int) -> str:
        return f"{rows_done}/{rows} rows, {tokens} tokens, {tokens / max(time.perf_counter() - start, 1e-9):.1f} tokens/s"

    if sys.stderr.isatty():
        columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(text(done, 0), total=rows, completed=done)
            yield lambda rows_done, tokens: bar.update(task, completed=rows_done, description=text(rows_done, tokens))
        return

    def say(rows_done: int, tokens: int) -> None:
        nonlocal said
        if rows_done == rows or time.perf_counter() - said >= EVERY:
            said, passed = time.perf_counter(), time.perf_counter() - start
            left = passed / (rows_done - was) * (rows - rows_done) if rows_done > was else 0
            print(text(rows_done, tokens) + (f", {left:.0f} s left" if left else ""), file=sys.stderr, flush=True)

    yield say


def from_file(prompter: Prompter, prompts: str, output: str, settings: dict[str, Any]) -> int:
    engine, stop = prompter.engine, Stop()
    jobs = read_jobs(prompts, prompter, settings)
    with opened(output) as file:
        done = rows_done(file, output, jobs)
        if done:
            print(f"{len(done)} of {len(jobs)} rows are in {output} already", file=sys.stderr)
        waiting = deque(job for job in jobs if job.index not in done)
        running: dict[int, tuple[Job, list[Output], list[Any]]] = {}
        total, failed = 0, 0
        with stop.listening(), progress(len(jobs), len(done)) as show:
            while (waiting or running) and not stop.asked:
                while waiting and len(running) < 2 * engine.scheduler.config.max_num_seqs:
                    job = waiting.popleft()
                    id = engine.add(job.tokens, job.params, adapter=job.adapter)
                    running[id] = (job, [Output() for _ in range(job.params.n)], [])
                for update in engine.step():
                    job, outputs, prompt = running[update.id]
                    outputs[update.index].add(update)
                    total += len(update.token_ids)
                    if update.prompt_logprobs is not None:
                        prompt[:] = [update.prompt_logprobs]
                    if update.finish_reason is not None and all(one.finish_reason for one in outputs):
                        failed += any(one.finish_reason == "error" for one in outputs)
                        done[job.index] = as_json(job, outputs, update, prompt[0] if prompt else None)
                        file.write(done[job.index])
                        file.flush()
                        del running[update.id]
                show(len(done), total)
        if stop.asked:
            where = f"{len(done)} of {len(jobs)} rows are in {output}"
            print(f"swiftk.generate: stopped; {where}, the same command goes on with the rest", file=sys.stderr)
            return 130
        if list(done) != sorted(done):  # rows end in another order than they began
            in_order = Path(f"{output}.sorted")
            in_order.write_bytes(b"".join(done[index] for index in sorted(done)))
            os.replace(in_order, output)
    if failed:
        print(f"swiftk.generate: {failed} rows have the finish_reason error, their stop_reason says why", file=sys.stderr)
    return 1 if failed else 0


# --- the command line ------------------------------------------------------------------------------------------------


def parser() -> Parser:
    found = Parser("swiftk.generate", __doc__)
    group = found.add_argument_group("what")
    group.add_argument("--prompt", metavar="TEXT")
    group.add_argument("--prompts", metavar="FILE", help="jsonl")
    group.add_argument("--output", metavar="FILE", help="jsonl; rows that are in it already are not generated again")
    group.add_argument("--chat", type=boolean, metavar="true|false",
                       help="prompts are a user's turn in the chat template; default: where the tokenizer has one")  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="system message of chats that have none")
    group.add_argument("--adapter", metavar="NAME", help=f"of --adapters, or {BASE}; default: the only one")
    add_engine_keys(found)
    add_sampling_keys(found)
    return found


def check(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("prompt and prompts are both given, wants one of them")
    if (args.prompts is None) != (args.output is None):
        raise ValueError("prompts and output belong together, wants both or none")
    if args.prompts is not None and Path(args.output).exists() and Path(args.output).samefile(args.prompts):
        raise ValueError(f"output: has {args.output}, which is the file of prompts, wants another one")
    if args.prompts is not None and not Path(args.prompts).is_file():
        raise ValueError(f"prompts: {args.prompts} is not there, wants a jsonl file")
    if args.prompts is None and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise ValueError("logprobs and prompt_logprobs are written to files, wants --prompts and --output")
    if args.prompts is None and args.prompt is None and (args.n or 1) != 1:
        raise ValueError(f"n: has {args.n}, a conversation wants 1")


def main(argv: list[str]) -> int:
    args = parser().parse(argv)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    try:
        check(args)
        params = read_sampling({name: getattr(args, name) for name in SAMPLING}, SamplingParams())
        engine = make_engine(args, say)
        assert engine.tokenizer is not None
        has_template = bool(engine.tokenizer.chat_template)
        chat = has_template if args.chat is None else args.chat
        if chat and not has_template:
            raise ValueError("chat: has true, the tokenizer has no chat template; --chat false continues texts as they are")
        if args.system is not None and not chat:
            raise ValueError("system: is given, wants --chat true: texts that are continued as they are have no system message")
        adapter = args.adapter
        if adapter is None and len(engine.adapters) > 1 and args.prompts is None:
            raise ValueError(f"adapter: is not given, wants one of {', '.join(engine.adapters)}, or {BASE}")
        if adapter is None and len(engine.adapters) == 1:
            adapter = next(iter(engine.adapters))
        ends = turn_ends(engine.tokenizer) if has_template else ()
        prompter = Prompter(engine, chat, args.system, adapter, params, args.max_tokens is not None, ends)
        if args.chat is None and chat and args.prompt is not None and sys.stderr.isatty():
            say("(as a user's turn in the chat template; --chat false continues the text as it is)")
        if args.prompts is not None:
            names = {name: str(Path(directory).absolute()) for name, directory in named_adapters(args.adapters).items()}
            settings: dict[str, Any] = {"model": str(Path(args.model).absolute()), "adapters": names}
            settings["weights"] = [  # a model that is trained again into its folder is another one
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for folder in (args.model, *names.values()) for file in sorted(Path(folder).glob("*.safetensors"))
            ]  # fmt: skip
            settings |= {name: getattr(args, name) for name in ("torch_dtype", "quant_bits", "quant_head", "isa")}
            return from_file(prompter, args.prompts, args.output, settings)
        return conversation(prompter) if args.prompt is None else one_prompt(prompter, args.prompt)
    except ValueError as error:
        print(f"swiftk.generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, ImportError) as error:
        print(f"swiftk.generate: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

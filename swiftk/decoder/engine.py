"""Continuous batching on the trainer's own weights: requests in, tokens out, the same text under every schedule.

    engine = Engine("path/to/checkpoint")            # or Engine(model): the live trainer's tensors, not copied
    engine.add("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_work:
        for update in engine.step():
            print(update.text, end="")

A token's logits depend on the tokens before it and the weights alone, its noise on (seed, position, token): neither the other
requests, nor how prompts are cut into chunks, cached prefixes, preemptions, drafts or the number of threads change a bit of
what a request gets (on a GPU with numerics="invariant"; "auto" multiplies as the vendor's library chooses by the number of
rows). Log-probabilities are those of kernels.linear_cross_entropy.token_logprobs on the same tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from swiftk.decoder import loading
from swiftk.decoder.forward import Forward, LoadedAdapter, Rows
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.request import Request
from swiftk.decoder.results import Completion, Output, Update
from swiftk.decoder.sampler import Row, Sampler, TokenLogprob
from swiftk.decoder.scheduler import Scheduler, SchedulerConfig, Work
from swiftk.decoder.speculate import Drafter, DraftModel, PromptLookup
from swiftk.decoder.text import Detokenizer, StopStrings, tokens_of
from swiftk.kernels.linear import check_numerics
from swiftk.model import Model, ModelConfig
from swiftk.model.compute import compute_dtype, pick_device
from swiftk.model.tokenizer import has_tokenizer, read_tokenizer

PROMPT_ROWS = 64  # rows of logits at a time, for the log-probabilities of prompts
SEED_STEP = 0x9E3779B97F4A7C15  # between the n sequences of one seed


@dataclass(slots=True)
class _Sequence:
    """The engine's side of a request of the scheduler."""

    request: Request
    id: int
    index: int
    seed: int
    text: Detokenizer | None
    stops: StopStrings | None
    prompt_logprobs: list[TokenLogprob | None] | None
    ends: frozenset[int]  # eos, where it counts


class Engine:
    """
    Args:
        model: directory of a Hugging Face checkpoint, or a live `Model` (with or without an adapter of its own).
        tokenizer: of transformers; None: the directory's. A live model without one takes and gives token ids only.
        adapters: name -> directory in PEFT's format. Several share a batch (LoRA on linears); one with DoRA, embeddings or
            modules_to_save comes alone and is then the model: requests without an adapter are refused.
        torch_dtype: bfloat16 | float32 | float64; None: bf16 on a GPU and where the CPU has its instructions, else fp32.
        quant_bits: 4 holds the linears of the blocks in NF4; quant_head the head too. With a directory only.
        cache_gib, num_blocks: size of the KV cache; None: room for max_num_seqs at their longest, but at most 4 GiB and a
            quarter of the memory that is free; on a GPU up to three quarters of what is free there (a live model: a quarter).
        block_size: tokens of a block. max_num_seqs: sequences that run at once. max_batched_tokens: rows of a step.
        max_model_len: longest sequence; None: the model's max_position_embeddings, or what the cache holds.
        prefix_caching: shared prefixes are computed once.
        speculate: "ngram", or a draft model (live, or a directory) of the same vocabulary; num_draft_tokens guesses a step,
            while at most speculate_up_to sequences run.
        isa: of the CPU kernels. A live model's own is used where it is given as "auto".
        device: of a directory: "auto" (a GPU where torch sees one), "cpu" or "cuda". A live model is where it is.
        numerics: of a directory's products on a GPU: "auto", or "invariant": then a request's tokens and log-probabilities do
            not depend on the batch there either, and are those of a trainer with numerics="invariant" (docs/numerics.md).
    Raises: ValueError for what does not fit together or into memory, before anything is loaded.
    """

    def __init__(
        self, model: Model | str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None,
        adapters: Mapping[str, str | Path] | None = None, torch_dtype: str | None = None, quant_bits: int | None = None,
        quant_head: bool = False, cache_gib: float | None = None, num_blocks: int | None = None, block_size: int = 32,
        max_num_seqs: int = 64, max_batched_tokens: int = 512, max_model_len: int | None = None, prefix_caching: bool = True,
        speculate: str | Model | Path | None = None, num_draft_tokens: int = 4, speculate_up_to: int = 8, isa: str = "auto",
        device: str = "auto", numerics: str = "auto",
    ) -> None:  # fmt: skip
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1), ("max_batched_tokens", max_batched_tokens, max_num_seqs),
            ("block_size", block_size, 1), ("num_draft_tokens", num_draft_tokens, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"Engine: {name} has {value}, wants at least {least}")
        check_numerics("Engine", numerics)
        adapters, own = dict(adapters or {}), None
        where = model.device if isinstance(model, Model) else pick_device(device)
        dtype = model.compute_dtype if isinstance(model, Model) else compute_dtype(torch_dtype, isa, where)
        if where.type == "cuda" and dtype == torch.float64:
            raise ValueError("Engine: the model computes in float64, wants bfloat16 or float32 on a GPU")
        draft, weights = loading.draft_of(speculate, dtype)
        cache: dict[str, Any] = dict(
            block_size=block_size, max_seqs=max_num_seqs, max_len=max_model_len, cache_gib=cache_gib, num_blocks=num_blocks,
            draft=draft, device=where,
        )  # fmt: skip
        if isinstance(model, Model):
            isa = model.isa if isa == "auto" else isa  # other instructions would add in another order
            if quant_bits or quant_head or torch_dtype or (device, numerics) != ("auto", "auto"):
                wants = "wants none: a live model is as it is"
                raise ValueError(f"Engine: quant_bits, quant_head, torch_dtype, device or numerics has a value, {wants}")
            if adapters and model.tuning.adapted:
                raise ValueError("Engine: adapters has names, a model with an adapter of its own wants none")
            self.model, directory = model, None
            num_blocks, longest = loading.cache_blocks(model.config, dtype, weights=weights, live=True, **cache)
        else:
            directory = Path(model)
            config = ModelConfig.from_hf(directory)
            if len(adapters) == 1 and loading.needs_own(next(iter(adapters.values()))):
                own = next(iter(adapters.values()))
            tuner = loading.tuner_of(own, 4 if config.quantised else quant_bits)
            weights += loading.weight_bytes(config, tuner, dtype, quant_head)
            num_blocks, longest = loading.cache_blocks(config, dtype, weights=weights, **cache)
            if tokenizer is None and has_tokenizer(directory):
                tokenizer = read_tokenizer(directory)
            self.model = loading.load_model(
                directory, config, tuner, dtype, quant_head=quant_head, adapter=own, isa=isa, numerics=numerics, device=where
            )
        self.config, self.tokenizer = self.model.config, tokenizer
        stack: list[LoadedAdapter] = [] if own is not None else loading.read_adapters(self.model, adapters)
        self.adapters = {name: -1 if own is not None else i for i, name in enumerate(adapters)}
        self.serves_base = own is None
        self.scheduler = Scheduler(SchedulerConfig(
            num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens,
            max_model_len=longest, prefix_caching=prefix_caching,
        ))  # fmt: skip
        sizes: dict[str, Any] = dict(
            num_blocks=num_blocks, block_size=block_size, max_tokens=max_batched_tokens, max_seqs=max_num_seqs, max_len=longest
        )
        self.forward = Forward(self.model, isa=isa, adapters=stack, **sizes)
        self.sampler = Sampler(self.config.vocab_size, isa)
        self.num_draft_tokens, self.speculate_up_to = num_draft_tokens, speculate_up_to
        self.drafter = self._drafter(speculate, isa, sizes)
        self._sequences: dict[int, _Sequence] = {}  # by the scheduler's id
        self._of: dict[int, list[int]] = {}  # id of add -> scheduler's ids
        self._ids, self._numbers = itertools.count(), itertools.count()
        self._done: list[Update] = []  # of aborts, for the next step
        self._eos = self._end_tokens(directory)
        self.weight_version = self.model.weight_version  # the trainer's count; rises by 1 where others change the weights
        self.scheduler.set_weight_version(self.weight_version)
        self.num_computed_tokens = 0  # rows of all forwards so far

    def _drafter(self, speculate: str | Model | Path | None, isa: str, sizes: dict[str, Any]) -> Drafter | None:
        if speculate is None:
            return None
        if speculate == "ngram":
            return PromptLookup()
        if not isinstance(speculate, Model):
            config = ModelConfig.from_hf(speculate)
            tuner = loading.tuner_of(None, 4 if config.quantised else None)
            places: dict[str, Any] = dict(isa=isa, numerics=self.model.numerics, device=self.model.device)
            speculate = loading.load_model(speculate, config, tuner, self.model.compute_dtype, **places)
        if speculate.device != self.model.device:
            raise ValueError(f"Engine: speculate has a model on {speculate.device}, wants {self.model.device} like the model")
        if speculate.config.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"Engine: speculate has a model of vocab_size {speculate.config.vocab_size}, wants {self.config.vocab_size}: "
                "both models have to write the same tokens"
            )
        if speculate.config.max_position_embeddings < sizes["max_len"]:
            raise ValueError(
                f"Engine: speculate has a model of max_position_embeddings {speculate.config.max_position_embeddings}, wants "
                f"at least {sizes['max_len']}; or lower max_model_len"
            )

        def pick(logits: torch.Tensor, requests: Sequence[Request], guesses: Sequence[Sequence[int]]) -> list[int]:
            rows = [self._row(self._sequences[r.id], g) for r, g in zip(requests, guesses, strict=True)]
            return self.sampler(logits, rows)[0]

        return DraftModel(Forward(speculate, isa=isa, **sizes), pick)

    def _end_tokens(self, directory: Path | None) -> frozenset[int]:
        found = self.config.eos_token_id
        ids = set(found) if isinstance(found, tuple) else {found}
        if self.tokenizer is not None:
            ids.add(self.tokenizer.eos_token_id)
        if directory is not None:
            ids |= loading.generation_eos(directory)
        return frozenset(i for i in ids if i is not None and 0 <= i < self.config.vocab_size)  # a tokenizer may have more

    # --- requests ----------------------------------------------------------------------------------------------------

    def add(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, adapter: str | None = None,
        priority: int = 0, salt: str = "",
    ) -> int:  # fmt: skip
        """Puts a request in the queue.

        Args:
            prompt: text, or token ids.
            params: how to sample; None: the defaults of SamplingParams.
            adapter: one of the names given to the engine; None: the base.
            priority: smaller goes first.
            salt: cached prefixes are shared only among requests of the same salt.
        Returns: its id.
        Raises: ValueError for what can never be served; the engine is as before.
        """
        params = params or SamplingParams()
        params.check(self.config.vocab_size)
        tokens = self.encode(prompt)
        if adapter is None and not self.serves_base:
            raise ValueError(f"adapter: has None, wants {', '.join(self.adapters)}: it is part of the model")
        if adapter is not None and adapter not in self.adapters:
            names = ", ".join(self.adapters) or "those given to the engine (none was)"
            raise ValueError(f"adapter: has {adapter!r}, wants one of {names}, or None")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: has strings, wants none (stop_token_ids): the engine has no tokenizer")
        if not isinstance(priority, int):
            raise ValueError(f"priority: has {priority!r}, wants an integer, the smaller the earlier")
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        made: list[_Sequence] = []
        for index in range(params.n):
            number = next(self._numbers)
            own = params if not index else replace(params, prompt_logprobs=None)  # the others may read the first's cache
            request = Request(number, tokens, own, -1 if adapter is None else self.adapters[adapter], salt, priority)
            try:
                self.scheduler.add(request)
            except ValueError:
                for one in made:
                    self.scheduler.abort(one.request.id)
                raise
            made.append(_Sequence(
                request, -1, index, (seed + index * SEED_STEP) % (1 << 63),
                None if self.tokenizer is None else Detokenizer(self.tokenizer, context=tokens),
                StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None,
                [None] if params.prompt_logprobs is not None and index == 0 else None,
                frozenset() if params.ignore_eos else self._eos,
            ))  # fmt: skip
        id = next(self._ids)
        for one in made:
            one.id = id
            self._sequences[one.request.id] = one
        self._of[id] = [one.request.id for one in made]
        return id

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt as token ids. Raises ValueError for an empty one and for ids out of range."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: has text, wants token ids: the engine has no tokenizer")
            tokens = tokens_of(self.tokenizer, prompt)
        else:
            tokens = [int(t) for t in prompt]
        if not tokens:
            raise ValueError("prompt: has no tokens, wants at least one")
        if min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            at = next(i for i, t in enumerate(tokens) if not 0 <= t < self.config.vocab_size)
            wants = f"at least 0 and below vocab_size {self.config.vocab_size}"
            raise ValueError(f"prompt: has token {tokens[at]} at {at}, wants {wants}")
        return tokens

    def abort(self, id: int) -> None:
        """Ends a request in any state; one that is unknown or finished is passed over. The next step reports it."""
        for number in self._of.get(id, [])[:]:
            one = self._sequences[number]
            self.scheduler.abort(number)
            self._forget(one)
            self._done.append(self._update(one, [], self._held(one)[0], None, "abort", None))

    @property
    def has_work(self) -> bool:
        return bool(self._done) or self.scheduler.has_work

    # --- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Update]:
        """One forward: a token or more for each sequence whose prompt is read, and a piece of those that are not."""
        if not self.scheduler.has_work:
            return self._reported([])
        self._follow_weights()
        if self.drafter is not None and len(self.scheduler.running) <= self.speculate_up_to:
            self.drafter.propose(self.scheduler, self.num_draft_tokens)
        batch = self.scheduler.plan()
        step = [Rows(_tokens(w), w.start, w.request.block_table, w.request.adapter) for w in batch.work]
        count = self.forward(step)
        self.num_computed_tokens += count
        sampled: list[int] = []  # rows of the step that give tokens
        rows: list[Row] = []
        firsts, at = [], 0
        for w in batch.work:
            firsts.append(at)
            at += w.count
            if w.samples:
                sampled += range(at - 1 - w.num_draft, at)
                one = self._sequences[w.request.id]
                rows += [self._row(one, w.request.draft[:i]) for i in range(w.num_draft + 1)]
        tokens, logprobs = self.sampler(self.forward.logits(sampled, count), rows) if rows else ([], [])
        for w, first in zip(batch.work, firsts, strict=True):
            self._score_prompt(w, first, count)
        commits: list[list[int]] = []
        ends: list[tuple[int, Update]] = []
        at = 0
        for w in batch.work:
            if not w.samples:
                commits.append([])
                continue
            stop = at + w.num_draft + 1
            new, update = self._accept(w, tokens[at:stop], logprobs[at:stop])
            commits.append(new)
            ends.append((w.request.id, update))
            at = stop
        self.scheduler.commit(batch, commits)
        for number, update in ends:  # only now: a step that fails before its commit has ended nobody
            if update.finish_reason is not None:
                self.scheduler.finish(number, update.finish_reason)
                self._forget(self._sequences[number])
        return self._reported([update for _, update in ends])

    def _reported(self, updates: list[Update]) -> list[Update]:
        """With those of aborts since the last step; what a failed step (out of memory, say) did not report is not lost."""
        before, self._done = self._done, []
        return before + updates

    def _row(self, one: _Sequence, guesses: Sequence[int] = ()) -> Row:
        """What the sampler has to know of the token after `guesses`."""
        r = one.request
        output = r.output + list(guesses) if guesses else r.output
        return Row(r.params, r.prompt, output, len(r.prompt) + len(output), one.seed, one.ends)

    def _accept(
        self, work: Work, tokens: list[int], logprobs: list[TokenLogprob | None]
    ) -> tuple[list[int], Update]:
        """The tokens that count: up to the first that is not its draft, or that ends the sequence."""
        one = self._sequences[work.request.id]
        params, draft, before = one.request.params, work.request.draft, len(one.request.output)
        new: list[int] = []
        text, reason = "", None
        stop: str | int | None = None
        for i, token in enumerate(tokens):
            if token < 0:
                why = "the logits have NaN, or no token is allowed"
                return [0], self._update(one, [], "", None, "error", why)
            new.append(token)
            if token in one.ends:
                reason = "stop"
            elif token in params.stop_token_ids:
                reason, stop = "stop", token
            if one.text is not None and (reason is None or params.include_stop_str_in_output):
                piece, hit = one.text.push([token]), None
                if one.stops is not None and before + len(new) >= params.min_tokens:
                    piece, hit = one.stops.push(piece)
                text += piece
                if hit is not None and reason is None:
                    reason, stop = "stop", hit
            if reason is None and before + len(new) == params.max_tokens:
                reason = "length"
            if reason is not None or (i < work.num_draft and token != draft[i]):
                break
        if reason is not None and not isinstance(stop, str) and one.text is not None:
            piece, hit = self._held(one)
            if hit is not None and reason == "length":
                reason, stop = "stop", hit
            text += piece
        found = [x for x in logprobs[: len(new)] if x is not None] if params.logprobs is not None else None
        return new, self._update(one, new, text, found, reason, stop)

    def _update(self, one: _Sequence, tokens, text, logprobs, reason, stop) -> Update:
        prompt, one.prompt_logprobs = one.prompt_logprobs, None
        return Update(
            one.id, one.index, tokens, text, logprobs, reason, stop, prompt, one.request.num_cached_tokens,
            self.weight_version,
        )  # fmt: skip

    def _held(self, one: _Sequence) -> tuple[str, str | None]:
        """The text that was held back, at the end of a sequence, and the stop string that is in it."""
        piece, hit = "" if one.text is None else one.text.flush(), None
        if one.stops is not None:
            piece, hit = one.stops.push(piece)
            if hit is None:
                piece += one.stops.flush()
        return piece, hit

    def _forget(self, one: _Sequence) -> None:
        """A sequence that has ended."""
        number = one.request.id
        del self._sequences[number]
        self._of[one.id].remove(number)
        if not self._of[one.id]:
            del self._of[one.id]
        if self.drafter is not None:
            self.drafter.forget(number)

    def _score_prompt(self, work: Work, first: int, count: int) -> None:
        """Log-probabilities of the prompt's tokens that this step's rows predict."""
        one = self._sequences[work.request.id]
        found, prompt = one.prompt_logprobs, one.request.prompt
        if found is None:
            return
        rows = range(max(work.start, len(found) - 1), min(work.start + work.count, len(prompt) - 1))  # positions
        for at in range(rows.start, rows.stop, PROMPT_ROWS):
            part = range(at, min(at + PROMPT_ROWS, rows.stop))
            logits = self.forward.logits([first + p - work.start for p in part], count)
            found += self.sampler.score(logits, [prompt[p + 1] for p in part], one.request.params.prompt_logprobs or 0)

    # --- the weights -------------------------------------------------------------------------------------------------

    def _follow_weights(self) -> None:
        """Where weights have moved: what was computed with the old ones is computed again."""
        if not self.forward.follow():
            return
        self.weight_version = max(self.model.weight_version, self.weight_version + 1)
        self.scheduler.set_weight_version(self.weight_version)
        for one in self._sequences.values():
            if one.prompt_logprobs is not None:
                one.prompt_logprobs = [None]

    # --- all at once ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None, *, adapter: str | None = None,
        on_update: Callable[[int, Update], Any] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Completions of prompts, in their order.

        Args:
            prompts: texts or lists of token ids; one text is a list of one.
            params: for all (with the same seed, thus the same noise), or one for each.
            on_update: called with the number of the prompt and each update of it, as they come.
        Raises: ValueError that names the prompt which cannot be served; nothing is then generated.
        """
        todo: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not isinstance(params, (SamplingParams, Sequence, type(None))):
            raise ValueError(f"generate: params has a {type(params).__name__}, wants SamplingParams, or one for each prompt")
        each = [params or SamplingParams()] * len(todo) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(todo):
            raise ValueError(f"generate: params has {len(each)}, wants one, or {len(todo)} as there are prompts")
        numbers: dict[int, int] = {}
        done: list[Completion] = []
        for i, (prompt, one) in enumerate(zip(todo, each, strict=True)):
            try:
                numbers[self.add(prompt, one, adapter=adapter)] = i
            except ValueError as error:
                self._drop(numbers)
                raise ValueError(f"generate: prompt {i}: {error}") from error
            text = prompt if isinstance(prompt, str) else None
            tokens = self.encode(prompt)
            done.append(Completion(text, tokens, [Output() for _ in range(one.n)]))
        left = sum(one.n for one in each)
        try:
            while left:
                for update in self.step():
                    if update.id not in numbers:  # of a request that was added by itself
                        self._done.append(update)
                        continue
                    done[numbers[update.id]].add(update)
                    left -= update.finish_reason is not None
                    if on_update is not None:
                        on_update(numbers[update.id], update)
        finally:
            if left:  # Ctrl-C, or on_update has raised: nobody waits for the rest
                self._drop(numbers)
        return done

    def _drop(self, ids: Iterable[int]) -> None:
        """Ends requests of which nothing is to be told any more."""
        gone = set(ids)
        for id in gone:
            self.abort(id)
        self._done = [update for update in self._done if update.id not in gone]


def _tokens(work: Work) -> list[int]:
    request, stop = work.request, work.start + work.count - work.num_draft
    return request.tokens[work.start : stop] + request.draft[: work.num_draft]

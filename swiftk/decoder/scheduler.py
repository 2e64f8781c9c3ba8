"""Which tokens of which requests the next forward computes: continuous batching over a paged cache. Pure Python, no torch.

    while scheduler.has_work:
        batch = scheduler.plan()                 # rows for a forward; blocks for them are allocated, nothing else has changed
        tokens = forward_and_sample(batch)       # new tokens of each work item
        scheduler.commit(batch, tokens)          # sequences grow, full blocks are published

A step has max_batched_tokens rows. First every running request that lacks one token gets its row, so no prompt, however
long, holds up those that are decoding; then running requests that lack more get chunks of what is left, then waiting ones
are admitted in order, then drafts fill up. Within each group the order is (priority, arrival).

A request gets the blocks of all its tokens when it is admitted, and one more each time a block is full. When none is free,
the last request in order is preempted: it gives back its blocks, waits in its old place and computes its tokens again (those
whose blocks are still in the prefix cache are read). Admission leaves RESERVE blocks free for each running request, and at
least watermark x num_blocks, or the newest would be admitted and preempted in turn. A request that is refused for want
of blocks lets nobody overtake it. The first request in order always gets rows, and each was small enough to run alone when it
was added, so each one ends, unless smaller priorities keep arriving.

A request whose next block is just being computed by a running one waits for it: of many that arrive together with
one prefix, one computes it. Such a request does not stop those behind it.

Not here: swapping of preempted blocks, freeing of blocks behind a sliding window, sharing of a block that is partly filled
(copy on write), preemption of a running request because a more urgent one waits, planning a step while another one runs.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from swiftk.decoder.blocks import BlockPool, block_hash, root_hash
from swiftk.decoder.request import Request, State

# Blocks of growth that admission leaves to each running request. 200 requests of 100-400 tokens in and out, 400 blocks of 16,
# no prefix cache: rows computed over rows needed are 1.45, 1.19, 1.10, 1.03 with 0, 1, 2, 4 of them (1.37 with the watermark
# of 1 % alone), steps 1, 1.01, 1.04, 1.10. tests/decoder/test_scheduler.py holds the value here.
RESERVE = 2
_ORDER = attrgetter("order")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """num_blocks counts the dummy: the cache holds (num_blocks - 1) x block_size tokens."""

    num_blocks: int
    block_size: int = 32
    max_num_seqs: int = 64  # requests that run at once
    max_batched_tokens: int = 512  # rows of a step, at least max_num_seqs
    max_model_len: int
    watermark: float = 0.01  # share of the blocks that admission leaves free
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        least = {"num_blocks": 2, "block_size": 1, "max_num_seqs": 1, "max_batched_tokens": self.max_num_seqs}
        for name, low in (least | {"max_model_len": 1}).items():
            if getattr(self, name) < low:
                raise ValueError(f"SchedulerConfig: {name} has {getattr(self, name)}, wants at least {low}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"SchedulerConfig: watermark has {self.watermark}, wants 0 <= watermark < 1")


class Work(NamedTuple):
    """Rows of one request: tokens[start : start + count - num_draft], then draft[:num_draft]. The KV before start is there."""

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    num_draft: int
    samples: bool  # the last row and those of the draft give tokens: the chunk reaches the end of the sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step: single rows (with drafts) first, chunks after them."""

    work: tuple[Work, ...]
    num_rows: int


class Scheduler:
    """Owns the sequences and the pool; see the top of the file. Not thread-safe: one thread calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self.requests: dict[int, Request] = {}  # all that are not finished
        self.waiting: list[Request] = []  # both in order
        self.running: list[Request] = []
        self.weight_version = 0
        self._num_added = 0
        self._watermark = math.ceil(config.watermark * config.num_blocks)
        self._in_flight: dict[bytes, Request] = {}  # names of blocks that a running request has still to compute
        self._planned: Batch | None = None

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished; then plan() gives at least one row."""
        return bool(self.requests)

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts a request in the queue.

        Raises:
            ValueError: the prompt is empty, or prompt + max_tokens can never fit into max_model_len or the cache.
        """
        config = self.config
        if request.id in self.requests:
            raise ValueError(f"request: id has {request.id}, wants one that no unfinished request has")
        if not request.prompt:
            raise ValueError("request: prompt has no tokens, wants at least one")
        total = len(request.prompt) + request.params.max_tokens
        sizes = f"prompt has {len(request.prompt)} tokens and max_tokens {request.params.max_tokens}, together {total}"
        if total > config.max_model_len:
            raise ValueError(f"request: {sizes}, wants at most max_model_len {config.max_model_len}; lower max_tokens")
        room = (config.num_blocks - 1) * config.block_size
        if total > room:
            raise ValueError(
                f"request: {sizes}, wants at most the {room} tokens of the cache ({config.num_blocks - 1} blocks of "
                f"{config.block_size}); give it more blocks or lower max_tokens"
            )
        request.arrival = self._num_added
        self._num_added += 1
        self.requests[request.id] = request
        insort(self.waiting, request, key=_ORDER)

    def finish(self, id: int, reason: str) -> None:
        """Ends a request, waiting or running; between plan and commit too: its rows are then ignored."""
        request = self.requests.pop(id)
        if request.state is State.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.state, request.finish_reason = State.FINISHED, reason

    def abort(self, id: int) -> bool:
        """finish(id, "abort") for a client that has gone; False where the request is unknown or finished already."""
        if id not in self.requests:
            return False
        self.finish(id, "abort")
        return True

    def preempt(self, request: Request) -> None:
        """Takes the blocks of a running request and puts it back in the queue, where its arrival says."""
        self.running.remove(request)
        self._release(request)
        request.state = State.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.draft = []
        insort(self.waiting, request, key=_ORDER)

    def set_weight_version(self, version: int) -> None:
        """The weights have changed: KV of others is forgotten, every running request computes its tokens again."""
        if version == self.weight_version:
            return
        for request in self.running[:]:
            self.preempt(request)
        for request in self.waiting:
            request.hashes.clear()
            request.num_missing_blocks = 0
        self.pool.forget()
        self.weight_version = version

    def _release(self, request: Request) -> None:
        """The one place where a request gives up its blocks, and what it was going to compute."""
        for name in request.hashes[request.num_computed_tokens // self.config.block_size :]:
            if self._in_flight.get(name) is request:
                del self._in_flight[name]
        self.pool.free(request.block_table)
        request.block_table = []  # a new list: who has copied the old one sees that it is another

    # --- a step --------------------------------------------------------------------------------------------------

    def plan(self) -> Batch:
        """The rows of the next forward. A plan that is not committed is void when the next one is made."""
        config, pool, running, waiting = self.config, self.pool, self.running, self.waiting
        singles: list[Request] = []
        chunked: list[Request] = []
        preempted = False
        for request in running[:]:
            num_tokens = len(request.tokens)
            if num_tokens - request.num_computed_tokens == 1 and num_tokens > len(request.block_table) * config.block_size:
                while not pool.num_free and request.state is State.RUNNING:
                    self.preempt(running[-1])  # never one that has been placed: those stand before this request
                    preempted = True
                if request.state is State.RUNNING:
                    request.block_table += pool.allocate(1)
            if request.state is not State.RUNNING:
                break  # preempted by one before it, or by itself as the last: so are all that come after it
            (singles if num_tokens - request.num_computed_tokens == 1 else chunked).append(request)

        budget = config.max_batched_tokens - len(singles)
        chunks: list[Work] = []
        for request in chunked:
            if not budget:
                break
            chunks.append(self._chunk(request, budget))
            budget -= chunks[-1].count
        place = 0
        while budget and not preempted and place < len(waiting) and len(running) < config.max_num_seqs:
            request = waiting[place]
            if request.num_missing_blocks > pool.num_free:
                break  # as when it was refused; spares a full queue the search in each step
            hits = self._match(request)
            if hits is None:
                place += 1
            elif self._admit(request, hits):
                del waiting[place]
                chunks.append(self._chunk(request, budget))
                budget -= chunks[-1].count
            else:
                break

        work = []
        for request in singles:
            num_draft = 0
            if request.draft and budget:
                num_draft = self.reserve(request, min(len(request.draft), budget))
                budget -= num_draft
            work.append(Work(request, request.num_computed_tokens, 1 + num_draft, num_draft, True))
        work += chunks
        self._planned = Batch(tuple(work), config.max_batched_tokens - budget)
        return self._planned

    def commit(self, batch: Batch, tokens: list[list[int]]) -> None:
        """Takes in what the forward of the last plan gave. Requests that were finished or preempted since are passed over.

        Args:
            batch: what plan() returned last; its KV is written.
            tokens: for each work item that samples, 1 to 1 + num_draft new tokens: the draft as far as it was sampled too, then
                one more, or less where a stop token ends it; [] for the others.
        """
        assert batch is self._planned, "commit: this batch is not the last plan"
        self._planned = None
        for work, new in zip(batch.work, tokens, strict=True):
            request = work.request
            if request.state is not State.RUNNING:
                continue
            if work.samples:
                assert 1 <= len(new) <= 1 + work.num_draft, f"commit: {len(new)} tokens for {1 + work.num_draft} rows"
                request.output += new
                request.tokens += new
                request.draft = []
                computed = len(request.tokens) - 1  # rows of rejected drafts are written again
            else:
                assert not new, "commit: tokens for rows that do not sample"
                computed = work.start + work.count
            block = work.start // self.config.block_size
            full = computed // self.config.block_size
            request.num_computed_tokens = computed
            if full > block and self.config.prefix_caching:
                self._name_blocks(request, full)
                for name in request.hashes[block:full]:
                    self.pool.publish(request.block_table[block], name)
                    if self._in_flight.get(name) is request:
                        del self._in_flight[name]
                    block += 1

    def _chunk(self, request: Request, budget: int) -> Work:
        start = request.num_computed_tokens
        count = min(budget, len(request.tokens) - start)
        return Work(request, start, count, 0, start + count == len(request.tokens))

    def reserve(self, request: Request, n: int) -> int:
        """Blocks for n guesses after the tokens of a running request, as far as they are free and above the watermark: a guess
        preempts nobody. How many of the n have room, and can still be of use. A draft model calls it ahead of plan()."""
        size, table = self.config.block_size, request.block_table
        n = min(n, request.params.max_tokens - len(request.output) - 1)  # the last token is never fed
        missing = -(-(len(request.tokens) + n) // size) - len(table)
        if missing > 0:
            table += self.pool.allocate(max(0, min(missing, self.pool.num_free - self._watermark)))
        return max(0, min(n, len(table) * size - len(request.tokens)))

    # --- admission -----------------------------------------------------------------------------------------------

    def _match(self, request: Request) -> list[int] | None:
        """The cached blocks its tokens begin with; None while a running request computes the next one. Holds nothing yet."""
        hits: list[int] = []
        if not self.config.prefix_caching or (request.params.prompt_logprobs is not None and not request.output):
            return hits  # the logprobs of a prompt need all its hidden states
        most = (len(request.tokens) - 1) // self.config.block_size  # the last token is computed, it gives the logits
        self._name_blocks(request, most)
        for name in request.hashes[:most]:
            block = self.pool.find(name)
            if block is None:
                if name in self._in_flight:
                    return None
                break
            hits.append(block)
        return hits

    def _admit(self, request: Request, hits: list[int]) -> bool:
        """Gives a waiting request its blocks and lets it run, or changes nothing and returns False."""
        size, num_tokens = self.config.block_size, len(request.tokens)
        missing = -(-num_tokens // size) - len(hits)
        idle = sum(not self.pool.refs[block] for block in hits)  # free now, not when they are held
        reserve = max(self._watermark, RESERVE * len(self.running)) if self.running else 0  # alone it always fits: `add`
        if missing + idle + reserve > self.pool.num_free:
            request.num_missing_blocks = missing + idle
            return False
        self.pool.touch(hits)  # before new ones are popped, or a hit might be among them
        request.block_table[:] = hits + self.pool.allocate(missing)
        request.state, request.num_missing_blocks = State.RUNNING, 0
        request.num_computed_tokens = len(hits) * size
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
        insort(self.running, request, key=_ORDER)
        if self.config.prefix_caching:
            self._name_blocks(request, num_tokens // size)
            for name in request.hashes[len(hits) :]:
                self._in_flight.setdefault(name, request)
        return True

    def _name_blocks(self, request: Request, n: int) -> None:
        """Names the first n blocks of its tokens, those that have none yet."""
        hashes, size, tokens = request.hashes, self.config.block_size, request.tokens
        while len(hashes) < n:
            parent = hashes[-1] if hashes else root_hash(request.adapter, request.salt, self.weight_version)
            hashes.append(block_hash(parent, tokens[len(hashes) * size : (len(hashes) + 1) * size]))

    def check(self) -> None:
        """Asserts every invariant that can be seen between two calls; for tests."""
        size = self.config.block_size
        self.pool.check([request.block_table for request in self.requests.values()])
        assert sorted(self.running + self.waiting, key=_ORDER) == sorted(self.requests.values(), key=_ORDER)
        assert all(queue == sorted(queue, key=_ORDER) for queue in (self.running, self.waiting)), "a queue out of order"
        assert len(self.running) <= self.config.max_num_seqs
        for request in self.waiting:
            assert request.state is State.WAITING and not request.block_table and request.num_computed_tokens == 0
        for request in self.running:
            table, computed = request.block_table, request.num_computed_tokens
            assert request.state is State.RUNNING and computed < request.num_tokens, "a running request has nothing to compute"
            assert request.tokens == request.prompt + request.output and computed <= len(table) * size
            assert len(table) * size < len(request.prompt) + request.params.max_tokens + size, "more blocks than it can fill"
            name = root_hash(request.adapter, request.salt, self.weight_version)
            for i, block in enumerate(table):
                name = block_hash(name, request.tokens[i * size : (i + 1) * size])
                if (published := self.pool.hashes[block]) is not None:
                    assert (i + 1) * size <= computed, "a block is published before its KV is written"
                    assert published == name, "a block is published under another content's name"
        for name, request in self._in_flight.items():
            assert request.state is State.RUNNING and name in request.hashes[request.num_computed_tokens // size :]

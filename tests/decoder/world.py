"""A toy model whose KV really lies in the blocks that a scheduler gives out, and all checks that can be made between its steps.

The toy's state of position p is a hash of the states of p - 1 and of one earlier position, both read through the block
table, and of token p; the state is what is "stored" there and names the next token. A block that is read before it is
written, written while it is shared, evicted while it is held or matched under a wrong name gives another number.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

from swiftk.decoder import scheduler as scheduling
from swiftk.decoder.request import Request, State
from swiftk.decoder.scheduler import Batch, SchedulerConfig

VOCAB, STOP = 5, 0  # few tokens, so that random prompts share prefixes


def state_of(before: int, earlier: int, token: int) -> int:
    x = (before * 0x9E3779B97F4A7C15 + earlier * 0xBF58476D1CE4E5B9 + token + 1) & (1 << 64) - 1
    x = ((x ^ x >> 29) * 0x94D049BB133111EB) & (1 << 64) - 1
    return x ^ x >> 32


def earlier_of(position: int) -> int:
    return position * 7919 % position if position < 3 else position * 7919 % (position - 1)


class Toy:
    """The oracle: states of a token sequence, computed from the tokens alone, once per (sequence, weights)."""

    def __init__(self) -> None:
        self.known: dict[tuple, list[int]] = {}

    def start(self, request: Request, version: int) -> int:
        """All that the KV depends on, and the salt, which it must not be shared across."""
        return state_of(request.adapter + 100, sum(request.salt.encode()), version)

    def states(self, request: Request, version: int, n: int) -> list[int]:
        states = self.known.setdefault((request.id, version), [])
        start = self.start(request, version)
        for p in range(len(states), n):
            states.append(state_of(states[-1] if p else start, states[earlier_of(p)] if p else 0, request.tokens[p]))
        return states[:n]

    def alone(self, prompt: list[int], params, adapter: int = -1, salt: str = "", version: int = 0) -> list[int]:
        request = Request(-1, prompt, params, adapter, salt)
        self.known.pop((-1, version), None)
        while len(request.output) < params.max_tokens and (params.ignore_eos or STOP not in request.output):
            token = self.states(request, version, request.num_tokens)[-1] % VOCAB
            request.output.append(token)
            request.tokens.append(token)
        return request.output


class World:
    """A scheduler, a cache of toy states, and every check that can be made after each operation."""

    def __init__(self, *, seed: int = 0, **config) -> None:
        self.rng = random.Random(seed)
        self.config = SchedulerConfig(**{"num_blocks": 20, "block_size": 4, "max_model_len": 1 << 20} | config)
        self.scheduler = scheduling.Scheduler(self.config)
        self.kv: list[int | None] = [None] * (self.config.num_blocks * self.config.block_size)
        self.toy, self.contents, self.tables = Toy(), {}, []
        self.finished: dict[int, Request] = {}
        self.rows = self.steps = self.serial = 0
        self.hook = lambda batch: None  # called between plan and commit
        pool = self.scheduler.pool
        allocate, publish = pool.allocate, pool.publish

        def poisoned(n):
            blocks = allocate(n)
            for block in blocks:
                self.kv[block * pool.block_size : (block + 1) * pool.block_size] = [None] * pool.block_size
            return blocks

        def recorded(block, name):
            content = self.kv[block * pool.block_size : (block + 1) * pool.block_size]
            assert None not in content, "published before it is written"
            assert self.contents.setdefault(name, content) == content, "one name, two contents"
            publish(block, name)

        pool.allocate, pool.publish = poisoned, recorded

    def add(self, prompt, max_tokens=4, ignore_eos=True, prompt_logprobs=None, **fields) -> Request:
        params = SimpleNamespace(max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        request = Request(self.serial, list(prompt), params, **fields)
        self.serial += 1
        self.scheduler.add(request)
        return request

    def slot(self, request: Request, position: int) -> int:
        size = self.config.block_size
        return request.block_table[position // size] * size + position % size

    def forward(self, batch: Batch) -> list[list[int]]:
        """Writes and reads the cache as the kernels do; the sampled tokens that agree with the draft, and one more."""
        tokens, version, pool = [], self.scheduler.weight_version, self.scheduler.pool
        for request, start, count, num_draft, samples in batch.work:
            if request.state is not State.RUNNING:
                tokens.append([7] if samples else [])  # blocks are gone: what it gives has no meaning and must be ignored
                continue
            fed = request.tokens[start : start + count - num_draft] + request.draft[:num_draft]
            assert len(fed) == count
            states = []
            for p, token in enumerate(fed, start):
                before = self.kv[self.slot(request, p - 1)] if p else self.toy.start(request, version)
                earlier = self.kv[self.slot(request, earlier_of(p))] if p else 0
                assert before is not None and earlier is not None, "read before it was written"
                block = request.block_table[p // self.config.block_size]
                assert pool.hashes[block] is None and pool.refs[block] == 1, "written while shared"
                states.append(state_of(before, earlier, token))
                self.kv[self.slot(request, p)] = states[-1]
            assert states[: count - num_draft] == self.toy.states(request, version, request.num_tokens)[start : start + count]
            new = []
            if samples:
                for i, state in enumerate(states[count - 1 - num_draft :]):
                    new.append(state % VOCAB)
                    if i == num_draft or request.draft[i] != new[-1] or self.ended(request, new):
                        break
            tokens.append(new)
        return tokens

    def ended(self, request: Request, new: list[int]) -> bool:
        return len(request.output) + len(new) >= request.params.max_tokens or (not request.params.ignore_eos and STOP in new)

    def step(self) -> Batch:
        """One step of an engine, with all that a plan promises checked."""
        scheduler, config = self.scheduler, self.config
        single = [r for r in scheduler.running if r.num_tokens - r.num_computed_tokens == 1]
        before = [(r, r.num_computed_tokens, r.num_preemptions, list(r.output)) for r in scheduler.requests.values()]
        batch = scheduler.plan()
        self.rows, self.steps = self.rows + batch.num_rows, self.steps + 1
        assert bool(batch.work) == scheduler.has_work, "work, and no row for anybody"
        assert batch.num_rows == sum(work.count for work in batch.work) <= config.max_batched_tokens
        assert len({work.request.id for work in batch.work}) == len(batch.work) <= config.max_num_seqs
        for request, start, count, num_draft, samples in batch.work:
            assert request.state is State.RUNNING and start == request.num_computed_tokens
            assert 0 <= num_draft < count and start + count - num_draft <= request.num_tokens, "a row for no token"
            assert samples == (start + count - num_draft == request.num_tokens) and (samples or not num_draft)
            assert start + count <= len(request.block_table) * config.block_size, "a row without a slot"
        planned = {work.request for work in batch.work}
        assert all(r in planned or r.state is State.WAITING for r in single), "a prompt held up a request that decodes"
        for request, computed, preemptions, output in before:  # a plan changes nothing that a forward has to bring
            assert request.output == output
            assert request.num_computed_tokens == computed or request.num_preemptions > preemptions or not computed
        self.check()
        self.hook(batch)
        tokens = self.forward(batch)
        scheduler.commit(batch, tokens)
        for work, new in zip(batch.work, tokens, strict=True):
            request = work.request
            if request.state is State.RUNNING and not request.params.ignore_eos and STOP in new:
                self.finish(request, "stop")
            elif request.state is State.RUNNING and len(request.output) == request.params.max_tokens:
                self.finish(request, "length")
        self.check()
        return batch

    def finish(self, request: Request, reason: str) -> None:
        self.scheduler.finish(request.id, reason)
        self.finished[request.id] = request

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.steps < 100_000

    def check(self) -> None:
        self.scheduler.check()
        pool, size = self.scheduler.pool, self.config.block_size
        for block, name in enumerate(pool.hashes):
            assert name is None or self.kv[block * size : (block + 1) * size] == self.contents[name], "the cache changed"
        for table, copy in self.tables:
            assert table[: len(copy)] == copy, "a table is not append-only"
        self.tables = [(request.block_table, list(request.block_table)) for request in self.scheduler.running]

    def draft(self, request: Request, n: int) -> list[int]:
        """n guesses of which most are right."""
        known = self.toy.alone(request.tokens, SimpleNamespace(max_tokens=n, ignore_eos=True), request.adapter, request.salt,
                               self.scheduler.weight_version)  # fmt: skip
        return [token if self.rng.random() < 0.8 else self.rng.randrange(VOCAB) for token in known]

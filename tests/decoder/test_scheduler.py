"""The scheduler in the world of world.py: whatever the schedule, tokens are those of a run alone."""

from __future__ import annotations

import inspect
import random
from types import SimpleNamespace

import pytest

from swiftk.decoder import blocks as pooling
from swiftk.decoder import scheduler as scheduling
from swiftk.decoder.request import Request, State
from swiftk.decoder.scheduler import RESERVE, Batch, SchedulerConfig
from tests.decoder.world import VOCAB, World

# --- the contract: any schedule, the same tokens -----------------------------------------------------------------


def random_operations(seed: int, operations: int) -> None:
    rng = random.Random(seed)
    max_num_seqs = rng.randint(1, 8)
    world = World(
        seed=seed, num_blocks=rng.randint(2, 40), block_size=rng.randint(1, 6), max_num_seqs=max_num_seqs,
        max_batched_tokens=max_num_seqs + rng.choice((0, 1, 3, 10, 50)), max_model_len=rng.choice((12, 40, 1000)),
        watermark=rng.choice((0.0, 0.01, 0.2)), prefix_caching=rng.random() < 0.8,
    )  # fmt: skip
    scheduler, config = world.scheduler, world.config
    room = min((config.num_blocks - 1) * config.block_size, config.max_model_len)
    speculates, changes, steady = rng.random() < 0.6, rng.random() < 0.3, set()
    prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randint(0, room))] for _ in range(3)]

    def disturb(batch: Batch | None) -> None:
        live = list(scheduler.requests.values())
        action = rng.random()
        if live and action < 0.3:
            request = rng.choice(live)
            assert scheduler.abort(request.id) and not scheduler.abort(request.id)
            assert request.state is State.FINISHED and request.finish_reason == "abort" and not request.block_table
        elif scheduler.running and action < 0.8:
            scheduler.preempt(rng.choice(scheduler.running))
        elif changes:
            scheduler.set_weight_version(scheduler.weight_version + 1)
            steady.clear()
        world.check()

    world.hook = lambda batch: disturb(batch) if rng.random() < 0.1 else None
    for _ in range(operations):
        action = rng.random()
        if action < 0.3 and len(scheduler.requests) < 30:
            prompt = rng.choice(prefixes)[: rng.randint(0, room)] + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 5))]
            max_tokens = rng.randint(1, 12)
            fits = prompt and len(prompt) + max_tokens <= room
            fields = {"adapter": rng.choice((-1, -1, 0)), "salt": rng.choice(("", "b")), "priority": rng.choice((0, 0, -1, 2))}
            try:
                request = world.add(prompt, max_tokens, rng.random() < 0.7, rng.choice((None, None, None, 1)), **fields)
                assert fits
                steady.add(request.id)
            except ValueError:
                assert not fits
        elif action < 0.35:
            disturb(None)
        else:
            for request in scheduler.running:
                if speculates and rng.random() < 0.7 and request.num_computed_tokens == request.num_tokens - 1:
                    n = rng.randint(1, 6)
                    request.draft = world.draft(request, scheduler.reserve(request, n) if rng.random() < 0.5 else n)
            world.step()
        world.check()
    world.hook = lambda batch: None
    world.run()
    assert scheduler.pool.num_free == config.num_blocks - 1, "blocks are left behind when nobody is there"
    for request in world.finished.values():
        assert request.num_computed_tokens == request.num_tokens - 1
        if request.id in steady and request.finish_reason != "abort":  # the weights have been the same all along
            assert request.output == world.toy.alone(
                request.prompt, request.params, request.adapter, request.salt, scheduler.weight_version
            )


@pytest.mark.parametrize("seed", range(20))
def test_random_operations(seed):
    random_operations(seed, 100)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 200))
def test_random_operations_long(seed):
    random_operations(seed, 1000)


# --- queues, blocks, order ---------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_at_once():
    world = World(num_blocks=5, max_model_len=100)
    with pytest.raises(ValueError, match=r"prompt has 13 tokens and max_tokens 4, together 17, wants at most the 16 tokens"):
        world.add([1] * 13)
    with pytest.raises(ValueError, match=r"prompt has 97 tokens and max_tokens 4, together 101, wants at most max_model_len"):
        world.add([1] * 97)
    with pytest.raises(ValueError, match="prompt has no tokens"):
        world.add([])
    request = world.add([1] * 12)
    world.serial -= 1
    with pytest.raises(ValueError, match="id has"):
        world.add([1])
    world.run()
    assert world.finished[request.id].output == world.toy.alone([1] * 12, request.params)
    wrong = {"num_blocks": 1, "block_size": 0, "max_batched_tokens": 63, "watermark": 1.0, "max_model_len": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"SchedulerConfig: {name} has {value}, wants"):
            World(**{name: value})


def test_an_exhausted_cache_preempts_the_newest_and_all_end():
    world = World(num_blocks=9, watermark=0.0)
    requests = [world.add([i] * 4, max_tokens=20) for i in range(3)]
    world.run()
    assert [request.num_preemptions > 0 for request in requests] == [False, True, True]
    assert [request.output for request in requests] == [world.toy.alone(r.prompt, r.params) for r in requests]
    assert list(world.finished) == [0, 1, 2]


def test_one_request_may_fill_the_cache():
    world = World(num_blocks=9, watermark=0.5)
    request = world.add([1] * 28, max_tokens=4)
    world.step()
    assert world.scheduler.pool.num_free == 1 and request.output
    world.run()
    assert world.steps == 4


def test_a_long_prompt_stops_nobody():
    """One that decodes gets a token in every step while 200 tokens of another are computed in chunks of what is left."""
    world = World(num_blocks=100, max_num_seqs=8, max_batched_tokens=8)
    short = [world.add([i], max_tokens=40) for i in range(4)]
    world.step()
    long = world.add([4] * 200)
    while not long.output:
        sizes = [len(request.output) for request in short]
        world.step()
        assert [len(request.output) for request in short] == [size + 1 for size in sizes if size < 40] or sizes == [40] * 4
    assert 200 / 8 < world.steps <= 1 + -(-200 // 4)
    world.run()


def test_a_large_request_is_not_overtaken_for_ever():
    """Small ones keep coming and would always fit; the large one in front of them gets its turn."""
    world = World(num_blocks=12, prefix_caching=False)
    small = [world.add([i % 5] * 4, max_tokens=6) for i in range(3)]
    world.step()
    large = world.add([1] * 36)
    while not large.output:
        small.append(world.add([len(small) % 5] * 4, max_tokens=6))
        world.step()
    assert world.steps < 10 and not any(request.output for request in small[3:])
    world.run()


def test_priorities():
    """Smaller first, equal ones by arrival; the last in order is preempted, whenever it came."""
    world = World(num_blocks=100, max_num_seqs=1)
    requests = [world.add([1, 2], max_tokens=2, priority=priority) for priority in (0, 1, -1, 0, 1, -1)]
    world.run()
    assert list(world.finished) == [2, 5, 0, 3, 1, 4]

    world = World(num_blocks=8, watermark=0.0)
    requests = [world.add([i] * 4, max_tokens=16, priority=priority) for i, priority in enumerate((1, 0))]
    world.run()
    assert [request.num_preemptions > 0 for request in requests] == [True, False]


def test_admission_leaves_room_to_grow():
    world = World(num_blocks=21, watermark=0.0)
    first, second = world.add([1] * 4, max_tokens=30), world.add([2] * 4 * (19 - RESERVE), max_tokens=4)
    world.step()
    assert first.output and second.output and world.scheduler.pool.num_free == RESERVE
    world = World(num_blocks=21, watermark=0.25)  # 6 blocks of 21
    first, second = world.add([1] * 4, max_tokens=30), world.add([2] * 4 * 14, max_tokens=4)
    world.step()
    assert first.output and second.state is State.WAITING


def test_little_is_computed_twice_when_the_cache_is_short():
    """The workload that chose RESERVE, beside the rows that each request needs once."""
    config = SchedulerConfig(num_blocks=400, block_size=16, max_model_len=1000, prefix_caching=False)
    rng, scheduler, needed, rows = random.Random(0), scheduling.Scheduler(config), 0, 0
    for i in range(200):
        prompt, max_tokens = [1] * rng.randint(100, 400), rng.randint(100, 400)
        scheduler.add(Request(i, prompt, SimpleNamespace(max_tokens=max_tokens, prompt_logprobs=None)))
        needed += len(prompt) + max_tokens - 1
    while scheduler.has_work:
        batch = scheduler.plan()
        rows += batch.num_rows
        scheduler.commit(batch, [[1] if work.samples else [] for work in batch.work])
        for request in {work.request for work in batch.work if len(work.request.output) == work.request.params.max_tokens}:
            scheduler.finish(request.id, "length")
    assert needed < rows < 1.15 * needed


@pytest.mark.parametrize("when", ["waiting", "chunked", "decoding", "preempted", "awaiting", "planned", "finished"])
def test_abort_in_every_state(when):
    world = World(num_blocks=60, max_num_seqs=4, max_batched_tokens=100 if when == "awaiting" else 8)
    scheduler, other = world.scheduler, world.add([1, 2], max_tokens=30)
    if when != "waiting":
        world.step()
    if when == "awaiting":
        world.add([3] * 60, max_tokens=2)
    request = world.add([3] * 60, max_tokens=2)
    if when == "chunked":
        world.step()
        assert 0 < request.num_computed_tokens < 60
    elif when in ("decoding", "preempted"):
        while not request.output:
            world.step()
        if when == "preempted":
            scheduler.preempt(request)
    elif when == "awaiting":
        assert world.step().num_rows == 61 and not request.block_table
    elif when == "finished":
        while request.state is not State.FINISHED:
            world.step()
    if when == "planned":
        world.hook = lambda batch: scheduler.abort(request.id) and world.check()
        world.step()
    else:
        assert scheduler.abort(request.id) == (when != "finished")
    assert request.state is State.FINISHED and not request.block_table and not scheduler.abort(request.id)
    assert request.finish_reason == ("length" if when == "finished" else "abort")
    world.check()
    world.run()
    assert other.output == world.toy.alone(other.prompt, other.params) and scheduler.pool.num_free == 59


def test_a_plan_that_was_not_committed_is_void():
    """A forward that raised: the next plan is the same again."""
    world = World(num_blocks=30, max_num_seqs=2, max_batched_tokens=7)
    world.add([1] * 10)
    lost = world.scheduler.plan()
    again = world.scheduler.plan()
    assert lost == again
    with pytest.raises(AssertionError, match="not the last plan"):
        world.scheduler.commit(lost, [[]])
    world.run()


# --- prefix cache ------------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once():
    """32 requests at once, 40 common tokens: one computes them, the others wait for it and read."""
    world = World(num_blocks=300, max_num_seqs=32, max_batched_tokens=32)
    requests = [world.add([1, 2, 3, 4] * 10 + [0, i // 5, i % 5, 2, 1], max_tokens=3) for i in range(31)]
    other = world.add([2] * 5, max_tokens=3)
    world.step()
    assert len(world.scheduler.running) == 1
    world.step()
    assert other.output, "who does not wait is not held up by those that do"
    world.run()
    assert world.rows == 40 + 31 * (5 + 2) + 5 + 2
    assert [request.num_cached_tokens for request in requests] == [0] + [40] * 30
    assert all(request.output == world.toy.alone(request.prompt, request.params) for request in requests)


def test_siblings_share_their_prompt():
    """n = 4 of one prompt: only the last, partly filled block is computed by each."""
    world = World(num_blocks=60)
    siblings = [world.add([3] * 18, max_tokens=3) for _ in range(4)]
    world.run()
    assert [request.num_cached_tokens for request in siblings] == [0, 16, 16, 16]
    assert world.rows == 18 + 3 * 2 + 4 * 2


@pytest.mark.parametrize("how, rows", [("go on", 31 + 6), ("abort", 62 + 3), ("preempt", 62 + 6), ("weights", 62 + 6)])
def test_who_waits_for_a_prefix_is_not_left_behind(how, rows):
    """The one that computes it goes, between the plan and the commit: another one computes it."""
    world = World(num_blocks=60)
    owner, *others = (world.add([1] * 30 + [i], max_tokens=3) for i in range(3))

    def disturb(batch):
        assert [work.request for work in batch.work] == [owner] and len(world.scheduler._in_flight) == 7
        if how == "abort":
            world.scheduler.abort(owner.id)
        elif how == "preempt":
            world.scheduler.preempt(owner)
        elif how == "weights":
            world.scheduler.set_weight_version(1)
        assert how == "go on" or not world.scheduler._in_flight
        world.hook = lambda batch: None

    world.hook = disturb
    world.run()
    assert len(world.finished) == 3 - (how == "abort") and not world.scheduler._in_flight
    assert world.rows == rows + 2 * len(world.finished)
    version = world.scheduler.weight_version
    assert all(request.output == world.toy.alone(request.prompt, request.params, version=version) for request in others)


def test_a_fully_cached_prompt_computes_its_last_token():
    world = World(num_blocks=40)
    first = world.add([1] * 16, max_tokens=1)
    world.run()
    for length, cached in ((16, 12), (17, 16), (4, 0), (5, 4)):
        request = world.add([1] * length, max_tokens=1)
        world.run()
        assert request.num_cached_tokens == cached and request.output
    assert first.num_cached_tokens == 0


def test_prompt_logprobs_need_every_row():
    """They read no cached block, but publish; after a preemption, when all has been seen, they do read."""
    world = World(num_blocks=40)
    for _ in range(2):
        request = world.add([1] * 16, max_tokens=6, prompt_logprobs=1)
        batch = world.step()
        assert request.num_cached_tokens == 0 and batch.work[-1].count == 16
    world.scheduler.preempt(request)
    world.step()
    assert request.num_computed_tokens == 17 and world.rows == 16 + (1 + 16) + (1 + 1)
    world.run()
    reader = world.add([1] * 17)
    world.run()
    assert reader.num_cached_tokens == 16


@pytest.mark.parametrize("field, value", [("adapter", 0), ("salt", "s"), (None, None)])
def test_who_may_share(field, value):
    world = World(num_blocks=40)
    world.add([1] * 17, max_tokens=1)
    world.run()
    request = world.add([1] * 17, max_tokens=1, **({field: value} if field else {}))
    world.run()
    assert request.num_cached_tokens == (0 if field else 16)


def test_new_weights_forget_the_cache():
    world = World(num_blocks=40)
    done = world.add([1] * 17, max_tokens=1)
    world.run()
    running = world.add([1] * 17, max_tokens=5)
    world.step()
    assert running.num_cached_tokens == 16 and world.scheduler.pool.num_cached
    world.scheduler.set_weight_version(0)
    assert running.state is State.RUNNING, "the same weights: nothing happens"
    world.scheduler.set_weight_version(1)
    assert running.state is State.WAITING and not world.scheduler.pool.num_cached and len(running.output) == 1
    world.run()
    again = world.add([1] * 17, max_tokens=1)
    world.run()
    assert again.num_cached_tokens == 16 and done.output == world.toy.alone([1] * 17, done.params)
    assert again.output == world.toy.alone([1] * 17, done.params, version=1)


def test_a_refused_match_leaves_no_trace():
    world = World(num_blocks=12, watermark=0.0)
    world.add([1] * 12, max_tokens=1)
    world.run()  # blocks 1 to 3 are cached and idle
    world.add([2] * 13, max_tokens=8)
    world.step()
    pool = world.scheduler.pool
    waiting = world.add([1] * 28, max_tokens=4)  # 3 cached blocks and 4 new ones, of 7 that are free, and 2 in reserve
    before = list(pool._free), list(pool.refs), list(pool.hashes)
    world.step()
    assert waiting.state is State.WAITING and before == (list(pool._free), pool.refs, pool.hashes)
    world.run()
    assert waiting.num_cached_tokens >= 4


def test_hits_are_held_before_new_blocks_are_popped():
    """The only free blocks are the hits and as many as are missing."""
    world = World(num_blocks=8)
    world.add([1] * 12, max_tokens=1)
    world.run()
    request = world.add([1] * 24, max_tokens=4)
    world.step()
    assert request.num_cached_tokens == 12
    world.run()


def test_without_a_prefix_cache_nothing_is_shared():
    world = World(num_blocks=60, prefix_caching=False)
    for _ in range(3):
        world.add([1] * 16, max_tokens=2)
    world.run()
    assert world.rows == 3 * 17 and not world.scheduler.pool.num_cached


# --- drafts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 2, 4])
def test_drafts(right):
    """4 guesses of which the first `right` hold give right + 1 tokens; slots of the others are written again."""
    world = World(num_blocks=20, block_size=2)
    request = world.add([1] * 5, max_tokens=20)
    world.step()
    known = world.toy.alone(request.tokens, SimpleNamespace(max_tokens=4, ignore_eos=True))
    request.draft = [token if i < right else (token + 1) % VOCAB for i, token in enumerate(known)]
    (work,) = world.step().work
    assert (work.start, work.count, work.num_draft, work.samples) == (5, 5, 4, True)
    assert len(request.output) == 2 + right and request.num_computed_tokens == 6 + right and not request.draft
    assert len(request.block_table) == 5  # 10 slots for positions 5 to 9, and they stay
    world.run()
    assert request.output == world.toy.alone(request.prompt, request.params)


def test_room_for_guesses_ahead_of_a_plan():
    """As many as have slots or get them: what max_tokens leaves, what is free above the watermark, at least none."""
    world = World(num_blocks=5, block_size=4, watermark=0.2)  # 4 blocks, 1 of them kept
    request = world.add([1] * 4, max_tokens=12)
    world.step()
    assert request.num_tokens == 5 and world.scheduler.pool.num_free == 3 and len(request.block_table) == 1
    assert world.scheduler.reserve(request, 2) == 2 and len(request.block_table) == 2
    assert world.scheduler.reserve(request, 2) == 2 and len(request.block_table) == 2
    assert world.scheduler.reserve(request, 99) == 7 and len(request.block_table) == 3
    world.run()

    world = World(num_blocks=5, block_size=4, watermark=0.0)
    first, second = world.add([1] * 4, max_tokens=4), world.add([2] * 4, max_tokens=10)
    world.step()
    if not second.output:
        world.step()
    assert world.scheduler.reserve(first, 99) == 2, "max_tokens 4: the third guess would be the last token, which nobody feeds"
    world.run()

    world = World(num_blocks=3, block_size=4, watermark=0.5)
    request = world.add([1] * 4, max_tokens=4)
    world.step()
    assert world.scheduler.reserve(request, 2) == 0, "not even the next token has a slot yet"
    world.run()


def test_drafts_take_only_what_is_left():
    """Of max_tokens, of the rows of a step, of the blocks above the watermark; never those of another request."""
    world = World(num_blocks=20)
    request = world.add([1] * 4, max_tokens=4)
    world.step()
    request.draft = [1] * 9
    assert world.scheduler.plan().work[0].num_draft == 2
    world.scheduler.abort(request.id)

    world = World(num_blocks=20, max_num_seqs=2, max_batched_tokens=6)
    request = world.add([1] * 4, max_tokens=20)
    world.step()
    prompt = world.add([2] * 9)
    request.draft = [1] * 9
    assert [(w.count, w.num_draft) for w in world.step().work] == [(1, 0), (5, 0)]
    request.draft = [1] * 9
    assert [(w.count, w.num_draft) for w in world.scheduler.plan().work] == [(2, 1), (4, 0)]
    world.run()
    assert prompt.output == world.toy.alone(prompt.prompt, prompt.params)

    world = World(num_blocks=9, watermark=0.1)  # one block
    requests = [world.add([i] * 8, max_tokens=12) for i in range(2)]
    world.step()
    for request in requests:
        request.draft = [1] * 9
    batch = world.step()
    assert world.scheduler.pool.num_free == 1 and [work.num_draft for work in batch.work] == [7, 3]
    world.run()
    assert all(request.output == world.toy.alone(request.prompt, request.params) for request in requests)


# --- the checks see what they are there for ----------------------------------------------------------------------

BROKEN = {
    "nothing": (scheduling, "full = computed //", "full = computed //"),
    "1 a leak": (pooling, "self.refs[block] -= 1", "self.refs[block] -= self.refs[block] == 1"),
    "2 held and free": (pooling, "                del self._free[block]", "                pass"),
    "3 tables shrink": (scheduling, "request.output += new", "request.output += new; request.block_table[-1:] = []"),
    "4 partly full blocks are published": (scheduling, "full = computed //", "full = -1 + len(request.tokens) //"),
    "5 hits are popped": (scheduling, "self.pool.touch(hits)", "self.pool.touch([])"),
    "6 blocks are kept": (scheduling, "self._release(request)\n        else", "pass\n        else"),
    "7 the dummy is used": (pooling, "range(1, num_blocks)", "range(num_blocks)"),
    "8 nothing is left to compute": (scheduling, "(len(request.tokens) - 1) // self", "len(request.tokens) // self"),
    "9 the match is not counted": (scheduling, "num_computed_tokens = len(hits) * size", "num_computed_tokens = 0"),
    "10 published too early": (scheduling, "full = computed //", "full = len(request.tokens) //"),
    "11 a refused match is held": (scheduling, "request.num_missing_blocks = missing + idle", "self.pool.touch(hits)"),
    "no chain": (pooling, "sha256(parent + array", "sha256(array"),
    "no key": (pooling, "repr((adapter, salt, weight_version))", "repr(0)"),
    "old names for new weights": (scheduling, "request.hashes.clear()", "pass"),
    "waits for one that has gone": (scheduling, "request.hashes[request.num_computed_tokens // self", "()[self"),
    "rejected drafts count": (scheduling, "computed = len(request.tokens) - 1", "computed = work.start + work.count"),
    "drafts past the table": (scheduling, "min(n, len(table) * size - len(request.tokens))", "n"),
    "drafts past the end": (scheduling, "n = min(n, request.params.max_tokens", "n = min(n, 9 + request.params.max_tokens"),
    "more rows than a step has": (scheduling, "min(budget, len(request.tokens) - start)", "len(request.tokens) - start"),
    "preempted and planned": (scheduling, "break  # preempted", "pass  # preempted"),
    "rows of the preempted": (scheduling, "continue\n            if work.samples", "pass\n            if work.samples"),
}  # fmt: skip


def operations_of_many_seeds() -> None:
    for seed in range(40):
        random_operations(seed, 60)


@pytest.mark.parametrize("name", BROKEN)
def test_each_invariant_broken_is_seen(name, monkeypatch):
    """One wrong line in the code, and random operations fail: by a check, or where the wrong state crashes."""
    module, right, wrong = BROKEN[name]
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"the code has changed, this is not in it once: {right}"
    code = {"__name__": module.__name__}
    exec(compile(source.replace(right, wrong), name, "exec"), code)
    for attribute in ("Scheduler",) if module is scheduling else ("BlockPool", "block_hash", "root_hash"):
        monkeypatch.setattr(scheduling, attribute, code[attribute])
    if name == "nothing":
        return operations_of_many_seeds()
    with pytest.raises((AssertionError, KeyError, IndexError)):
        operations_of_many_seeds()

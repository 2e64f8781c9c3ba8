"""The pool alone: order of eviction, names, counts. Sequences are tests/decoder/test_scheduler.py's."""

from __future__ import annotations

import random

import pytest

from swiftk.decoder.blocks import DUMMY_BLOCK, BlockPool, block_hash, root_hash


def publish(pool: BlockPool, blocks: list[int], label: str) -> list[bytes]:
    names = [f"{label}{i}".encode() for i in range(len(blocks))]
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    return names


def test_the_dummy_is_never_given_out():
    pool = BlockPool(5, 4)
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert sorted(blocks) == [1, 2, 3, 4] and pool.num_free == 0
    pool.check([blocks])
    for bad in (lambda: pool.allocate(1), lambda: pool.free([DUMMY_BLOCK])):
        with pytest.raises(AssertionError):
            bad()
    pool.free(blocks)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.free(blocks)
    pool.check([])


def test_names_are_a_chain():
    """Equal only where everything before is: tokens in order, adapter, salt, weight version."""
    roots = [root_hash(*key) for key in ((-1, "", 0), (0, "", 0), (-1, "a", 0), (-1, "", 1), (1, "', 1", 0), (1, "", 10))]
    names = {block_hash(parent, tokens) for parent in roots for tokens in ([1, 2], [2, 1], [1, 2, 0], [258], [])}
    assert len(names) == 30 and names.isdisjoint(roots)
    assert block_hash(block_hash(roots[0], [1]), [2]) not in names
    assert block_hash(roots[0], [1, 2]) == block_hash(root_hash(-1, "", 0), (1, 2))
    root_hash(0, "\ud800\0", 0)  # a salt that is no UTF-8


def test_least_recently_used_is_evicted_first_and_a_tail_before_its_head():
    pool = BlockPool(8, 4)
    a, b = pool.allocate(3), pool.allocate(3)
    a_names, b_names = publish(pool, a, "a"), publish(pool, b, "b")
    pool.free(a)
    pool.free(b)
    (plain,) = pool.allocate(1)  # the one that was never used
    pool.free([plain])
    assert pool.allocate(1) == [plain], "a block without a name goes before cached ones, though it was freed last"
    pool.touch([pool.find(a_names[0])])  # used again: the newest now
    pool.free([a[0]])
    assert [pool.allocate(1)[0] for _ in range(6)] == [a[2], a[1], b[2], b[1], b[0], a[0]]
    assert pool.num_cached == 0 and all(pool.find(name) is None for name in a_names + b_names)
    pool.check([a, b, [plain]])


def test_a_held_block_outlives_its_first_holder():
    pool = BlockPool(4, 4)
    first = pool.allocate(2)
    names = publish(pool, first, "x")
    pool.touch(first)
    pool.check([first, first])
    pool.free(first)
    assert pool.num_free == 1 and [pool.find(name) for name in names] == first
    pool.check([first])
    pool.free(first)
    assert pool.num_free == 3 and [pool.find(name) for name in names] == first


def test_a_name_belongs_to_one_block():
    pool = BlockPool(4, 4)
    a, b = pool.allocate(2)
    pool.publish(a, b"n")
    pool.publish(b, b"n")
    assert pool.find(b"n") == a and pool.num_cached == 1
    pool.free([b])
    assert pool.find(b"n") == a
    with pytest.raises(AssertionError, match="publish"):
        pool.publish(b, b"m")  # free
    with pytest.raises(AssertionError, match="publish"):
        pool.publish(a, b"m")  # has a name
    pool.check([[a]])


def test_forget():
    pool = BlockPool(4, 4)
    held, idle = pool.allocate(1), pool.allocate(1)
    names = publish(pool, held + idle, "x")
    pool.free(idle)
    pool.forget()
    assert [pool.find(name) for name in names] == [None, None] and pool.num_free == 2
    pool.check([held])
    pool.publish(held[0], names[1])
    assert pool.find(names[1]) == held[0]


def test_random_operations():
    rng = random.Random(0)
    pool, tables, serial = BlockPool(12, 4), [], 0
    for _ in range(2000):
        action = rng.choice(("allocate", "free", "touch", "publish", "forget" if rng.random() < 0.1 else "free"))
        table = rng.choice(tables) if tables else []
        if action == "allocate":
            tables.append(pool.allocate(rng.randint(0, min(4, pool.num_free))))
        elif action == "free" and tables:
            pool.free(table)
            tables.remove(table)
        elif action == "touch":
            idle = [block for name in list(pool._cached) if (block := pool.find(name)) not in table]
            hits = rng.sample(idle, rng.randint(0, len(idle)))
            pool.touch(hits)
            tables.append(hits)
        elif action == "publish":
            for block in table:
                if pool.hashes[block] is None:
                    pool.publish(block, f"{serial}".encode())
                    serial += rng.random() < 0.9
        elif action == "forget":
            pool.forget()
        pool.check(tables)


@pytest.mark.parametrize("broken", ["leak", "twice", "queue", "dummy", "name", "cache"])
def test_check_sees(broken):
    """Each fault is one that `check` is there for."""
    pool = BlockPool(6, 4)
    table = pool.allocate(3)
    publish(pool, table[:2], "x")
    pool.check([table])
    tables = [table]
    if broken == "leak":
        tables = []
    elif broken == "twice":
        tables = [table, table[:1]]
    elif broken == "queue":
        pool._free[table[0]] = None
    elif broken == "dummy":
        tables = [[*table, DUMMY_BLOCK]]
    elif broken == "name":
        pool.hashes[table[2]] = b"y"
    elif broken == "cache":
        del pool._cached[b"x0"]
    with pytest.raises(AssertionError):
        pool.check(tables)

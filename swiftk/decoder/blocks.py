"""Blocks of the paged cache: how many sequences hold each one, and which of them hold a prefix that can be read again.

A block is the KV of block_size consecutive tokens of a sequence, in every layer. Here it is a number; the tensors are the
engine's. A block that nobody holds stays in the free queue with its contents, and if it is *published* (its content has a
name, the hash below) a later sequence with the same prefix takes it from there. The queue is least recently used first, so
a name is lost only when its block is the oldest that is free; blocks without a name are used before any that has one.

The name of a full block is h(block) = SHA-256(h(block before), tokens), and before the first block stands the hash of what
else the KV depends on or must not be shared across: adapter, salt, weight version. Equal names mean equal prefixes; Python's
own hash would let a client choose prompts that collide and read another's cache (vLLM's CVE-2025-25183).

Not here: copies of blocks that are partly filled (a shared prefix ends at a block's end), swapping to other memory,
freeing the blocks that a sliding window has left behind.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

DUMMY_BLOCK = 0  # padding of block tables and slots points here; never allocated, what is in it is never read


def root_hash(adapter: int, salt: str, weight_version: int) -> bytes:
    """What stands before the first block: the name of an empty prefix."""
    return hashlib.sha256(repr((adapter, salt, weight_version)).encode()).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block of tokens that follows the block named parent."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """num_blocks blocks of block_size tokens, block 0 the dummy, so num_blocks - 1 to give out."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.refs = [0] * num_blocks  # sequences whose table has the block
        self.refs[DUMMY_BLOCK] = 1
        self.hashes: list[bytes | None] = [None] * num_blocks  # the name it is published under
        self._cached: dict[bytes, int] = {}  # the other way round
        self._free = OrderedDict.fromkeys(range(1, num_blocks))  # a dict's first key is O(deleted) to find, this one's O(1)

    @property
    def num_free(self) -> int:
        """Blocks that allocate can give: those that nobody holds, whether they are cached or not."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Published blocks, held or not."""
        return len(self._cached)

    def allocate(self, n: int) -> list[int]:
        """n blocks for a new holder, contents undefined; the names of cached ones among them are forgotten."""
        assert 0 <= n <= len(self._free), f"allocate: {n} blocks wanted, {len(self._free)} are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in blocks:
            self.refs[block] = 1
            if (name := self.hashes[block]) is not None:
                del self._cached[name]
                self.hashes[block] = None
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """One more holder for each: blocks that `find` has given, before anything is allocated."""
        for block in blocks:
            if not self.refs[block]:
                del self._free[block]
            self.refs[block] += 1

    def free(self, table: Sequence[int]) -> None:
        """One holder less for each block of a sequence's table. Tail first: the end of a prefix is evicted before its start."""
        for block in reversed(table):
            assert block != DUMMY_BLOCK and self.refs[block] > 0, f"free: nobody holds block {block}"
            self.refs[block] -= 1
            if not self.refs[block]:
                self._free[block] = None
                if self.hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, name: bytes) -> None:
        """From now on `find(name)` gives block: full, its KV written. A name that another block already has stays there."""
        assert self.refs[block] > 0 and self.hashes[block] is None, f"publish: block {block} is free or has a name"
        if name not in self._cached:
            self._cached[name] = block
            self.hashes[block] = name

    def find(self, name: bytes) -> int | None:
        """The block with that name, without holding it."""
        return self._cached.get(name)

    def forget(self) -> None:
        """Unpublishes every block; who holds them does not change."""
        for block in self._cached.values():
            self.hashes[block] = None
        self._cached.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts the invariants of the pool for the block tables of all sequences there are; for tests."""
        held = Counter(block for table in tables for block in table)
        assert DUMMY_BLOCK not in held and self.hashes[DUMMY_BLOCK] is None, "the dummy is used"
        held[DUMMY_BLOCK] = 1
        assert self.refs == [held[block] for block in range(self.num_blocks)], "holders counted wrong: leaked or freed twice"
        assert set(self._free) == {block for block, refs in enumerate(self.refs) if not refs}, "free queue != not held"
        idle = sum(not self.refs[block] for block in self._cached.values())
        plain = sum(self.hashes[block] is None for block in self._free)
        assert plain + idle + sum(refs > 0 for refs in self.refs) == self.num_blocks, "free + cached idle + held != all"
        names = {name: block for block, name in enumerate(self.hashes) if name is not None}
        assert self._cached == names, "the two directions of the cache differ"

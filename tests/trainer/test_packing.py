"""Packing, the order of training, and batches: properties against brute force, resume, and every layout's share."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftk.trainer.data import Dataset
from swiftk.trainer.packing import IGNORE_INDEX, BatchPlan, collate, pack_lengths
from swiftk.trainer.shuffle import shuffle_keys
from swiftk.trainer.template import Encoded


def plan_of(lengths, packing_length=None, micro=1, batch=4, seed=0, rank=0, size=1):
    return BatchPlan(
        lengths, packing_length=packing_length, micro_batch_size=micro, global_batch_size=batch, seed=seed, dp_rank=rank,
        dp_size=size,
    )  # fmt: skip


def best_fit_rooms(lengths, capacity):
    """The rule by search over all packs, quadratic: the free room of each pack at the end."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


def fewest_packs(lengths, capacity):
    """By trying every assignment."""
    for packs in range(1, len(lengths) + 1):
        for places in product(range(packs), repeat=len(lengths)):
            if all(sum(n for n, p in zip(lengths, places, strict=True) if p == k) <= capacity for k in range(packs)):
                return packs
    raise AssertionError


@given(st.lists(st.integers(1, 20), min_size=1, max_size=120), st.integers(20, 40))
def test_packing_is_best_fit_decreasing(lengths, capacity):
    ordered = np.sort(lengths)[::-1]
    packs = pack_lengths(ordered, capacity)
    used = np.bincount(packs, weights=ordered)
    assert used.max() <= capacity and used.min() > 0
    assert sorted(capacity - used) == best_fit_rooms(lengths, capacity)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=6))
def test_packing_stays_within_its_bound(lengths):
    packs = pack_lengths(np.sort(lengths)[::-1], 10).max() + 1
    assert packs <= 11 / 9 * fewest_packs(lengths, 10) + 4


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60), st.sampled_from([None, 50, 64]), st.integers(1, 3),
    st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 5),
)  # fmt: skip
def test_each_epoch_is_each_row_once_in_every_layout(lengths, packing_length, micro, batch, seed, dp_size):
    alone = plan_of(lengths, packing_length, 1, batch, seed)
    ranks = [plan_of(lengths, packing_length, micro, batch, seed, rank, dp_size) for rank in range(dp_size)]
    steps = alone.steps_per_epoch()
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert alone.epoch_of(step) == (epoch, step - epoch * steps)
            whole = [pack for micro_batch in alone.step(step) for pack in micro_batch]
            parts = [pack for plan in ranks for micro_batch in plan.step(step) for pack in micro_batch]
            assert sorted(parts) == sorted(whole)
            assert len(whole) == batch or step == (epoch + 1) * steps - 1
            assert all(len(micro_batch) <= micro for plan in ranks for micro_batch in plan.step(step))
            counts = [sum(map(len, plan.step(step))) for plan in ranks]
            assert max(counts) - min(counts) <= 1
            seen += whole
        rows = sorted(row for pack in seen for row in pack)
        assert rows == list(range(len(lengths)))
        if packing_length:
            assert all(sum(lengths[row] for row in pack) <= packing_length for pack in seen)
        else:
            assert all(len(pack) == 1 for pack in seen)


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    first, again = plan_of(lengths, 128, seed=3), plan_of(lengths, 128, seed=3)
    np.random.seed(1)
    torch.manual_seed(1)
    steps = first.steps_per_epoch()
    order = [first.step(step) for step in range(2 * steps)]
    # resumed: a new plan, asked from the middle of either epoch on
    for start in (steps // 2, steps + 3):
        resumed = plan_of(lengths, 128, seed=3)
        assert [resumed.step(step) for step in range(start, 2 * steps)] == order[start:]
    assert [again.step(step) for step in reversed(range(2 * steps))] == order[::-1]
    assert first.packs(0) != first.packs(1) and first.packs(0) != plan_of(lengths, 128, seed=4).packs(0)
    company = [{frozenset(pack) for pack in first.packs(epoch)} for epoch in (0, 1)]
    assert len(company[0] & company[1]) < len(company[0]) / 2  # equally long rows change places, not only packs
    sizes = [sorted(sorted(int(lengths[row]) for row in pack) for pack in first.packs(epoch)) for epoch in (0, 1)]
    assert sizes[0] == sizes[1]


def splitmix64(state):
    """One output and the next state, in Python integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31), state


def test_shuffle_keys_are_the_published_generator():
    # the first outputs of splitmix64 from the state that the key (7, 1) leads to
    state = 0
    for part in (7, 1):
        state, _ = splitmix64(state ^ part)
    want = []
    for _ in range(5):
        value, state = splitmix64(state)
        want.append(value)
    assert shuffle_keys(5, 7, 1).tolist() == want
    assert shuffle_keys(3, 7, 1).tolist() == want[:3]
    assert splitmix64(1234567)[0] == 6457827717110365317  # the published test vector
    assert len(set(shuffle_keys(10_000, -1).tolist())) == 10_000


def test_shuffle_is_even():
    """Each row is first about equally often: chi-squared of 12 rows over 6,000 epochs, 11 degrees of freedom."""
    firsts = np.bincount([int(np.argmin(shuffle_keys(12, 42, epoch, 0))) for epoch in range(6000)], minlength=12)
    assert ((firsts - 500) ** 2 / 500).sum() < 31.3  # 0.1 % are above


def test_a_hundred_thousand_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 100_000).astype(int), 1, 2048)
    plan = plan_of(lengths, 2048, batch=64)
    assert sorted(row for pack in plan.packs(0) for row in pack) == list(range(100_000))
    assert plan.num_packs <= 1.01 * -(-lengths.sum() // 2048) and plan.efficiency > 0.99


def test_ranks_get_about_the_same_tokens():
    lengths = np.random.default_rng(1).integers(1, 1000, 256)
    tokens = [
        sum(int(lengths[r]) for m in plan_of(lengths, batch=64, rank=k, size=4).step(0) for p in m for r in p) for k in range(4)
    ]
    assert max(tokens) - min(tokens) <= lengths.max()


def encoded(*rows):
    return Dataset([Encoded(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in rows], {})


@given(st.data())
def test_collate_against_a_loop(data):
    rows = []
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(1, 7))
        rows.append(
            (
                data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)),
                data.draw(st.lists(st.booleans(), min_size=n, max_size=n)),
            )
        )
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    micro_batch = [pack for pack in (tuple(order[:cut]), tuple(order[cut:])) if pack]
    batch = collate(encoded(*rows), micro_batch)
    ids, labels, positions, bounds = [], [], [], [0]
    for row in order:
        tokens, mask = rows[row]
        for i, token in enumerate(tokens):
            ids.append(token)
            positions.append(i)
            labels.append(tokens[i + 1] if i + 1 < len(tokens) and mask[i + 1] else IGNORE_INDEX)
        bounds.append(len(ids))
    assert batch.input_ids.tolist() == ids and batch.labels.tolist() == labels
    assert batch.positions.tolist() == positions and batch.cu_seqlens.tolist() == bounds
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.positions.dtype) == (torch.int64,) * 3
    assert batch.cu_seqlens.dtype == torch.int32 and batch.rows == tuple(order)
    assert batch.num_loss_tokens == sum(label != IGNORE_INDEX for label in labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lengths=[]), "lengths has no rows or an empty row"),
        (dict(lengths=[3, 0]), "lengths has no rows or an empty row"),
        (dict(lengths=[3, 9, 2], packing_length=8), "row 1 has 9 tokens, wants at most packing_length 8; raise packing_length"),
        (dict(lengths=[3], micro=0), "micro_batch_size has 0, wants at least 1"),
        (dict(lengths=[3], batch=0), "global_batch_size has 0, wants at least 1"),
        (dict(lengths=[3], rank=2, size=2), "dp_rank has 2, dp_size 2 needs 0 <= dp_rank < 2"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**arguments)
    with pytest.raises(ValueError, match="collate: micro_batch has no rows"):
        collate(encoded(([1], [True])), [])

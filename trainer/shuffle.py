"""A shuffle that is a formula: the same order on every machine, rank and version."""

from __future__ import annotations

import numpy as np


def shuffle_keys(n: int, *key: int) -> np.ndarray:
    """n pseudo-random uint64, a function of key alone (splitmix64: Steele, Lea & Flood 2014); sorting by them shuffles.

    Written out because a library's generator may change its stream between versions, and a run that is resumed after an
    upgrade has to see the remaining rows in the same order.
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix((state ^ np.array([part % 2**64], np.uint64)) + golden)
    return mix(state + golden * np.arange(1, n + 1, dtype=np.uint64))

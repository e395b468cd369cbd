"""Permutation: which row stands at which place of an epoch, one to one, without a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixing.keys import key, scramble

Integers = NDArray[np.int64]

_ROUNDS = 6  # a keyed Feistel network of four rounds leaves a measurable rank correlation; six do not


def permute(places: Integers, size: int, base: int) -> Integers:
    """Where a keyed permutation of [0, size) sends each place: one to one, and for another key another permutation.

    places: any shape, each in [0, size). A Feistel network over the bits of size - 1 with splitmix64 as its round function; what falls
    outside is sent on until it falls inside (Black and Rogaway 2002). Costs the same for the first place and the last.
    """
    one = np.zeros(places.size, dtype=np.int64)  # each by the only permutation
    return permute_each(places.ravel(), one, np.asarray([size]), round_keys(base)[None]).reshape(places.shape)


def permute_each(places: Integers, which: Integers, sizes: Integers, rounds: NDArray[np.uint64]) -> Integers:
    """As `permute`, by several permutations together. places, which: [N], a place and the number of its permutation. sizes: [P], rounds: [P, 6], of each."""
    bits = np.asarray([_bits(size) for size in sizes.tolist()], dtype=np.uint64)
    low, one = bits // np.uint64(2), np.uint64(1)
    low_mask, high_mask, limit = (one << low) - one, (one << (bits - low)) - one, sizes.astype(np.uint64)

    def network(words: NDArray[np.uint64], own: Integers) -> NDArray[np.uint64]:
        own_low, masks = low[own], (high_mask[own], low_mask[own])
        halves = [words >> own_low, words & masks[1]]  # upper, lower
        for number in range(_ROUNDS):
            change = number % 2
            halves[change] = halves[change] ^ (scramble(halves[1 - change] ^ rounds[own, number]) >> np.uint64(17)) & masks[change]
        joined: NDArray[np.uint64] = halves[0] << own_low | halves[1]
        return joined

    flat = network(places.astype(np.uint64), which)
    outside = np.flatnonzero(flat >= limit[which])
    while outside.size:
        flat[outside] = network(flat[outside], which[outside])
        outside = outside[flat[outside] >= limit[which[outside]]]
    return flat.astype(np.int64)


def _bits(size: int) -> int:
    return max(2, int(size - 1).bit_length())


def round_keys(base: int) -> NDArray[np.uint64]:
    """What a permutation's rounds are keyed by, [6]."""
    return np.asarray([key(base, number) for number in range(_ROUNDS)], dtype=np.uint64)

"""Keys: 64-bit numbers that stand for a place in a run, from which everything random is derived.

A key depends on its parts alone: not on the process, the platform, the version of Python or numpy, or what was drawn before.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def scramble(words: Words) -> Words:
    """Mix the bits of 64-bit words, one to one. Source: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        words = words + _GOLDEN
        words = (words ^ (words >> np.uint64(30))) * _FIRST
        words = (words ^ (words >> np.uint64(27))) * _SECOND
        return words ^ (words >> np.uint64(31))


def key(*parts: int | str) -> int:
    """The key of a place, named by numbers and words, in [0, 2**64).

    Parts are told apart from one another and by kind: key(1, 2), key(12) and key("1", 2) all differ.
    """
    text = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind = b"s" if isinstance(part, str) else b"i"
        value = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else str(int(part)).encode()
        text.update(kind + str(len(value)).encode() + b":" + value)
    return int.from_bytes(text.digest(), "little")


def keys(base: int, numbers: NDArray[np.int64]) -> Words:
    """One key for each number, below a common base key; shape as `numbers`. Vectorised, for positions by the million."""
    return scramble(scramble(numbers.astype(np.uint64)) ^ np.uint64(base & _MASK))


def uniform(words: Words) -> NDArray[np.float64]:
    """Numbers in the open interval (0, 1), one for each word: its upper 52 bits and a half."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

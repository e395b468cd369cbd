"""Levels: at which level of a pyramid each image of a stage is trained, as arithmetic on its position. Imports no torch.

The levels are divided in two, and each half in two again, as in `mixing.quota`; where a half has had n images, its own first half has had as many as
it was due when the half was due n, rounded. So nothing is drawn or kept, the counts are exact at every position, and every process agrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from mixing.keys import key
from mixing.permutation import permute
from stages.objectives.windows import MOST_LEVELS

_BITS = 128  # after the binary point of a square root: far finer than the nearest that two due counts of a stage come to a tie


@dataclass(frozen=True)
class LevelShares:
    """Shares of the levels among the images of a stage. Raises ValueError if they are no shares.

    Constant shares repeat themselves: as whole numbers without a common factor, any so many images in a row as their sum hold each level exactly as
    often as its share says. With a ramp too, after any number of images each level's count is within 1 of its share's integral up to there.
    """

    first: tuple[float, ...]
    """One for each level, the coarsest first; at least 0, in any unit. Of every image, or with `last` of the stage's beginning."""
    last: tuple[float, ...] | None = None
    """Of the stage's end, with a straight line between; None: they stay."""
    images: int | None = None
    """Of the stage; only for a ramp, which needs it."""

    def __post_init__(self) -> None:
        for name, shares in (("first", self.first), ("last", self.last)):
            if shares is None:
                continue
            if not 1 <= len(shares) <= MOST_LEVELS or len(shares) != len(self.first):
                raise ValueError(f"level shares: {name}: {list(shares)} must be one share for each level, of which there are 1 to {MOST_LEVELS}")
            if not all(0 <= share < math.inf for share in shares) or sum(shares) <= 0:
                raise ValueError(f"level shares: {name}: {list(shares)} must be numbers of at least 0, one of them above 0")
        if (self.last is None) != (self.images is None) or (self.images is not None and self.images < 1):
            raise ValueError(f"level shares: images: {self.images} is not the stage's number of images, which a ramp needs and constant shares do not")

    def due(self, first: int, end: int, position: Fraction | int) -> Fraction:
        """How many images of the levels from `first` up to before `end` are due before a position: the integral of their share."""
        rate, bend = self._line(first, end)
        return rate * position + bend * position * position

    def level(self, position: int) -> int:
        """The level of the image at a position, from 0. Raises ValueError if a ramp has ended before it."""
        if position < 0 or (self.images is not None and position >= self.images):
            raise ValueError(f"level shares: position {position} is outside the stage's {self.images} images")
        low, high, number = 0, len(self.first), position  # the levels it may be at, and how many images of those came before
        while high - low > 1:
            middle = (low + high) // 2
            before, after = (self._rounded(low, middle, high, count) for count in (number, number + 1))
            if after > before:
                high, number = middle, before
            else:
                low, number = middle, number - before
        return low

    def levels(self, positions: Sequence[int]) -> list[int]:
        """The level at each of these positions."""
        return [self.level(position) for position in positions]

    def period(self) -> int:
        """After how many images constant shares begin again: their sum as whole numbers without a common factor. Of a ramp, that of its beginning."""
        return math.lcm(*(_share(self.first, level, level + 1).denominator for level in range(len(self.first))))

    def _line(self, first: int, end: int) -> tuple[Fraction, Fraction]:
        """a and b of the integral a p + b p^2 of the share of some levels."""
        begins = _share(self.first, first, end)
        if self.last is None or self.images is None:
            return begins, Fraction(0)
        return begins, (_share(self.last, first, end) - begins) / (2 * self.images)

    def _rounded(self, low: int, middle: int, high: int, number: int) -> int:
        """Of the first `number` images of the levels [low, high), how many are of [low, middle)."""
        return math.floor(self.due(low, middle, self._when(low, high, number)) + Fraction(1, 2))

    def _when(self, low: int, high: int, number: int) -> Fraction:
        """The position before which `number` images of some levels are due; the stage's end if so many never are."""
        rate, bend = self._line(low, high)
        under = max(rate * rate + 4 * bend * number, Fraction(0))
        below = rate + _root(under) if bend else 2 * rate
        if below == 0:
            return Fraction(0 if self.images is None or number == 0 else self.images)
        when = 2 * number / below
        return when if self.images is None else min(when, Fraction(self.images))


def shuffled(positions: Sequence[int], block: int, base: int) -> list[int]:
    """The positions, each changed for another inside its aligned block of so many, in each block in another way. base: key of (seed, stage).

    A step of fewer images than a period of the shares needs this: with one image in a step, two sources in equal shares take turns, and with them
    the levels of 1:2:1, so that one source would never see the coarsest. Counts stay what they were wherever a block ends.
    """
    order: dict[int, list[int]] = {}
    for number in {position // block for position in positions}:
        order[number] = permute(np.arange(block), block, key(base, "levels", number)).tolist()
    return [position // block * block + order[position // block][position % block] for position in positions]


@lru_cache(maxsize=256)
def _share(shares: tuple[float, ...], first: int, end: int) -> Fraction:
    exact = [Fraction(repr(float(share))) for share in shares]  # as written: 0.1 is one tenth
    return sum(exact[first:end], Fraction(0)) / sum(exact)


def _root(value: Fraction) -> Fraction:
    return Fraction(math.isqrt(value.numerator * value.denominator << 2 * _BITS), value.denominator << _BITS)

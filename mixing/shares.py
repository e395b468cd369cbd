"""Shares: from what a plan says of a mix to the weight of each source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import Literal, Protocol

LARGEST_TOTAL = 2**31 - 1  # so that (position mod total) x weight stays inside 64 bits


class Exponent(Protocol):
    """Shares by size to a power."""

    @property
    def power(self) -> float:
        """In [0, 1]: 1 is by size, 0 gives every source the same share."""


Mix = Literal["natural"] | Exponent | Mapping[str, float]


@dataclass(frozen=True)
class Ramp:
    """Shares that change in a straight line over a stage."""

    first: Mix
    """The mix of the first step."""
    last: Mix
    """The mix of the last step."""


@dataclass(frozen=True)
class Changing:
    """Shares that may be changed each so many steps, by what was measured."""

    begins: Mix
    """The mix of the first step."""
    every: int
    """After how many steps, each time."""
    changes: Mapping[int, Mapping[str, Fraction]]
    """From which step on, a multiple of `every`, which shares of the same sources; they add up to 1."""


SEGMENTS = 100
"""A ramp has so many steps of its own, at most; inside each the shares stay."""


def weights(mix: Mix, sizes: Mapping[str, int], counted: Mapping[str, int] | None = None) -> dict[str, Fraction]:
    """Exact, unnormalised weights of the sources that are drawn, in the order of `sizes`; those with weight 0 are left out.

    sizes: training rows of every source. counted: how many a mix by size takes each to have, if other. Decimal shares are taken as written: 0.1 is one tenth.
    Raises ValueError if a named source does not exist, or if a drawn source has no rows, or if nothing is drawn.
    """
    if isinstance(mix, str):
        asked = {name: Fraction(size) for name, size in (counted or sizes).items()}
    elif isinstance(mix, Mapping):
        unknown = [name for name in mix if name not in sizes]
        if unknown:
            raise ValueError(f"no source '{unknown[0]}' (sources: {', '.join(sizes)})")
        asked = {name: Fraction(repr(float(mix[name]))) for name in sizes if name in mix}
    else:
        asked = {name: Fraction(repr(float(size) ** mix.power)) if size else Fraction(0) for name, size in (counted or sizes).items()}
    drawn = {name: weight for name, weight in asked.items() if weight > 0}
    if not drawn:
        raise ValueError("the mix draws nothing: every share is 0")
    empty = [name for name in drawn if sizes[name] < 1]
    if empty:
        raise ValueError(f"source '{empty[0]}' has no rows to train on")
    return drawn


def shares(mix: Mix, sizes: Mapping[str, int]) -> dict[str, float]:
    """Shares in (0, 1] that sum to 1, of the sources that are drawn. Errors as `weights`."""
    asked = weights(mix, sizes)
    total = sum(asked.values())
    return {name: float(weight / total) for name, weight in asked.items()}


def mix_steps(mix: Mix | Ramp | Changing, sizes: Mapping[str, int], steps: int, counted: Mapping[str, int] | None = None) -> list[tuple[int, dict[str, Fraction]]]:
    """From which step on which shares are asked for, adding up to 1, of the sources that are drawn at some time; one entry for a mix that stays.

    The shares of a segment are the mean of the ramp over its steps, so that their sum over the stage is the ramp's own. Errors as `weights`.
    """
    if isinstance(mix, Changing):
        begins = _normalised(weights(mix.begins, sizes, counted))
        # At every multiple, whether anything changes there or not: what comes later must not move what comes before.
        parts = [(0, begins)]
        for step in range(mix.every, steps, mix.every):
            parts.append((step, {name: mix.changes[step][name] for name in begins} if step in mix.changes else parts[-1][1]))
        return parts
    if not isinstance(mix, Ramp):
        return [(0, _normalised(weights(mix, sizes, counted)))]
    first, last = (_normalised(weights(end, sizes, counted)) for end in (mix.first, mix.last))
    names = [name for name in sizes if name in first or name in last]
    number = min(SEGMENTS, steps)
    borders = [part * steps // number for part in range(number + 1)]
    parts = []
    for begin, end in pairwise(borders):
        way = Fraction(begin + end - 1, 2 * (steps - 1)) if steps > 1 else Fraction(0)
        parts.append((begin, {name: (1 - way) * first.get(name, Fraction(0)) + way * last.get(name, Fraction(0)) for name in names}))
    return parts


def _normalised(asked: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = sum(asked.values())
    return {name: weight / total for name, weight in asked.items()}


def integers(asked: Mapping[str, Fraction]) -> dict[str, int]:
    """The same weights as whole numbers with no common factor and a sum of at most 2**31 - 1.

    Exact where that is possible; otherwise rounded, each to within half of a 2**31st of the whole, and never to 0.
    """
    scale = lcm(*(weight.denominator for weight in asked.values()))
    whole = {name: int(weight * scale) for name, weight in asked.items()}
    common = gcd(*whole.values())
    whole = {name: weight // common for name, weight in whole.items()}
    total = sum(whole.values())
    if total > LARGEST_TOTAL:
        room = LARGEST_TOTAL - len(whole)
        whole = {name: max(1, (weight * room + total // 2) // total) for name, weight in whole.items()}
    return whole

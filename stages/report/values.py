"""What a JSON value is, for a reader that must not fail: a number, a text, an object, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

Event = Mapping[str, object]
"""One line of metrics.jsonl, or one part of a plan."""


def number(value: object) -> float | None:
    """A number as float, nan and infinities included; None for anything else.

    Sizes beyond 1e30 count as infinite and those below 1e-30 as 0, so that whoever reckons with them stays within float's range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value != value:
        return math.nan
    if abs(value) > 1e30:
        return math.inf if value > 0 else -math.inf
    return float(value) if abs(value) >= 1e-30 else 0.0


def finite(value: object) -> float | None:
    """A finite number as float; None for anything else."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def whole(value: object) -> int:
    """A finite number as int; 0 for anything else."""
    return int(finite(value) or 0)


def text(value: object) -> str:
    """A string or a number as text; the empty string for anything else."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def mapping(value: object) -> dict[str, object]:
    """A JSON object as dict; empty for anything else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def numbers(value: object) -> dict[str, float]:
    """The entries of a JSON object that are numbers."""
    return {key: found for key, item in mapping(value).items() if (found := number(item)) is not None}

"""A verdict: what was found of one promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["proved", "failed", "not proved"]


@dataclass(frozen=True)
class Verdict:
    """What was found of one promise."""

    promise: str
    outcome: Outcome
    found: str
    """The numbers, in words; of a failure what is wrong."""
    numbers: Mapping[str, object] = field(default_factory=dict)
    """All of them."""


def judged(promise: str, wrong: Sequence[str], found: str, numbers: Mapping[str, object]) -> Verdict:
    """A verdict: failed if anything is wrong."""
    if not wrong:
        return Verdict(promise, "proved", found, numbers)
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Verdict(promise, "failed", "; ".join(wrong[:3]) + more, {**numbers, "wrong": list(wrong)})

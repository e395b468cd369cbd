"""Differences of held-out losses, paired over rows: their errors, how they are written, and what was drawn meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from stages.report.page import fixed, signed
from stages.report.record import Change, StageRecord

GLYPHS = {"better": "▼", "worse": "▲", "": "·"}
"""What stands before a change, by its verdict."""


def mean_change(changes: Sequence[float]) -> Change | None:
    """The mean of differences and its standard error; None of fewer than two, or where one is no number to reckon with."""
    if len(changes) < 2 or not all(abs(change) < 1e30 for change in changes):
        return None
    mean = math.fsum(changes) / len(changes)
    return Change(mean, math.sqrt(math.fsum((change - mean) ** 2 for change in changes) / (len(changes) - 1) / len(changes)))


def said_change(change: Change | None, digits: int, verdict: str | None = None) -> str:
    """A change with its sign and its error: `▼ −0.042 ± 0.005`. verdict: left out, the change's own."""
    if change is None:
        return "–"
    return f"{GLYPHS[change.verdict if verdict is None else verdict]} {signed(change.value, digits)} ± {fixed(change.error, digits)}"


def decimals(changes: Iterable[Change | None]) -> int:
    """How many decimals show one digit of the smallest standard error, between 3 and 5."""
    errors = [change.error for change in changes if change is not None and change.error > 0]
    return min(5, max(3, -math.floor(math.log10(min(errors))))) if errors else 4


def images_at(stage: StageRecord, until: int) -> dict[str, float]:
    """Images of each source after so many steps of a stage: those logged at this step, or in a straight line between two that were."""
    points = [(0, dict[str, float]()), *((step.step, dict(step.drawn)) for step in stage.steps)]
    for (first, before), (last, after) in pairwise(points):
        if first <= until <= last and last > first:
            part = (until - first) / (last - first)
            return {source: before.get(source, 0.0) + part * (drawn - before.get(source, 0.0)) for source, drawn in after.items()}
    return points[-1][1]

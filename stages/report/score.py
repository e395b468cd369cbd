"""The report's score: in one line for each source, what its held-out loss was before any training and what it is now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from stages.report.charts import bullet
from stages.report.curves import colour
from stages.report.page import fixed
from stages.report.record import Change, Evaluation, Record

MOST_SOURCES = 12
"""Lines of the score; of more sources, those that gained least are shown."""


@dataclass(frozen=True)
class Line:
    """A source: its loss before and now, and the change with its error."""

    source: str
    before: float
    now: float
    change: Change

    @property
    def left(self) -> float:
        """The part of the loss that is left; 1 is no change."""
        return self.now / self.before


def score(record: Record) -> str:
    """The score as HTML, from the last evaluation; empty where nothing has been measured twice."""
    latest = next((stage.latest for stage in reversed(record.begun) if stage.latest), None)
    if latest is None:
        return ""
    since, lines = "before any training", _lines(record, latest, from_base=True)
    if not lines:
        since, lines = "at the start of the stage", _lines(record, latest, from_base=False)
    if not lines:
        return ""
    shown = lines if len(lines) <= MOST_SOURCES else sorted(lines, key=lambda line: -line.left)[:MOST_SOURCES]
    whole = max(1.0, *(line.left for line in shown))
    items = "".join(_item(record, line, min(whole, 2.0)) for line in shown)
    some = f" The {MOST_SOURCES} of {len(lines)} sources that gained least." if len(shown) < len(lines) else ""
    note = f"Loss on rows that are never trained on: {since} (the upright mark), and now (the bar). Shorter is better.{some}"
    return f'<section class="score"><h2 class="over">Is it getting better?</h2><ul>{items}</ul><p class="note">{note}</p></section>'


def _lines(record: Record, latest: Evaluation, *, from_base: bool) -> list[Line]:
    lines = []
    for source in record.sources:
        found = latest.sources.get(source)
        change = None if found is None else found.since_base if from_base else found.since_start
        if found is not None and change is not None and math.isfinite(found.loss) and found.loss >= 0 and found.loss - change.value > 0:
            lines.append(Line(source, found.loss - change.value, found.loss, change))
    return lines


def _item(record: Record, line: Line, whole: float) -> str:
    verdict = line.change.verdict
    by = abs(1 - line.left) * 100
    how_much = f"{by:.0f} %" if by >= 9.5 else f"{by:.1f} %"
    said = {"better": f"▼ {how_much} lower", "worse": f"▲ {how_much} higher", "": "· no clear change"}[verdict]
    numbers = f"{fixed(line.before, 3)} → {fixed(line.now, 3)}"
    bar = bullet(f"{line.source}: {numbers}, {said[2:]}", line.left, 1.0, whole, colour(record, line.source))
    name = f'<i class="swatch" style="background:var({colour(record, line.source)})"></i>{escape(line.source)}'
    return f'<li><b class="name">{name}</b><span class="bar">{bar}</span><span class="was">{numbers}</span><b class="{verdict or "soft"}">{said}</b></li>'

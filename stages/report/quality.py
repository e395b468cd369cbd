"""The report's measures of samples: how near they are to their captions and targets, beside what real and shuffled images score."""

from __future__ import annotations

from html import escape

from stages.report.charts import bullet
from stages.report.curves import MOST_STAGES, colour
from stages.report.page import count, fixed, percent, section, signed, table
from stages.report.record import Change, Record
from stages.report.values import Event, finite, mapping, text

MOST_ROWS = 200
"""Rows of one table; of more, the last stages of the first sources are shown."""
_SAID = {
    "clip_score": ("CLIP score", "sample and caption"),
    "dino_similarity": ("DINO similarity", "sample and target, or its reference where the task is a subject"),
}


def quality(record: Record) -> str:
    """One table for each metric: source by stage, with changes and yardsticks."""
    latest = {text(event.get("stage")): mapping(event.get("sources")) for event in record.events.get("quality", ())}
    stages = dict(list(latest.items())[-MOST_STAGES:])
    metrics = dict.fromkeys(metric for sources in stages.values() for measured in sources.values() for metric in mapping(measured))
    tables = "".join(_table(record, metric, stages) for metric in list(metrics)[:8])
    if not tables:
        return ""
    note = (
        "Samples for held-out rows at fixed seeds; higher is better. A score says little alone, so beside it stand what real images score and what samples score against "
        "each other's rows, and how much of the way from the one to the other was gone. ▲ and ▼: changed by more than three standard errors. ± is one standard error, "
        "of changes over the same rows."
    )
    return section("quality", "How good are its samples?", note, f'<div class="quality">{tables}</div>')


def _table(record: Record, metric: str, stages: dict[str, dict[str, object]]) -> str:
    name, between = _SAID.get(metric, (metric.replace("_", " "), ""))
    rows: list[list[str]] = []
    first: list[int] = []
    for source in dict.fromkeys(source for sources in stages.values() for source in sources):
        found = [(stage, measured) for stage, sources in stages.items() if finite((measured := mapping(mapping(sources.get(source)).get(metric))).get("mean")) is not None]
        first += [len(rows)] if found else []
        rows += [_row(record, source, stage, measured, lead=k == 0) for k, (stage, measured) in enumerate(found)]
    if not rows:
        return ""
    head = ["Source", "Stage", '<span class="hidden">The way gone, drawn</span>', "Mean", "Since the base", "Since the last stage", "Real images", "Shuffled", "Way gone", "Rows"]
    aside = f' <span class="soft">{escape(between)}</span>' if between else ""
    return f"<h3>{escape(name)}{aside}</h3>" + table(head, rows[:MOST_ROWS], range(3, 10), first, name=name)


def _row(record: Record, source: str, stage: str, measured: Event, *, lead: bool) -> list[str]:
    mean, ceiling, floor = (finite(measured.get(key)) for key in ("mean", "ceiling", "floor"))
    way = (mean - floor) / (ceiling - floor) if mean is not None and ceiling is not None and floor is not None and ceiling > floor else None
    shade = colour(record, source) if source in record.sources else "--ink"
    bar = "" if way is None else bullet(f"{source} after {stage}: {percent(way, 0)} of the way to real images", max(0.0, way), 1.0, 1.05, shade)
    error = finite(measured.get("error"))
    changes = [_change(measured, since) for since in ("since_base", "since_last")]
    about = f'<b>{fixed(mean, 3)}</b>' + (f'<span class="error"> ± {fixed(error, 3)}</span>' if error is not None else "")
    return [escape(source) if lead else "", escape(stage), bar, about, *changes, fixed(ceiling, 3), fixed(floor, 3), percent(way, 0), count(finite(measured.get("rows")))]


def _change(measured: Event, since: str) -> str:
    value, error = finite(measured.get(since)), finite(measured.get(f"{since}_error"))
    if value is None:
        return '<span class="soft">–</span>'
    verdict = "" if error is None else Change(-value, abs(error)).verdict  # a loss is better where it fell, a score where it rose
    glyph = {"": "·", "better": "▲", "worse": "▼"}[verdict]
    around = "" if error is None else f'<span class="error"> ± {fixed(abs(error), 3)}</span>'
    return f'<span class="mark {verdict}" aria-hidden="true">{glyph}</span><span class="{verdict}">{signed(value, 3)}</span>{around}<span class="hidden"> {verdict or "no clear change"}</span>'

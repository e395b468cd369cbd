"""The report's page of the guard: steps that were skipped, and those that stood far above the others, with the rows that are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape

from stages.report.page import count, section, table
from stages.report.record import Record
from stages.report.values import Event, finite, mapping, text, whole

MOST_STEPS = 20
"""Steps that are listed, the last ones of all stages."""
_MOST_ROWS = 3


def guard(record: Record) -> str:
    """How many steps of each stage were skipped or were spikes, and the last of them; nothing where there were none."""
    found = record.events.get("guard", ())
    if not found:
        return ""
    said = [f"{escape(name)}: {_counted(own)}." for name in dict.fromkeys(text(event.get("stage")) for event in found) if (own := [event for event in found if text(event.get("stage")) == name])]
    if again := [f"{escape(name)} ({count(times)} times)" for name, times in _again(found)]:
        said.append(f"Named again and again: {', '.join(again)}.")
    rows = [_row(event) for event in found[-MOST_STEPS:]]
    note = " ".join(said) + (f" The last {MOST_STEPS} of {count(len(found))}; metrics.jsonl has all." if len(found) > MOST_STEPS else "")
    return section("guard", "Skipped steps and spikes", note, table(["Stage", "Step", "What", "Loss", "Gradient's norm", "Rows"], rows, [1, 3, 4], name="Skipped steps and spikes"))


def _counted(events: list[Event]) -> str:
    skipped, spikes = sum(bool(event.get("skipped")) for event in events), sum(bool(event.get("spikes")) for event in events)
    parts = [f"{count(number)} {word}{'' if number == 1 else 's'}{more}" for number, word, more in ((skipped, "step", " skipped"), (spikes, "spike", "")) if number]
    return " and ".join(parts)


def _again(events: Iterable[Event]) -> list[tuple[str, int]]:
    """The rows that were named first in more than one step, those named most before the others."""
    first = Counter(f"{text(row.get('source'))}: {text(row.get('key'))}" for event in events for row in _rows(event)[:1])
    return [(name, times) for name, times in first.most_common(_MOST_ROWS) if times > 1]


def _rows(event: Event) -> list[Event]:
    rows = event.get("rows")
    return [mapping(row) for row in rows] if isinstance(rows, list) else []


def _row(event: Event) -> list[str]:
    wrong, spikes = ([text(name) for name in names] if isinstance(names := event.get(field), list) else [] for field in ("not_finite", "spikes"))
    rows = _rows(event)
    if any(text(row.get("not_finite")) == "latents" for row in rows):
        wrong = ["latents", *wrong]
    what = f"no number: {', '.join(wrong)}" if wrong else f"spike: {', '.join(spikes)}"
    named = [f"{text(row.get('source'))}: {text(row.get('key'))}" for row in rows[:_MOST_ROWS]]
    more = whole(event.get("num_rows")) - len(named)
    loss, norm = (f"{value:.4g}" if (value := finite(event.get(field))) is not None else "no number" for field in ("loss", "grad_norm"))
    return [
        escape(text(event.get("stage"))),
        count(whole(event.get("step"))),
        escape(what + (", skipped" if event.get("skipped") else "")),
        loss,
        norm,
        escape(", ".join(named) + (f" and {count(more)} more" if more > 0 else "")),
    ]

"""The report's hand-offs: what passed from stage to stage, what moved, and which fields of the plan changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from stages.report.page import exact, panel, section, shortest
from stages.report.record import Record
from stages.report.values import finite, mapping, numbers, text

MOST_HANDOFFS = 24


def handoffs(record: Record) -> str:
    events = {(text(event.get("from")), text(event.get("to"))): event for event in record.events.get("handoff", ())}
    panels = []
    for (before, after), event in list(events.items())[-MOST_HANDOFFS:]:
        deltas = [f"{exact(value)} at {t}" for t, value in numbers(event.get("delta")).items()]
        cause = text(event.get("cause")).replace("->", "→")
        kept = event.get("kept")
        held = ", ".join(text(item) for item in kept) if isinstance(kept, list) else text(kept)
        lines = [
            f"Handed on: {escape(held)}" if held else "",
            "Declared exact: the same function."
            if event.get("exact") is True
            else f"Not exact: {escape(cause)}"
            if cause
            else "",
            f"Delta: {escape(', '.join(deltas))}" if deltas else "",
        ]
        body = "".join(f"<p>{line}</p>" for line in lines if line)
        changes = [change for name, pair in mapping(event.get("changes")).items() for change in _changes(name, pair)]
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(old)} → {escape(new)}</dd>" for name, old, new in changes)
        panels.append(panel(f"{before} → {after}", "", body + (f'<dl class="changes">{rows}</dl>' if rows else "")))
    if not panels:
        return ""
    note = "What passes from stage to stage. Delta is how far the model's output moved at the switch, at these t, relative to all that was learnt so far."
    note += f" The last {MOST_HANDOFFS} are shown." if len(events) > MOST_HANDOFFS else ""
    return section("handoffs", "Hand-offs", note, f'<div class="grid two handoffs">{"".join(panels)}</div>')


def _changes(name: str, pair: object) -> list[tuple[str, str, str]]:
    """What differs in a field that was [before, after]: name, before, after; of two mappings only the entries that differ."""
    if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
        return []
    if isinstance(pair[0], Mapping) and isinstance(pair[1], Mapping):
        before, after = mapping(pair[0]), mapping(pair[1])
        return [
            c
            for key in dict.fromkeys([*before, *after])
            for c in _changes(f"{name}.{key}", [before.get(key), after.get(key)])
        ]
    return [(name, _word(pair[0]), _word(pair[1]))]


def _word(value: object) -> str:
    """A value of a plan as its YAML would have it, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_word(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    held = finite(value)
    return text(value) if held is None or isinstance(value, int) else shortest(held)

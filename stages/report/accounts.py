"""The report's accounts: what was drawn and how it was chosen, launches and checkpoints, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from stages.report.page import count, duration, exact, moment, percent, section, size, table
from stages.report.record import Record
from stages.report.values import finite, mapping, text, whole

MOST_ROWS = 200
"""Rows of the ledger, of the launches and of the warnings."""


def ledger(record: Record) -> str:
    rows: list[list[str]] = []
    first = []
    for stage in record.stages:
        for k, (name, tally) in enumerate([*stage.ledger.items(), *((f"at {level}", tally) for level, tally in stage.levels.items())]):
            first += [len(rows)] if k == 0 else []
            dropped = "; ".join(f"{count(n)} {reason}" for reason, n in tally.dropped.items())
            epochs = "–" if tally.epochs is None else f"{tally.epochs:,.2f}"
            counts = [count(tally.images), count(tally.tokens), epochs, count(tally.unique_rows)]
            rows.append(
                [
                    escape(stage.name) if k == 0 else "",
                    escape(name),
                    percent(tally.asked, 2),
                    percent(tally.drawn, 2),
                    *counts,
                    escape(dropped) or "–",
                ]
            )
    if not rows:
        return ""
    note = "What each stage saw of each source." + (
        f" The first {MOST_ROWS} rows; ledger.json has all." if len(rows) > MOST_ROWS else ""
    )
    head = ["Stage", "Source", "Asked", "Drawn", "Images", "Tokens", "Epochs", "Unique rows", "Dropped rows"]
    return section("ledger", "Ledger", note, table(head, rows[:MOST_ROWS], range(2, 8), first, name="Ledger"))


def selections(record: Record) -> str:
    """How the rows of sources were chosen, where a plan says `where` or `take`."""
    chosen = {name: selection for stage in record.stages for name, selection in stage.selections.items()}
    if not chosen:
        return ""
    rows = [
        [
            escape(name),
            escape(text(selection.get("method")) or "–"),
            escape(text(selection.get("where")) or "–"),
            count(finite(selection.get("seed"))),
            count(finite(selection.get("rows"))),
            count(finite(selection.get("of"))),
            count(finite(selection.get("source_rows"))),
            escape(text(selection.get("sha256"))[:16]),
        ]
        for name, selection in list(chosen.items())[:MOST_ROWS]
    ]
    note = "Which rows of a source take part, where the plan says where or take. The hash is the same for the same rows."
    head = ["Source", "By", "Where", "Seed", "Rows", "Fulfil the condition", "In the source", "Hash of the rows"]
    return section("selection", "Rows chosen", note, table(head, rows, range(3, 7), name="Rows chosen"))


def launches(record: Record) -> str:
    rows = []
    for event in record.launches[-MOST_ROWS:]:
        since = mapping(event.get("resumed_from"))
        place = f"{text(since.get('stage'))}, step {count(finite(since.get('step')))}" if since else "the beginning"
        versions = ", ".join(f"{name} {text(version)}" for name, version in mapping(event.get("versions")).items())
        rows.append(
            [
                escape(moment(finite(event.get("time"))) or "–"),
                escape(place),
                escape(text(event.get("device")) or "–"),
                count(finite(event.get("processes"))),
                escape(versions) or "–",
            ]
        )
    if not rows:
        return ""
    said = []
    if saves := record.events.get("save", ()):
        seconds, held = sum(finite(event.get("seconds")) or 0.0 for event in saves), finite(saves[-1].get("bytes"))
        took = f" in {duration(seconds)}" if seconds else ""
        last = escape(text(saves[-1].get("folder"))) + (f" ({size(held)})" if held is not None else "")
        said.append(
            f"{count(len(saves))} checkpoint{'s were' if len(saves) > 1 else ' was'} written{took}; the last is {last}."
        )
    if published := record.events.get("publish", ()):
        apart = finite(published[-1].get("max_difference"))
        said.append(
            f"The adapter is published in {escape(text(published[-1].get('folder')))}/"
            + (
                "."
                if apart is None
                else f"; loaded back, its output differs by at most {exact(apart)}."
                if apart
                else "; loaded back, its output is the same."
            )
        )
    return section(
        "launches",
        "Launches and checkpoints",
        " ".join(said),
        table(["Started", "Went on from", "Device", "Processes", "Versions"], rows, [3], name="Launches"),
    )


def warnings(record: Record) -> str:
    grouped: dict[str, list[Mapping[str, object]]] = {}
    for event in record.events.get("warning", ()):
        grouped.setdefault(text(event.get("message")), []).append(event)
    items = []
    for message, events in list(grouped.items())[:MOST_ROWS]:
        stage = text(events[0].get("stage"))
        place = f"{stage}, step {count(whole(events[0].get('step')))}" if stage else "before the first stage"
        times = f", and {count(len(events) - 1)} more times" if len(events) > 1 else ""
        items.append(f'<li>{escape(message[:2000])} <span class="soft">({escape(place)}{times})</span></li>')
    return (
        section("warnings", "Warnings", "", f'<div class="card"><ul class="plain">{"".join(items)}</ul></div>')
        if items
        else ""
    )

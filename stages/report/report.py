"""The report of a run: one HTML file that opens anywhere, needs no network and can be written at any moment of the run.

`write_report` reads the run folder alone, so that a report can be made again from any run. What a half-finished run has not written yet
is left out, with one line that says so. Numbers come first: which source got better, in which stage, and how sure that is.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from stages.report.charts import stacked
from stages.report.curves import MOST_STAGES, by_timestep, colour, held_out, mixes, rates, throughput, training
from stages.report.page import (
    count,
    duration,
    exact,
    folded,
    moment,
    page,
    panel,
    percent,
    section,
    shortest,
    size,
    table,
)
from stages.report.record import Record, StageRecord, read_record
from stages.report.results import accuracy, losses, verdict
from stages.report.sheets import previews
from stages.report.values import finite, mapping, numbers, text, whole

MOST_ROWS = 200
"""Rows of the ledger, of the launches and of the warnings."""
MOST_HANDOFFS = 24
MOST_NAMED = 12
"""Sources named below a stage's bar."""
MOST_TEXT = 60_000
"""Characters of the plan and of the environment that are shown."""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from what the run has written so far, and return its path."""
    record = read_record(folder)
    sections = [(name, anchor, write(record)) for name, anchor, write in _SECTIONS]
    present = [(name, anchor, body) for name, anchor, body in sections if body]
    absent = [name for name, anchor, body in sections if not body and anchor not in ("warnings", "selection")]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor, _ in present)
    footer = f"Written by Medley from {escape(record.folder.resolve().name)}/, with what the run had written by then."
    footer += f" Not in this report, because the run has not written it: {', '.join(absent).lower()}." if absent else ""
    body = _glance(record) + (f"<nav>{links}</nav>" if present else "") + "".join(body for _, _, body in present)
    html = page(f"{record.name} · Medley", body + f"<footer><p>{footer}</p></footer>")
    path = folder / "report.html"
    part = path.with_suffix(".html.part")
    part.write_bytes(html.encode("utf-8", errors="replace"))
    os.replace(part, path)
    return path


def _glance(record: Record) -> str:
    run = record.run
    parameters = finite(run.get("parameters")) or next(
        (n for s in record.begun if (n := finite(s.event.get("parameters")))), None
    )
    processes, seed = finite(run.get("processes")), finite(run.get("seed"))
    about = [
        text(run.get("model")),
        text(run.get("family")),
        f"{count(parameters)} parameters" if parameters else "",
        f"{count(processes)} process{'' if processes == 1 else 'es'} on {text(run.get('device')) or 'an unnamed device'}"
        if processes
        else "",
        f"seed {seed:.0f}" if seed is not None else "",
        moment(finite(run.get("time"))),
    ]
    warned = len(record.events.get("warning", ()))
    warning = f' <a href="#warnings">{warned} warning{"" if warned == 1 else "s"}</a>.' if warned else ""
    return (
        f'<header><p class="over">Medley run</p><h1>{escape(record.name)}</h1><p class="soft">{escape(" · ".join(a for a in about if a))}</p></header>'
        f'<p class="verdict">{_state(record)} {verdict(record)}{warning}</p>{_facts(record)}{_strip(record)}'
    )


def _state(record: Record) -> str:
    if not record.begun:
        return "Nothing has been trained yet."
    if record.done:
        return f"All {len(record.stages)} stages are done." if len(record.stages) > 1 else "The stage is done."
    ended = sum(stage.ended for stage in record.stages)
    now = record.begun[-1]
    if now.ended:
        return f"{ended} of {len(record.stages)} stages are done; the last is <b>{escape(now.name)}</b>."
    of = f" of {count(now.planned)}" if now.planned else ""
    return f"{ended} of {len(record.stages)} stages are done; <b>{escape(now.name)}</b> has come to step {count(now.reached)}{of}."


def _facts(record: Record) -> str:
    steps, planned = sum(stage.reached for stage in record.stages), sum(stage.planned or 0 for stage in record.stages)
    images = sum(_images(stage) for stage in record.begun)
    spent = sum(sum(_drawn(stage)) / speed for stage in record.begun if (speed := _speed(stage)))
    speed = sum(sum(_drawn(stage)) for stage in record.begun if _speed(stage)) / spent if spent else None
    seeing = sum(finite(event.get("seconds")) or 0.0 for event in record.events.get("eval", ()))
    facts = [
        ("Wall time", duration(record.seconds), f"{len(record.launches)} launches" if len(record.launches) > 1 else ""),
        ("Optimizer steps", count(steps), f"of {count(planned)}" if planned > steps else ""),
        ("Images trained on", count(images), ""),
        ("Images per second", shortest(float(f"{speed:.3g}")) if speed else "", "while training"),
        ("Evaluation", percent(seeing / record.seconds) if seeing and record.seconds else "", "of the time"),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{more}</small></dd></div>"
        for name, value, more in facts
        if value not in ("", "0")
    )
    return f'<dl class="facts">{cells}</dl>' if record.begun else ""


def _drawn(stage: StageRecord) -> list[float]:
    tallied = [tally.images or 0.0 for tally in stage.ledger.values()]
    return tallied or (list(stage.steps[-1].drawn.values()) if stage.steps else [])


def _images(stage: StageRecord) -> float:
    """Images trained on in a stage, by the ledger, the last step's line, or steps times images."""
    return sum(_drawn(stage)) or stage.reached * (finite(stage.event.get("images")) or 0.0)


def _speed(stage: StageRecord) -> float | None:
    """Images per second while a stage trained: the harmonic mean over its lines, each of which stands for as many images."""
    found = [step.images_per_second for step in stage.steps if step.images_per_second and step.images_per_second > 0]
    return statistics.harmonic_mean(found) if found else None


def _strip(record: Record) -> str:
    items = []
    for stage in record.stages[-MOST_STAGES:]:
        if stage.ended:
            state = "done" + (f" · {duration(stage.seconds)}" if stage.seconds else "")
        elif stage.begun:
            state = f"step {count(stage.reached)}" + (f" of {count(stage.planned)}" if stage.planned else "")
        else:
            state = "to come"
        lines = "".join(f"<p>{escape(line)}</p>" for line in _stage_lines(stage) if line)
        mix = numbers(stage.event.get("mix")) or numbers(stage.plan.get("mix"))
        total = sum(mix.values()) or 1.0
        parts = [
            (name, share, colour(record, name) if name in record.sources else "--soft")
            for name, share in mix.items()
            if share > 0
        ]
        legend = "".join(
            f'<span><i class="swatch" style="background:var({c})"></i>{escape(name)} {share / total * 100:.3g} %</span> '
            for name, share, c in parts[:MOST_NAMED]
        )
        legend += f"<span>and {len(parts) - MOST_NAMED} more</span>" if len(parts) > MOST_NAMED else ""
        bar = stacked(f"Mix asked for in {stage.name}", parts) + f'<p class="legend">{legend}</p>' if parts else ""
        items.append(
            f"<li><h3><b>{stage.index} {escape(stage.name)}</b><span>{escape(state)}</span></h3>{lines}{bar}</li>"
        )
    left = len(record.stages) - len(items)
    note = f'<p class="note">The {left} stages before these are not shown here.</p>' if left > 0 else ""
    return (f'<ol class="strip">{"".join(items)}</ol>' if items else "") + note


def _stage_lines(stage: StageRecord) -> list[str]:
    """What a stage does, in four lines, and what it asks beside the usual."""
    event, plan = stage.event, stage.plan
    batch = finite(event.get("images")) or finite(plan.get("batch")) or finite(mapping(plan.get("batch")).get("images"))
    resolution = finite(event.get("resolution")) or finite(plan.get("resolution"))
    holds = text(event.get("step_holds")) or (f"{count(batch)} images" if batch else "")
    work = [f"{count(stage.planned)} steps" + (f" of {holds}" if holds else "") if stage.planned else ""]
    seen_at = text(event.get("seen_at")) or (f"{resolution:.0f}" if resolution else "")
    work.append(f"{seen_at} px" if seen_at else "")
    train = event.get("train", plan.get("train", ""))
    trained = {"full": "full weights", "adapter": "adapter"}.get(
        text(train), text(train) or ("part of the adapter" if train else "")
    )
    trainable = finite(event.get("trainable"))
    trains = f"trains {trained}" + (f", {count(trainable)} parameters" if trainable else "") if trained else ""
    asked = text(event.get("precision")) or text(plan.get("precision"))
    measured = sorted({step.multiplied_in for step in stage.steps if step.multiplied_in})
    numeric = asked
    if asked and measured:
        numeric += ", as measured" if measured == [asked] else f" asked, {' and '.join(measured)} measured"
    base = text(event.get("base")) or text(plan.get("base"))
    stored = f"base in {base}" if base else ""
    skipped = whole(event.get("skipped"))
    left_out = f"{count(skipped)} steps skipped" if skipped else ""
    optimizer = text(event.get("optimizer"))
    rate = ", ".join(filter(None, (_rate(stage), f"by {optimizer}" if optimizer not in ("", "adamw") else "")))
    return [" · ".join(p for p in work if p), trains, " · ".join(p for p in (numeric, stored, left_out) if p), rate, *filter(None, [text(event.get("asks"))])]


def _rate(stage: StageRecord) -> str:
    """The learning rate as the plan has it, or the highest that was logged."""
    planned = stage.plan.get("lr")
    if (constant := finite(planned)) is not None:
        return f"lr {shortest(constant)}"
    rate = mapping(planned)
    if (peak := finite(rate.get("peak"))) is not None:
        schedule = text(rate.get("schedule"))
        return f"lr {shortest(peak)}" + (
            f", {schedule} to {shortest(finite(rate.get('floor')) or 0.0)}" if schedule in ("linear", "cosine") else ""
        )
    logged = [step.lr for step in stage.steps if step.lr is not None and math.isfinite(step.lr)]
    return f"lr up to {shortest(max(logged))}" if logged else ""


def _handoffs(record: Record) -> str:
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


def _ledger(record: Record) -> str:
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
    return section("ledger", "Ledger", note, table(head, rows[:MOST_ROWS], range(2, 8), first))


def _selections(record: Record) -> str:
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
    return section("selection", "Rows chosen", note, table(head, rows, range(3, 7)))


def _launches(record: Record) -> str:
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
        table(["Started", "Went on from", "Device", "Processes", "Versions"], rows, [3]),
    )


def _warnings(record: Record) -> str:
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


def _plan(record: Record) -> str:
    parts = []
    for name, content in (("plan.yaml", record.plan_text), ("environment.json", record.environment_text)):
        if content:
            cut = (
                f"\n... ({count(len(content) - MOST_TEXT)} more characters in {name})"
                if len(content) > MOST_TEXT
                else ""
            )
            parts.append(folded(name, f"<pre>{escape(content[:MOST_TEXT] + cut)}</pre>"))
    return section("plan", "Plan and environment", "", "".join(parts)) if parts else ""


_SECTIONS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("Losses", "loss", losses),
    ("Accuracy", "accuracy", accuracy),
    ("Previews", "previews", previews),
    ("Mix", "mix", mixes),
    ("Held-out loss", "held-out", held_out),
    ("Timesteps", "timesteps", by_timestep),
    ("Training loss", "training", training),
    ("Learning rate", "rate", rates),
    ("Throughput", "throughput", throughput),
    ("Hand-offs", "handoffs", _handoffs),
    ("Ledger", "ledger", _ledger),
    ("Rows chosen", "selection", _selections),
    ("Launches", "launches", _launches),
    ("Warnings", "warnings", _warnings),
    ("Plan", "plan", _plan),
)

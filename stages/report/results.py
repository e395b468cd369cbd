"""The results of a run: held-out loss by source and stage, what changed and how sure that is, and the accuracy of samples.

The first table of the report, and the same table as Markdown for a README, a model card and the console.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from stages.report.charts import bullet
from stages.report.curves import MOST_STAGES, colour
from stages.report.page import count, fixed, percent, region, section, signed, table
from stages.report.paired import GLYPHS, decimals, said_change
from stages.report.record import Change, Record, StageRecord, read_record
from stages.report.values import Event, finite, text

_SINCE = "since the base", "since its start"
HEAD = ("source", "stage", "held-out loss", *_SINCE)
LEGEND = "▼ lower, so better; ▲ higher, so worse; by more than three standard errors. · no clear change. ± is one standard error."
_YARDSTICKS = {"judge_on_real": "real images", "shuffled_captions": "shuffled captions", "untrained": "untrained model"}


def first_table(folder: Path) -> str:
    """The first table as Markdown, aligned for a console: held-out loss by source and stage with its changes; then the accuracy."""
    record = read_record(folder)
    rows = [[row[0].replace("|", "\\|"), *row[1:]] for row in first_rows(record)]
    if not rows:
        return "No held-out loss has been measured yet.\n"
    widths = [max(len(row[k]) for row in [HEAD, *rows]) for k in range(len(HEAD))]
    lines = [
        _markdown(HEAD, widths),
        "|" + "|".join("-" * (w + 1) + (":" if k > 1 else "-") for k, w in enumerate(widths)) + "|",
    ]
    lines += [_markdown(row, widths) for row in rows]
    lines += ["", LEGEND]
    for event in _accuracies(record)[-1:]:
        others = ", ".join(
            f"{name} {percent(value)}"
            for key, name in _YARDSTICKS.items()
            if (value := finite(event.get(key))) is not None
        )
        judged = f"{percent(finite(event.get('accuracy')))} of {count(finite(event.get('samples')))} samples of {text(event.get('source'))}"
        lines += [
            "",
            f"After {text(event.get('stage'))}, {judged} are judged right" + (f" ({others})." if others else "."),
        ]
    return "\n".join(lines) + "\n"


def first_rows(record: Record) -> list[list[str]]:
    """The rows of the first table, a cell for each of HEAD; empty where nothing has been measured."""
    stages, digits, rows = table_stages(record), _digits(record), []
    for source in record.sources:
        for stage in stages:
            found = stage.latest.sources.get(source) if stage.latest else None
            if found is not None:
                changes = [said_change(change, digits) for change in (found.since_base, found.since_start)]
                rows.append([source, _column(stage), fixed(found.loss, digits), *changes])
    return rows


def table_stages(record: Record) -> list[StageRecord]:
    """The stages of the first table: those that have been evaluated, the last ones of many."""
    return [stage for stage in record.begun if stage.latest][-MOST_STAGES:]


def verdict(record: Record) -> str:
    """How many sources got better, from the last evaluation, in one sentence of HTML; empty where there is none."""
    stages = table_stages(record)
    latest = stages[-1].latest if stages else None
    if latest is None:
        return ""
    said = []
    for since, changes in (
        ("the base", [m.since_base for m in latest.sources.values() if m.since_base]),
        (
            f"the start of <b>{escape(stages[-1].name)}</b>",
            [m.since_start for m in latest.sources.values() if m.since_start],
        ),
    ):
        better, worse = (sum(change.verdict == word for change in changes) for word in ("better", "worse"))
        if changes:
            unclear = len(changes) - better - worse
            rest = [f"{n} {word}" for n, word in ((worse, "worse"), (unclear, "without a clear change")) if n]
            said.append(
                f"since {since}, {better} of {len(changes)} sources got better" + "".join(f", {r}" for r in rest)
            )
    return ("; ".join(said)[:1].upper() + "; ".join(said)[1:] + ".") if said else ""


def _markdown(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if k > 1 else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "| " + " | ".join(cells) + " |"


def _digits(record: Record) -> int:
    """Decimals of the first table."""
    found = [measured for stage in record.begun if stage.latest for measured in stage.latest.sources.values()]
    return decimals(change for measured in found for change in (measured.since_base, measured.since_start))


def _column(stage: StageRecord) -> str:
    """A stage's name, and the step where its last evaluation is not its end."""
    latest = stage.latest
    return stage.name if latest is None or latest.kind == "end" else f"{stage.name}, step {count(latest.step)}"


def losses(record: Record) -> str:
    """The first table: source by stage."""
    stages, digits = table_stages(record), _digits(record)
    names = [name for name in record.sources if any(stage.latest and name in stage.latest.sources for stage in stages)]
    if not names:
        return ""
    parts = '<span class="cell"><span>loss</span>' + "".join(f"<span>{since}</span>" for since in _SINCE) + "</span>"
    head = "".join(
        f'<th scope="col"><span class="head"><b>{escape(_column(stage))}</b></span>{parts}</th>' for stage in stages
    )
    rows = []
    for name in names:
        swatch = f'<i class="swatch" style="background:var({colour(record, name)})"></i>'
        cells = "".join(f"<td>{_cell(stage, name, digits)}</td>" for stage in stages)
        rows.append(f'<tr><th scope="row">{swatch}{escape(name)}</th>{cells}</tr>')
    averaged = [stage.name for stage in stages if stage.latest and stage.latest.weights == "ema"]
    note = (
        "Mean squared error on rows that are never trained on, at the end of each stage. "
        '<span class="mark better">▼</span>lower, so better, and <span class="mark worse">▲</span>higher, so worse, by more than three standard errors; '
        '<span class="mark">·</span>no clear change. ± is one standard error of the change, paired over the same rows, noise and timesteps.'
    )
    where = "every stage" if len(averaged) == len(stages) else escape(", ".join(averaged))
    note += f" Of the moving average in {where}." if averaged else ""
    hidden = sum(1 for stage in record.begun if stage.latest) - len(stages)
    note += f" The {hidden} stages before these are not shown." if hidden > 0 else ""
    kind = "losses many" if len(stages) > 3 else "losses"
    body = f'<table class="{kind}" style="--digits:{digits}"><thead><tr><th scope="col"><span class="hidden">Source</span></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return section("loss", "Which stage made which source better?", note, region("Held-out loss by source and stage", body))


def _cell(stage: StageRecord, source: str, digits: int) -> str:
    latest = stage.latest
    found = latest.sources.get(source) if latest else None
    if latest is None or found is None:
        return f'<span class="cell soft"><span><span class="lead">{escape(_column(stage))}</span>–</span></span>'
    parts = [f'<span><span class="lead">{escape(_column(stage))}</span><b>{fixed(found.loss, digits)}</b></span>']
    for since, change in zip(_SINCE, (found.since_base, found.since_start), strict=True):
        parts.append(f'<span><span class="lead">{since}</span>{_marked(change, digits)}</span>')
    raw = latest.raw.get(source)
    parts.append(f'<span class="raw">raw weights {fixed(raw.loss, digits)}</span>' if raw else "")
    return f'<span class="cell">{"".join(parts)}</span>'


def _marked(change: Change | None, digits: int) -> str:
    if change is None:
        return '<span class="soft">–</span>'
    said = change.verdict or "no clear change"
    mark = f'<span class="mark {change.verdict}" title="{said}" aria-hidden="true">{GLYPHS[change.verdict]}</span>'
    error = f'<span class="error"> ± {fixed(change.error, digits)}</span>'
    return f'{mark}<span class="{change.verdict}">{signed(change.value, digits)}</span>{error}<span class="hidden"> {said}</span>'


def _accuracies(record: Record) -> list[Event]:
    """The last judgement of each source in each stage."""
    found = {
        (text(event.get("source")), text(event.get("stage"))): event for event in record.events.get("accuracy", ())
    }
    return [event for event in found.values() if finite(event.get("accuracy")) is not None]


def accuracy(record: Record) -> str:
    """Which share of the samples a classifier judges right, beside what that has to be measured by."""
    tables = []
    by_source: dict[str, list[Event]] = {}
    for event in _accuracies(record)[-4 * MOST_STAGES :]:
        by_source.setdefault(text(event.get("source")), []).append(event)
    for source, events in by_source.items():
        shade = colour(record, source) if source in record.sources else "--ink"
        rows = []
        for event in events:
            share, samples = finite(event.get("accuracy")) or 0.0, finite(event.get("samples"))
            error = f" ± {100 * math.sqrt(max(0.0, share * (1 - share)) / samples):.1f}" if samples else ""
            said = f"{percent(share)} judged right"
            rows.append(
                [
                    escape(text(event.get("stage"))),
                    bullet(said, share, finite(event.get("judge_on_real")), 1.0, shade),
                    f'<b>{percent(share)}</b><span class="error">{error}</span>',
                    *(percent(finite(event.get(key))) for key in _YARDSTICKS),
                ]
            )
        tried = {count(finite(event.get("samples"))) for event in events}
        head = [
            f"{escape(source)}, {' or '.join(sorted(tried))} samples",
            '<span class="hidden">Judged right, drawn</span>',
            "Judged right",
            *(name.capitalize() for name in _YARDSTICKS.values()),
        ]
        tables.append(table(head, rows, range(2, 6), name=f"Samples of {source} judged right"))
    if not tables:
        return ""
    note = (
        "Samples for held-out captions, judged by a classifier. Beside it, what that has to be measured by: the classifier on real images (the upright "
        "mark), samples held against each other's captions, and the model before any training. ± is one standard error."
    )
    return section(
        "accuracy", "Are its samples what was asked for?", note, f'<div class="accuracy">{"".join(tables)}</div>'
    )

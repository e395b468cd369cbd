"""The report's first screen: what the run is, how far it has come, what each stage does."""

from __future__ import annotations

import math
import statistics
from html import escape

from stages.report.charts import stacked
from stages.report.curves import MOST_STAGES, colour
from stages.report.page import count, duration, moment, percent, shortest
from stages.report.record import Record, StageRecord
from stages.report.results import verdict
from stages.report.score import score
from stages.report.values import finite, mapping, numbers, text, whole

MOST_NAMED = 12
"""Sources named below a stage's bar."""
MOST_LISTED = 6
"""Stages up to which the first sentence names them."""


def glance(record: Record) -> str:
    """The first screen: the run in a sentence, whether each source got better, the run in figures, and its stages."""
    run = record.run
    parameters = finite(run.get("parameters")) or next((n for s in record.begun if (n := finite(s.event.get("parameters")))), None)
    processes, seed = finite(run.get("processes")), finite(run.get("seed"))
    about = [
        text(run.get("family")),
        f"{count(parameters)} parameters" if parameters else "",
        f"{count(processes)} process{'' if processes == 1 else 'es'} on {text(run.get('device')) or 'an unnamed device'}" if processes else "",
        f"seed {seed:.0f}" if seed is not None else "",
        moment(finite(run.get("time"))),
    ]
    warned = len(record.events.get("warning", ()))
    warning = f' <a href="#warnings">{warned} warning{"" if warned == 1 else "s"}</a>.' if warned else ""
    return (
        f'<header><p class="over">Medley run</p><h1>{escape(record.name)}</h1><p class="what">{_what(record)}</p><p class="soft">{escape(" · ".join(a for a in about if a))}</p></header>'
        f'<p class="verdict">{_state(record)} {verdict(record)}{warning}</p>{score(record)}{_facts(record)}{_strip(record)}'
    )


def _what(record: Record) -> str:
    """What was trained on what, in a sentence of HTML."""
    model, stages, sources = text(record.run.get("model")) or text(mapping(record.plan.get("model")).get("repo")) or text(record.plan.get("model")), record.stages, len(record.sources)
    named = ": " + " → ".join(escape(stage.name) for stage in stages) if 0 < len(stages) <= MOST_LISTED else ""
    parts = [f"trained on {sources} source{'' if sources == 1 else 's'}" if sources else "", f"through {len(stages)} stage{'' if len(stages) == 1 else 's'}{named}" if stages else ""]
    said = " ".join(part for part in parts if part)
    return f"<b>{escape(model)}</b>{', ' if said else ''}{said}." if model else f"{said[:1].upper()}{said[1:]}." if said else ""


def _state(record: Record) -> str:
    if not record.begun:
        return "Nothing has been trained yet."
    if record.done:
        return {1: "The stage is done.", 2: "Both stages are done."}.get(len(record.stages), f"All {len(record.stages)} stages are done.")
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
    return (f'<h2 class="over">Stages</h2><ol class="strip">{"".join(items)}</ol>' if items else "") + note


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

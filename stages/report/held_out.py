"""The report's held-out losses: over the run, and by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from stages.report.charts import Course, Line, Point, Tick, line_chart
from stages.report.curves import MOST_DOTS, colour, course, stretched
from stages.report.page import count, fixed, folded, panel, section, table
from stages.report.record import Measured, Record, StageRecord

MOST_ROWS = 200
"""Evaluations in the table of all of them; of more, the last ones."""


def held_out(record: Record) -> str:
    """Held-out loss of every source over the whole run, with bands."""
    stages = [stage for stage in record.begun if stage.evaluations]
    if not stages:
        return ""
    axis, panels = course(stages), []
    for source in record.sources:
        lines = [_stage_line(record, source, stage, axis, k) for k, stage in enumerate(stages)]
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        last = lines[-1]
        value = fixed(last.points[-1][1])
        lines[-1] = Line(last.points, last.colour, value, last.style, last.band, last.dots)
        base = _base_line(record, source, stages, axis)
        if base:
            lines.insert(0, Line(base, "--soft", "base", "dashed"))
        said = f"{source} ends at {value}" + (f"; the base has {fixed(base[-1][1])}." if base else ".")
        rows = next(
            (m.rows for s in reversed(stages) for e in s.evaluations if (m := e.sources.get(source)) and m.rows), None
        )
        aside = f"{rows} rows" if rows else ""
        panels.append(
            panel(
                source,
                aside,
                line_chart(f"Held-out loss of {source}", said, lines, course=axis),
                colour(record, source),
            )
        )
    if not panels:
        return ""
    note = (
        "Over optimizer steps, on rows that are never trained on, with the same noise every time. The band is two standard errors of the change since the "
        "stage's start, to either side. Axes do not begin at zero; they are logarithmic where a loss spans more than a factor of five."
    )
    if len({stage.event.get("resolution") for stage in stages}) > 1:
        note += " Stages differ in resolution: compare within a stage."
    body = f'<div class="grid">{"".join(panels)}</div>' + folded("Every evaluation", _evaluations(record, stages))
    return section("held-out", "Held-out loss by source", note + stretched(axis), body)


def _evaluations(record: Record, stages: Sequence[StageRecord]) -> str:
    """The numbers behind the curves."""
    measured = [("base", evaluation) for evaluation in record.bases]
    measured += [(stage.name, evaluation) for stage in stages for evaluation in stage.evaluations]
    rows = []
    for name, evaluation in measured[-MOST_ROWS:]:
        found = [evaluation.sources.get(source) for source in record.sources]
        rows.append(
            [
                escape(name),
                count(evaluation.step),
                escape(evaluation.weights),
                *(fixed(m.loss) if m else "–" for m in found),
            ]
        )
    head = ["Stage", "Step", "Weights", *(escape(source) for source in record.sources)]
    left = len(measured) - len(rows)
    note = f'<p class="note">The {count(left)} evaluations before these are in metrics.jsonl.</p>' if left else ""
    return note + table(head, rows, [1, *range(3, len(head))], name="Every evaluation")


def _base_line(record: Record, source: str, stages: Sequence[StageRecord], axis: Course) -> list[Point]:
    """The base's loss under every stage: it differs where resolutions do."""
    points = []
    for left, right, stage in zip(axis.edges, axis.edges[1:], stages, strict=False):
        base = record.base_of(stage.evaluations[-1])
        found = stage.evaluations[-1].sources.get(source)
        if found is not None and found.since_base is not None:
            loss = found.loss - found.since_base.value
        elif base is not None and source in base.sources:
            loss = base.sources[source].loss
        else:
            continue
        points += [(left, loss), (right, loss)]
    return points


def _stage_line(record: Record, source: str, stage: StageRecord, axis: Course, place: int) -> Line:
    points, band, dots = [], [], []
    for evaluation in stage.evaluations:
        found = evaluation.sources.get(source)
        if found is None:
            continue
        x, room = axis.place(place, evaluation.step), 2 * found.since_start.error if found.since_start else 0.0
        points.append((x, found.loss))
        band.append((x, found.loss - room, found.loss + room))
        error = f" ± {fixed(room)}" if room else ""
        dots.append((x, found.loss, f"{stage.name}, step {count(evaluation.step)}: {fixed(found.loss)}{error}"))
    every = -(-len(band) // 100)
    return Line(
        points, colour(record, source), band=band[::every] if band else (), dots=dots if len(dots) <= MOST_DOTS else ()
    )


def by_timestep(record: Record) -> str:
    """Held-out loss of every source against the noise level: the base, and the end of the last stages."""
    ends = [(stage.name, stage.latest) for stage in record.begun if stage.latest][-4:]
    base = record.base_of(ends[-1][1]) if ends else next(iter(record.bases), None)
    known = [("base", base), *ends] if base else ends
    panels, by_tenths = [], False
    for source in record.sources:
        measured = [(label, m) for label, evaluation in known if (m := evaluation.sources.get(source)) and m.by_timestep]
        if not measured:
            continue
        # A run that a former version began has both kinds of parts; only those of the last evaluation's kind lie on the same axis.
        is_tenths = bool(measured[-1][1].by_timestep_rows)
        by_tenths = by_tenths or is_tenths
        measured = [(label, m) for label, m in measured if bool(m.by_timestep_rows) is is_tenths]
        lines = [_noise_line(record, source, label, m, is_base=label == "base" and base is not None, is_last=k == len(measured) - 1) for k, (label, m) in enumerate(measured)]
        ticks = [Tick(0.0, "t = 0"), Tick(50.0, "0.5"), Tick(100.0, "1")] if is_tenths else [Tick(0.0, "little noise"), Tick(100.0, "much noise")]
        said = f"From little to much noise, {', '.join(label for label, _ in measured)}."
        panels.append(panel(source, "", line_chart(f"Held-out loss of {source} by noise level", said, lines, ticks=ticks), colour(record, source)))
    if not panels:
        return ""
    parts = "by tenth of t; t = 0 is the image and t = 1 noise. A gap has no row." if by_tenths else "the timesteps that are trained, in parts of equal probability."
    note = f"Held-out loss by noise level: {parts} Grey: earlier stages. The band is two standard errors of the change since the base, to either side." if by_tenths else f"Held-out loss by noise level: {parts}"
    return section("timesteps", "Held-out loss by timestep", note, f'<div class="grid">{"".join(panels)}</div>')


def _noise_line(record: Record, source: str, label: str, measured: Measured, *, is_base: bool, is_last: bool) -> Line:
    """A source's losses by noise level at one evaluation."""
    losses, counts, errors = measured.by_timestep, measured.by_timestep_rows, measured.by_timestep_error
    points = [((k + 0.5) / len(losses) * 100, loss) for k, loss in enumerate(losses)]
    if is_base:
        return Line(points, "--soft", label, "dashed")
    if not is_last:
        return Line(points, "--soft", label, "thin")
    dots = []
    for k, (x, y) in enumerate(points):
        part = f"t from {k / len(losses):.1f} to {(k + 1) / len(losses):.1f}, {count(counts[k])} rows" if counts else f"part {k + 1} of {len(losses)}"
        dots.append((x, y, f"{label}, {part}: {fixed(y)}"))
    band = [(x, y - 2 * error, y + 2 * error) for (x, y), error in zip(points, errors, strict=True)] if errors else []
    return Line(points, colour(record, source), label, band=band, dots=dots)

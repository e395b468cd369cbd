"""The report's sections that are drawn: the mix, held-out and training losses, learning rate and throughput."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from stages.report.charts import Course, Line, Point, Tick, bullet, line_chart
from stages.report.page import COLOURS, count, fixed, folded, panel, percent, section, table
from stages.report.record import Record, StageRecord, Step
from stages.report.tally import Tally
from stages.report.values import numbers, text, whole

MOST_STAGES = 12
"""Stages whose mix is shown, and in the first table; of more, the last ones."""
MOST_CURVES = 8
"""Curves in one chart; of more sources those of which most was drawn are shown."""
MOST_ROWS = 200
"""Evaluations in the table of all of them; of more, the last ones."""
MOST_DOTS = 40
"""Evaluations of a curve up to which each has a dot."""


def colour(record: Record, source: str) -> str:
    """The CSS variable of a source."""
    return f"--c{record.sources.index(source) % COLOURS}"


def course(stages: Sequence[StageRecord]) -> Course:
    """The stages end to end: finished ones in full, the one that runs as far as it has come."""
    return Course(tuple(stage.name for stage in stages), tuple(float(stage.reached) for stage in stages))


def mixes(record: Record) -> str:
    """Share asked and share drawn of every source in every stage."""
    tallies = [(stage, stage.ledger or _drawn_so_far(stage)) for stage in record.begun[-MOST_STAGES:]]
    shares = [
        share for _, tally in tallies for t in tally.values() for share in (t.asked, t.drawn) if share is not None
    ]
    panels = []
    for stage, tally in tallies:
        if not tally:
            continue
        total = sum(t.images or 0.0 for t in tally.values())
        off = [abs((t.images or 0.0) - t.asked * total) for t in tally.values() if t.asked is not None]
        aside = (
            f"off by at most {max(off):.1f} of {count(total)} images"
            if off and max(off) >= 0.05
            else f"exactly as asked, {count(total)} images"
        )
        rows = []
        for name, t in tally.items():
            said = f"{name}: asked {percent(t.asked, 2)}, drawn {percent(t.drawn, 2)}"
            bar = bullet(said, t.drawn or 0.0, t.asked, max(shares, default=1.0), colour(record, name))
            rows.append(f'<div title="{escape(name)}">{escape(name)}</div><div>{bar}</div>')
            asked = "–" if t.asked is None else f"{t.asked * 100:.2f}"
            rows.append(f'<div class="n"><span class="soft">{asked} / </span>{percent(t.drawn, 2)}</div>')
        panels.append(panel(f"{stage.index} {stage.name}", aside, f'<div class="mix">{"".join(rows)}</div>'))
    if not panels:
        return ""
    note = "Images drawn of each source. The bar is what was drawn, the upright mark what was asked; in figures, asked / drawn."
    note += f" The last {MOST_STAGES} stages are shown; ledger.json has all." if len(record.begun) > MOST_STAGES else ""
    changing = "".join(f'<div class="below">{chart}</div>' for stage in record.begun[-MOST_STAGES:] if (chart := _shares_over_time(record, stage)))
    return section("mix", "The mix, asked and drawn", note, f'<div class="grid">{"".join(panels)}</div>{changing}')


def _shares_over_time(record: Record, stage: StageRecord) -> str:
    """The shares that an adaptive mix asked for, step by step, with what moved them; nothing where none changed."""
    decisions = [event for event in record.events.get("shares", ()) if event.get("stage") == stage.name]
    changed = [event for event in decisions if event.get("changed")]
    if not decisions:
        return ""
    if not changed:
        return panel(f"{stage.index} {stage.name}", "", f"<p>Shares follow held-out losses; after {count(len(decisions))} evaluations none has moved: {escape(text(decisions[-1].get('why')))}.</p>")
    axis = course([stage])
    lines = []
    for name, share in numbers(changed[0].get("before")).items():
        points, dots = [(axis.place(0, 0), share)], []
        for event in changed:
            step, after = whole(event.get("step")), numbers(event.get("shares")).get(name, share)
            points += [(axis.place(0, step), share), (axis.place(0, step), after)]
            if abs(after - share) >= 0.0005:
                dots.append((axis.place(0, step), after, f"{name}: {percent(share)} to {percent(after)} after step {step}"))
            share = after
        points.append((axis.place(0, stage.reached), share))
        lines.append(Line(points, colour(record, name), name, dots=tuple(dots) if len(changed) <= MOST_DOTS else ()))
    aside = f"moved at {count(len(changed))} of {count(len(decisions))} evaluations"
    chart = line_chart("Shares asked", "The share of each source, over the steps of the stage.", lines, course=axis, from_zero=True)
    return panel(f"{stage.index} {stage.name}: shares that follow held-out losses", aside, chart)


def _drawn_so_far(stage: StageRecord) -> dict[str, Tally]:
    """What the ledger will say, from the last logged step: asked and drawn alone."""
    drawn = stage.steps[-1].drawn if stage.steps else {}
    asked, total = numbers(stage.event.get("mix")), sum(drawn.values())
    if not total:
        return {}
    return {
        name: Tally(asked.get(name), drawn.get(name, 0.0) / total, drawn.get(name, 0.0), None, None, None, {})
        for name in dict.fromkeys([*asked, *drawn])
    }


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
    return section("held-out", "Held-out loss by source", note + _stretched(axis), body)


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
    return note + table(head, rows, [1, *range(3, len(head))])


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


def _stretched(axis: Course) -> str:
    return "" if axis.to_scale else " Short stages are drawn wider than they are."


def by_timestep(record: Record) -> str:
    """Held-out loss of every source against the noise level: the base, and the end of the last stages."""
    ends = [(stage.name, stage.latest) for stage in record.begun if stage.latest][-4:]
    base = record.base_of(ends[-1][1]) if ends else next(iter(record.bases), None)
    known = [("base", base), *ends] if base else ends
    panels = []
    for source in record.sources:
        lines = []
        found = [
            (label, measured.by_timestep)
            for label, e in known
            if (measured := e.sources.get(source)) and measured.by_timestep
        ]
        for k, (label, losses) in enumerate(found):
            points = [((n + 0.5) / len(losses) * 100, loss) for n, loss in enumerate(losses)]
            last = k == len(found) - 1
            dots = (
                [(x, y, f"{label}, part {n + 1} of {len(points)}: {fixed(y)}") for n, (x, y) in enumerate(points)]
                if last
                else []
            )
            if k == 0 and base is not None:
                lines.append(Line(points, "--soft", label, "dashed"))
            else:
                lines.append(
                    Line(
                        points,
                        colour(record, source) if last else "--soft",
                        label,
                        "line" if last else "thin",
                        dots=dots,
                    )
                )
        if lines:
            chart = line_chart(
                f"Held-out loss of {source} by noise level",
                f"From little to much noise, {', '.join(label for label, _ in found)}.",
                lines,
                ticks=[Tick(0.0, "little noise"), Tick(100.0, "much noise")],
            )
            panels.append(panel(source, "", chart, colour(record, source)))
    if not panels:
        return ""
    note = "Held-out loss by noise level: the timesteps that are trained, in parts of equal probability."
    return section("timesteps", "Held-out loss by timestep", note, f'<div class="grid">{"".join(panels)}</div>')


def _curve(
    stages: Sequence[StageRecord], axis: Course, value: Callable[[Step], float | None], smooth: bool = False
) -> list[Point]:
    """One value of every logged step over the whole run, broken between stages; smooth: the running mean over a fortieth of a stage's lines."""
    points: list[Point] = []
    for k, stage in enumerate(stages):
        found = [(axis.place(k, step.step), number) for step in stage.steps if (number := value(step)) is not None]
        if points and found:
            points.append((found[0][0], math.nan))
        points += running_mean(found, len(found) // 80) if smooth else found
    return points


def running_mean(points: Sequence[Point], reach: int) -> list[Point]:
    """The mean of the finite values from `reach` points before to `reach` points after each point."""
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y if math.isfinite(y) else 0.0))
        counts.append(counts[-1] + math.isfinite(y))
    means = []
    for k, (x, _) in enumerate(points):
        low, high = max(0, k - reach), min(len(points), k + reach + 1)
        held = counts[high] - counts[low]
        means.append((x, (sums[high] - sums[low]) / held if held else math.nan))
    return means


def _loss_of(source: str) -> Callable[[Step], float | None]:
    return lambda step: step.losses.get(source)


def training(record: Record) -> str:
    """Training loss, total and by source."""
    stages = [stage for stage in record.begun if stage.steps]
    axis = course(stages)
    raw = _curve(stages, axis, lambda step: step.loss)
    if not raw:
        return ""
    drawn: dict[str, float] = {}
    for stage in stages:
        for name, images in stage.steps[-1].drawn.items():
            drawn[name] = drawn.get(name, 0.0) + images
    named = [name for name in record.sources if any(name in stage.steps[-1].losses for stage in stages)]
    chosen = set(sorted(named, key=lambda name: -drawn.get(name, 0.0))[:MOST_CURVES])
    lines = [Line(raw, "--ink", style="faint")]
    for name in named:
        if name in chosen and len(named) > 1:
            lines.append(Line(_curve(stages, axis, _loss_of(name), smooth=True), colour(record, name), name))
    lines.append(Line(_curve(stages, axis, lambda step: step.loss, smooth=True), "--ink", "all"))
    broken = sum(step.loss is not None and not math.isfinite(step.loss) for stage in stages for step in stage.steps)
    note = (
        "As it was trained on, so each stage's mix, timesteps and noise are in it: read the held-out loss for progress. Thin: every logged step, over all "
        "sources. Strong: running means over a fortieth of a stage."
    )
    note += f" {count(broken)} logged steps had a loss that was not finite." if broken else ""
    note += f" The {MOST_CURVES} sources of which most was drawn are shown." if len(named) > MOST_CURVES else ""
    note += f" One logged step in {record.stride} was read for this page." if record.stride > 1 else ""
    chart = line_chart("Training loss", "The loss of logged steps over all stages.", lines, course=axis, height=240)
    return section("training", "Training loss", note + _stretched(axis), panel("", "", chart, extra=" all"))


def rates(record: Record) -> str:
    """Learning rate and gradient norm."""
    stages = [stage for stage in record.begun if stage.steps]
    axis = course(stages)
    peaks = [max((step.lr for step in stage.steps if step.lr is not None), default=0.0) for stage in stages]
    above = [peak for peak in peaks if peak > 0]
    wide = bool(above) and max(above) / min(above) >= 10
    rate = _curve(stages, axis, lambda step: step.lr)
    norm = _curve(stages, axis, lambda step: step.grad_norm)
    panels = []
    if rate:
        floor = min(above) / 20 if wide else None
        chart = line_chart(
            "Learning rate", "Over all stages.", [Line(rate, "--ink")], course=axis, from_zero=not wide, floor=floor
        )
        panels.append(panel("Learning rate", "logarithmic" if wide else "", chart))
    if norm:
        mean = _curve(stages, axis, lambda step: step.grad_norm, smooth=True)
        chart = line_chart(
            "Gradient norm", "Before clipping.", [Line(norm, "--ink", style="faint"), Line(mean, "--ink")], course=axis
        )
        panels.append(panel("Gradient norm", "before clipping", chart))
    return (
        section(
            "rate",
            "Learning rate and gradient",
            _stretched(axis).strip(),
            f'<div class="grid two">{"".join(panels)}</div>',
        )
        if panels
        else ""
    )


def throughput(record: Record) -> str:
    """Images per second and the wait for data."""
    stages = [stage for stage in record.begun if stage.steps]
    axis = course(stages)
    speed = _curve(stages, axis, lambda step: step.images_per_second)
    wait = _curve(stages, axis, lambda step: step.data_wait)
    panels = []
    mean_speed = _curve(stages, axis, lambda step: step.images_per_second, smooth=True)
    mean_wait = _curve(stages, axis, lambda step: step.data_wait, smooth=True)
    for heading, aside, points, mean in (
        ("Images per second", "", speed, mean_speed),
        ("Wait for data", "share of a step's time", wait, mean_wait),
    ):
        if points:
            lines = [Line(points, "--ink", style="faint"), Line(mean, "--ink")]
            panels.append(
                panel(heading, aside, line_chart(heading, "Over all stages.", lines, course=axis, from_zero=True))
            )
    return (
        section("throughput", "Throughput", _stretched(axis).strip(), f'<div class="grid two">{"".join(panels)}</div>')
        if panels
        else ""
    )

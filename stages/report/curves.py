"""The report's curves of the steps: training loss, learning rate and throughput."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stages.report.charts import Course, Line, Point, line_chart
from stages.report.page import count, panel, section
from stages.report.record import Record, StageRecord, Step
from stages.report.style import COLOURS

MOST_STAGES = 12
"""Stages whose mix is shown, and in the first table; of more, the last ones."""
MOST_CURVES = 8
"""Curves in one chart; of more sources those of which most was drawn are shown."""
MOST_DOTS = 40
"""Evaluations of a curve up to which each has a dot."""


def colour(record: Record, source: str) -> str:
    """The CSS variable of a source."""
    return f"--c{record.sources.index(source) % COLOURS}"


def course(stages: Sequence[StageRecord]) -> Course:
    """The stages end to end: finished ones in full, the one that runs as far as it has come."""
    return Course(tuple(stage.name for stage in stages), tuple(float(stage.reached) for stage in stages))


def stretched(axis: Course) -> str:
    """What is to be said of an axis that is not to scale."""
    return "" if axis.to_scale else " Short stages are drawn wider than they are."


def curve(
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
    raw = curve(stages, axis, lambda step: step.loss)
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
            lines.append(Line(curve(stages, axis, _loss_of(name), smooth=True), colour(record, name), name))
    lines.append(Line(curve(stages, axis, lambda step: step.loss, smooth=True), "--ink", "all"))
    broken = sum(step.loss is not None and not math.isfinite(step.loss) for stage in stages for step in stage.steps)
    note = (
        "As it was trained on, so each stage's mix, timesteps and noise are in it: read the held-out loss for progress. Thin: every logged step, over all "
        "sources. Strong: running means over a fortieth of a stage."
    )
    note += f" {count(broken)} logged steps had a loss that was not finite." if broken else ""
    note += f" The {MOST_CURVES} sources of which most was drawn are shown." if len(named) > MOST_CURVES else ""
    note += f" One logged step in {record.stride} was read for this page." if record.stride > 1 else ""
    chart = line_chart("Training loss", "The loss of logged steps over all stages.", lines, course=axis, height=240)
    return section("training", "Training loss", note + stretched(axis), panel("", "", chart, extra=" all"))


def rates(record: Record) -> str:
    """Learning rate and gradient norm."""
    stages = [stage for stage in record.begun if stage.steps]
    axis = course(stages)
    peaks = [max((step.lr for step in stage.steps if step.lr is not None), default=0.0) for stage in stages]
    above = [peak for peak in peaks if peak > 0]
    wide = bool(above) and max(above) / min(above) >= 10
    rate = curve(stages, axis, lambda step: step.lr)
    norm = curve(stages, axis, lambda step: step.grad_norm)
    panels = []
    if rate:
        floor = min(above) / 20 if wide else None
        chart = line_chart(
            "Learning rate", "Over all stages.", [Line(rate, "--ink")], course=axis, from_zero=not wide, floor=floor
        )
        panels.append(panel("Learning rate", "logarithmic" if wide else "", chart))
    if norm:
        mean = curve(stages, axis, lambda step: step.grad_norm, smooth=True)
        chart = line_chart(
            "Gradient norm", "Before clipping.", [Line(norm, "--ink", style="faint"), Line(mean, "--ink")], course=axis
        )
        panels.append(panel("Gradient norm", "before clipping", chart))
    return (
        section(
            "rate",
            "Learning rate and gradient",
            stretched(axis).strip(),
            f'<div class="grid two">{"".join(panels)}</div>',
        )
        if panels
        else ""
    )


def throughput(record: Record) -> str:
    """Images per second and the wait for data."""
    stages = [stage for stage in record.begun if stage.steps]
    axis = course(stages)
    speed = curve(stages, axis, lambda step: step.images_per_second)
    wait = curve(stages, axis, lambda step: step.data_wait)
    panels = []
    mean_speed = curve(stages, axis, lambda step: step.images_per_second, smooth=True)
    mean_wait = curve(stages, axis, lambda step: step.data_wait, smooth=True)
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
        section("throughput", "Throughput", stretched(axis).strip(), f'<div class="grid two">{"".join(panels)}</div>')
        if panels
        else ""
    )

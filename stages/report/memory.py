"""The report's memory: the peak of every stage beside what was estimated, and what was held over time."""

from __future__ import annotations

from html import escape

from stages.report.charts import Line, bullet, line_chart
from stages.report.curves import MOST_STAGES, course, curve, stretched
from stages.report.page import count, panel, section, size, table
from stages.report.record import Record, StageRecord
from stages.report.values import Event, finite, text

_GIB = 2**30


def memory(record: Record) -> str:
    """Peak and estimate by stage; over the steps where their lines say it."""
    table_of_peaks, over_time = _peaks(record), _over_time(record)
    if not table_of_peaks and not over_time:
        return ""
    note = "The most that a stage's steps took: on a GPU what its tensors took, on a CPU what the process took beside what it held before the stage."
    return section("memory", "Memory", note, table_of_peaks + (f'<div class="below">{over_time}</div>' if over_time else ""))


def _peaks(record: Record) -> str:
    peaks, tries = _latest(record, "peak"), _latest(record, "dry_step")
    stages = [stage for stage in record.begun if stage.name in peaks or stage.name in tries][-MOST_STAGES:]
    if not any(stage.name in peaks for stage in stages):
        return ""
    found = [(stage, peaks.get(stage.name, {}), tries.get(stage.name, {})) for stage in stages]
    whole = max((value for _, peak, _ in found for key in ("peak_bytes", "estimated_bytes") if (value := finite(peak.get(key))) is not None), default=0.0)
    has_estimate = any(finite(peak.get("estimated_bytes")) is not None for _, peak, _ in found)
    rows = [_row(stage, peak, tried, max(whole, 1.0), has_estimate, has_tries=bool(tries)) for stage, peak, tried in found]
    head = ["Stage", '<span class="hidden">Peak, drawn</span>', "Peak", *(["Estimated", "Encoders besides"] if has_estimate else []), *(["Largest micro-batch"] if tries else [])]
    marked = '<p class="note">The upright mark is the estimate, which --explain gives before the run.</p>' if has_estimate else ""
    return f'<div class="peaks">{table(head, rows, range(2, len(head) - bool(tries)), name="Memory by stage")}</div>{marked}'


def _row(stage: StageRecord, peak: Event, tried: Event, whole: float, has_estimate: bool, *, has_tries: bool) -> list[str]:
    taken, estimated = finite(peak.get("peak_bytes")), finite(peak.get("estimated_bytes"))
    said = f"{stage.name}: peak {size(taken)}" + (f", estimated {size(estimated)}" if estimated is not None else "")
    bar = bullet(said, max(0.0, taken or 0.0), estimated, whole, "--c0")
    tokens = finite(tried.get("tokens"))
    largest = f"{count(finite(tried.get('images')))} images" + (f", {count(tokens)} tokens" if tokens else "") if tried else "–"
    estimates = [size(estimated), size(finite(peak.get("estimated_encoder_bytes")))] if has_estimate else []
    return [escape(stage.name), bar, f"<b>{size(taken)}</b>", *estimates, *([largest] if has_tries else [])]


def _latest(record: Record, kind: str) -> dict[str, Event]:
    """The last memory event of a kind, by stage."""
    return {text(event.get("stage")): event for event in record.events.get("memory", ()) if event.get("kind") == kind}


def _over_time(record: Record) -> str:
    stages = [stage for stage in record.begun if stage.steps]
    axis = course(stages)
    points = [(x, y / _GIB) for x, y in curve(stages, axis, lambda step: step.memory_bytes)]
    if not points:
        return ""
    chart = line_chart("Memory", "What was held at each logged step, over all stages, in GiB.", [Line(points, "--ink")], course=axis, from_zero=True)
    return panel("Over the steps", "GiB", chart, extra=" all") + (f'<p class="note">{stretched(axis)}</p>' if stretched(axis) else "")

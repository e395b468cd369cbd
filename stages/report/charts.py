"""Charts as inline SVG: text stays crisp and of one size at every width, colours are the page's CSS variables, nothing is scripted.

Across, a chart has no width of its own: x is in percent of the plot, so that it fits a phone and a wide screen alike. Curves lie in an inner
SVG that is stretched, with strokes that are not. Down, y is in pixels. Labels stand in the padding around the plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Literal

Point = tuple[float, float]

MOST_POINTS = 400
"""Points that a curve keeps."""
MOST_TICKS = 5
LABEL_GAP = 13.0
"""Pixels between two labels at line ends."""
LONGEST_LABEL = 18
LOG_RATIO = 5.0
"""Positive values that span at least this ratio are drawn on a logarithmic axis."""
NARROWEST_PLOT, WIDE_PLOT = 240.0, 760.0
"""Pixels across a plot on a phone, and across one of full width elsewhere; a stage's name that does not fit is its number."""
MOST_BORDERS = 60
"""Stages up to which their borders are drawn."""
_CHARACTER = 7.4
_LEAST_PERCENT = 8.0


@dataclass(frozen=True)
class Line:
    """One curve. `points`: x in percent, y in the axis' unit; a y that is not finite breaks it. `band`: x, low, high."""

    points: Sequence[Point]
    colour: str
    """A CSS variable, such as `--c1`."""
    label: str = ""
    """Stands at the right end."""
    style: Literal["line", "thin", "faint", "dashed"] = "line"
    band: Sequence[tuple[float, float, float]] = ()
    dots: Sequence[tuple[float, float, str]] = ()
    """x, y and what is shown when pointed at."""


@dataclass(frozen=True)
class Tick:
    """A mark below the plot: where, in percent, and what."""

    at: float
    label: str


@dataclass(frozen=True)
class Course:
    """The x axis of a run: its stages end to end, each at least 8 % wide where there are few, so that a short one can be seen."""

    names: tuple[str, ...]
    lengths: tuple[float, ...]

    @property
    def to_scale(self) -> bool:
        """Whether a step is equally wide in every stage."""
        total = sum(self.lengths) or 1.0
        return len(self.lengths) > 8 or all(length / total * 100 >= _LEAST_PERCENT for length in self.lengths)

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """Where the stages begin, and where the last one ends, in percent."""
        lengths = [max(length, 1e-9) for length in self.lengths]
        if not self.to_scale:
            least = _LEAST_PERCENT / (100 - _LEAST_PERCENT * len(lengths)) * sum(lengths)
            lengths = [length + least for length in lengths]
        edges, total = [0.0], sum(lengths) or 1.0
        for length in lengths:
            edges.append(edges[-1] + length / total * 100)
        return tuple(edges)

    def place(self, stage: int, step: float) -> float:
        """Percent at which a step of a stage (counted from 0) lies."""
        left, right = self.edges[stage : stage + 2]
        return left + (right - left) * min(1.0, max(0.0, step / max(self.lengths[stage], 1e-9)))

    def ticks(self) -> list[Tick]:
        """Round numbers of steps since the run began; at the stages' borders instead where they are not to scale."""
        total = sum(self.lengths)
        if self.to_scale:
            step = _round_step(total, MOST_TICKS)
            return (
                [Tick(at / total * 100, short(at)) for k in range(int(total / step) + 1) if (at := k * step) <= total]
                if total
                else []
            )
        ticks, passed = [Tick(0.0, "0")], 0.0
        for edge, length in zip(self.edges[1:], self.lengths, strict=True):
            passed += length
            if edge - ticks[-1].at >= 16:
                ticks.append(Tick(edge, short(passed)))
        return ticks


def short(value: float) -> str:
    """A number for an axis: 0.05, 300, 12k, 4e-6."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}".replace("-", "−")
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e−{-int(exponent)}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def downsample(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points, the first, the last, and the lowest and highest of every stretch of equal count among them."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for k in range(stretches):
        stretch = inner[len(inner) * k // stretches : len(inner) * (k + 1) // stretches]
        numbered = [(y, i) for i, (_, y) in enumerate(stretch) if math.isfinite(y)]
        if numbered:
            kept += [stretch[i] for i in sorted({min(numbered)[1], max(numbered)[1]})]
        else:
            kept.append(stretch[0])
    return [*kept, points[-1]]


def _round_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides a span into at most `most` parts."""
    if not span > 1e-300:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)


@dataclass(frozen=True)
class Scale:
    """The y axis: values to pixels from the top of a plot."""

    low: float
    high: float
    height: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """Pixels from the top; what lies outside is put on the edge."""
        value = min(self.high, max(self.low, value))
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        return self.height * (high - (math.log(value) if self.logarithmic else value)) / (high - low)

    def ticks(self) -> list[float]:
        """Round values inside the axis, at most one for about 28 pixels."""
        most = max(2, int(self.height / 28))
        if not self.logarithmic:
            step = _round_step(self.high - self.low, most)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [k * step for k in range(first, last + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [
                f * 10.0**k for k in range(first, last + 1) for f in factors if self.low <= f * 10.0**k <= self.high
            ]
            if len(found) <= most:
                break
        return found[:: -(-len(found) // most)] if found else [self.low, self.high]


def scale(values: Sequence[float], height: float, *, from_zero: bool = False, floor: float | None = None) -> Scale:
    """The axis for these values: logarithmic where all are positive and span a factor of 5, unless it has to begin at zero.

    floor: the least value that a logarithmic axis has to show; smaller ones are put on the edge.
    """
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if floor is not None and floor > 0:
        low = max(low, floor) if high > floor else low
    if low > 0 and high / low >= LOG_RATIO and not from_zero:
        room = (high / low) ** 0.04
        return Scale(low / room, high * room, height, True)
    if from_zero:
        return Scale(min(0.0, low), (high if high > 0 else 1.0) * 1.05, height, False)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return Scale(low - room, high + room, height, False)


def _path(points: Sequence[Point], axis: Scale) -> str:
    """An SVG path through the points, broken where a value is not finite. x in thousandths of the plot."""
    parts, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x * 10:.1f} {axis.place(y):.1f}")
        pen = "L"
    return "".join(parts)


def _shape(band: Sequence[tuple[float, float, float]], axis: Scale) -> str:
    held = [(x, low, high) for x, low, high in band if math.isfinite(low) and math.isfinite(high)]
    upper = [f"{x * 10:.1f} {axis.place(high):.1f}" for x, _, high in held]
    lower = [f"{x * 10:.1f} {axis.place(low):.1f}" for x, low, _ in reversed(held)]
    return "M" + "L".join([*upper, *lower]) + "Z" if held else ""


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved apart to at least `gap`, within low and high as far as they fit, their order kept."""
    order = sorted(range(len(places)), key=lambda k: places[k])
    moved = list(places)
    edge = low
    for k in order:
        moved[k] = max(moved[k], edge)
        edge = moved[k] + gap
    edge = max(high, low + gap * (len(places) - 1))
    for k in reversed(order):
        moved[k] = min(moved[k], edge)
        edge = moved[k] - gap
    return moved


def clipped(label: str, longest: int = LONGEST_LABEL) -> str:
    """A label that fits, cut with an ellipsis."""
    return label if len(label) <= longest else label[: longest - 1] + "…"


def _borders(course: Course) -> str:
    """Thin lines between the stages and, where they fit, their names above."""
    parts: list[str] = []
    if len(course.names) > MOST_BORDERS:
        return ""
    for k, (name, left, right) in enumerate(zip(course.names, course.edges, course.edges[1:], strict=False)):
        if k:
            parts.append(f'<line class="border" x1="{left:.2f}%" x2="{left:.2f}%" y1="-4" y2="100%"/>')
        share = (right - left) / 100
        narrow, wide = (
            next(
                (said for said in (name, str(k + 1)) if len(said) * 5.8 + (3 if said == name else 12) <= share * width),
                "",
            )
            for width in (NARROWEST_PLOT, WIDE_PLOT)
        )
        if len(course.names) > 1:
            at = f'x="{(left + right) / 2:.2f}%" y="-9" text-anchor="middle"'
            shown = [("tick", narrow)] if narrow == wide else [("tick narrow", narrow), ("tick wide", wide)]
            parts += [f'<text class="{kind}" {at}>{escape(label)}</text>' for kind, label in shown if label]
    return "".join(parts)


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    course: Course | None = None,
    ticks: Sequence[Tick] = (),
    height: int = 150,
    from_zero: bool = False,
    floor: float | None = None,
    axis: Scale | None = None,
) -> str:
    """A chart of curves as HTML. `course` gives stages and ticks across, `ticks` alone any others. All text is escaped here."""
    lines = [Line(downsample(k.points), k.colour, k.label, k.style, k.band, k.dots) for k in lines]
    values = [y for k in lines for _, y in k.points] + [
        y for k in lines for _, low, high in k.band for y in (low, high)
    ]
    axis = axis or scale(values, height, from_zero=from_zero, floor=floor)
    marks = axis.ticks()
    labelled = [
        (k, end)
        for k in lines
        if k.label and (end := next((y for _, y in reversed(k.points) if math.isfinite(y)), None)) is not None
    ]
    left = 10 + _CHARACTER * max((len(short(mark)) for mark in marks), default=1)
    right = 12 + _CHARACTER * max((len(clipped(k.label)) for k, _ in labelled), default=1)
    parts = [f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"]
    for mark in marks:
        y = axis.place(mark)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="-8" y="{y:.1f}" dy=".34em" text-anchor="end">{short(mark)}</text>')
    if course is not None:
        parts.append(_borders(course))
    for tick in ticks or (course.ticks() if course is not None else ()):
        anchor = (
            "start"
            if tick.at < 1 and len(tick.label) > 3
            else "end"
            if tick.at > 99 and len(tick.label) > 5
            else "middle"
        )
        parts.append(
            f'<text class="tick" x="{tick.at:.2f}%" y="{height + 16}" text-anchor="{anchor}">{escape(tick.label)}</text>'
        )
    parts.append(f'<svg viewBox="0 0 1000 {height}" width="100%" height="{height}" preserveAspectRatio="none">')
    parts += [
        f'<path class="band" style="fill:var({k.colour})" d="{shape}"/>'
        for k in lines
        if (shape := _shape(k.band, axis))
    ]
    parts += [
        f'<path class="{k.style}" style="stroke:var({k.colour})" d="{path}"/>'
        for k in lines
        if (path := _path(k.points, axis))
    ]
    parts.append("</svg>")
    for k in lines:
        for x, y, said in k.dots:
            if math.isfinite(y):
                parts.append(
                    f'<circle style="fill:var({k.colour})" cx="{x:.2f}%" cy="{axis.place(y):.1f}" r="2.6"><title>{escape(said)}</title></circle>'
                )
    for (k, _), y in zip(labelled, spread([axis.place(end) for _, end in labelled], LABEL_GAP, 2, height), strict=True):
        full = f"<title>{escape(k.label)}</title>" if clipped(k.label) != k.label else ""
        parts.append(
            f'<text class="label" x="100%" y="{y:.1f}" dx="7" dy=".34em" style="fill:var({k.colour})">{escape(clipped(k.label))}{full}</text>'
        )
    top = 22 if course is not None and len(course.names) > 1 else 8
    return (
        f'<div class="chart" style="padding:{top}px {right:.0f}px 22px {left:.0f}px">'
        f'<svg role="img" width="100%" height="{height}">{"".join(parts)}</svg></div>'
    )


def bullet(title: str, drawn: float, asked: float | None, whole: float, colour: str) -> str:
    """A bar as long as what was drawn, and a mark where it was asked to end, both as shares of `whole`."""
    size = 100 / whole if whole > 0 else 0.0
    mark = (
        ""
        if asked is None
        else f'<rect class="asked" x="{min(100.0, asked * size):.3f}%" y="0" width="2" height="14" transform="translate(-1)"/>'
    )
    return (
        f'<svg role="img" class="bullet" width="100%" height="14"><title>{escape(title)}</title><rect class="track" y="3" width="100%" height="8" rx="2"/>'
        f'<rect style="fill:var({colour})" y="3" width="{min(100.0, drawn * size):.3f}%" height="8" rx="2"/>{mark}</svg>'
    )


def stacked(title: str, parts: Sequence[tuple[str, float, str]], height: int = 10) -> str:
    """One bar of shares side by side: what, how much, colour. Each says its name and share when pointed at."""
    total, left, drawn = sum(share for _, share, _ in parts) or 1.0, 0.0, []
    for name, share, colour in parts:
        width = share / total * 100
        drawn.append(
            f'<rect style="fill:var({colour})" x="{left:.3f}%" width="{width:.3f}%" height="{height}">'
            f"<title>{escape(name)}: {width:.4g} %</title></rect>"
        )
        left += width
    return f'<svg role="img" class="stacked" width="100%" height="{height}"><title>{escape(title)}</title>{"".join(drawn)}</svg>'

"""The report's charts, colours and figures."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_runs import Elements, report_of, write_quickstart_run
from stages.report.charts import MOST_POINTS, Course, Line, downsample, line_chart, scale, spread
from stages.report.curves import running_mean
from stages.report.page import duration, exact, fixed, shortest, signed, size
from stages.report.style import COLOURS, STYLE


def test_loss_that_is_not_finite_breaks_the_curve_and_is_counted(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    spoilt = [line.replace('"loss": ', '"loss": NaN, "was": ', 1) if '"step": 200, "loss"' in line else line for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(spoilt), encoding="utf-8")
    html, words = report_of(folder)
    assert "3 logged steps had a loss that was not finite." in words
    paths = [str(attributes["d"]) for tag, attributes in Elements(html).found if tag == "path"]
    assert paths
    assert not any("nan" in path for path in paths)


def test_losses_by_tenth_of_t_and_by_former_parts_are_never_on_one_axis(tmp_path: Path) -> None:
    def report(*evaluations: dict[str, object]) -> str:
        lines = [{"event": "eval", "stage": "a" if k else "", "step": 9 * k, "kind": "end" if k else "base", "sources": {"photos": {"loss": 0.5, **e}}} for k, e in enumerate(evaluations)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        html = report_of(tmp_path)[0]
        return html[html.index('<section id="timesteps">') : html.index("<footer>")]

    former, tenths = {"by_timestep": [0.5] * 8}, {"by_timestep": [None, *[0.4] * 9], "by_timestep_rows": [0, *[3] * 9]}
    old = report(former, former)
    assert "in parts of equal probability" in old
    assert "little noise" in old
    assert "a, part 8 of 8: 0.5000" in old
    new = report(tenths, tenths)
    assert "by tenth of t" in new
    assert "little noise" not in new
    assert "a, t from 0.9 to 1.0, 3 rows: 0.4000" in new
    assert "t from 0.0" not in new  # no row lies there
    assert old.count(">base<") == new.count(">base<") == 1
    assert ">base<" not in report(former, tenths)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=3000), st.integers(10, MOST_POINTS))
def test_downsampled_curve_keeps_its_ends_its_extremes_and_its_order(values: list[float], most: int) -> None:
    points = [(float(k), value) for k, value in enumerate(values)]
    kept = downsample(points, most)
    assert len(kept) <= max(most, 0)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    finite = [value for value in values if math.isfinite(value)]
    if points:
        assert (kept[0][0], kept[-1][0]) == (points[0][0], points[-1][0])
    if finite:
        held = [value for _, value in kept if math.isfinite(value)]
        assert (min(held), max(held)) == (min(finite), max(finite))


@given(st.lists(st.floats(-1e30, 1e30).map(lambda v: v if abs(v) > 1e-30 else 0.0) | st.floats(1e-30, 1e12), max_size=50), st.booleans())
def test_axis_holds_its_values_and_few_round_ticks(values: list[float], from_zero: bool) -> None:
    axis = scale(values, 150, from_zero=from_zero)
    assert all(-1e-6 <= axis.place(value) <= 150 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(axis.low - 1e-6 * abs(axis.high) <= tick <= axis.high + 1e-6 * abs(axis.high) for tick in ticks)


@given(st.lists(st.floats(0, 150), max_size=10))
def test_labels_at_line_ends_stand_apart_in_the_order_of_their_lines(places: list[float]) -> None:
    moved = spread(places, 13, 2, 150)
    in_order = [moved[k] for k in sorted(range(len(places)), key=lambda k: places[k])]
    assert all(later - earlier >= 13 - 1e-6 for earlier, later in itertools.pairwise(in_order))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_stages_lie_end_to_end_and_short_ones_can_be_seen(lengths: list[float]) -> None:
    course = Course(tuple(f"s{k}" for k in range(len(lengths))), tuple(lengths))
    edges = course.edges
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(100)
    assert list(edges) == sorted(edges)
    if len(lengths) <= 8:
        assert all(right - left >= 7.99 for left, right in itertools.pairwise(edges))
    assert all(0 <= tick.at <= 100.01 for tick in course.ticks())


@given(st.lists(st.floats(-100, 100) | st.just(math.nan), min_size=1, max_size=60), st.integers(0, 9))
def test_running_mean_is_the_mean_of_the_neighbours(values: list[float], reach: int) -> None:
    for k, (_, mean) in enumerate(running_mean([(float(i), value) for i, value in enumerate(values)], reach)):
        near = [value for value in values[max(0, k - reach) : k + reach + 1] if math.isfinite(value)]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-9) if near else math.isnan(mean)


def test_chart_has_a_name_for_who_cannot_see_it_and_says_its_labels_escaped() -> None:
    chart = line_chart("Loss of <a>", "Ends at 1 & 2", [Line([(0, 1.0), (50, math.nan), (100, 2.0)], "--c0", "<b>")])
    Elements(chart)
    assert "<title>Loss of &lt;a&gt;</title><desc>Ends at 1 &amp; 2</desc>" in chart
    assert "&lt;b&gt;</text>" in chart
    assert chart.count("M0.0 ") + chart.count("M1000.0 ") == 2  # broken where it is not finite


def test_every_colour_can_be_read_on_its_background() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for name in ("ink", "soft", "good", "bad", *(f"c{k}" for k in range(8))):
            for ground in ("paper", "card"):
                one, other = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (other + 0.05) / (one + 0.05) >= 4.5, (name, ground)


# What is left of linear red, green and blue to who has no long-wave, no middle-wave or no short-wave cones. Source: Machado, Oliveira and Fernandes 2009, severity 1.
CONES = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(colour: str, cones: str) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour as it is seen."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    red, green, blue = (min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in CONES[cones])
    seen = ((0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505, 0.2126 * red + 0.7152 * green + 0.0722 * blue, (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089)
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in seen)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_colours_of_sources_are_told_apart_by_who_sees_no_red_no_green_or_no_blue() -> None:
    for theme in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for cones in CONES:
            for one, other in itertools.combinations([colours[f"c{k}"] for k in range(COLOURS)], 2):
                assert math.dist(lab(one, cones), lab(other, cones)) > 12, (cones, one, other)  # 2 can just be seen side by side


def test_numbers_are_written_as_a_person_would() -> None:
    assert [duration(s) for s in (0.62, 59, 221, 7500, 200_000)] == ["0.6 s", "59 s", "3 min 41 s", "2 h 5 min", "2 d 7 h"]
    assert [shortest(v) for v in (0.001, 4e-6, 5e-4, 467_104, 1)] == ["0.001", "4e-6", "0.0005", "467,104", "1"]
    assert [signed(v, 3) for v in (-0.0214, 0.0004, 0.02)] == ["−0.021", "0.000", "+0.020"]
    assert [fixed(v) for v in (0.14, -0.5, 1e-7, math.nan)] == ["0.1400", "−0.5000", "1.0e-7", "not finite"]
    assert [exact(v) for v in (0.004, 0.00383, 1.2e-7)] == ["0.0040", "0.0038", "1.2e-7"]
    assert [size(v) for v in (12, 1_900_000, 23_802_816_000)] == ["12 bytes", "1.9 MB", "23.8 GB"]

"""The report's mix: the share that every source was asked for and the share that was drawn, and shares that moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from stages.report.charts import MOST_POINTS, Line, Point, bullet, line_chart
from stages.report.curves import MOST_CURVES, MOST_DOTS, MOST_STAGES, colour, course
from stages.report.page import count, panel, percent, section
from stages.report.record import Record, StageRecord
from stages.report.tally import Tally
from stages.report.values import Event, mapping, numbers, text, whole


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
    over_the_run = f'<div class="below">{chart}</div>' if (chart := _over_the_run(record)) else ""
    return section("mix", "The mix, asked and drawn", note, f'<div class="grid">{"".join(panels)}</div>{over_the_run}{changing}')


def _over_the_run(record: Record) -> str:
    """The share of every source in what was drawn lately, over all stages, and what was asked; nothing where there is but one source."""
    stages = [stage for stage in record.begun if len(stage.steps) > 1]
    totals: dict[str, float] = {}
    for stage in stages:
        for name, images in stage.steps[-1].drawn.items():
            totals[name] = totals.get(name, 0.0) + images
    shown = sorted(sorted(totals, key=lambda name: -totals[name])[:MOST_CURVES], key=list(totals).index)
    if len(shown) < 2:
        return ""
    axis, lately, changed = course(stages), [drawn_lately(stage) for stage in stages], _changed(record)
    lines = []
    for name in shown:
        wanted: list[Point] = []
        drawn: list[Point] = []
        for k, stage in enumerate(stages):
            wanted += [*((axis.place(k, step), share) for step, share in asked(stage, changed.get(stage.name, ()), name)), (axis.edges[k + 1], math.nan)]
            drawn += [*((axis.place(k, step), shares[name]) for step, shares in lately[k] if name in shares), (axis.edges[k + 1], math.nan)]
        lines += [Line(wanted, colour(record, name), style="dashed"), Line(drawn, colour(record, name), name)]
    chart = line_chart("Shares drawn over the run", f"The shares of {', '.join(shown)} in what was drawn lately, and dashed what was asked.", lines, course=axis, height=200, from_zero=True)
    some = f'<p class="note">The {MOST_CURVES} sources of which most was drawn are shown.</p>' if len(shown) < len(totals) else ""
    return panel("Over the run", "drawn lately; dashed: asked", chart) + some


def drawn_lately(stage: StageRecord) -> list[tuple[int, dict[str, float]]]:
    """At logged steps the share of each source in the images since some lines before: at least 200 images and a fortieth of the stage, so that it can be read."""
    steps = stage.steps
    per_line = sum(steps[-1].drawn.values()) / len(steps)
    reach = max(1, len(steps) // 40, math.ceil(200 / per_line) if per_line > 0 else 1)
    found = []
    for k in range(0, len(steps), -(-len(steps) // MOST_POINTS)):
        before = steps[k - reach].drawn if k >= reach else {}
        images = {name: number - before.get(name, 0.0) for name, number in steps[k].drawn.items()}
        if (total := sum(images.values())) > 0:
            found.append((steps[k].step, {name: number / total for name, number in images.items()}))
    return found


def _changed(record: Record) -> dict[str, list[Event]]:
    """The changes of shares that follow evaluations, by stage."""
    changed: dict[str, list[Event]] = {}
    for event in record.events.get("shares", ()):
        if event.get("changed"):
            changed.setdefault(text(event.get("stage")), []).append(event)
    return changed


def asked(stage: StageRecord, changed: Sequence[Event], name: str) -> list[tuple[int, float]]:
    """Steps and the share asked from each on; nothing where a mix moves in a straight line. changed: what moved the stage's shares."""
    if changed:
        return _moves(changed, name, numbers(changed[0].get("before")).get(name, 0.0), stage.reached)
    mix = numbers(stage.event.get("mix"))
    if name not in mix or "from" in mapping(stage.plan.get("mix")):
        return []
    share = mix[name] / (sum(mix.values()) or 1.0)
    return [(0, share), (stage.reached, share)]


def _moves(changed: Sequence[Event], name: str, share: float, last: int) -> list[tuple[int, float]]:
    """Steps and shares of a source as a stair: where it began, each move, and the last step."""
    points = [(0, share)]
    for event in changed:
        step, after = whole(event.get("step")), numbers(event.get("shares")).get(name, share)
        points += [(step, share), (step, after)]
        share = after
    return [*points, (last, share)]


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
        moves = _moves(changed, name, share, stage.reached)
        dots = [
            (axis.place(0, step), after, f"{name}: {percent(before)} to {percent(after)} after step {step}")
            for (_, before), (step, after) in zip(moves[1:-1:2], moves[2::2], strict=False)
            if abs(after - before) >= 0.0005
        ]
        points = [(axis.place(0, step), held) for step, held in moves]
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

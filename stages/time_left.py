"""Time left: how long a run will still take, from the speed of the stage under way."""

from __future__ import annotations

from dataclasses import dataclass

from stages.plan import Batch, Change, Plan, Stage
from stages.resolved import resolved_batch, resolved_levels


@dataclass(frozen=True)
class Pace:
    """What was measured of a stage."""

    index: int
    """Of the stage, from 0."""
    step_seconds: float
    evaluation_seconds: float | None
    """None: none was made in this launch, and evaluations are left out."""


def stage_seconds(plan: Plan, pace: Pace, step: int) -> float:
    """How long the stage under way will still take after so many steps, with the evaluations that stand in it."""
    steps = plan.stages[pace.index].steps
    return (steps - step) * pace.step_seconds + (pace.evaluation_seconds or 0.0) * (_evaluations(plan, steps) - _evaluations(plan, step, ends=False))


def run_seconds(plan: Plan, pace: Pace, step: int, multiple: int) -> float:
    """How long the run will still take: this stage, and the later ones as if a step took time in proportion to its pixels.

    Loading, sampling and saving are left out, and what a later stage computes otherwise, such as precision or checkpointing. multiple: pixels along a token's side.
    """
    seconds = stage_seconds(plan, pace, step)
    here = step_pixels(plan.stages[pace.index], multiple)
    for stage in plan.stages[pace.index + 1 :]:
        measured = _images_pixels(stage) / _images_pixels(plan.stages[pace.index])
        seconds += stage.steps * pace.step_seconds * step_pixels(stage, multiple) / here
        seconds += (pace.evaluation_seconds or 0.0) * measured * (1 + _evaluations(plan, stage.steps))
    return seconds


def _evaluations(plan: Plan, steps: int, *, ends: bool = True) -> int:
    """Evaluations inside so many steps, and one at the end."""
    every = plan.evaluate.every
    inside = (steps - ends) // every if every else 0
    return inside + ends


def step_pixels(stage: Stage, multiple: int) -> float:
    """Pixels of targets in a step of a stage, on the mean."""
    batch: Batch = resolved_batch(stage)
    if batch.tokens is not None:
        return _mean(batch.tokens) * multiple**2
    return _mean(batch.images or 1) * _images_pixels(stage)


def _images_pixels(stage: Stage) -> float:
    """Pixels of an image of a stage, on the mean."""
    levels = resolved_levels(stage)
    return sum(level.share * level.pixels**2 for level in levels) / sum(level.share for level in levels)


def _mean(count: int | Change) -> float:
    return (count.first + count.last) / 2 if isinstance(count, Change) else count


def duration(seconds: float) -> str:
    """In words: `45 s`, `3 min 12 s`, `27 min`, `2 h 05`, `3 d 4 h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rounded(seconds: float) -> str:
    """The same as an estimate that should not look better than it is."""
    if seconds < 90:
        return "a minute"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h" if seconds < 10 * 3600 else f"{round(seconds / 3600)} h"
    return f"{seconds / 86400:.1f} days"

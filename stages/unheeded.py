"""Unheeded: what a plan could say and nothing would listen to. Given, it is refused; left out, it is not written into the resolved plan."""

from __future__ import annotations

from collections.abc import Iterator

from stages.plan import LearningRate, Plan, Stage
from stages.problems import Location


def unheeded(plan: Plan) -> Iterator[tuple[Location, str]]:
    """The location of every field that has no effect in this plan, with the reason and the cure."""
    if all(stage.train == "full" for stage in plan.stages):
        yield ("adapter",), "every stage has train: full, so there is no adapter; remove it, or train it in a stage"
    for name, source in plan.sources.items():
        if source.take is not None and source.take.by == "first":
            yield ("sources", name, "take", "seed"), "by: first takes rows in file order, without a seed; remove it"
        if not source.path.startswith("hub/"):
            yield ("sources", name, "split"), "only a Hub dataset (hub/USER/DATASET) has splits; remove it"
        if source.task == "text_to_image" and "reference" in source.columns:
            yield ("sources", name, "columns", "reference"), "task text_to_image uses no references; remove it, or name another task"
    for index, stage in enumerate(plan.stages):
        for location, reason in _of_stage(stage, is_first=index == 0 and plan.start is None):
            yield ("stages", index, *location), reason
    if plan.evaluate.rows == 0:
        yield ("evaluate", "every"), "with evaluate.rows: 0 nothing is held out to measure; remove it, or hold rows out"
        yield ("evaluate", "accuracy"), "with evaluate.rows: 0 there are no held-out captions; remove it, or hold rows out"
        if plan.previews.rows > 0:
            yield ("previews",), "with evaluate.rows: 0 there are no held-out rows to show; remove it, or hold rows out"


def _of_stage(stage: Stage, *, is_first: bool) -> Iterator[tuple[Location, str]]:
    if is_first:
        yield ("handoff",), "nothing comes before the first stage; remove it, or begin from another run with `start`"
    elif stage.ema is None:
        yield ("handoff", "ema"), "this stage keeps no average; give it `ema` (0.999, say), or remove this"
    if stage.timesteps.density == "uniform":
        yield ("timesteps", "mean"), "density: uniform has no mean; remove it"
        yield ("timesteps", "std"), "density: uniform has no std; remove it"
    if isinstance(stage.lr, LearningRate):
        if stage.lr.schedule == "constant":
            yield ("lr", "floor"), "schedule: constant ends at its peak; remove it, or choose linear or cosine"
        if stage.lr.warmup == 0:
            yield ("lr", "warmup_from"), "with warmup: 0 there is no warm-up to begin from; remove it"

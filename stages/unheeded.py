"""Unheeded: what a plan could say and nothing would listen to. Given, it is refused; left out, it is not written into the resolved plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mixing.columns import TASKS
from stages.plan import LearningRate, MixRamp, Plan, Source, Stage
from stages.problems import Location


def unheeded(plan: Plan) -> Iterator[tuple[Location, str]]:
    """The location of every field that has no effect in this plan, with the reason and the cure."""
    if all(stage.train == "full" for stage in plan.stages):
        yield ("adapter",), "every stage has train: full, so there is no adapter; remove it, or train it in a stage"
    for name, source in plan.sources.items():
        if source.take is not None and source.take.by == "first":
            yield ("sources", name, "take", "seed"), "by: first takes rows in file order, without a seed; remove it"
        if source.take is not None and source.take.by != "stratified":
            yield ("sources", name, "take", "column"), "only by: stratified looks at a column; remove it, or choose stratified"
        yield from _of_source(name, source, plan)
        if not source.path.startswith("hub/") and source.split == "train":  # another is judged by who looks at the folder
            yield ("sources", name, "split"), "only a Hub dataset, or a folder that save_to_disk wrote, has splits, and train is the usual one; remove it"
        roles = TASKS[source.task]
        if not roles.references and "reference" in source.columns:
            yield ("sources", name, "columns", "reference"), f"task {source.task} uses no references; remove it, or name another task"
        for role in ("entity_prompts", "entity_masks"):
            if not roles.regions and role in source.columns:
                yield ("sources", name, "columns", role), f"task {source.task} uses no regions; remove it, or name task entity"
    for index, stage in enumerate(plan.stages):
        for location, reason in _of_stage(stage, is_first=index == 0 and plan.start is None):
            yield ("stages", index, *location), reason
    if plan.evaluate.rows == 0:
        yield ("evaluate", "every"), "with evaluate.rows: 0 nothing is held out to measure; remove it, or hold rows out"
        yield ("evaluate", "accuracy"), "with evaluate.rows: 0 there are no held-out captions; remove it, or hold rows out"
        if plan.previews.rows > 0:
            yield ("previews",), "with evaluate.rows: 0 there are no held-out rows to show; remove it, or hold rows out"


def _of_source(name: str, source: Source, plan: Plan) -> Iterator[tuple[Location, str]]:
    location: Location = ("sources", name)
    if source.stream:
        for field in ("where", "take"):
            yield (*location, field), "a stream is read as it comes, and rows are not chosen from it; remove it, or leave `stream` out"
    else:
        for field in ("rows", "references", "lanes"):
            yield (*location, field), "only a stream is told this; remove it, or say stream: true"
    if all(isinstance(mix, Mapping) for mix in _mixes(plan)):
        if source.stream:
            yield (*location, "rows"), "every stage gives shares by name, so nobody asks how many rows there are; remove it"
        yield (*location, "repeat"), "every stage gives shares by name, which `repeat` does not touch; remove it, or use natural or {power: ...}"
    if not source.captions.shuffle_tags:
        yield (*location, "captions", "keep_tags"), "tags are not shuffled; remove it, or say shuffle_tags: true"
    if source.augment.flip == 0 and source.augment.crop == "center":
        yield (*location, "augment", "variants"), "without flip or crop: random there is one variant; remove it"


def _mixes(plan: Plan) -> Iterator[object]:
    for stage in plan.stages:
        yield from (stage.mix.first, stage.mix.last) if isinstance(stage.mix, MixRamp) else (stage.mix,)


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

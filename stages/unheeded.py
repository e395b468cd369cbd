"""Unheeded: what a plan could say and nothing would listen to. Given, it is refused; left out, it is not written into the resolved plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mixing.columns import TASKS
from stages.plan import LearningRate, Plan, Source, Stage
from stages.problems import Location
from stages.resolved import measures_all, resolved_rate, resolved_storage, still_mixes


def unheeded(plan: Plan) -> Iterator[tuple[Location, str]]:
    """The location of every field that has no effect in this plan, with the reason and the cure."""
    if all(stage.train == "full" for stage in plan.stages):
        for field in ("adapter", "adapters"):
            yield (field,), "every stage has train: full, so there is no adapter; remove it, or train it in a stage"
    elif plan.adapters:
        yield ("adapter",), "the plan gives `adapters` by name, and one adapter is given here; remove one of the two"
    else:
        yield ("adapters",), "no adapter is named; remove it, or name one"
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
        for location, reason in _of_stage(stage, is_first=index == 0 and plan.start is None, several=bool(plan.adapters)):
            yield ("stages", index, *location), reason
        if index == 0 and plan.start is not None:
            for field in ("optimizer", "ema") if stage.ema is not None else ("optimizer",):
                yield ("stages", index, "handoff", field), "`start` brings weights and nothing else; remove it"
    if measures_all(plan):
        why = "rows is a number, and all of them are measured" if plan.evaluate.rows != "auto" else "shares follow what is measured, so all held-out rows are"
        yield ("evaluate", "time"), f"{why}, whatever time it takes; remove it"
    if not plan.evaluate.metrics:
        yield ("evaluate", "samples"), "only `metrics` looks at these samples; remove it, or name metrics"
    if plan.evaluate.rows == 0:
        yield ("evaluate", "every"), "with evaluate.rows: 0 nothing is held out to measure; remove it, or hold rows out"
        yield ("evaluate", "accuracy"), "with evaluate.rows: 0 there are no held-out captions; remove it, or hold rows out"
        yield ("evaluate", "metrics"), "with evaluate.rows: 0 there are no held-out rows to sample; remove it, or hold rows out"
        if plan.previews.rows > 0:
            yield ("previews",), "with evaluate.rows: 0 there are no held-out rows to show; remove it, or hold rows out"


def _of_source(name: str, source: Source, plan: Plan) -> Iterator[tuple[Location, str]]:
    location: Location = ("sources", name)
    if source.prior is not None:
        for field in ("columns", "prompt", "split", "stream"):
            yield (*location, field), "the model makes the images of `prior` and their captions itself; remove it"
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
        yield from still_mixes(stage)


def _of_stage(stage: Stage, *, is_first: bool, several: bool) -> Iterator[tuple[Location, str]]:
    if is_first:
        yield ("handoff",), "nothing comes before the first stage; remove it, or begin from another run with `start`"
    else:
        if stage.ema is None:
            yield ("handoff", "ema"), "this stage keeps no average; give it `ema` (0.999, say), or remove this"
        if stage.train == "full":
            yield ("handoff", "adapter"), "a stage with train: full has no adapter; remove it"
        yield from _of_way(stage, several=several)
    if (density := stage.timesteps.density) in ("uniform", "mode"):
        yield ("timesteps", "mean"), f"density: {density} has no mean; remove it"
        yield ("timesteps", "std"), f"density: {density} has no std; remove it"
    if density != "mode":
        yield ("timesteps", "scale"), "only density: mode has a scale; remove it"
    if stage.pyramid is not None:
        yield ("timesteps",), "the levels of `pyramid` say which noise levels are trained; remove it, or `pyramid`"
        yield ("loss", "weighting"), "`pyramid` weighs its levels itself (pyramid.loss); remove it"
        yield ("loss", "changed"), "`pyramid` trains most images at a coarser level, where places are not those of the edit; remove it, or `pyramid`"
        if stage.pyramid.levels == 1:
            yield ("pyramid", "gamma"), "with levels: 1 there is no jump between levels; remove it"
    if stage.loss.weighting != "min_snr":
        yield ("loss", "gamma"), "only weighting: min_snr has a gamma; remove it"
    if stage.dropout.mode == "joint":
        yield ("dropout", "references"), "with mode: joint the references go with the prompt; remove it, or choose nested or independent"
    if stage.dropout.mode == "nested" and stage.dropout.prompt == 0:
        yield ("dropout", "references"), "with mode: nested the references go only where the prompt went, and no prompt goes; give dropout.prompt"
    if stage.dropout.prompt == 0 and stage.dropout.references == 0:
        yield ("dropout", "mode"), "nothing is left out; give dropout.prompt, or remove it"
    if stage.guard.on_spike == "ignore":
        yield ("guard", "sigmas"), "on_spike: ignore looks for no spike; remove it, or choose say or skip"
    if stage.optimizer.name != "prodigy":
        for field in ("d0", "d_coef"):
            yield ("optimizer", field), f"{stage.optimizer.name} takes steps of the size that `lr` says; remove it, or choose name: prodigy"
    if isinstance(stage.lr, LearningRate):
        if stage.lr.schedule == "constant":
            yield ("lr", "floor"), "schedule: constant ends at its peak; remove it, or choose linear or cosine"
        if resolved_rate(stage).warmup == 0:
            why = "with warmup: 0" if stage.lr.warmup == 0 else "in a stage of fewer than 20 steps, without `warmup`,"
            yield ("lr", "warmup_from"), f"{why} there is no warm-up to begin from; remove it" + ("" if stage.lr.warmup == 0 else ", or give warmup")


def _of_way(stage: Stage, *, several: bool) -> Iterator[tuple[Location, str]]:
    """What the way in which the adapter is handed on leaves unheeded. several: whether the plan has adapters by name."""
    way = stage.handoff.adapter
    if way == "continue" or stage.train == "full":
        for field in ("rank", "alpha"):
            yield ("handoff", field), f"adapter: continue leaves the {field} as it is; remove it, or choose grow, shrink, stack or merge"
    elif several:
        for field in ("rank", "alpha"):
            yield ("handoff", field), f"each of `adapters` has its own {field}; remove it"
    if way != "merge":
        yield ("handoff", "lossy"), "only adapter: merge can lose what was learnt to the base's rounding; remove it"
    elif resolved_storage(stage) == "fp32":
        yield ("handoff", "lossy"), "over a base in fp32 a merge loses nothing; remove it"

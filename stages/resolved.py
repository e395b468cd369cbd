"""Resolved: what a plan means where it leaves something out, as numbers and as words. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from stages.objectives.windows import Windows
from stages.placed import newest, placed_adapters
from stages.plan import Batch, Change, LearningRate, Level, MetricName, MixAdaptive, MixRamp, Plan, Quantised, Ramped, Stage, StillMix, Storage, Timesteps, Tracker

HELD_OUT = 64
METRIC_MODELS: Mapping[MetricName, str] = MappingProxyType({"clip_score": "openai/clip-vit-large-patch14", "dino_similarity": "facebook/dinov2-small"})


def still_mixes(stage: Stage) -> tuple[StillMix, ...]:
    """The mixes that a stage names: one; of a ramp the first and the last; of an adaptive mix the one that it stays near."""
    if isinstance(stage.mix, MixRamp):
        return stage.mix.first, stage.mix.last
    return (stage.mix.adaptive,) if isinstance(stage.mix, MixAdaptive) else (stage.mix,)


def resolved_batch(stage: Stage) -> Batch:
    """The stage's batch as a mapping, `micro` filled in where it is a number of images: the largest divisor of `images` that is at most 4.

    With `tokens`, or images that change, what a micro-batch holds by default follows from the shapes that occur, and is left out here.
    """
    batch = stage.batch if isinstance(stage.batch, Batch) else Batch(images=stage.batch)
    if batch.micro is not None or not isinstance(batch.images, int):
        return batch
    return batch.model_copy(update={"micro": max(size for size in (1, 2, 3, 4) if batch.images % size == 0)})


def resolved_levels(stage: Stage) -> list[Level]:
    """The stage's resolutions; one with a share of 1 where it has one."""
    return stage.resolution if isinstance(stage.resolution, list) else [Level(pixels=stage.resolution, share=1.0)]


def main_resolution(stage: Stage) -> int:
    """The largest of the stage's resolutions, at which held-out rows are seen."""
    return max(level.pixels for level in resolved_levels(stage))


def windows_of(stage: Stage) -> Windows | None:
    """The levels of the stage's pyramid; None for a straight flow."""
    return None if stage.pyramid is None else Windows(stage.pyramid.levels, stage.pyramid.gamma)


def level_shares(stage: Stage, images: int) -> tuple[tuple[float, ...], tuple[float, ...] | None, int | None]:
    """The shares of the pyramid's levels as `LevelShares` takes them. images: of the stage."""
    assert stage.pyramid is not None
    shares, levels = stage.pyramid.shares, stage.pyramid.levels
    if isinstance(shares, Ramped):
        return tuple(shares.first), tuple(shares.last), images
    return tuple(shares) if shares is not None else (1.0, 2.0, 1.0) if levels == 3 else (1.0,) * levels, None, None


def objective_words(stage: Stage) -> str:
    """What a stage asks of the transformer beside the usual, in words: `a pyramid of 3 levels, 1 : 2 : 1; bell weighting`; empty if nothing."""
    said = []
    if stage.expert:
        said.append(f"the expert for {stage.expert} noise")
    if stage.pyramid is not None:
        first, last, _ = level_shares(stage, 1)
        ends = [" : ".join(f"{share:g}" for share in shares) for shares in (first, last) if shares is not None]
        said.append(f"a pyramid of {stage.pyramid.levels} levels, {' to '.join(ends)}" + ("" if stage.pyramid.loss == "original" else ", all alike in the loss"))
    asked = stage.timesteps
    if asked != Timesteps():
        parts = [asked.density or "", "" if asked.shift == "auto" else f"shift {asked.shift if isinstance(asked.shift, str) else format(asked.shift, 'g')}"]
        parts += [f"{asked.range[0]:g} to {asked.range[1]:g}" if asked.range != (0.0, 1.0) else "", "stratified" if asked.stratified else ""]
        if said_of_noise := ", ".join(filter(None, parts)):
            said.append(f"noise levels {said_of_noise}")
    if stage.loss.weighting != "none":
        said.append(f"{stage.loss.weighting} weighting")
    if stage.loss.per == "token":
        said.append("the loss per token")
    if stage.loss.changed is not None:
        said.append("edits weighed where they change")
    said += [f"{name} counts {factor:g}" for name, factor in stage.loss.sources.items()]
    dropout = stage.dropout
    if dropout.mode == "joint" and dropout.prompt:
        said.append(f"without prompt and references {dropout.prompt:.3g} of the time")
    else:
        if dropout.prompt:
            said.append(f"without prompt {dropout.prompt:.3g} of the time")
        if dropout.references:
            said.append(f"without references {dropout.references:.3g} of the time" + (", where the prompt went" if dropout.mode == "nested" else ""))
    return "; ".join(said)


def step_words(stage: Stage) -> str:
    """What a step holds, in words: `32 images`, `65,536 tokens`, `16 to 64 images`."""
    batch = resolved_batch(stage)
    unit, asked = ("images", batch.images) if batch.images is not None else ("tokens", batch.tokens)
    counted = f"{asked.first:,} to {asked.last:,}" if isinstance(asked, Change) else f"{asked:,}"
    return "1 image" if asked == 1 and unit == "images" else f"{counted} {unit}"


def resolution_words(stage: Stage) -> str:
    """The stage's resolutions, in words: `512`, `256, 512 and 768`."""
    sides = [str(level.pixels) for level in resolved_levels(stage)]
    return sides[0] if len(sides) == 1 else f"{', '.join(sides[:-1])} and {sides[-1]}"


def in_bytes(size: str) -> int:
    """`200GB` in bytes. Units: MB, GB, TB of 1000, MiB, GiB, TiB of 1024."""
    found = re.fullmatch(r"([0-9.]+) ?([MGT])(i?)B", size)
    assert found is not None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("MGT".index(found[2]) + 2))


def num_held_out(plan: Plan) -> int:
    """How many rows of each source are held out, where it has ten times as many."""
    return HELD_OUT if plan.evaluate.rows == "auto" else plan.evaluate.rows


def measures_all(plan: Plan) -> bool:
    """Whether every held-out row is measured at each evaluation, rather than as many as the time allows. Where shares follow evaluations they are: what is drawn must not depend on a clock."""
    return plan.evaluate.rows != "auto" or any(isinstance(stage.mix, MixAdaptive) for stage in plan.stages)


def metric_models(plan: Plan) -> dict[MetricName, str]:
    """The metrics that the plan asks for, and the model that each looks with."""
    asked = plan.evaluate.metrics
    return {name: asked[name].model for name in asked} if isinstance(asked, dict) else {name: METRIC_MODELS[name] for name in asked}


def resolved_rate(stage: Stage) -> LearningRate:
    """The stage's learning rate with `warmup` filled in, min(100, 5 % of the steps, rounded down), and `floor` where the schedule has one, 0."""
    rate = stage.lr if isinstance(stage.lr, LearningRate) else LearningRate(peak=stage.lr)
    filled: dict[str, int | float] = {}
    if rate.warmup is None:
        filled["warmup"] = min(100, stage.steps // 20)
    if rate.floor is None and rate.schedule != "constant":
        filled["floor"] = 0.0
    return rate.model_copy(update=filled)


def resolved_storage(stage: Stage) -> Storage:
    """What the stage's frozen weights are stored in."""
    return quantised(stage) or plain_storage(stage)


def quantised(stage: Stage) -> Quantised | None:
    """What the stage's blocks are quantised to; None leaves them as they are."""
    if stage.base is None:
        return "fp8" if stage.precision == "fp8" and stage.train != "full" else None
    return None if stage.base == "fp32" or stage.base == "bf16" else stage.base


def plain_storage(stage: Stage) -> Literal["fp32", "bf16"]:
    """What those of the stage's frozen weights are stored in that are not quantised: all of them, unless the base is nf4, int8 or fp8."""
    if stage.base == "fp32" or stage.base == "bf16":
        return stage.base
    return "bf16" if stage.precision in ("bf16", "fp8") and stage.train != "full" else "fp32"


def resolved_plan(plan: Plan) -> Plan:
    """The same plan with every number that a default computes written as a number: micro-batches, warm-ups, floors, storage, ranks and alphas."""
    stages = [
        stage.model_copy(update={"batch": resolved_batch(stage), "lr": resolved_rate(stage), "base": resolved_storage(stage)})
        for stage in plan.stages
    ]
    adapter = plan.adapter if plan.adapters or all(stage.train == "full" for stage in stages) else plan.adapter.model_copy(update={"alpha": plan.adapter.alpha or float(plan.adapter.rank)})
    adapters = {name: settings.model_copy(update={"alpha": settings.alpha or float(settings.rank)}) for name, settings in plan.adapters.items()}
    for index, stage in enumerate(stages):
        if stage.handoff.adapter != "continue" and not adapters:
            settings = newest(placed_adapters(plan, index)).settings
            handoff = stage.handoff.model_copy(update={"rank": settings.rank, "alpha": settings.alpha})
            stages[index] = stage.model_copy(update={"handoff": handoff})
    return plan.model_copy(update={"stages": stages, "adapter": adapter, "adapters": adapters})


def trackers_of(plan: Plan) -> list[Tracker]:
    """The trackers that a plan asks for."""
    asked = plan.track if isinstance(plan.track, list) else [] if plan.track == "none" else [plan.track]
    return [tracker if isinstance(tracker, Tracker) else Tracker(name=tracker) for tracker in asked]

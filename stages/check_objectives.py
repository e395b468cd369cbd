"""Check of what a stage asks of the transformer: pyramid, noise levels, weights of the loss, dropout, and whether the model's family can do it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from stages.families.facts import FAMILIES, FamilyFacts
from stages.objectives.windows import Windows
from stages.plan import Plan, Ramped, Stage
from stages.problems import Location, Problem, listed, nearest, quoted, written
from stages.reader import ReadPlan


def objective_problems(read: ReadPlan) -> Iterator[Problem]:
    """What is wrong with it in itself."""
    for index, stage in enumerate(read.plan.stages):
        for location, message in (*_of_pyramid(stage), *_of_noise(stage), *_of_loss(stage, read.plan)):
            place: Location = ("stages", index, *location)
            yield Problem(read.place(*place), written(place), message)


def _of_pyramid(stage: Stage) -> Iterator[tuple[Location, str]]:
    if (pyramid := stage.pyramid) is None:
        return
    try:
        Windows(pyramid.levels, pyramid.gamma)
    except ValueError as error:
        yield ("pyramid",), str(error)
    ends = {"from": pyramid.shares.first, "to": pyramid.shares.last} if isinstance(pyramid.shares, Ramped) else {} if pyramid.shares is None else {"": pyramid.shares}
    for end, shares in ends.items():
        location: Location = ("pyramid", "shares", end) if end else ("pyramid", "shares")
        if len(shares) != pyramid.levels:
            yield location, f"{len(shares)} shares for {pyramid.levels} levels; give one for each level, the coarsest first"
        elif not any(shares):
            yield location, "every share is 0, so nothing would be trained"
    if isinstance(pyramid.shares, Ramped) and stage.steps == 1:
        yield ("pyramid", "shares"), "the stage has one step, in which nothing can change; write one list"


def _of_noise(stage: Stage) -> Iterator[tuple[Location, str]]:
    low, high = stage.timesteps.range
    if low >= high:
        yield ("timesteps", "range"), f"[{low:g}, {high:g}] holds nothing; write the lower noise level first"


def _of_loss(stage: Stage, plan: Plan) -> Iterator[tuple[Location, str]]:
    for name in stage.loss.sources:
        if name not in plan.sources:
            yield ("loss", "sources"), f"no source {quoted(name)} (sources: {listed(plan.sources)}){nearest(name, plan.sources)}"
    if (changed := stage.loss.changed) is not None:
        if changed.limits[0] > changed.limits[1]:
            yield ("loss", "changed", "limits"), f"[{changed.limits[0]:g}, {changed.limits[1]:g}]: the least stands first"
        if not any(source.task in ("edit", "control", "other") for source in plan.sources.values()):
            yield ("loss", "changed"), "no source has task edit, control or other, so nothing is edited; remove it"


def precision_notes(read: ReadPlan, family: str) -> Iterator[Problem]:
    """What has been reported of a stage's precision with this family."""
    for index, stage in enumerate(read.plan.stages):
        if stage.precision == "fp16" and (risk := FAMILIES[family].fp16_risk):
            place: Location = ("stages", index, "precision")
            yield Problem(read.place(*place), written(place), f"{family} in fp16: {risk}; bf16 has its range")


def known_problems(read: ReadPlan, family: str, pipeline: str) -> Iterator[Problem]:
    """What of it no model of this pipeline can do."""
    for index, stage in enumerate(read.plan.stages):
        for location, message in _against(stage, family, pipeline, FAMILIES[family]):
            place: Location = ("stages", index, *location)
            yield Problem(read.place(*place), written(place), message)


def family_problems(read: ReadPlan, family: str, pipeline: str, experts: tuple[str, ...], pixel_multiple: int) -> Iterator[Problem]:
    """What of it this model cannot do. experts: of the model; empty where it has one transformer."""
    facts = FAMILIES[family]
    for index, stage in enumerate(read.plan.stages):
        for location, message in (*_against(stage, family, pipeline, facts), *_experts(stage, family, experts, read.plan), *_halved(stage, pixel_multiple)):
            place: Location = ("stages", index, *location)
            yield Problem(read.place(*place), written(place), message)


def _against(stage: Stage, family: str, pipeline: str, facts: FamilyFacts) -> Iterator[tuple[Location, str]]:
    if stage.pyramid is not None and not facts.takes_scaled_positions:
        able = ", ".join(name for name, other in FAMILIES.items() if other.takes_scaled_positions)
        why = "predicts noise, and a pyramid is a straight flow" if facts.objective == "epsilon" else "cannot be told where the tokens of a coarse level lie"
        yield ("pyramid",), f"{family} {why}; these can be trained in levels: {able}"
    if facts.objective == "epsilon":
        if stage.timesteps.shift not in ("auto", "none"):
            yield ("timesteps", "shift"), f"{family} predicts noise over its own table of levels, which no shift belongs to; write none, or leave it out"
        if stage.loss.weighting == "bell":
            yield ("loss", "weighting"), f"'bell' weighs a straight flow, and {family} predicts noise; choose min_snr or none"
    elif stage.loss.weighting == "min_snr":
        yield ("loss", "weighting"), f"'min_snr' is for models that predict noise, and {family} predicts a velocity; choose bell or none"
    if stage.precision == "fp16" and facts.fp16:
        yield ("precision",), f"{family} cannot be trained in fp16: {facts.fp16}; choose bf16 or fp32"
    if pipeline in facts.prompts_see_references and (stage.dropout.references or (stage.dropout.mode == "joint" and stage.dropout.prompt)):
        yield ("dropout",), f"the text encoder of {pipeline} looks at the references, so they cannot be left out by themselves; give dropout.prompt with mode: independent"


def _experts(stage: Stage, family: str, experts: tuple[str, ...], plan: Plan) -> Iterator[tuple[Location, str]]:
    if stage.expert is not None and stage.expert not in experts:
        yield ("expert",), f"this model ({family}) has one transformer for all noise levels; remove it"
    elif stage.expert is not None and len({other.expert for other in plan.stages}) > 1:
        if stage.train == "full":
            yield ("train",), "'full' of one of two transformers is not handed on to a stage of the other; train an adapter"
        if stage.handoff.adapter == "merge":
            yield ("handoff", "adapter"), "'merge' into one of two transformers is not handed on to a stage of the other; choose continue"
    if experts and stage.expert is None:
        yield ("name",), f"the model has {len(experts)} transformers; say which one this stage trains, expert: {' or '.join(experts)}"


def _halved(stage: Stage, pixel_multiple: int) -> Iterator[tuple[Location, str]]:
    """Resolutions that the levels of a pyramid do not divide."""
    if stage.pyramid is None:
        return
    multiple = pixel_multiple * 2 ** (stage.pyramid.levels - 1)
    sides: dict[Location, int] = {("resolution",): stage.resolution} if isinstance(stage.resolution, int) else {}
    if isinstance(stage.resolution, list):
        sides |= {("resolution", number, "pixels"): level.pixels for number, level in enumerate(stage.resolution)}
    for location, side in sides.items():
        if side % pixel_multiple == 0 and side % multiple:
            near = [str(size) for size in (side // multiple * multiple, (side // multiple + 1) * multiple) if size]
            yield location, f"{side} cannot be halved {stage.pyramid.levels - 1} times into multiples of {pixel_multiple}, as the {stage.pyramid.levels} levels of `pyramid` need; try {' or '.join(near)}"

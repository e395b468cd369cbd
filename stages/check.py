"""Check: whether a plan that is well formed can be carried out. Imports no torch; takes well under a second."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from stages.check_model import model_notes, model_problems
from stages.check_sources import source_notes, source_problems
from stages.plan import Batch, LearningRate, Stage
from stages.problems import Location, PlanError, Problem, listed, nearest, quoted, written
from stages.reader import ReadPlan
from stages.unheeded import unheeded

__all__ = ["check_plan", "plan_notes"]


def check_plan(read: ReadPlan, root: Path) -> list[Problem]:
    """Everything for which the plan cannot be carried out, sorted by place; empty if it is sound.

    root: the folder that relative paths start from. Looks at names, headers and first rows of what lies there, never at the network.
    """
    problems: list[Problem] = []
    for check in (_unheeded, _mixes, _stage_names, _batches, _rates, _trained, _handoffs, _patterns, _accuracy):
        problems += check(read)
    problems += source_problems(read, root)
    problems += model_problems(read, root)
    return list(PlanError(problems).problems)


def plan_notes(read: ReadPlan, root: Path) -> list[Problem]:
    """What is worth knowing and stops nothing: sources that no stage draws from, and what was not checked."""
    notes = [*_never_drawn(read), *source_notes(read), *model_notes(read, root)]
    return list(PlanError(notes).problems)


def _at_name(read: ReadPlan, location: Location, message: str) -> Problem:
    """A problem with a field as such, at its name."""
    return Problem(read.name_place(*location), written(location), message)


def _at_value(read: ReadPlan, location: Location, message: str) -> Problem:
    """A problem with what is given, at the value."""
    return Problem(read.place(*location), written(location), message)


def _unheeded(read: ReadPlan) -> Iterator[Problem]:
    """What is given and nothing would listen to. A null is as good as nothing given."""
    given = read.plan.model_dump(mode="json")
    for location, reason in unheeded(read.plan):
        value: object = given
        for step in location:
            assert isinstance(value, dict | list)
            value = value[step]  # type: ignore[index]
        if location in read.places and value is not None:
            yield _at_name(read, location, reason)


def _mixes(read: ReadPlan) -> Iterator[Problem]:
    sources = read.plan.sources
    if "power" in sources:
        yield _at_name(read, ("sources", "power"), "'power' is a word of `mix`; give the source another name")
    for index, stage in enumerate(read.plan.stages):
        location = ("stages", index, "mix")
        if not isinstance(stage.mix, dict):
            continue
        unknown = [name for name in stage.mix if name not in sources]
        for name in unknown:
            message = f"no source {quoted(name)} (sources: {listed(sources)}){nearest(name, sources)}"
            yield Problem(read.name_place(*location, name), written(location), message)
        if not stage.mix:
            yield _at_value(read, location, f"names no source (sources: {listed(sources)})")
        elif not unknown and not any(stage.mix.values()):
            yield _at_value(read, location, "every share is 0, so nothing would be drawn")


def _stage_names(read: ReadPlan) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, stage in enumerate(read.plan.stages):
        if (before := first.setdefault(stage.name, index)) != index:
            place = read.place("stages", before, "name")
            yield _at_value(read, ("stages", index, "name"), f"a stage is called '{stage.name}' already, at {place}")


def _batches(read: ReadPlan) -> Iterator[Problem]:
    for index, stage in enumerate(read.plan.stages):
        batch = stage.batch
        if isinstance(batch, Batch) and batch.micro is not None and batch.images % batch.micro:
            near = [size for size in range(1, min(batch.micro, 1024) + 1) if batch.images % size == 0][-3:]
            message = f"{batch.micro} does not divide images: {batch.images}; try {' or '.join(map(str, near))}"
            yield _at_value(read, ("stages", index, "batch", "micro"), message)


def _rates(read: ReadPlan) -> Iterator[Problem]:
    for index, stage in enumerate(read.plan.stages):
        if isinstance(stage.lr, LearningRate):
            for field, message in _rate(stage.lr, stage.steps):
                yield _at_value(read, ("stages", index, "lr", field), message)


def _rate(rate: LearningRate, steps: int) -> Iterator[tuple[str, str]]:
    """Field and message of everything that is wrong with a learning rate."""
    if rate.warmup is not None and rate.warmup > steps:
        yield "warmup", f"{rate.warmup} steps of warm-up, and the stage has {steps}"
    elif rate.warmup and rate.schedule != "constant" and rate.warmup >= steps - 1:
        yield "warmup", f"{rate.warmup} steps of warm-up leave none of the stage's {steps} for schedule: {rate.schedule}"
    if rate.warmup_from > rate.peak:
        yield "warmup_from", f"{rate.warmup_from:g} is above the peak, {rate.peak:g}; a warm-up rises"
    if rate.floor is not None and rate.floor > rate.peak:
        yield "floor", f"{rate.floor:g} is above the peak, {rate.peak:g}"


def _trained(read: ReadPlan) -> Iterator[Problem]:
    """What each stage trains, against what stands before it and what its weights are stored in."""
    teacher: Stage | None = None  # the first stage that trains the adapter
    for index, stage in enumerate(read.plan.stages):
        if stage.base == "bf16" and stage.precision == "fp32":
            message = "bf16 weights are not multiplied in fp32; choose precision bf16 or fp16, or base fp32"
            yield _at_value(read, ("stages", index, "base"), message)
        if stage.train != "full":
            teacher = teacher or stage
            continue
        if teacher is not None:
            message = (
                f"'full' after stage '{teacher.name}', which trains the adapter: the adapter belongs to the weights that it was "
                "trained on; put this stage before it, or begin another run with `start`"
            )
            yield _at_value(read, ("stages", index, "train"), message)
        if stage.base == "bf16":
            message = "bf16 would round most of what train: full learns away; choose fp32, or leave it out"
            yield _at_value(read, ("stages", index, "base"), message)


def _handoffs(read: ReadPlan) -> Iterator[Problem]:
    for index, (before, stage) in enumerate(pairwise(read.plan.stages), start=1):
        location = ("stages", index, "handoff")
        if stage.handoff.optimizer != "reset" and (before.train == "full") != (stage.train == "full"):
            trained = ["full weights" if each.train == "full" else "the adapter" for each in (before, stage)]
            message = f"'{stage.handoff.optimizer}', but stage '{before.name}' trains {trained[0]} and this one {trained[1]}; choose reset"
            yield _at_value(read, (*location, "optimizer"), message)
        if stage.handoff.ema == "keep" and stage.ema is not None and before.ema is None:
            message = f"'keep', but stage '{before.name}' has no `ema`; give it one, or choose reset"
            yield _at_value(read, (*location, "ema"), message)


def _patterns(read: ReadPlan) -> Iterator[Problem]:
    lists: dict[Location, str | Sequence[str]] = {("adapter", "targets"): read.plan.adapter.targets}
    lists |= {("stages", index, "train"): stage.train for index, stage in enumerate(read.plan.stages)}
    for location, patterns in lists.items():
        if isinstance(patterns, str):
            continue
        if not patterns:
            yield _at_value(read, location, "no pattern is given")
        for number, pattern in enumerate(patterns):
            if (reason := _not_a_pattern(pattern)) is not None:
                yield _at_value(read, (*location, number), f"{quoted(pattern)} is not a regular expression: {reason}")


def _not_a_pattern(pattern: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "nested too deep"
    return None


def _accuracy(read: ReadPlan) -> Iterator[Problem]:
    accuracy = read.plan.evaluate.accuracy
    if accuracy is None:
        return
    sources, location = read.plan.sources, ("evaluate", "accuracy", "source")
    if accuracy.source not in sources:
        message = f"no source {quoted(accuracy.source)} (sources: {listed(sources)}){nearest(accuracy.source, sources)}"
        yield _at_value(read, location, message)
    elif (task := sources[accuracy.source].task) != "text_to_image":
        yield _at_value(read, location, f"source '{accuracy.source}' has task {task}; samples are made from captions alone")


def _never_drawn(read: ReadPlan) -> Iterator[Problem]:
    for name in read.plan.sources:
        mixes = [stage.mix for stage in read.plan.stages]
        if all(isinstance(mix, Mapping) and not mix.get(name) for mix in mixes):
            yield _at_name(read, ("sources", name), "no stage draws from this source")

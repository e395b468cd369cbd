"""Check: whether a plan that is well formed can be carried out. Imports no torch; takes well under a second."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

from mixing.where import WhereError, parse
from stages.check_adapters import adapter_problems
from stages.check_computing import computing_problems
from stages.check_hub import hub_problems
from stages.check_metrics import metric_notes, metric_problems
from stages.check_model import model_notes, model_problems
from stages.check_objectives import objective_problems
from stages.check_optimizers import optimizer_problems
from stages.check_sources import source_notes, source_problems
from stages.check_tracking import tracking_problems
from stages.placed import target_of
from stages.plan import Batch, Change, LearningRate, MicroTokens, MixAdaptive, MixRamp, Stage
from stages.problems import MOST_TOLD, Location, PlanError, Problem, listed, nearest, quoted, written
from stages.reader import ReadPlan
from stages.resolved import quantised, still_mixes
from stages.unheeded import unheeded

__all__ = ["check_plan", "plan_notes"]


def check_plan(read: ReadPlan, root: Path) -> list[Problem]:
    """Everything for which the plan cannot be carried out, sorted by place; empty if it is sound.

    root: the folder that relative paths start from. Looks at names, headers and first rows of what lies there, never at the network.
    """
    problems: list[Problem] = []
    for check in (_unheeded, _takes, _mixes, _stage_names, _batches, _rates, _trained, _handoffs, adapter_problems, _patterns, _accuracy, objective_problems, optimizer_problems, computing_problems, hub_problems, tracking_problems):
        problems += islice(check(read), MOST_TOLD)
    problems += source_problems(read, root)
    problems += islice(model_problems(read, root), MOST_TOLD)
    problems += metric_problems(read, root)
    return list(PlanError(problems).problems)


def plan_notes(read: ReadPlan, root: Path) -> list[Problem]:
    """What is worth knowing and stops nothing: sources that no stage draws from, and what was not checked."""
    notes = [*_never_drawn(read), *source_notes(read), *model_notes(read, root), *metric_notes(read, root)]
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


_WORDS_OF_MIX = ("power", "from", "to", "adaptive")


def _mixes(read: ReadPlan) -> Iterator[Problem]:
    sources = read.plan.sources
    for word in _WORDS_OF_MIX:
        if word in sources:
            yield _at_name(read, ("sources", word), f"'{word}' is a word of `mix`; give the source another name")
    for index, stage in enumerate(read.plan.stages):
        location: Location = ("stages", index, "mix")
        names = ("from", "to") if isinstance(stage.mix, MixRamp) else ("adaptive",) if isinstance(stage.mix, MixAdaptive) else ("",)
        ends = dict(zip(names, still_mixes(stage), strict=True))
        for end, mix in ends.items():
            yield from _mix(read, (*location, end) if end else location, mix)
        if isinstance(stage.mix, MixRamp):
            if stage.mix.first == stage.mix.last:
                yield _at_value(read, location, "from and to are the same mix; write it once")
            if stage.steps == 1:
                yield _at_value(read, location, "the stage has one step, in which nothing can change; write one mix")
        if isinstance(stage.mix, MixAdaptive):
            yield from _adaptive(read, location, stage, stage.mix)
        unknown = [name for name, source in sources.items() if source.stream and source.rows is None and not all(isinstance(mix, Mapping) for mix in ends.values())]
        for name in unknown:
            yield _at_value(read, location, f"a mix by size needs to know how many rows the stream '{name}' has; give sources.{name}.rows, or shares by name")


def _adaptive(read: ReadPlan, location: Location, stage: Stage, mix: MixAdaptive) -> Iterator[Problem]:
    """Why shares could not follow what is measured."""
    every = read.plan.evaluate.every
    if not every:
        yield _at_value(read, location, "shares follow the evaluations inside a stage, and evaluate.every is not given; set it, to a tenth of the stage's steps, say")
    elif every >= stage.steps:
        yield _at_value(read, location, f"evaluate.every is {every:,}, and the stage has {stage.steps:,} steps, so that no evaluation stands inside it; make it smaller")
    elif mix.follows == "progress" and (stage.steps - 1) // every <= mix.lookback:
        inside = (stage.steps - 1) // every
        yield _at_value(read, location, f"{inside} evaluations stand inside the stage, and `lookback: {mix.lookback}` needs {mix.lookback + 1} before anything changes; make evaluate.every or lookback smaller")
    if not read.plan.evaluate.rows:
        yield _at_value(read, location, "shares follow held-out losses, and evaluate.rows is 0; hold rows out, 64 say")
    if mix.band == 1:
        yield _at_value(read, location, "band: 1 lets no share move; write a larger one, or the mix itself")
    if mix.floor >= mix.ceiling:
        yield _at_value(read, location, f"floor {mix.floor:g} is not below ceiling {mix.ceiling:g}")
    if mix.follows == "progress" and mix.targets is not None:
        yield _at_value(read, (*location, "targets"), "only `follows: balance` compares with targets; remove them, or write that")
    if mix.follows == "balance":
        drawn = [name for name in read.plan.sources if not isinstance(mix.adaptive, Mapping) or mix.adaptive.get(name)]
        if missing := [name for name in drawn if name not in (mix.targets or {})]:
            yield _at_value(read, location, f"`follows: balance` compares each source with the loss that is in reach, and targets has none for {listed(missing)}; without one it would follow the noisiest")
        for name in mix.targets or {}:
            if name not in drawn:
                yield _at_value(read, (*location, "targets", name), f"this mix draws no source {quoted(name)} (it draws: {listed(drawn)}){nearest(name, drawn)}")
    for field in ("lookback", "tolerance", "epochs") if mix.follows == "balance" else ():
        if (*location, field) in read.places:
            yield _at_name(read, (*location, field), "only `follows: progress` heeds it; remove it")


def _mix(read: ReadPlan, location: Location, mix: object) -> Iterator[Problem]:
    """What is wrong with shares, by name or by size."""
    sources = read.plan.sources
    if not isinstance(mix, Mapping):
        if sources and not any(source.repeat for source in sources.values()):
            yield _at_value(read, location, "every source has repeat: 0, so nothing would be drawn")
        return
    unknown = [name for name in mix if name not in sources]
    for name in unknown:
        message = f"no source {quoted(name)} (sources: {listed(sources)}){nearest(name, sources)}"
        yield Problem(read.name_place(*location, name), written(location), message)
    if not mix:
        yield _at_value(read, location, f"names no source (sources: {listed(sources)})")
    elif not unknown and not any(mix.values()):
        yield _at_value(read, location, "every share is 0, so nothing would be drawn")


def _takes(read: ReadPlan) -> Iterator[Problem]:
    """Which rows of its sources the plan asks for."""
    for name, source in read.plan.sources.items():
        location: Location = ("sources", name)
        if source.where is not None:
            try:
                parse(source.where)
            except WhereError as error:
                yield _at_value(read, (*location, "where"), str(error))
        if (take := source.take) is None:
            continue
        if (take.count is None) == (take.fraction is None):
            found = "neither is given" if take.count is None else "both are given"
            yield _at_value(read, (*location, "take"), f"count or fraction says how much is taken, and {found}")
        if take.by == "stratified" and take.column is None:
            yield _at_value(read, (*location, "take", "by"), "'stratified' by which column? give take.column")


def _stage_names(read: ReadPlan) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, stage in enumerate(read.plan.stages):
        if (before := first.setdefault(stage.name, index)) != index:
            place = read.place("stages", before, "name")
            yield _at_value(read, ("stages", index, "name"), f"a stage is called '{stage.name}' already, at {place}")


def _batches(read: ReadPlan) -> Iterator[Problem]:
    for index, stage in enumerate(read.plan.stages):
        if not isinstance(stage.batch, Batch):
            continue
        batch, location = stage.batch, ("stages", index, "batch")
        if (batch.images is None) == (batch.tokens is None):
            found = "neither is given" if batch.images is None else "both are given"
            yield _at_value(read, location, f"images or tokens says what a step holds, and {found}")
            continue
        if isinstance(batch.images, int) and isinstance(batch.micro, int) and batch.images % batch.micro:
            near = [size for size in range(1, min(batch.micro, 1024) + 1) if batch.images % size == 0][-3:]
            message = f"{batch.micro} does not divide images: {batch.images}; try {' or '.join(map(str, near))}"
            yield _at_value(read, (*location, "micro"), message)
        if isinstance(batch.micro, MicroTokens) and batch.tokens is not None:
            least = min(batch.tokens.first, batch.tokens.last) if isinstance(batch.tokens, Change) else batch.tokens
            if batch.micro.tokens > least:
                yield _at_value(read, (*location, "micro", "tokens"), f"{batch.micro.tokens:,} tokens are more than a step has, {least:,}")
        for unit in ("images", "tokens"):
            asked = getattr(batch, unit)
            if isinstance(asked, Change) and (stage.steps == 1 or asked.first == asked.last):
                why = "the stage has one step" if stage.steps == 1 else "it stays the same"
                yield _at_value(read, (*location, unit), f"from {asked.first:,} to {asked.last:,}, and {why}; write one number")
            if isinstance(asked, Change) and stage.steps**2 * abs(asked.last - asked.first) >= 2**61:  # the order counts in 64 bits
                yield _at_value(read, (*location, unit), f"a change by {abs(asked.last - asked.first):,} over {stage.steps:,} steps is more than can be counted; change it in several stages")


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
        if blocks := quantised(stage):
            message = f"{blocks} holds weights that stay as they are, and train: full changes them; choose fp32, or leave it out"
            yield _at_value(read, ("stages", index, "base"), message)
        if stage.base == "bf16":
            message = "bf16 would round most of what train: full learns away; choose fp32, or leave it out"
            yield _at_value(read, ("stages", index, "base"), message)
        if stage.offload:
            message = "weights that are kept off the device stay as they are, and train: full changes them; remove it, or train the adapter"
            yield _at_value(read, ("stages", index, "offload"), message)


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
    lists |= {("adapters", name, "targets"): settings.targets for name, settings in read.plan.adapters.items()}
    lists |= {("stages", index, "train"): stage.train for index, stage in enumerate(read.plan.stages)}
    for location, patterns in lists.items():
        if isinstance(patterns, str):
            continue
        if not patterns:
            yield _at_value(read, location, "no pattern is given")
        for number, entry in enumerate(patterns):
            pattern = target_of(entry, list(read.plan.adapters))[1] if location[0] == "stages" else entry
            if pattern is not None and (reason := _not_a_pattern(pattern)) is not None:
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
        mixes = [mix for stage in read.plan.stages for mix in still_mixes(stage)]
        if all(isinstance(mix, Mapping) and not mix.get(name) for mix in mixes):
            yield _at_name(read, ("sources", name), "no stage draws from this source")

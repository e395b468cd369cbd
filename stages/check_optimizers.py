"""Check a plan's optimizers: rates that they can use, and whether what is to be kept at a handoff is there. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from stages.plan import LearningRate
from stages.problems import Location, Problem, written
from stages.reader import ReadPlan

_LEAST_FACTOR, _MOST_FACTOR = 0.1, 10.0


def optimizer_problems(read: ReadPlan) -> Iterator[Problem]:
    """What is wrong with the optimizers of the stages."""
    yield from _factors(read)
    yield from _kept(read)


def _at(read: ReadPlan, location: Location, message: str) -> Problem:
    return Problem(read.place(*location), written(location), message)


def _factors(read: ReadPlan) -> Iterator[Problem]:
    """Rates that were meant for AdamW, where Prodigy finds the step size itself."""
    for index, stage in enumerate(read.plan.stages):
        if stage.optimizer.name != "prodigy":
            continue
        location: Location = ("stages", index, "lr")
        whole = isinstance(stage.lr, LearningRate)
        peak = stage.lr.peak if isinstance(stage.lr, LearningRate) else stage.lr
        if not _LEAST_FACTOR <= peak <= _MOST_FACTOR:
            message = f"{peak:g}, and with optimizer prodigy it is a factor of the step size that prodigy finds, {_LEAST_FACTOR:g} to {_MOST_FACTOR:g}; write 1, or choose adamw"
            yield _at(read, (*location, "peak") if whole else location, message)
        if isinstance(stage.lr, LearningRate) and stage.lr.schedule == "linear":
            yield _at(read, (*location, "schedule"), "'linear', and prodigy is meant for a factor that is constant or falls by a cosine; choose one of these")


def _kept(read: ReadPlan) -> Iterator[Problem]:
    """What another optimizer left behind, or what belongs to other weights."""
    for index, (before, stage) in enumerate(pairwise(read.plan.stages), start=1):
        asked, location = stage.handoff.optimizer, ("stages", index, "handoff", "optimizer")
        if asked == "reset" or (before.train == "full") != (stage.train == "full"):  # the latter is refused already
            continue
        if before.optimizer.name != stage.optimizer.name:
            message = f"'{asked}', but stage '{before.name}' has optimizer {before.optimizer.name} and this one {stage.optimizer.name}, whose state is another; choose reset"
            yield _at(read, location, message)
        elif stage.optimizer.name == "prodigy" and (before.train != stage.train or (stage.handoff.adapter == "grow" and read.plan.adapter.variant == "dora")):
            why = f"stage '{before.name}' trains others" if before.train != stage.train else "with adapter: grow most begin anew"
            yield _at(read, location, f"'{asked}', but prodigy's step size belongs to all of its weights together, and {why}; choose reset")

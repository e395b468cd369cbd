"""Evaluation size: how many held-out rows are measured, so that all evaluations of a run take no more than a part of the time that its training takes.

It is chosen once, before the first row is measured, and kept in the run folder: a run that is gone on with measures the same rows. Nothing that is learnt depends on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixing.buckets import Signature
from mixing.selected import Selection
from stages.checked import DamagedError, checked, ignore, read_checked
from stages.checkpoint import write_whole
from stages.encode import kept_latents
from stages.evaluate import STRATA, Portion, Way, chunks, measure, portions
from stages.families.family import Family
from stages.feed import Sizes, main_shapes, sizes_at, stage_mixture
from stages.log_files import log_events
from stages.plan import Plan, Stage
from stages.recomputation import recomputed_every
from stages.shown import show

_SOURCES_TIMED = 4


@dataclass(frozen=True)
class Size:
    """What was chosen."""

    rows: int
    """So many rows of each source are measured, where it has as many."""
    held_out: int
    """The most that a source has."""
    evaluations: int
    """How many the run makes, those of the base among them."""
    seconds: float
    """What they take together, as estimated."""
    training_seconds: float
    """What the steps of all stages take, as estimated."""
    timed: str
    """What the training was estimated by: `dry steps`, or `forward passes`."""

    @property
    def share(self) -> float:
        """Of the time of training."""
        return self.seconds / self.training_seconds

    def save(self, folder: Path) -> None:
        """Write it into a run folder."""
        write_whole(_file(folder), checked({**asdict(self), "share": self.share}))

    @staticmethod
    def load(folder: Path, say: Callable[[str], object] = ignore) -> Size | None:
        """What a run folder says; None if nothing was chosen yet, and where it is damaged, which is said through `say`."""
        try:
            saved = read_checked(_file(folder))
        except DamagedError as error:
            say(str(error))
            return None
        if saved is None or not all(name in saved for name in Size.__annotations__):
            return None
        return Size(**{name: saved[name] for name in Size.__annotations__})


def _file(folder: Path) -> Path:
    return folder / "evaluations" / "size.json"


@dataclass(frozen=True)
class StageCost:
    """What a stage is reckoned to take."""

    evaluations: int
    """Its own, and that of its base if it is the first that needs it."""
    tokens_of: Callable[[int], float]
    """Of an evaluation of so many rows a source: tokens of the process that has the most."""
    training_seconds: float


def choose(stages: Sequence[StageCost], seconds_per_token: float, held_out: int, limit: float, timed: str) -> Size:
    """The most rows, a multiple of 8, whose evaluations take no more than a part `limit` of the training; 8 if none do.

    seconds_per_token: of an evaluation. held_out: the most rows that a source has.
    """
    training, evaluations = sum(stage.training_seconds for stage in stages), sum(stage.evaluations for stage in stages)
    most = math.ceil(held_out / STRATA) * STRATA
    for rows in range(most, 0, -STRATA):
        seconds = seconds_per_token * sum(stage.evaluations * stage.tokens_of(rows) for stage in stages)
        if seconds <= limit * training:
            break
    return Size(rows, held_out, evaluations, seconds, training, timed)


@dataclass(frozen=True)
class Timed:
    """Seconds for a token, measured on held-out rows."""

    row: float
    """In an evaluation, reading and encoding (from the cache, where there is one) among it."""
    forward: float
    """In the transformer's forward pass alone."""


@torch.no_grad()
def time_rows(family: Family, transformer: nn.Module, selections: Mapping[str, Selection], way: Way, sizes: Sizes, in_step: AbstractContextManager[None]) -> Timed:
    """Measure the first rows of the first sources twice, and time the second time: by then the device is warm, and what can be cached is. sizes: as of `sizes_at`, of the stage."""
    few = {name: selection for name, selection in selections.items() if len(selection.held_out)}
    few = {name: few[name] for name in list(few)[:_SOURCES_TIMED]}
    with in_step:
        for _ in range(2):
            with _forward_passes(transformer, family.device) as passes:
                began, tokens = now(family.device), 0
                for chunk in chunks(portions(few, STRATA), few, way.shapes, way.seed, lambda row: None, kept_latents(family)):
                    measure(family, transformer, chunk, show(family, chunk.batch), way)
                    batch = chunk.batch
                    signature = Signature(batch.targets.size, tuple(reference.size for reference in batch.references), len(batch.regions))
                    tokens += len(batch.keys) * sizes.tokens(signature)
                seconds = now(family.device) - began
    return Timed(seconds / max(1, tokens), sum(passes) / max(1, tokens))


@contextmanager
def _forward_passes(transformer: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Inside, the seconds of each of the transformer's forward passes are noted."""
    began = 0.0
    passes: list[float] = []

    def before(module: nn.Module, inputs: Any) -> None:
        nonlocal began
        began = now(device)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        passes.append(now(device) - began)

    hooks = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def now(device: torch.device) -> float:
    """The time at which the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def passes_of(stage: Stage, parameters: int, device: torch.device) -> float:
    """How many forward passes a step's forward and backward passes take as long as: the gradients of activations and of weights take one each, and frozen weights have none."""
    every = recomputed_every(stage.checkpointing, parameters, device)
    return (3.0 if stage.train == "full" else 2.0) + (1 / every if every else 0.0)


def stage_costs(
    plan: Plan, selections: Mapping[str, Selection], sizes: Sizes, seconds_per_token: Sequence[float], processes: int, bases: Sequence[str]
) -> list[StageCost]:
    """What each stage is reckoned to take. seconds_per_token: of each stage's training. bases: what each stage's base evaluation is called; several stages may share one.

    Raises ValueError where a stage's mix draws nothing.
    """
    costs = []
    classes = {name: {row: selection.class_of(row) for row in selection.held_out.tolist()} for name, selection in selections.items()}
    dealt = cache(lambda rows: portions(selections, rows))
    for index, stage in enumerate(plan.stages):
        shapes, of_stage = main_shapes(stage, sizes.multiple), sizes_at(stage, sizes)
        tokens = {name: {row: of_stage.tokens(shapes.signature(row_class)) for row, row_class in rows.items()} for name, rows in classes.items()}
        busiest = _busiest(dealt, tokens, processes)
        inside = (stage.steps - 1) // plan.evaluate.every if plan.evaluate.every else 0
        mixture = stage_mixture(stage, selections, sizes, seed=plan.seed, drawn_before={})
        training = mixture.tokens_before(stage.steps) / processes * seconds_per_token[index]
        costs.append(StageCost(2 + inside + (bases[index] not in bases[:index]), busiest, training))
    return costs


def _busiest(dealt: Callable[[int], Sequence[Portion]], tokens: Mapping[str, Mapping[int, int]], processes: int) -> Callable[[int], float]:
    """The tokens of the process that has the most, of so many rows a source. dealt: as `portions` deals so many rows."""
    return lambda rows: max(sum(tokens[portion.source][row] for portion in dealt(rows)[rank::processes] for row in portion.rows) for rank in range(processes))


def time_taken(folder: Path) -> tuple[float, float]:
    """Seconds that a run's evaluations took, and its steps, as metrics.jsonl in its folder tells them."""
    seconds = training = 0.0
    reached: dict[str, int] = {}
    for event in log_events(folder, "metrics"):
        if event["event"] == "eval":
            seconds += event["seconds"]
        elif event["event"] == "step" and event["images_per_second"]:
            steps = event["step"] - reached.get(event["stage"], 0)
            reached[event["stage"]] = event["step"]
            training += steps * event["images"] / event["images_per_second"]
    return seconds, training

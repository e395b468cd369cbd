"""Placed: which adapters stand on the model in each stage, and in which form; it follows from the plan alone. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from stages.plan import Adapter, Handoff, Plan

DEFAULT = "default"
"""What the plan's only adapter is called in peft and in checkpoints; those that are stacked on it are stack2, stack3 ..."""


@dataclass(frozen=True)
class Placed:
    """One adapter of a stage."""

    settings: Adapter
    """Its settings, with rank and alpha as numbers."""
    frozen: bool = False
    """Whether a later adapter was stacked on it: then it stays as it is, whatever `train` says."""
    turn: int = 0
    """How often an adapter of this name was folded into the base before: fresh pairs are drawn by it."""
    place: str = "adapter"
    """Where its settings stand in the plan."""

    @property
    def scale(self) -> float:
        """What the product of its pairs is multiplied by."""
        return scale_of(self.settings)


def scale_of(settings: Adapter) -> float:
    """What the product of an adapter's pairs is multiplied by: alpha / rank, of rsLoRA alpha / sqrt(rank). Source: Kalajdzievski 2023, arXiv:2312.03732."""
    alpha = settings.alpha or settings.rank
    return alpha / math.sqrt(settings.rank) if settings.variant == "rslora" else alpha / settings.rank


def placed_adapters(plan: Plan, index: int) -> Mapping[str, Placed]:
    """The adapters that stand on the model in a stage, by name; those that a handoff brings are named after the handoff.

    index: the stage's number, from 0; -1 for what stands before the first. Of a model with experts those that stages of this expert train, since
    each expert is a transformer of its own.
    """
    everything, expert = all_adapters(plan, index), plan.stages[max(index, 0)].expert
    owners = experts_of(plan)
    own = {name: placed for name, placed in everything.items() if index < 0 or owners.get(name, {expert}) == {expert}}
    return MappingProxyType(own)


def experts_of(plan: Plan) -> dict[str, set[str | None]]:
    """The experts whose stages name an adapter in `train`, by the adapter's name; empty where the plan has one adapter, or all stages one expert."""
    if not plan.adapters or len({stage.expert for stage in plan.stages}) < 2:
        return {}
    found: dict[str, set[str | None]] = {name: set() for name in plan.adapters}
    for stage in plan.stages:
        for entry in stage.train if isinstance(stage.train, list) else ():
            name, _ = target_of(entry, list(plan.adapters))
            if name is not None:
                found[name].add(stage.expert)
    return found


def all_adapters(plan: Plan, index: int) -> Mapping[str, Placed]:
    """As `placed_adapters`, of all experts: what a stage's checkpoints hold."""
    placed: Mapping[str, Placed] = {DEFAULT: Placed(_filled(plan.adapter))}
    if plan.adapters:
        placed = {name: Placed(_filled(settings), place=f"adapters.{name}") for name, settings in plan.adapters.items()}
    for number, stage in enumerate(plan.stages[: index + 1]):
        if stage.train != "full" and (number > 0 or plan.start is not None):
            placed = _handed_on(placed, stage.handoff, plan, is_start=number == 0)
    return placed


def newest(placed: Mapping[str, Placed]) -> Placed:
    """The adapter that was put on last: the one that learns where the plan has one."""
    return list(placed.values())[-1]


def _handed_on(placed: Mapping[str, Placed], handoff: Handoff, plan: Plan, *, is_start: bool) -> Mapping[str, Placed]:
    """What stands after a handoff."""
    way = handoff.adapter
    if way == "continue":
        return placed
    if way == "merge" and plan.adapters:
        return {name: replace(each, turn=each.turn + 1) for name, each in placed.items()}
    name, last = list(placed.items())[-1]
    if way == "grow":
        rank = handoff.rank or (plan.adapter.rank if is_start else 2 * last.settings.rank)
        return {**placed, name: replace(last, settings=_of_rank(plan, rank, handoff.alpha))}
    if way == "shrink":
        rank = handoff.rank or (plan.adapter.rank if is_start else max(1, total_rank(placed) // 2))
        return {DEFAULT: Placed(_of_rank(plan, rank, handoff.alpha), turn=last.turn)}
    fresh = _of_rank(plan, handoff.rank or plan.adapter.rank, handoff.alpha)
    if way == "merge":
        return {DEFAULT: Placed(fresh, turn=last.turn + 1)}
    return {**{each: below if below.frozen else replace(below, frozen=True) for each, below in placed.items()}, f"stack{len(placed) + 1}": Placed(fresh, turn=last.turn)}


def total_rank(placed: Mapping[str, Placed]) -> int:
    """The rank of all adapters joined."""
    return sum(each.settings.rank for each in placed.values())


def _of_rank(plan: Plan, rank: int, alpha: float | None) -> Adapter:
    """The plan's adapter with another rank; its alpha in proportion, unless it is given."""
    whole = _filled(plan.adapter)
    assert whole.alpha is not None
    return whole.model_copy(update={"rank": rank, "alpha": alpha or whole.alpha * rank / whole.rank})


def _filled(settings: Adapter) -> Adapter:
    return settings.model_copy(update={"alpha": settings.alpha or float(settings.rank)})


def target_of(entry: str, names: Sequence[str]) -> tuple[str | None, str | None]:
    """An entry of `train` as the name of an adapter and a pattern; either is None where the entry has none.

    `cond` is an adapter, `cond:to_q` a pattern on its layers, `to_q` one on all adapters' layers; so is what stands before a colon that names none.
    """
    if entry in names:
        return entry, None
    before, colon, pattern = entry.partition(":")
    return (before, pattern) if colon and before in names else (None, entry)

"""Follower: an adaptive mix under way. What its stage has seen and changed so far; the rule itself is `mixing.adaptive`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from mixing.adaptive import Decision, Following, Rule, Seen, follow
from mixing.mixture import StageMixture
from mixing.selected import Selection
from stages.measured import Measured
from stages.plan import MixAdaptive, Plan, Stage
from stages.problems import PlanError


@dataclass
class Follower:
    """Where an adaptive mix stands."""

    rule: Rule
    every: int
    """Steps between the evaluations that it follows."""
    following: Following
    changes: dict[int, dict[str, Fraction]] = field(default_factory=dict)
    """From which step on which shares."""

    def next_border(self, step: int, steps: int) -> int:
        """The step before which no shares change, from a step on; the stage's last at most."""
        return min(steps, (step // self.every + 1) * self.every)

    def after(self, measured: Measured, mixture: StageMixture, step: int, *, warming: bool) -> Decision:
        """What an evaluation after so many steps of the stage leads to; remembered here. The same on every process."""
        counts = mixture.order.counts(np.asarray(step)).tolist()
        images = dict.fromkeys(self.rule.begins, 0)
        for cell, count in zip(mixture.order.cells, counts, strict=True):
            images[cell.source] += count
        drawn = dict.fromkeys(self.rule.begins, 0)
        for (source, _), count in mixture.order.drawn_after(step).items():
            drawn[source] += count
        epochs = {name: count / selection.size if (selection := mixture.selections[name]).stream is None else 0.0 for name, count in drawn.items()}
        losses = {name: measured.losses[name] for name in self.rule.begins}
        decision = follow(self.rule, self.following, Seen(step, losses, images), warming=warming, epochs=epochs)
        self.following = decision.following
        if decision.changed:
            self.changes[step] = decision.shares
        return decision

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        changes = [[step, {name: [share.numerator, share.denominator] for name, share in shares.items()}] for step, shares in self.changes.items()]
        return {"changes": changes, **self.following.state()}


def changes_of(state: Mapping[str, Any] | None) -> dict[int, dict[str, Fraction]]:
    """The changes that a checkpoint's `Follower.state` tells; none for None."""
    return {int(step): {name: Fraction(*parts) for name, parts in shares.items()} for step, shares in (state or {"changes": []})["changes"]}


def changes_every(plan: Plan, stage: Stage) -> int:
    """After how many steps a stage's shares can change, each time; 0 for never."""
    return plan.evaluate.every or 0 if isinstance(stage.mix, MixAdaptive) else 0


def open_follower(plan: Plan, stage: Stage, mixture: StageMixture, selections: Mapping[str, Selection], state: Mapping[str, Any] | None) -> Follower | None:
    """What follows a stage's evaluations; None where nothing does. state: of the checkpoint that the stage goes on from.

    Raises PlanError if a source that is drawn has no held-out rows.
    """
    mix = stage.mix
    if not isinstance(mix, MixAdaptive):
        return None
    begins = mixture.order.asked_at(0)
    if blind := [name for name in begins if not len(selections[name].held_out)]:
        raise PlanError.at(f"stages.{stage.name}.mix", f"shares follow held-out losses, and source '{blind[0]}' has no held-out row; give it more rows, or shares that stay")
    rule = Rule(begins, mix.follows, mix.band, mix.floor, mix.ceiling, mix.change, mix.lookback, mix.tolerance, mix.epochs, mix.targets)
    if state is None:
        return Follower(rule, changes_every(plan, stage), Following(begins))
    return Follower(rule, changes_every(plan, stage), Following.of_state(state), changes_of(state))

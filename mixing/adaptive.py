"""Adaptive: shares that follow held-out losses, inside a band around the plan's own. A pure function of what was measured: nothing is drawn.

Two rules. *progress* gives more to what gets better by being drawn, and to what got clearly worse than it was; its signal is the absolute change of the
loss between paired evaluations, because a loss of flow matching is mostly irreducible and its level says how noisy a task is, not how much is left to
learn. *balance* gives more to what is further above a loss that is known to be in reach.

Inside the band p >= w / c every source is drawn at least 1 / c as often as the plan says, which bounds what following can cost it.
Sources: ADO (Jiang et al. 2024, arXiv:2410.11820) for the credit of the square root, DoReMi (Xie et al. 2023, arXiv:2305.10429) for excess losses by
exponentiated gradients, DRO's bands for the projection; the leaky sum and the hinge are our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

Values = Mapping[str, float]
"""A number for each source."""

_PARTS = 10_000  # shares are whole numbers of these: what processes round differently does not reach the order
_LEAST_DRAWN = 0.02  # a source that was drawn less has no more credit for its progress
_MOST_LEANING = 5.0
_SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Rule:
    """How shares follow."""

    begins: Values
    """The plan's own shares, adding up to 1: what the band is around."""
    follows: Literal["progress", "balance"] = "progress"
    band: float = 2.0
    """By which factor a share may be larger or smaller than the plan's."""
    floor: float = 0.02
    """No share is below it, or below the plan's own where that is smaller."""
    ceiling: float = 0.95
    """No share is above it, or above the plan's own where that is larger."""
    change: float = 1.25
    """By which factor a share may change at once."""
    lookback: int = 3
    """progress: over how many evaluations progress is measured."""
    tolerance: float = 0.1
    """progress: how far, relative to its lowest, a loss may rise before its source gets more."""
    epochs: float = 10.0
    """progress: a source whose rows were drawn more often gets no more for a loss that rises, for that is overfitting."""
    targets: Values | None = None
    """balance: the loss of each source that is in reach."""

    def limits(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest share of each source."""
        return {name: (min(share, max(self.floor, share / self.band)), max(share, min(self.ceiling, share * self.band))) for name, share in self.begins.items()}


@dataclass(frozen=True)
class Seen:
    """One evaluation."""

    step: int
    """Steps of the stage made before."""
    losses: Mapping[str, Values]
    """Source to held-out row to loss."""
    images: Mapping[str, int]
    """Images of each source that the stage had drawn."""


@dataclass(frozen=True)
class Following:
    """What is remembered from one evaluation to the next."""

    shares: Values
    """Those in force, adding up to 1."""
    seen: tuple[Seen, ...] = ()
    """The last evaluations of the stage, as many as the rule looks back and one more."""
    lowest: Mapping[str, float] | None = None
    """The lowest loss of each source in the stage."""
    gains: Values | None = None
    """progress: a slow mean of what each source's draws brought."""
    leanings: Values | None = None
    """What the plan's shares are multiplied by, as logarithms."""

    def state(self) -> dict[str, Any]:
        """As JSON, every float exact."""
        seen = [{"step": each.step, "losses": {name: dict(rows) for name, rows in each.losses.items()}, "images": dict(each.images)} for each in self.seen]
        parts = {name: dict(values) if values is not None else None for name, values in (("lowest", self.lowest), ("gains", self.gains), ("leanings", self.leanings))}
        return {"shares": dict(self.shares), "seen": seen, **parts}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Following:
        """What `state` gave."""
        seen = tuple(Seen(int(each["step"]), each["losses"], each["images"]) for each in state["seen"])
        return cls(state["shares"], seen, state["lowest"], state["gains"], state["leanings"])


@dataclass(frozen=True)
class Decision:
    """What an evaluation led to."""

    following: Following
    changed: bool
    why: str
    """Why the shares stayed, or what they follow, in words."""
    signals: Values
    """progress: how much each loss fell since the evaluation that is looked back to; balance: how far each is above its target, relative to it."""
    at_limit: tuple[str, ...] = ()
    """Sources whose shares would have gone further."""

    @property
    def shares(self) -> dict[str, Fraction]:
        """The shares from here on, exact."""
        return exact(self.following.shares)


def exact(shares: Values) -> dict[str, Fraction]:
    """Shares as whole ten-thousandths that add up to 1, by the largest remainder; none becomes 0."""
    whole = {name: max(1, math.floor(share * _PARTS)) for name, share in shares.items()}
    left = _PARTS - sum(whole.values())
    order = sorted(shares, key=lambda name: (whole[name] - shares[name] * _PARTS, name))
    for name in order[:left] if left > 0 else ():
        whole[name] += 1
    for _ in range(max(0, -left)):  # of many that were lifted to one part
        largest = max(whole, key=lambda name: (whole[name], name))
        whole[largest] -= 1
    return {name: Fraction(parts, _PARTS) for name, parts in whole.items()}


def follow(rule: Rule, following: Following, seen: Seen, *, warming: bool, epochs: Values) -> Decision:
    """What an evaluation makes of the shares.

    warming: whether the learning rate still rises: the fall of that time says nothing of what is left, so what was seen in it is not looked back to.
    epochs: how often each source's rows were drawn in the whole run.
    """
    losses = {name: _mean(seen.losses[name].values()) for name in rule.begins}
    if rule.follows == "balance":
        return _balance(rule, following, seen, losses, warming=warming)
    if warming:
        return Decision(Following(following.shares, leanings=following.leanings), False, "the learning rate is still rising", {})
    kept = (*following.seen, seen)[-(rule.lookback + 1) :]
    lowest = {name: min(loss, (following.lowest or losses)[name]) for name, loss in losses.items()}
    stays = Following(following.shares, kept, lowest, following.gains, following.leanings)
    if len(kept) <= rule.lookback:
        return Decision(stays, False, f"evaluation {len(kept)} of the {rule.lookback + 1} that it looks back over", {})
    first = kept[0]
    falls = {name: _paired(first.losses[name], seen.losses[name]) for name in rule.begins}
    signals = {name: fall for name, (fall, _) in falls.items()}
    if all(abs(fall) < _SURE * error for fall, error in falls.values()):
        return Decision(stays, False, "no loss changed by twice its standard error", signals)
    drawn = {name: seen.images.get(name, 0) - first.images.get(name, 0) for name in rule.begins}
    part = {name: max(count / max(1, sum(drawn.values())), _LEAST_DRAWN) for name, count in drawn.items()}
    worse = {name: max(0.0, loss - (1 + rule.tolerance) * lowest[name]) if epochs.get(name, 0.0) <= rule.epochs else 0.0 for name, loss in losses.items()}
    before = following.gains or dict.fromkeys(rule.begins, 0.0)
    gains = {name: 0.6 * before[name] + 0.4 * share * (max(signals[name], 0.0) / math.sqrt(part[name]) + worse[name]) for name, share in rule.begins.items()}
    largest = max(gains.values())
    pushes = {name: gain / largest if largest > 0 else 0.0 for name, gain in gains.items()}
    return _leant(rule, stays, pushes, 0.5, signals, gains)


def _balance(rule: Rule, following: Following, seen: Seen, losses: Values, *, warming: bool) -> Decision:
    assert rule.targets is not None
    excess = {name: max(0.0, losses[name] - rule.targets[name]) / rule.targets[name] for name in rule.begins}
    if warming:
        return Decision(following, False, "the learning rate is still rising", excess)
    return _leant(rule, Following(following.shares, (seen,), None, None, following.leanings), excess, 0.1, excess, None)


def _leant(rule: Rule, following: Following, pushes: Values, weight: float, signals: Values, gains: Values | None) -> Decision:
    """The shares after a push to each source, of which the mean one is none."""
    mean = math.fsum(share * pushes[name] for name, share in rule.begins.items())
    before = following.leanings or dict.fromkeys(rule.begins, 0.0)
    kept = 0.9 if rule.follows == "progress" else 1.0  # old progress fades; what is above its target is so until it is not
    leanings = {name: min(_MOST_LEANING, max(-_MOST_LEANING, kept * before[name] + weight * (pushes[name] - mean))) for name in rule.begins}
    wanted = {name: share * math.exp(leanings[name]) for name, share in rule.begins.items()}
    limits = {
        name: (max(low, following.shares[name] / rule.change), min(high, following.shares[name] * rule.change)) for name, (low, high) in rule.limits().items()
    }
    shares = projected(wanted, limits)
    total = math.fsum(wanted.values())
    at_limit = tuple(name for name, (low, high) in limits.items() if (shares[name] <= low and wanted[name] / total < low) or (shares[name] >= high and wanted[name] / total > high))
    changed = exact(shares) != exact(following.shares)
    why = "what gets better by being drawn gets more" if rule.follows == "progress" else "what is furthest above its target gets more"
    kept_shares = shares if changed else following.shares
    return Decision(Following(kept_shares, following.seen, following.lowest, gains, leanings), changed, why if changed else "the shares are where they should be", signals, at_limit)


def projected(wanted: Values, limits: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Shares in proportion to what is wanted, each inside its limits, adding up to 1: by bisection of the factor. The lower limits add up to at most 1, the upper ones to 1 or more."""
    low, high = 0.0, max(upper / wanted[name] for name, (_, upper) in limits.items())

    def at(factor: float) -> dict[str, float]:
        return {name: min(upper, max(lower, factor * wanted[name])) for name, (lower, upper) in limits.items()}

    for _ in range(100):
        middle = (low + high) / 2
        if math.fsum(at(middle).values()) < 1:
            low = middle
        else:
            high = middle
    shares = at(high)
    total = math.fsum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _paired(before: Values, after: Values) -> tuple[float, float]:
    """By how much the loss of the same rows fell, and the standard error of that."""
    falls = [before[row] - after[row] for row in before if row in after]
    if not falls:
        return 0.0, math.inf
    mean = _mean(falls)
    if len(falls) == 1:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((fall - mean) ** 2 for fall in falls) / (len(falls) - 1) / len(falls))


def _mean(values: Sequence[float] | Any) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)

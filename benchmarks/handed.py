"""Shares that are handed to a run, in the place of those that its evaluations would lead to: what a placebo is made with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any
from unittest.mock import patch

from mixing.adaptive import Decision, Following, Rule, exact, projected
from mixing.keys import key
from mixing.mixture import StageMixture
from stages import open_leg
from stages.feed import Changes
from stages.follower import Follower, open_follower
from stages.measured import Measured


@dataclass(kw_only=True)
class Handed(Follower):
    """Changes shares when and as it is told, and looks at nothing."""

    given: Changes

    def after(self, measured: Measured, mixture: StageMixture, step: int, *, warming: bool) -> Decision:
        """What is given for this step, if anything."""
        if step not in self.given:
            return Decision(self.following, False, "nothing is given for this step", {})
        self.following = Following({name: float(share) for name, share in self.given[step].items()})
        self.changes[step] = dict(self.given[step])
        return Decision(self.following, True, "as it is given", {})


@contextlib.contextmanager
def handed(given: Changes | None) -> Iterator[None]:
    """Inside, adaptive stages are given their shares; None leaves them to what they measure."""
    if given is None:
        yield
        return

    def opened(*arguments: Any) -> Follower | None:
        follower = open_follower(*arguments)
        return follower and Handed(**{each.name: getattr(follower, each.name) for each in fields(Follower)}, given=given)

    with patch.object(open_leg, "open_follower", opened):
        yield


def of_other_sources(changes: Sequence[tuple[int, Mapping[str, float]]], begins: Mapping[str, float], seed: int) -> dict[int, dict[str, Fraction]]:
    """The changes of an adaptive run, handed to other sources: a placebo, that moves as much at the same steps, and by what another source's loss said.

    What a share was multiplied by goes to the next source of a ring that is drawn by seed; then shares are put back into the rule's band. begins: the plan's, adding up to 1.
    """
    ring = sorted(begins, key=lambda name: key(seed, "placebo", name))
    of = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    limits = Rule(begins).limits()
    return {step: exact(projected({name: begins[name] * shares[of[name]] / begins[of[name]] for name in begins}, limits)) for step, shares in changes}

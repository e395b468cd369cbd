"""Guard: what is done about a step whose losses or gradient are no numbers, or stand far above those of the steps before. Imports no torch.

A spike is judged by the mean loss of a step and by the norm of its gradient, each beside its own last steps, in logarithms, for both are larger by a factor, not by an
amount: a noise level or a source may bring three times the loss of another. Usual is the median, and the spread is 1.4826 times the median distance from it, which one
value in a thousand cannot move. Where steps of a rare kind stand above the others the median distance does not know of them; so a spike must besides stand twice as far
above the median as any of the steps remembered. A spike is not remembered; several in a row are a new level, and then all is remembered anew.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.plan import Guard as Asked

REMEMBERED = 256  # steps; of a source that is drawn in every hundredth step two or three are among them
FEWEST = 64  # before so many there is nothing to judge by
COUNTED = 100  # steps among which those are counted that were skipped
LASTING = 5  # spikes in a row that are a new level
_LEAST_SPREAD = 0.05  # of a logarithm: losses that hardly vary at all may do so a little
_TO_SPREAD = 1.4826  # of a normal distribution, the standard deviation over the median distance from the median
_ABOVE_ALL = 2.0


class Course:
    """A number over the last steps, all of them above zero, and whether the next one is a spike."""

    def __init__(self, logarithms: Iterable[float] = (), above: int = 0) -> None:
        self._logarithms, self._above = list(logarithms), above

    @property
    def usual(self) -> float | None:
        """The median of what is remembered; None before there is enough to judge by."""
        return math.exp(statistics.median(self._logarithms)) if len(self._logarithms) >= FEWEST else None

    def takes(self, value: float, sigmas: float) -> bool:
        """Remember a value, unless it is a spike, and say whether it is one. sigmas: how many times the spread it must stand above the median."""
        if not 0 < value < math.inf:  # a pair of images without a difference has no loss, and a number that is none is another affair
            return False
        found = math.log(value)
        is_spike = self._is_above(found, sigmas)
        self._above = self._above + 1 if is_spike else 0
        if self._above >= LASTING:
            self._logarithms, self._above = [found], 0
        elif not is_spike:
            self._logarithms = [*self._logarithms[1 - REMEMBERED :], found]
        return is_spike

    def _is_above(self, found: float, sigmas: float) -> bool:
        if len(self._logarithms) < FEWEST or found <= (largest := max(self._logarithms)):
            return False
        median = statistics.median(self._logarithms)
        spread = max(_LEAST_SPREAD, _TO_SPREAD * statistics.median(abs(each - median) for each in self._logarithms))
        return found > median + max(sigmas * spread, _ABOVE_ALL * (largest - median))

    def state(self) -> dict[str, Any]:
        """All that it remembers, for a checkpoint."""
        return {"logarithms": self._logarithms, "above": self._above}


@dataclass(frozen=True)
class Verdict:
    """What is said of a step before it is made."""

    not_finite: tuple[str, ...]
    """Of `loss` and `gradient` those that are no numbers."""
    spikes: tuple[str, ...]
    """Those that are spikes."""
    is_made: bool
    """Whether the optimizer may make it."""


class Guard:
    """Judges the steps of one stage, in their order. On every process the same, for all hand it the same numbers."""

    def __init__(self, asked: Asked, *, scales: bool) -> None:
        """scales: whether the stage's losses are scaled for fp16, which then deals itself with gradients that are no numbers: it skips the step and lowers the scale."""
        self._asked, self._scales = asked, scales
        self._courses = {"loss": Course(), "gradient": Course()}
        self._skipped: list[int] = []

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """What becomes of step number `step`, counted from 1. loss: the mean over its images; norm: of its gradient, before it is clipped."""
        values = {"loss": loss, "gradient": norm}
        not_finite = tuple(name for name, value in values.items() if not math.isfinite(value) and not (name == "gradient" and self._scales))
        asked = self._asked
        spikes: tuple[str, ...] = ()
        if not not_finite and asked.on_spike != "ignore":
            spikes = tuple(name for name, value in values.items() if self._courses[name].takes(value, asked.sigmas))
        is_made = not not_finite and not (spikes and asked.on_spike == "skip")
        self._skipped = [each for each in self._skipped if each > step - COUNTED] + ([] if is_made else [step])
        return Verdict(not_finite, spikes, is_made)

    @property
    def num_skipped(self) -> int:
        """Steps among the last `COUNTED` that were skipped."""
        return len(self._skipped)

    @property
    def is_over_limit(self) -> bool:
        """Whether that is more than the plan lets pass."""
        return self.num_skipped > self._asked.skips

    def usual(self, name: str) -> float | None:
        """What `loss` or `gradient` mostly is; None before there is enough to judge by."""
        return self._courses[name].usual

    def state(self) -> dict[str, Any]:
        """All that it remembers, for a checkpoint."""
        return {"skipped": self._skipped, **{name: course.state() for name, course in self._courses.items()}}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; None from one of a version that had no guard."""
        if state is not None:
            self._skipped = [int(step) for step in state["skipped"]]
            self._courses = {name: Course(state[name]["logarithms"], int(state[name]["above"])) for name in self._courses}

"""Problems: what is wrong with a plan, and where."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

Location = tuple[str | int, ...]
"""Where a value stands in a plan: ("stages", 1, "mix", "edit")."""

MOST_TOLD = 500
"""Problems of one kind that are looked for; what comes after them says nothing new, and takes time."""
_MOST_PRINTED = 50


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    place: str
    """`plans/x.yaml:18:16`, line and column counted from 1; or the file, or the flag: `--set stages.refine.steps=x`."""
    where: str
    """The same place in the plan's own words, `stages[1].precision`; empty for the plan as a whole."""
    message: str
    """What was found, what is allowed, what to do."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.where, self.message) if part)


class PlanError(ValueError):
    """A plan that cannot be carried out; the message has one line for each problem, sorted by place."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(dict.fromkeys(problems), key=_order))
        super().__init__(self.problems)

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[:_MOST_PRINTED]]
        if left := len(self.problems) - len(lines):
            lines.append(f"and {left} more")
        return "\n".join(lines)

    @classmethod
    def at(cls, place: str, message: str) -> PlanError:
        """One problem of the plan as a whole, or of something beside it."""
        return cls([Problem(place, "", message)])


class RowsError(PlanError):
    """Rows that cannot be used, found by one process while it reads; the others know nothing of them."""


class RunError(RuntimeError):
    """A run that cannot go on, though plan and data are right; the message says what was found and what to do."""


class LaunchError(RunError):
    """What was launched is not what takes part, or is told something that would be ignored."""


def _order(problem: Problem) -> tuple[int, str, int, int, str, str]:
    placed = re.fullmatch(r"(.*):(\d+):(\d+)", problem.place, re.DOTALL)
    if placed is None:
        return (1, problem.place, 0, 0, problem.where, problem.message)
    return (0, placed[1], int(placed[2]), int(placed[3]), problem.where, problem.message)


def written(location: Sequence[str | int]) -> str:
    """A location as messages write it: stages[1].mix."""
    parts = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location]
    return "".join(parts).removeprefix(".")


def quoted(text: str) -> str:
    """A word between quotes, unprintable characters written out, a long one cut."""
    short = text if len(text) <= 80 else text[:77] + "..."
    return f"'{short}'" if short.isprintable() else repr(short)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the name most like this one, or nothing where none is like it. Of many names the first hundred are compared."""
    allowed = {each.lower(): each for each in islice(names, 100)}
    close = difflib.get_close_matches(name.lower()[:100], list(allowed), n=1)
    return f"; did you mean '{allowed[close[0]]}'?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Names with commas between them; of many, the first twenty."""
    words = list(names)
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "") or "none"

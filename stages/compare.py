"""Compare two runs of one family of plans: the held-out loss of each source, paired row by row, and what each run took.

    python -m stages.compare RUN_A RUN_B                      two run folders
    python -m stages.compare A1,A2,A3 B1,B2,B3                two arms of several seeds, paired by seed
    options: --stage NAME (look at this stage)  --json

Compared are the ends of both runs where both are done; else the last point that both have come to, which is said.
Losses of one held-out row may be subtracted where seed, model, resolution and way are the same, for then noise and noise level are. What is not paired is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from stages.comparable import chosen_evaluations, notes_on_pair, refuse_unpaired
from stages.evaluations import paired_rows
from stages.plan_changes import PlanChange, differences, plan_changes
from stages.printable import PrintableConsole, printable
from stages.problems import PlanError, listed
from stages.report.paired import mean_change
from stages.report.record import Change
from stages.side import OpenedRun, Side, open_side, side_at

FEWEST_SEEDS = 5
"""Below so many seeds three standard errors are no verdict: of four, one time in seventeen they are passed by chance."""


@dataclass(frozen=True)
class Difference:
    """How the second side's held-out loss differs from the first one's."""

    a: float
    """Loss of the first side, over what is compared."""
    b: float
    change: Change | None
    """b - a with its standard error: over rows, or over seeds. None of a single row."""
    counted: int
    """Rows, or seeds, that both sides have."""
    lower: int
    """In how many of them the second side is lower."""
    of_seeds: bool = False

    @property
    def verdict(self) -> str:
        """`better` or `worse` of the second side, if it differs by more than three standard errors; else the empty string. Over fewer than five seeds always that."""
        return "" if self.change is None or (self.of_seeds and self.counted < FEWEST_SEEDS) else self.change.verdict


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed, each at an evaluation."""

    a: Side
    b: Side
    sources: Mapping[str, Difference]
    mean: Difference
    """Of all sources that both have, each counting alike."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What two runs, or two arms of several seeds, differ in. A console and a notebook show it as tables."""

    pairs: tuple[Pair, ...]
    sources: Mapping[str, Difference]
    mean: Difference
    plan: tuple[PlanChange, ...]
    """Fields in which the plans differ, and what else the runs were carried out with."""
    notes: tuple[str, ...]
    """What has to be known beside the numbers."""

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "pairs": [{"seed": pair.a.run.plan.seed, **{name: _side_json(side) for name, side in (("a", pair.a), ("b", pair.b))}} for pair in self.pairs],
            "over": "seeds" if self.mean.of_seeds else "rows",
            "sources": {name: _difference_json(difference) for name, difference in self.sources.items()},
            "mean": _difference_json(self.mean),
            "plan": [asdict(change) for change in self.plan],
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from stages.comparison_tables import comparison_tables

        yield from comparison_tables(self)

    def _repr_html_(self) -> str:
        from stages.as_html import to_html
        from stages.comparison_tables import comparison_tables

        return to_html(comparison_tables(self))


def compare(a: Path | str | Sequence[Path | str], b: Path | str | Sequence[Path | str], stage: str | None = None) -> Comparison:
    """Compare two run folders, or two lists of them, which are paired by seed. stage: the one to look at; left out, the ends of the runs, or as far as both have come.

    Raises PlanError, saying where and what to do, if a folder is no run's or if what was measured is not paired.
    """
    arms = [[open_side(Path(folder)) for folder in ([arm] if isinstance(arm, Path | str) else arm)] for arm in (a, b)]
    matched, notes = _matched(arms[0], arms[1])
    pairs = tuple(_pair(first, second, stage) for first, second in matched)
    sources = [name for name in pairs[0].sources if all(name in pair.sources for pair in pairs)]
    if len(pairs) == 1:
        found, mean = pairs[0].sources, pairs[0].mean
    else:
        found = {name: _over_seeds([pair.sources[name] for pair in pairs]) for name in sources}
        mean = _over_seeds([_mean({name: pair.sources[name] for name in sources}) for pair in pairs])
        notes += [f"the runs of {name} differ among themselves in more than the seed: {listed(changed)}" for name, arm in zip("AB", arms, strict=True) if (changed := _changed_within(arm))]
    notes += dict.fromkeys(note for pair in pairs for note in pair.notes)
    first, second = matched[0]
    changes = [*plan_changes(first.plan, second.plan), *differences(first.environment, second.environment, "environment")]
    return Comparison(pairs, found, mean, tuple(changes), tuple(notes))


def _matched(first: Sequence[OpenedRun], second: Sequence[OpenedRun]) -> tuple[list[tuple[OpenedRun, OpenedRun]], list[str]]:
    """Runs of one seed side by side, and what to say of those that have no other."""
    by_seed: list[dict[int, OpenedRun]] = [{}, {}]
    for known, arm in zip(by_seed, (first, second), strict=True):
        for run in arm:
            if run.plan.seed in known:
                raise PlanError.at(str(run.folder), f"seed {run.plan.seed} is that of {known[run.plan.seed].folder} too, and runs are paired by seed; name one of them")
            known[run.plan.seed] = run
    seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
    if not seeds:
        said = " and ".join(listed(map(str, known)) for known in by_seed)
        cure = f"carry one of them out again with the other's: --set seed={next(iter(by_seed[0]))} --out FOLDER"
        raise PlanError.at(str(second[0].folder), f"the runs have other seeds ({said}), so held-out rows were measured with other noise, and nothing is paired; {cure}")
    left = [run.name for known, other in zip(by_seed, reversed(by_seed), strict=True) for seed, run in known.items() if seed not in other]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in seeds], [f"left out, for the other side has no run of the seed: {listed(left)}"] if left else []


def _changed_within(arm: Sequence[OpenedRun]) -> list[str]:
    """Fields beside the seed in which runs of one arm differ."""
    return [field for field in dict.fromkeys(change.field for run in arm[1:] for change in plan_changes(arm[0].plan, run.plan)) if field != "seed"]


def _pair(first: OpenedRun, second: OpenedRun, stage: str | None) -> Pair:
    """The paired difference of two runs of one seed. Raises PlanError if nothing in them is paired."""
    a, b = (side_at(run, evaluation) for run, evaluation in zip((first, second), chosen_evaluations(first, second, stage), strict=True))
    refuse_unpaired(a, b)
    sources, notes = {}, notes_on_pair(a, b)
    for name in a.rows.losses:
        if name in b.rows.losses:
            rows = paired_rows(a.rows, b.rows, name)
            if rows:
                before, after = zip(*rows, strict=True)
                changes = [new - old for old, new in rows]
                sources[name] = Difference(_average(before), _average(after), mean_change(changes), len(rows), sum(each < 0 for each in changes))
    if not sources:
        raise PlanError.at(str(second.folder), f"no held-out row was measured at the same noise level in both runs (of {first.folder}); compare runs on the same rows")
    return Pair(a, b, sources, _mean(sources), tuple(notes))


def _mean(sources: Mapping[str, Difference]) -> Difference:
    """Over sources, each counting alike; their errors are independent, for rows and noise are their own."""
    found = list(sources.values())
    known = [each.change for each in found if each.change is not None]
    a, b = _average([each.a for each in found]), _average([each.b for each in found])
    change = Change(b - a, math.sqrt(math.fsum(each.error**2 for each in known)) / len(known)) if len(known) == len(found) else None
    return Difference(a, b, change, sum(each.counted for each in found), sum(each.lower for each in found))


def _over_seeds(found: Sequence[Difference]) -> Difference:
    """The mean over seeds, with its standard error over them."""
    changes = [each.b - each.a for each in found]
    return Difference(_average([each.a for each in found]), _average([each.b for each in found]), mean_change(changes), len(found), sum(each < 0 for each in changes), of_seeds=True)


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _difference_json(difference: Difference) -> dict[str, Any]:
    change = difference.change
    measured = {"difference": change.value if change else difference.b - difference.a, "error": change.error if change else None}
    return {"a": difference.a, "b": difference.b, **measured, "verdict": difference.verdict, "counted": difference.counted, "lower": difference.lower}


def _side_json(side: Side) -> dict[str, Any]:
    evaluation = side.evaluation
    return {"folder": str(side.run.folder), "stage": evaluation.stage, "step": evaluation.step, "kind": evaluation.kind, "weights": evaluation.weights, **asdict(side.cost)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 where nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m stages.compare", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("a", metavar="RUN_A", help="a run's folder, or several with commas between them")
    parser.add_argument("b", metavar="RUN_B", help="the other's")
    parser.add_argument("--stage", metavar="NAME", help="compare at the end of this stage, or as far as both have come in it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    try:
        found = compare(_folders(given.a), _folders(given.b), given.stage)
    except PlanError as error:
        print(printable(error), file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        PrintableConsole().print(found)
    return 0


def _folders(given: str) -> list[str]:
    """Folders with commas between them; a folder whose own name has one is taken as it is."""
    return [given] if Path(given).exists() else [part for part in given.split(",") if part]


if __name__ == "__main__":
    sys.exit(main())

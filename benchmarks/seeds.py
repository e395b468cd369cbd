"""Numbers over seeds: means with their standard errors, differences of the same seed, and tables of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Runs = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Arm to seed to figure to number."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    mean: float
    error: float
    """Its standard error; NaN of one seed."""


def mean_of(values: Sequence[float]) -> Mean:
    """Of at least one number."""
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    error = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan
    return Mean(mean, error)


def differences(runs: Runs, arm: str, against: str, figure: str) -> list[float]:
    """By how much a figure of one arm is above that of another, for each seed that both have, in the order of the seeds."""
    return [runs[arm][seed][figure] - runs[against][seed][figure] for seed in sorted(runs[arm]) if seed in runs.get(against, {})]


@dataclass(frozen=True)
class Figure:
    """One that is shown."""

    name: str
    words: str
    percent: bool = False
    digits: int = 4
    """Behind the point, if it is no percentage."""

    def shown(self, mean: Mean, signed: bool = False) -> str:
        """With its error."""
        factor, digits = (100, 1) if self.percent else (1, self.digits)
        sign = "+" if signed else ""
        error = "" if math.isnan(mean.error) else f" ± {factor * mean.error:.{digits}f}"
        return f"{factor * mean.mean:{sign}.{digits}f}{error}"


def table_of_means(runs: Runs, figures: Sequence[Figure]) -> list[list[str]]:
    """A row for each arm, the head first."""
    head = ["arm", *(figure.words + (", %" if figure.percent else "") for figure in figures)]
    return [head, *([arm, *(figure.shown(mean_of([seen[figure.name] for seen in by_seed.values()])) for figure in figures)] for arm, by_seed in runs.items())]


def table_of_differences(runs: Runs, figures: Sequence[Figure], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """By how much the first arm of each pair is above the second one, seed by seed, and for how many seeds it is better; pairs without a seed in common are left out."""
    rows = [["difference", *(figure.words + (", points" if figure.percent else "") for figure in figures)]]
    for arm, other in pairs:
        if arm not in runs or not differences(runs, arm, other, figures[0].name):
            continue
        row = [f"{arm} - {other}"]
        for figure in figures:
            values = differences(runs, arm, other, figure.name)
            better = sum(value > 0 if figure.percent else value < 0 for value in values)
            row.append(f"{figure.shown(mean_of(values), signed=True)} ({better}/{len(values)})")
        rows.append(row)
    return rows


def plain(table: Sequence[Sequence[str]]) -> str:
    """A table to read in a terminal."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in table)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The same for a page."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])

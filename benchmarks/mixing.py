"""What the mixture costs, and what other libraries' mixing costs, side by side in one run on the same rows.

    python -m benchmarks.mixing                       # a few minutes on two cores
    python -m benchmarks.mixing --quick               # the same in miniature: that it runs
    options: --rows N  --seconds S  --json FILE

Five tables: rows per second beside bare random reads of the same rows; positions per second of the order alone; time to the first batch far into a
stage; memory by sources and rows; how far images drawn are from the shares asked for. What is compared takes turns (A/B/A/B); medians are shown,
with the lowest and the highest. Other libraries are measured where they are installed (`benchmarks/peers.py` says how).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.memory import Held, harmonic, measure, mixture_of, per_row
from benchmarks.peers import PEERS, First, in_turns
from benchmarks.rows import SHARES, computed_facts, computed_sources, load_tables, make_folders, make_tables, open_folder
from benchmarks.speed import IMAGES, OURS, Speed, micro_batches, stage, throughput
from mixing.mixture import StageMixture
from mixing.selected import Choice, Selection, select

AT_ONCE = 64  # steps that are worked out together, as `mixing.mixture` does


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    sides: tuple[int, ...]
    """Of the square images that are measured; the last also as files."""
    rows: int
    """Of the tables with images."""
    seconds: float
    """For each contender in a case of throughput, about."""
    rounds: int
    draws: int
    """Images over which shares are counted."""
    position: int
    """Where a stage is gone on with."""
    repeats: int
    """How often a first batch is timed."""
    sources: tuple[int, ...]
    lengths: tuple[int, ...]
    """Rows of the mixtures whose memory is measured; the first is what the others are compared with."""


FULL = Settings((256, 512), 1500, 7.0, 9, 200_000, 1_000_000, 25, (5, 50, 500), (10**3, 10**5, 10**6, 10**7))
QUICK = Settings((256, 512), 150, 0.3, 3, 6_400, 20_000, 5, (5, 50), (10**3, 10**5))


@dataclass(frozen=True)
class Pace:
    """How fast an order is worked out."""

    case: str
    cells: int
    seconds_to_make: float
    positions_per_second: float
    """Which source, micro-batch and draw stand there."""
    lowest: float
    highest: float
    rows_per_second: float
    """The same with the row of each draw."""


@dataclass(frozen=True)
class Deviation:
    """The largest |images drawn of a source - its share x images drawn| of any source."""

    case: str
    contender: str
    at_every_image: float
    at_every_step: float


# --- the order alone --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A mixture of rows that hold no images of their own."""

    name: str
    shares: tuple[int, ...]
    aspects: int = 1
    references: int = 0
    """Rows have 0 to so many."""

    def mixture(self, folder: Path) -> StageMixture:
        """A stage over 100,000 rows, divided among the sources."""
        facts = folder / f"rows-of-{self.aspects}-{self.references}"
        if not facts.exists():
            computed_facts(facts, 100_000, self.aspects, self.references)
        names = [f"source-{number}" for number in range(len(self.shares))]
        selections = {source.name: select(source, Choice(), 0) for source in computed_sources(facts, names)}
        return mixture_of(selections, self.shares, images=IMAGES, max_aspect=4.0)


def order_cases(sources: Sequence[int]) -> list[Case]:
    """The mixtures whose order is measured: the first of plain shares, and one of many shapes."""
    plain = [Case(f"{number} sources", tuple(SHARES.values()) if number == 5 else harmonic(number)) for number in sources]
    return [plain[0], Case("25/50/25", (25, 50, 25)), *plain[1:], Case("5 sources, 9 aspects, 0 to 2 references", tuple(SHARES.values()), 9, 2)]


def pace(case: Case, draws: int, rounds: int, folder: Path) -> Pace:
    """Positions per second, a few steps at a time as training works them out."""
    case.mixture(folder)
    start = time.perf_counter()
    made = case.mixture(folder)
    seconds = time.perf_counter() - start
    order, rates, row_rates = made.order, [], []
    for turn in range(rounds):
        first, last = turn * draws // IMAGES, (turn + 1) * draws // IMAGES
        start = time.perf_counter()
        drawn = [order.steps(step, min(AT_ONCE, last - step)) for step in range(first, last, AT_ONCE)]
        rates.append(draws / (time.perf_counter() - start))
        for part in drawn:
            for number in np.unique(part.cell).tolist():
                order.cells[number].row(part.draw[part.cell == number], 1)
        row_rates.append(draws / (time.perf_counter() - start))
    return Pace(case.name, len(order.cells), seconds, median(rates), min(rates), max(rates), median(row_rates))


# --- the first batch --------------------------------------------------------------------------------------------------------------------


def first_batches(selections: Mapping[str, Selection], settings: Settings, folder: Path) -> dict[str, First]:
    """Seconds from open sources to the first batch, at the beginning of a stage and far into it; ours with images, the others' with numbers alone."""

    side = settings.sides[0]

    def ours(position: int) -> object:
        step = position // IMAGES
        return next(micro_batches(stage(selections, side, 10**6), step, step + 10**5))

    def order_only(position: int) -> object:
        return stage(selections, side, 10**6).order.steps(position // IMAGES, AT_ONCE)

    first = {OURS: in_turns(settings.repeats, settings.position, ours), f"{OURS}, the order alone": in_turns(settings.repeats, settings.position, order_only)}
    for name, peer in PEERS.items():
        if peer.is_installed():
            first[name] = peer.first(settings.repeats, settings.position, folder)
    return first


# --- shares -----------------------------------------------------------------------------------------------------------------------------


def deviation(case: str, contender: str, drawn: NDArray[np.int64], shares: NDArray[np.float64]) -> Deviation:
    """How far a row of draws, each the number of a source, is from the shares."""
    images = np.arange(1, len(drawn) + 1)
    shares = shares / shares.sum()
    every, steps = 0.0, 0.0
    for number, share in enumerate(shares.tolist()):
        off = np.abs(np.cumsum(drawn == number) - share * images)
        every, steps = max(every, float(off.max())), max(steps, float(off[IMAGES - 1 :: IMAGES].max()))
    return Deviation(case, contender, every, steps)


def sources_drawn(made: StageMixture, draws: int) -> NDArray[np.int64]:
    """The number of the source of each image of a stage, in order."""
    names = list(made.selections)
    of_cell = np.asarray([names.index(cell.source) for cell in made.order.cells])
    steps = draws // IMAGES
    cells: NDArray[np.int64] = np.concatenate([made.order.steps(first, min(AT_ONCE, steps - first)).cell for first in range(0, steps, AT_ONCE)])
    return of_cell[cells].astype(np.int64)


def deviations(case: Case, draws: int, folder: Path) -> list[Deviation]:
    """Ours beside the others'. They have no buckets, so rows of several shapes are ours alone."""
    shares = np.asarray(case.shares, dtype=np.float64)
    found = [deviation(case.name, OURS, sources_drawn(case.mixture(folder), draws), shares)]
    for name, peer in PEERS.items():
        if case.aspects == 1 and peer.drawn is not None and peer.is_installed():
            found.append(deviation(case.name, name, peer.drawn(case.shares, draws, folder), shares))
    return found


# --- all of it --------------------------------------------------------------------------------------------------------------------------


def measured_speeds(settings: Settings, folder: Path) -> list[Speed]:
    """Throughput of JPEG rows of each size in Arrow tables, and of the last in folders."""
    speeds: list[Speed] = []
    for side in settings.sides:
        place = folder / f"tables-{side}"
        make_tables(place, settings.rows, side)
        speeds += throughput(f"{side}x{side} JPEG in Arrow", open_folder(place, folder / "index"), load_tables(place), side, settings.seconds, settings.rounds, place)
    named = make_folders(load_tables(place), folder / "files")
    return speeds + throughput(f"{side}x{side} JPEG files", open_folder(folder / "files", folder / "index"), named, side, settings.seconds, settings.rounds)


def measured_memory(settings: Settings, folder: Path) -> list[Held]:
    """What mixtures hold, each in a process of its own."""
    return [measure(folder, number, rows) for number in settings.sources for rows in settings.lengths]


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Measure everything, print a table of each part as soon as it is there, and return it all as JSON values."""
    report: dict[str, Any] = {"machine": machine(), "settings": asdict(settings)}
    console.print(" ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)
    for name, peer in PEERS.items():
        if not peer.is_installed():
            console.print(f"{name}: not installed")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report["throughput"] = speeds = measured_speeds(settings, folder)
        console.print(speed_table(speeds))
        cases = order_cases(settings.sources)
        report["order"] = paces = [pace(case, settings.draws // 4, settings.rounds, folder) for case in cases]
        console.print(pace_table(paces))
        report["first_batch"] = first = first_batches(open_folder(folder / f"tables-{settings.sides[0]}", folder / "index"), settings, folder)
        console.print(first_table(first))
        report["memory"] = held = measured_memory(settings, folder)
        console.print(memory_table(held))
        report["shares"] = off = [found for case in cases for found in deviations(case, settings.draws, folder)]
        console.print(share_table(off, settings.draws))
    report["load_at_the_end"] = os.getloadavg()
    parts = {name: report[name] for name in ("throughput", "order", "memory", "shares")}
    return report | {name: [asdict(each) for each in part] for name, part in parts.items()} | {"first_batch": {name: asdict(each) for name, each in first.items()}}


def machine() -> dict[str, Any]:
    """What it is measured on."""
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    return {"python": platform.python_version(), "datasets": datasets.__version__, "numpy": np.__version__, "cores": os.cpu_count(), "load": load}


# --- tables -----------------------------------------------------------------------------------------------------------------------------


def speed_table(speeds: Sequence[Speed]) -> Table:
    """Throughput. As text, for rich would take the [i] in a name for a style."""
    table = _table("Rows per second, one process, decoded (target: at least 0.95 of bare)", "case", "contender", "rows/s", "of bare", "lowest to highest", "by processor time")
    for each in speeds:
        table.add_row(each.case, Text(each.contender), f"{each.rows_per_second:,.0f}", f"{each.ratio:.3f}", f"{each.lowest:.3f} to {each.highest:.3f}", f"{each.processor_ratio:.3f}")
    return table


def pace_table(paces: Sequence[Pace]) -> Table:
    """The order alone."""
    table = _table("The order alone, positions per second (target: at least 1,000,000)", "case", "cells", "made in", "positions/s", "lowest to highest", "with the rows")
    for each in paces:
        spread = f"{each.lowest:,.0f} to {each.highest:,.0f}"
        table.add_row(each.case, str(each.cells), f"{each.seconds_to_make:.2f} s", f"{each.positions_per_second:,.0f}", spread, f"{each.rows_per_second:,.0f}")
    return table


def first_table(first: Mapping[str, First]) -> Table:
    """The first batch."""
    table = _table("Time to the first batch of a stage (target: at most 1.1 times that at 0)", "contender", "at 0", "position", "there", "times", "lowest to highest there")
    for name, each in first.items():
        spread = f"{min(each.at_position) * 1000:.1f} to {max(each.at_position) * 1000:.1f} ms"
        times = median(each.at_position) / median(each.at_start)
        table.add_row(name, f"{median(each.at_start) * 1000:.1f} ms", f"{each.position:,}", f"{median(each.at_position) * 1000:.1f} ms", f"{times:.2f}", spread)
    return table


def memory_table(held: Sequence[Held]) -> Table:
    """Memory. What a row costs is told from 100,000 rows on: with fewer, it is what a source costs."""
    table = _table("Memory held by selections and mixture (target: at most 1 byte a row)", "sources", "rows", "held", "a row", "with the allocator's free memory", "most", "made in")
    for each in held:
        least = next(other for other in held if other.sources == each.sources)
        a_row = f"{per_row(each, least):.2f} B" if each.rows >= 100_000 else ""
        table.add_row(str(each.sources), f"{each.rows:,}", _megabytes(each.held), a_row, _megabytes(each.anonymous), _megabytes(each.peak), f"{each.seconds:.2f} s")
    return table


def share_table(off: Sequence[Deviation], draws: int) -> Table:
    """Shares."""
    table = _table(f"Largest |images drawn - share x images| of any source, at every prefix of {draws:,} images", "case", "contender", "after every image", f"after every {IMAGES} (a step)")
    for each in off:
        table.add_row(each.case, each.contender, f"{each.at_every_image:.1f}", f"{each.at_every_step:.1f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 1 or column == "contender" else "right")
    return table


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixing", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", type=int, help="rows of the tables with images")
    parser.add_argument("--seconds", type=float, help="for each contender in a case of throughput, about")
    parser.add_argument("--quick", action="store_true", help="in miniature: that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    asked = parser.parse_args(arguments)
    settings = QUICK if asked.quick else FULL
    settings = replace(settings, rows=asked.rows or settings.rows, seconds=asked.seconds or settings.seconds)
    datasets.disable_progress_bars()
    report = run(settings, Console(width=None if os.isatty(1) else 170))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

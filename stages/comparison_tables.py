"""A comparison as tables, for a console and for a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stages.report.page import count, duration, fixed, shortest, size
from stages.report.paired import decimals, said_change
from stages.side import Cost

if TYPE_CHECKING:
    from stages.compare import Comparison, Difference

_MOST_CHANGES = 40
_LONGEST = 60
"""Characters of a field of a plan that are shown."""
_STYLES = {"better": "green", "worse": "red", "": ""}


def comparison_tables(found: Comparison) -> Iterator[Text | Padding]:
    """What is compared, the losses, how sure that is, what it took, and what differs in the plans."""
    yield from _sides(found)
    yield Text("")
    yield Padding(_losses(found), (0, 0, 0, 1))
    yield Text(_legend(found), style="dim")
    for note in found.notes:
        yield Text(f"note: {note}", style="yellow")
    yield Text("")
    yield Padding(_costs(found), (0, 0, 0, 1))
    yield Text("")
    if found.plan:
        yield Padding(_plan(found), (0, 0, 0, 1))
    if len(found.plan) > _MOST_CHANGES:
        yield Text(f"and {len(found.plan) - _MOST_CHANGES} fields more", style="dim")
    if not found.plan:
        yield Text("The plans do not differ.")


def _sides(found: Comparison) -> Iterator[Text]:
    for letter, sides in (("A", [pair.a for pair in found.pairs]), ("B", [pair.b for pair in found.pairs])):
        for side in sides:
            yield Text.assemble((letter, "bold"), f"  {side.run.folder}, seed {side.run.plan.seed}: {side.where}")


def _losses(found: Comparison) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("held-out loss")
    for column in ("A", "B", "B − A", f"B lower in {'seeds' if found.mean.of_seeds else 'rows'}"):
        table.add_column(column, justify="right")
    every = [*found.sources.values(), found.mean]
    digits = decimals(each.change for each in every)
    for name, each in found.sources.items():
        table.add_row(Text(name), *_row(each, digits))
    if len(found.sources) > 1:
        table.add_row(Text("mean of sources", style="bold"), *_row(found.mean, digits))
    return table


def _row(each: Difference, digits: int) -> list[Text]:
    said = Text(said_change(each.change, digits, each.verdict), style=_STYLES[each.verdict])
    return [Text(fixed(each.a, digits)), Text(fixed(each.b, digits)), said, Text(f"{each.lower} of {each.counted}")]


def _legend(found: Comparison) -> str:
    from stages.compare import FEWEST_SEEDS

    signs = "▼ B is lower, so better; ▲ B is higher, so worse; by more than three standard errors. · no clear difference."
    if found.mean.of_seeds:
        few = f" Of fewer than {FEWEST_SEEDS} seeds there is no verdict: count in how many B is lower." if found.mean.counted < FEWEST_SEEDS else ""
        return f"{signs} ± is one standard error over {found.mean.counted} seeds, each paired with its own.{few}"
    return f"{signs} ± is one standard error over the same rows with the same noise: how sure it is of these two runs. Another seed can turn out otherwise; for that give several of each, A1,A2 B1,B2."


def _costs(found: Comparison) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("what it took" + (", on average" if len(found.pairs) > 1 else ""))
    sides = [[pair.a.cost for pair in found.pairs], [pair.b.cost for pair in found.pairs]]
    for column in "AB":
        table.add_column(column, justify="right")

    def add(name: str, value: Callable[[Cost], float | None], words: Callable[[float | None], str]) -> None:
        known = [[number for cost in costs if (number := value(cost)) is not None] for costs in sides]
        table.add_row(Text(name), *(words(sum(each) / len(each)) if each else "–" for each in known))

    add("images drawn", lambda cost: sum(cost.images.values()), count)
    for source in dict.fromkeys(source for costs in sides for cost in costs for source in cost.images):
        add(f"· {source}", partial(_images_of, source), count)
    add("time in the stages", lambda cost: cost.seconds, duration)
    add("images per second", lambda cost: cost.images_per_second, lambda value: shortest(float(f"{value:.3g}")))
    add("most memory of a stage", lambda cost: cost.peak_bytes, size)
    return table


def _images_of(source: str, cost: Cost) -> float:
    return cost.images.get(source, 0.0)


def _plan(found: Comparison) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("differs in the plans", "A", "B"):
        table.add_column(column, overflow="fold")
    for change in found.plan[:_MOST_CHANGES]:
        table.add_row(Text(change.field), *(Text(_short(value)) for value in (change.before, change.after)))
    return table


def _short(value: str) -> str:
    return (value if len(value) <= _LONGEST else value[: _LONGEST - 3] + "...") or "–"

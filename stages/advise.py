"""Advise: what the next stage could draw, on the console. Changes nothing; the rule is `stages.report.suggestion`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stages.log_files import log_files
from stages.problems import PlanError
from stages.report.page import count, percent
from stages.report.paired import decimals, said_change
from stages.report.record import read_record
from stages.report.suggestion import BAND, WORDS, Advice, advice_of

_STYLES = {"more": "green", "less": "yellow", "keep": "", "none": "dim"}


def advise(folder: Path) -> Advice:
    """What the next stage of a run could draw. Raises PlanError if it was not measured twice inside any of its stages."""
    if not log_files(folder, "metrics"):
        raise PlanError.at(str(folder), "no run lies there, and the advice is read from one; train first, or name its folder with --out")
    advice = advice_of(read_record(folder))
    if advice is None:
        raise PlanError.at(str(folder), "no stage was measured twice, so nothing says what its draws brought; let one come to its end, with `evaluate: {rows: 64}` or more")
    return advice


def show_advice(advice: Advice, console: Console) -> None:
    """Print the advice."""
    for part in advice_tables(advice):
        console.print(part)


def advice_tables(advice: Advice) -> Iterator[Text | Padding]:
    """The advice, for a console or a notebook."""
    yield Text.assemble("What the next stage could draw, by stage ", (advice.stage, "bold"), f" from step {count(advice.first)} to step {count(advice.last)}:")
    yield Text("")
    yield Padding(_table(advice), (0, 0, 0, 1))
    yield Text("")
    yield Padding(_reasons(advice), (0, 0, 0, 1))
    yield Text("")
    yield Text(f"  {advice.line}", style="bold")
    yield Text("")
    yield Text(advice.verdict)
    if advice.planned:
        yield Text(f"The plan's next stage is {advice.planned}.")
    yield Text(
        f"A rule of thumb, which changes nothing: what clearly gained more per draw gets more, by a factor of {BAND:g} at most. ± is one standard error over the same rows with the same noise; "
        "benchmarks/adaptive.py measures what following such numbers is worth.",
        style="dim",
    )


def _table(advice: Advice) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("source", "images", "held-out loss", "per 1,000 images", "share"):
        table.add_column(column, justify="left" if column == "source" else "right")
    digits = decimals(each.moved for each in advice.suggestions)
    slopes = decimals(each.per_thousand for each in advice.suggestions)
    for each in advice.suggestions:
        table.add_row(
            Text(each.source),
            count(each.images),
            said_change(each.moved, digits),
            said_change(each.per_thousand, slopes),
            percent(each.share) if each.share == each.suggested else Text.assemble(f"{percent(each.share)} → ", (percent(each.suggested), "bold")),
        )
    return table


def _reasons(advice: Advice) -> Table:
    table = Table(box=None, show_header=False)
    for each in advice.suggestions:
        table.add_row(Text(WORDS[each.word], style=_STYLES[each.word]), Text(each.source), Text(each.why))
    return table

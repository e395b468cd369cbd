"""The table of docs/reliability.md, out of what the scripts of this folder wrote the last time that they ran."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from faults.table import FOLDER, Done

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_PLACE = re.compile(r" \(/[^ ()]*\)")  # where on this machine it lay
_HEAD = re.compile(r"\| \*\*.*\*\* \(`(\w+)`, ")
_ROW = re.compile(r"\| (?!\*\*).+( \| [\d,]+){3} \|$")
BEGIN, END = "<!-- table: written by `python -m faults --write` -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Section:
    """What one script has to say in the table, as lines of Markdown."""

    rows: tuple[str, ...]
    lost: tuple[str, ...]


def write(scripts: Mapping[str, str]) -> int:
    """Put what scripts last wrote into the table; what it says of those that have not run since stays, and a whole run gives way to no short one.

    scripts: names, and what they do faults in. Returns 2 if the document has no place for a table, or nothing to say of one of the scripts.
    """
    text = DOCUMENT.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        print(f"{DOCUMENT} does not have '{BEGIN}' and '{END}'", file=sys.stderr)
        return 2
    before, table, after = text.partition(BEGIN)[0], text.partition(BEGIN)[2].partition(END)[0], text.partition(END)[2]
    found = sections(table)
    for name, words in scripts.items():
        if (file := FOLDER / f"{name}.json").is_file() and ((done := Done.read(file)).whole or name not in found):
            found[name] = section(name, words, done)
    if missing := [name for name in scripts if name not in found]:
        print(f"not run yet: {', '.join(missing)}", file=sys.stderr)
        return 2
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{as_markdown([found[name] for name in scripts])}\n{END}{after}", encoding="utf-8")
    return 0


def section(name: str, words: str, done: Done) -> Section:
    """What a script has to say. words: what it does faults in."""
    form = "" if done.whole else ", the short form"
    head = f"| **{words}** (`{name}`, {done.date}, {_time(done.seconds)}{form}) | | | |"
    rows = [f"| {fault.name} | {fault.tries:,} | {fault.survived:,} | {len(fault.lost):,} |" for fault in done.faults]
    return Section((head, *rows), tuple(f"- {fault.name}: {_PLACE.sub('', line)}" for fault in done.faults for line in fault.lost))


def sections(table: str) -> dict[str, Section]:
    """What a table says, by script, as `as_markdown` wrote it."""
    found: dict[str, list[str]] = {}
    lost = [line for line in table.splitlines() if line.startswith("- ")]
    for line in table.splitlines():
        if head := _HEAD.match(line):
            found[head[1]] = [line]
        elif found and _ROW.match(line):
            found[next(reversed(found))].append(line)
    return {name: Section(tuple(rows), tuple(line for line in lost if any(line.startswith(f"- {row.rsplit(' | ', 3)[0][2:]}: ") for row in rows[1:]))) for name, rows in found.items()}


def as_markdown(found: Sequence[Section]) -> str:
    """The table with its command and machine."""
    processor = f"{os.cpu_count()} cores ({platform.machine()}), no GPU, torch {version('torch').partition('+')[0]}"
    lines = [f"`cd tests && ../.venv/bin/python -m faults --whole`, on {processor}:", "", "| fault | tries | survived | lost |", "|---|---:|---:|---:|"]
    lines += [row for each in found for row in each.rows]
    numbers = [[int(number.replace(",", "")) for number in row.strip(" |").split(" | ")[-3:]] for each in found for row in each.rows[1:]]
    lines.append("| **all of them** | " + " | ".join(f"**{sum(column):,}**" for column in zip(*numbers, strict=True)) + " |")
    told = [line for each in found for line in each.lost]
    return "\n".join([*lines, *(["", "Lost:", "", *told] if told else []), ""])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

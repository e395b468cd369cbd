"""The table of docs/reliability.md, out of what the scripts of this folder wrote the last time that they ran."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from faults.table import FOLDER, Done, totals

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_PLACE = re.compile(r" \(/[^ ()]*\)")  # where on this machine it lay
BEGIN, END = "<!-- table: written by `python -m faults --write` -->", "<!-- end of the table -->"


def write(scripts: Mapping[str, str]) -> int:
    """Put the table into its place. scripts: names, and what they do faults in. Returns 2 if a script has not run yet or the document has no place for it."""
    missing = [name for name in scripts if not (FOLDER / f"{name}.json").is_file()]
    text = DOCUMENT.read_text(encoding="utf-8")
    if missing or BEGIN not in text or END not in text:
        print(f"not run yet: {', '.join(missing)}" if missing else f"{DOCUMENT} does not have '{BEGIN}' and '{END}'", file=sys.stderr)
        return 2
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    table = as_markdown({words: Done.read(FOLDER / f"{name}.json") for name, words in scripts.items()}, scripts)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")
    return 0


def as_markdown(done: Mapping[str, Done], scripts: Mapping[str, str]) -> str:
    """The table with its command and machine. done: by what faults are done in."""
    names = {words: name for name, words in scripts.items()}
    processor = f"{os.cpu_count()} cores ({platform.machine()}), no GPU, torch {version('torch').partition('+')[0]}"
    lines = [f"`cd tests && ../.venv/bin/python -m faults --whole`, on {processor}:", "", "| fault | tries | survived | lost |", "|---|---:|---:|---:|"]
    for words, each in done.items():
        form = "" if each.whole else ", the short form"
        lines.append(f"| **{words}** (`{names[words]}`, {each.date}, {_time(each.seconds)}{form}) | | | |")
        lines += [f"| {fault.name} | {fault.tries:,} | {fault.survived:,} | {len(fault.lost):,} |" for fault in each.faults]
    tries, survived, lost = totals([fault for each in done.values() for fault in each.faults])
    lines.append(f"| **all of them** | **{tries:,}** | **{survived:,}** | **{lost:,}** |")
    told = [f"- {fault.name}: {_PLACE.sub('', line)}" for each in done.values() for fault in each.faults for line in fault.lost]
    return "\n".join([*lines, *(["", "Lost:", "", *told] if told else []), ""])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

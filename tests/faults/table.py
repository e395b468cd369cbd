"""The table of faults: what was done to a run, how often, and how often it came through.

Each script of this folder does its faults, gives `Fault`s, writes runs/faults/NAME.json and prints its own table; `python -m faults` (in tests/) runs them all and prints one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "faults"


@dataclass(frozen=True)
class Fault:
    """One kind of fault, and what came of it."""

    name: str
    """What was done, in words: `kill -9 while a checkpoint is written`."""
    tries: int
    survived: int
    """How many ended as promised."""
    lost: tuple[str, ...] = ()
    """What was not kept, a line for each try that did not survive."""

    def __post_init__(self) -> None:
        assert self.survived + len(self.lost) == self.tries, f"{self.name}: {self.survived} + {len(self.lost)} of {self.tries}"


@dataclass(frozen=True)
class Done:
    """What a script did the last time that it ran."""

    faults: tuple[Fault, ...]
    whole: bool
    """Whether it was the whole matrix, or the short one."""
    date: str
    """`2026-11-30`"""
    seconds: float

    @classmethod
    def read(cls, file: Path) -> Done:
        """As `main` writes it. Raises OSError."""
        said: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        faults = tuple(Fault(**{**fault, "lost": tuple(fault["lost"])}) for fault in said["faults"])
        return cls(faults, said["whole"], said["date"], said["seconds"])


def main(name: str, doc: str | None, carry_out: Callable[[bool], Sequence[Fault]]) -> int:
    """The command line of one script. carry_out: does the faults; is told whether the whole matrix is asked for, or a short one. Returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--whole", action="store_true", help="the whole matrix; left out, a short one in minutes")
    whole = parser.parse_args().whole
    began, date = time.monotonic(), time.strftime("%Y-%m-%d")
    done = Done(tuple(carry_out(whole)), whole, date, round(time.monotonic() - began, 1))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(done), indent=1), encoding="utf-8")
    print(as_text(done.faults), flush=True)
    return 1 if any(fault.lost for fault in done.faults) else 0


def as_text(faults: Sequence[Fault]) -> str:
    """The table, and below it what was lost."""
    rows = [("fault", "tries", "survived", "lost"), *((fault.name, f"{fault.tries:,}", f"{fault.survived:,}", f"{len(fault.lost):,}") for fault in faults)]
    if len(faults) > 1:
        rows.append(("all of them", *(f"{number:,}" for number in totals(faults))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    lines += [f"lost: {fault.name}: {line}" for fault in faults for line in fault.lost]
    return "\n".join(lines)


def totals(faults: Sequence[Fault]) -> tuple[int, int, int]:
    """Tries, survived and lost of several."""
    return sum(fault.tries for fault in faults), sum(fault.survived for fault in faults), sum(len(fault.lost) for fault in faults)

"""The table of faults: what was done to a run, how often, and how often it came through.

Each script of this folder does its faults and gives `Fault`s; `python -m faults` (in tests/) runs them all, writes runs/faults/NAME.json for each and prints one table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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


def main(name: str, doc: str | None, carry_out: Callable[[bool], Sequence[Fault]]) -> int:
    """The command line of one script. carry_out: does the faults; is told whether the whole matrix is asked for, or a short one. Returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--whole", action="store_true", help="the whole matrix; left out, a short one in minutes")
    began = time.monotonic()
    faults = carry_out(parser.parse_args().whole)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps({"seconds": round(time.monotonic() - began, 1), "faults": [asdict(fault) for fault in faults]}, indent=1))
    print(as_text(faults))
    return 1 if any(fault.lost for fault in faults) else 0


def as_text(faults: Sequence[Fault]) -> str:
    """The table, and below it what was lost."""
    rows = [("fault", "tries", "survived", "lost"), *((fault.name, str(fault.tries), str(fault.survived), str(len(fault.lost))) for fault in faults)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    lines += [f"lost: {fault.name}: {line}" for fault in faults for line in fault.lost]
    return "\n".join(lines)

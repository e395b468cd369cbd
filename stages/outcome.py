"""What comes back from a run that was carried out from Python: where it is, how it ended, and as a table what got better."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stages.as_html import to_html
from stages.report.record import read_record
from stages.report.results import HEAD, LEGEND, first_rows, first_table


@dataclass(frozen=True)
class Outcome(os.PathLike[str]):
    """A run folder after a launch. It stands for the folder's path wherever a path is asked for."""

    folder: Path
    exit_code: int
    """0: done, or come to the stage asked for. 130 or 143: stopped by a signal after saving; the same call goes on."""

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped it."""
        return self.exit_code != 0

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str | Path) -> Path:
        return self.folder / name

    def __str__(self) -> str:
        return f"{first_table(self.folder)}\n{self._where()}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        table = Table(box=None, header_style="dim")
        for number, name in enumerate(HEAD):
            table.add_column(name, justify="right" if number > 1 else "left")
        rows = first_rows(read_record(self.folder))
        for row in rows:
            table.add_row(*map(Text, row))
        measured = [Padding(table, (0, 0, 0, 1)), Text(LEGEND, style="dim")] if rows else [Text("No held-out loss has been measured yet.")]
        return to_html([*measured, Text(self._where(), style="yellow" if self.stopped else "")])

    def _where(self) -> str:
        report = self.folder / "report.html"
        if self.stopped:
            return f"Stopped and saved; the same call goes on. {report} shows how far it came."
        return f"Done: {report} has the rest."

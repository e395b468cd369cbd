"""trackio: a SQLite file for each project on this machine, and `trackio show` to look at it."""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from stages.points import Point
from stages.trackers.curves import Opening

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
_ALL = 2**62


class TrackioCurves:
    """A run of trackio. Each point is one row of its table, which is how many there are, and where to cut.

    On a network disk trackio writes fragments, out of which its dashboard makes that table later (0.43): those are neither counted nor cut, so points that a killed
    run had made after its last checkpoint stand there twice.
    """

    def __init__(self, opening: Opening) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import get_storage_mode

        self._trackio, self._folder = trackio, opening.folder
        with _locally():
            self._file = SQLiteStorage.get_project_db_path(opening.project)
            self._in_table = get_storage_mode() == "sqlite"
            goes_on = opening.known.get("project") == opening.project
            name = opening.known["name"] if goes_on else _free(opening.folder.resolve().name, set(SQLiteStorage.get_runs(opening.project)))
            self._run = trackio.init(
                opening.project, name=name, config=dict(opening.settings), resume="allow" if goes_on else "never", embed=False, auto_log_cpu=False, auto_log_gpu=False
            )
        self.notes: Mapping[str, str] = {"project": opening.project, "name": name}

    def held(self) -> int:
        if not self._in_table:
            return _ALL
        with self._table() as table:
            return int(table.execute("SELECT count(*) FROM metrics WHERE run_id = ?", (self._run.id,)).fetchone()[0]) if table else 0

    def cut(self, number: int) -> None:
        if not self._in_table:
            return
        with self._table() as table:
            if table:
                table.execute("DELETE FROM metrics WHERE run_id = ?1 AND id NOT IN (SELECT id FROM metrics WHERE run_id = ?1 ORDER BY id LIMIT ?2)", (self._run.id, number))
                table.commit()

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection | None]:
        """The project's file; None before anything stands in it."""
        if not self._file.exists():
            yield None
            return
        with closing(sqlite3.connect(self._file, timeout=30)) as connection:
            made = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'metrics'").fetchone()[0]
            yield connection if made else None

    def add(self, point: Point) -> None:
        values: dict[str, Any] = {**point.numbers, "stage": point.stage, "stage_name": point.name}
        values |= {name: self._trackio.Table(columns=list(table.columns), data=[list(row) for row in table.rows]) for name, table in point.tables.items()}
        values |= {name: self._trackio.Image(str(file), caption=picture.caption) for name, picture in point.pictures.items() if (file := self._folder / picture.file).exists()}
        self._run.log(values, step=point.step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # and not the run's own: its exit hook would finish it, and print, a second time (0.43)


@contextmanager
def _locally() -> Iterator[None]:
    """Inside, trackio does not see that it is to send anything, and what it says of itself is not printed.

    It would ask the Hub, with the user's token, whose that is, to note a name beside the curves (trackio 0.43, run.py:242; tests/test_security.py).
    """
    from trackio import run

    taken = {name: os.environ.pop(name) for name in _ELSEWHERE if name in os.environ}
    asks, run._get_default_namespace = run._get_default_namespace, lambda: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        run._get_default_namespace = asks
        os.environ.update(taken)


def _free(name: str, used: set[str]) -> str:
    """A name that no run of the project has: the one given, or with a number behind it."""
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in used:
        number += 1
    return found

"""Trackers: those that a plan asks for, each brought to what metrics.jsonl holds, whatever a killed run has told it before, and then told what comes.

Points that a tracker lacks, since it had them in memory when the run was killed or is named in the plan only now, it is given from the file; those that it has too
many, which the run makes again after its last checkpoint, it forgets. So one curve goes on over stages and restarts. Nothing leaves the machine unless the plan says so.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.checkpoint import write_whole
from stages.plan import Tracker, TrackerName
from stages.points import Point
from stages.trackers.curves import Curves, Opening
from stages.trackers.tensorboard_curves import TensorBoardCurves
from stages.trackers.trackio_curves import TrackioCurves
from stages.trackers.wandb_curves import WandbCurves

CURVES: Mapping[TrackerName, Callable[[Opening], Curves]] = {"trackio": TrackioCurves, "tensorboard": TensorBoardCurves, "wandb": WandbCurves}
_NOTES = "tracking.json"
_FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, EOFError, sqlite3.Error)


class Trackers:
    """The trackers of a launch. One that fails is warned of and left alone for the rest of it: training goes on, and metrics.jsonl has everything."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[TrackerName, Curves] = {}

    def open(self, asked: Sequence[Tracker], folder: Path, name: str, settings: Mapping[str, Any], plan_text: str, kept: Callable[[], Iterable[Point]]) -> None:
        """Open them for a run. name: of the plan. settings, plan_text: the resolved plan. kept: gives the points that metrics.jsonl holds by now."""
        file = folder / _NOTES
        notes = self._notes(file)
        for tracker in asked:
            with self._outlived(tracker.name):
                curves = CURVES[tracker.name](Opening(folder, tracker.project or name, settings, plan_text, tracker.online, notes.get(tracker.name, {})))
                self._open[tracker.name] = curves
                notes[tracker.name] = curves.notes
                write_whole(file, json.dumps(notes, indent=1))
                _bring(curves, kept())

    def _notes(self, file: Path) -> dict[str, Mapping[str, str]]:
        """What each tracker has noted in the run folder; without its note one begins a new curve."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._warn(f"{file} cannot be read ({error}); what it says of trackers' runs is made anew")
            return {}
        return {name: notes for name, notes in found.items() if isinstance(notes, dict)} if isinstance(found, dict) else {}

    def add(self, point: Point) -> None:
        """Give all of them a point."""
        for name, curves in list(self._open.items()):
            with self._outlived(name):
                curves.add(point)

    def close(self) -> None:
        """End them."""
        for name, curves in list(self._open.items()):
            with self._outlived(name):
                curves.close()
        self._open.clear()

    @contextmanager
    def _outlived(self, name: TrackerName) -> Iterator[None]:
        """Inside, an error is the tracker's and ends its curves, and nothing else."""
        try:
            yield
        except _failures(name) as error:
            self._open.pop(name, None)
            said = " ".join(str(error).split())[:200] or type(error).__name__
            self._warn(f"{name} fails, and its curves end here ({said}); metrics.jsonl has all of them, and the next launch of this run brings {name} up to date")


def _failures(name: TrackerName) -> tuple[type[Exception], ...]:
    """What a tracker's library may raise, from a full disk to a server that is away."""
    return (*_FAILURES, sys.modules["wandb"].Error) if name == "wandb" and "wandb" in sys.modules else _FAILURES


def _bring(curves: Curves, kept: Iterable[Point]) -> None:
    """Give a tracker the points that it lacks, and make it go on after those that there are."""
    held, number = curves.held(), 0
    for number, point in enumerate(kept, 1):
        if number > held:
            curves.add(point)
    if held > number:
        curves.cut(number)

"""Tracking: what a run says, in metrics.jsonl, on the console and to trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixing.order import Order
from stages.heard import Heard, Remark
from stages.live import View, plain_line
from stages.log_files import BEGINNING, Place
from stages.plan import Plan
from stages.points import Stages, point, points
from stages.processes import Processes
from stages.reader import to_yaml
from stages.resolved import trackers_of
from stages.room import Lines, Room
from stages.time_left import Pace
from stages.trackers.trackers import Trackers

_MOST_REMARKS, _REMARK = 20, 160  # of the libraries beneath, that are shown, and how many characters of each


class Log:
    """The run's record. On processes other than the main one every method does nothing, but for what they have to do together."""

    def __init__(self, room: Room, accelerator: Accelerator, console: Console, keep: Place | None, plan: Plan, heard: Heard | None) -> None:
        """room: of the run's folder. keep: up to where metrics.jsonl stands; what a killed run wrote after its last checkpoint is cut off. None is all of it. heard: what the libraries beneath remark."""
        self.main = accelerator.is_main_process
        self.console, self._accelerator, self._folder, self._plan, self._heard = console, accelerator, room.folder, plan, heard
        self._stages = Stages({stage.name: stage.steps for stage in plan.stages})
        self._trackers = Trackers(lambda message: self.warn(message, *self._place))
        self._view: View | None = None
        self._place = ("", 0)
        self._multiple = 1
        self._remarks = 0
        self._is_behind = False
        if self.main:
            self._lines = Lines(room, "metrics", keep)
            _say_lost(self._lines, "metrics.jsonl", "the report lacks them", self)
        if heard:
            heard.tell(self._remark if self.main else None)

    @property
    def _in_terminal(self) -> bool:
        """Whether somebody can watch; with FORCE_COLOR rich takes a file for a terminal."""
        return self.console.is_interactive and self.console.file.isatty()

    def start_trackers(self) -> None:
        """Begin, or go on with, one curve for the whole run, in each tracker that the plan asks for."""
        if self.main:
            plan = self._plan
            self._trackers.open(trackers_of(plan), self._folder, plan.name, plan.model_dump(mode="json"), to_yaml(plan), lambda: points(self._folder, self._stages))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, and to the trackers what it brings to the curves. record: has "event"; the time is added."""
        if not self.main:
            return
        self._lines.add(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        if self._lines.is_behind and not self._is_behind:
            self.say(f"[yellow]the disk of {escape(str(self._folder))} is full[/yellow]: lines of metrics.jsonl wait in memory; the run goes on until it has to save")
        self._is_behind = self._lines.is_behind
        if "stage" in record:
            self._place = record["stage"], record.get("step", 0)
        if found := point(record, self._stages):
            self._trackers.add(found)
        if self._view and record["event"] == "eval":
            self._view.measured(record["sources"])

    def say(self, message: str) -> None:
        """Print a line, in rich's markup. In a terminal it is broken between words, unless it holds a longer one, such as a path to copy; in a file it stays one."""
        if self.main:
            is_broken = self._in_terminal and all(len(word) < self.console.width for word in message.split())
            self.console.print(message, highlight=False, soft_wrap=not is_broken)

    def show(self, table: Table) -> None:
        """Print a table."""
        if self.main:
            self.console.print(table)

    def start_view(self) -> None:
        """Show what goes on at the foot of the terminal, where there is one."""
        if self.main and self._in_terminal:
            self._view = View(self.console, self._plan)

    def now(self, words: str) -> None:
        """Say in the view what is done until the next step."""
        if self._view:
            self._view.now(words)

    def begin_stage(self, index: int, step: int, multiple: int) -> None:
        """A stage begins, or goes on after so many steps. multiple: pixels along a token's side."""
        self._multiple = multiple
        if self._view:
            self._view.begin(index, step, multiple)

    def stepped(self) -> None:
        """A step was made."""
        if self._view:
            self._view.stepped()

    def line(self, record: Mapping[str, Any], pace: Pace, order: Order) -> None:
        """Show what was logged of the steps, an event "step": in the view, or as a line where there is none."""
        if self._view:
            self._view.line(record, pace, order.asked(record["step"]))
        elif self.main:
            self.say(plain_line(self._plan, record, pace, self._multiple))

    def warn(self, message: str, stage: str, step: int) -> None:
        """Print a warning and record it. What looks like markup in it is text: a file can be called `[/red].png`."""
        self.say(f"[yellow]warning:[/yellow] {escape(message)}")
        self.write({"event": "warning", "stage": stage, "step": step, "message": message})

    def hear(self, processes: Processes) -> None:
        """Take in what the libraries beneath have remarked in data workers and on other processes; every process takes part."""
        if self._heard is None:
            return
        self._heard.drain()
        for remarks in processes.gathered([] if self.main else self._heard.take())[1:]:
            if self.main:
                self._heard.take_in(remarks)

    def _remark(self, remark: Remark) -> None:
        """Print and record what a library remarks: of the first lines, of warnings only the first so many; errors always."""
        stage, step = self._place
        record = {"event": "library_warning", "stage": stage, "step": step, "library": remark.library, "message": remark.text, "is_error": remark.is_error}
        self.write({**record, "heard_by": remark.heard_by or "the main process"})
        self._remarks += not remark.is_error
        if remark.is_error:
            self.say(f"[red]{escape(remark.library)}:[/red] {escape(remark.text)}")
        elif self._remarks <= _MOST_REMARKS:
            by = f" ({remark.heard_by})" if remark.heard_by else ""
            shown = " ".join(remark.text.split())
            text = shown if len(shown) <= _REMARK else f"{shown[: _REMARK - 1]}…"
            self.say(f"[dim]{escape(remark.library)}{by}: {escape(text)}[/dim]")
        elif self._remarks == _MOST_REMARKS + 1:
            self.say("[dim]what libraries remark from here on stands in metrics.jsonl[/dim]")

    def place(self) -> Place:
        """Where metrics.jsonl stands, all of it on the disk."""
        return self._lines.place() if self.main else BEGINNING

    def close(self) -> None:
        """Take the view away, end the trackers' runs and the process group, and close the file."""
        if self._view:
            self._view.close()
        if self.main:
            self._trackers.close()
            if self._heard:
                self._heard.tell(None)
            if left := self._lines.close():
                self.say(f"[yellow]{left:,} bytes of metrics.jsonl found no room[/yellow]; what was saved has all that belongs to it")
        self._accelerator.end_training()


class Trace:
    """trace.jsonl: every row drawn, in global order."""

    def __init__(self, room: Room, keep: Place | None, log: Log) -> None:
        """keep: up to where the trace stands, as of `Log`."""
        self._lines = Lines(room, "trace", keep, at_once=2**16)
        _say_lost(self._lines, "trace.jsonl", "it does not tell every row that was drawn", log)

    def write(self, stage: str, step: int, rows: list[tuple[int, str, str]]) -> None:
        """Add a step's rows. rows: micro-batch, source and key of each, in order."""
        lines = [json.dumps({"stage": stage, "step": step, "micro": micro, "source": source, "key": row}) for micro, source, row in rows]
        self._lines.add("".join(f"{line}\n" for line in lines))

    def place(self) -> Place:
        """Where it stands, all of it on the disk."""
        return self._lines.place()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _say_lost(lines: Lines, name: str, so: str, log: Log) -> None:
    """Warn of lines that were there when the checkpoint was saved, and are not now."""
    if lines.lost_bytes:
        log.warn(f"{name} is {lines.lost_bytes:,} bytes shorter than when the checkpoint was saved; {so}, and what is learnt does not depend on it", "", 0)

"""Tracking: what a run says, in metrics.jsonl, on the console and to a tracker."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Log:
    """The run's record. On processes other than the main one every method does nothing."""

    def __init__(self, folder: Path, accelerator: Accelerator, console: Console, keep_bytes: int) -> None:
        """keep_bytes: how much of an existing metrics.jsonl stands; what a killed run wrote after its last checkpoint is cut off."""
        self.main = accelerator.is_main_process
        self.console, self._accelerator, self._tracking = console, accelerator, False
        self.path = folder / "metrics.jsonl"
        self._bar: Progress | None = None
        if self.main:
            cut(self.path, keep_bytes)
            self._file = self.path.open("a", encoding="utf-8")

    def start_tracker(self, name: str, run: str, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with, one curve for the whole run."""
        if self._accelerator.log_with:
            options = {"trackio": {"name": run, "resume": "allow", "auto_log_cpu": False, "auto_log_gpu": False}}
            with contextlib.redirect_stdout(io.StringIO()):  # it speaks of uploading, and nothing is uploaded
                self._accelerator.init_trackers(name, config=dict(settings), init_kwargs=options)
            self._tracking = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl. record: has "event"; the time is added."""
        if self.main:
            self._file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to the tracker. step: counted over all stages."""
        if self._tracking:
            self._accelerator.log(dict(values), step=step)

    def say(self, message: str) -> None:
        """Print a line, in rich's markup."""
        if self.main:
            self.console.print(message, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        if self.main:
            self.console.print(table)

    def start_bar(self, name: str, done: int, steps: int) -> None:
        """Show a progress bar with the time left, where the console is a terminal."""
        if self.main and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(name, completed=done, total=steps)
            self._bar.start()

    def advance(self) -> None:
        """Move the bar on by a step."""
        if self._bar:
            self._bar.advance(self._bar.task_ids[0])

    def end_bar(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def warn(self, message: str, stage: str, step: int) -> None:
        """Print a warning and record it."""
        self.say(f"[yellow]warning:[/yellow] {message}")
        self.write({"event": "warning", "stage": stage, "step": step, "message": message})

    def size(self) -> int:
        """Bytes of metrics.jsonl so far, all of them on the disk."""
        if not self.main:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file, end the tracker's run and the process group, and take the bar away."""
        self.end_bar()
        if self.main:
            self._file.close()
        with contextlib.redirect_stdout(io.StringIO()):
            if self.main and self._tracking:
                import trackio

                trackio.finish()  # its own exit hook would finish the run, and print, a second time (0.43)
            self._accelerator.end_training()


class Trace:
    """trace.jsonl: every row drawn, in global order."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        path = folder / "trace.jsonl"
        cut(path, keep_bytes)
        self._file = path.open("a", encoding="utf-8")

    def write(self, stage: str, step: int, rows: list[tuple[int, str, str]]) -> None:
        """Add a step's rows. rows: micro-batch, source and key of each, in order."""
        lines = [json.dumps({"stage": stage, "step": step, "micro": micro, "source": source, "key": row}) for micro, source, row in rows]
        self._file.write("".join(f"{line}\n" for line in lines))

    def size(self) -> int:
        """Bytes so far, all of them on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut(path: Path, keep_bytes: int) -> None:
    """Cut a file after so many bytes; a missing file is made."""
    with path.open("ab") as file:
        if file.tell() > keep_bytes:
            file.truncate(keep_bytes)

"""Processes of train.py that a fault script has started, and waits for, and ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class LaunchedProcesses:
    """The processes of one launch, by rank, and the file that they print into."""

    def __init__(self, numbers: Sequence[int], log: Path) -> None:
        self.numbers, self.log = numbers, log
        self._codes: dict[int, int] = {}

    def codes(self) -> list[int | None]:
        """The exit codes, by rank, of those that have ended."""
        for number in self.left():
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                self._codes[number] = os.waitstatus_to_exitcode(status)
        return [self._codes.get(number) for number in self.numbers]

    def left(self) -> list[int]:
        """The numbers of those that were there when it was last looked."""
        return [number for number in self.numbers if number not in self._codes]

    def wait(self, seconds: float, *, one: bool = False, until: Callable[[], bool] = lambda: False) -> bool:
        """Until all have ended, or one of them, or something holds; whether all, or one, have ended."""
        end, enough = time.monotonic() + seconds, any if one else all
        while not (ended := enough(code is not None for code in self.codes())) and not until() and time.monotonic() < end:
            time.sleep(0.005)
        return ended

    def send(self, what: signal.Signals, *, rank: int | None = None) -> None:
        """Send a signal to every process that is there, or to one."""
        for number in self.left():
            if rank is None or number == self.numbers[rank]:
                os.kill(number, what)

    def said(self) -> str:
        """All that was printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self) -> str:
        """The end of what was printed, in one line."""
        return " / ".join(self.said().splitlines()[-6:])

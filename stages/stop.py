"""Stop: a signal is noted, so that the step under way can be finished and saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import torch
from accelerate import Accelerator


class Stop:
    """Notes SIGTERM and SIGINT, so that the step under way can be finished and saved. A second one ends the process at once.

    `accelerate launch` with one process does not pass its own SIGTERM on (1.15): that the launcher is gone counts as one.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._group: torch.distributed.ProcessGroup | None = None
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if _in_main_thread() else {}
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to stop. Every process must ask at the same step.

        They ask one another by their CPUs, also where they have GPUs: a question that goes through a GPU is answered only once it has done all that it was given
        before, and then waits for the next step's work.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.signal = self.signal or int(signal.SIGTERM)
        if accelerator.num_processes > 1:
            if accelerator.device.type != "cpu" and self._group is None:
                self._group = torch.distributed.new_group(backend="gloo")
            told = torch.tensor([self.signal or 0])
            torch.distributed.all_reduce(told, group=self._group)
            if int(told) and self.signal is None:
                self.signal = int(signal.SIGTERM)
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.signal or 0).name if self.signal else "nothing"

    @property
    def exit_code(self) -> int:
        """128 and the signal's number."""
        return 128 + (self.signal or 0)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

"""Stop: a signal is noted, so that the step under way can be finished and saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
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
        self._told, self._is_alone = False, False
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if _in_main_thread() else {}
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to stop. Every process must ask at the same step."""
        self.exchanged(accelerator, ())
        return self.told

    def exchanged(self, accelerator: Accelerator, numbers: Sequence[float]) -> list[float]:
        """Numbers added up over the processes, and in the same exchange whether any of them was told to stop. Every process must take part at the same step.

        They ask one another by their CPUs, also where they have GPUs: a question that goes through a GPU is answered only once it has done all that it was given
        before, and then waits for the next step's work.
        """
        self.look()
        if accelerator.num_processes == 1:
            self._is_alone = True
            return list(numbers)
        if accelerator.device.type != "cpu" and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        told = torch.tensor([self.signal or 0, *numbers], dtype=torch.float64)
        torch.distributed.all_reduce(told, group=self._group)
        signals, *sums = told.tolist()
        self._told = bool(signals)
        if signals and self.signal is None:
            self.signal = int(signal.SIGTERM)
        return sums

    @property
    def told(self) -> bool:
        """Whether any process was told to stop before the last exchange, which they all agree on: a signal that has come since counts in the next one. Of one process, before now."""
        return self.look() if self._is_alone else self._told

    def look(self) -> bool:
        """Whether this process was told to stop, as far as it knows by itself."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.signal = self.signal or int(signal.SIGTERM)
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

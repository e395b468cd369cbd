"""Run a training script unchanged, and note when each of its optimizer steps was made: `python -m benchmarks.timed FILE SCRIPT ARGUMENTS`.

It works with any script that steps a torch optimizer, by torch's own hook; the script is not read and not changed. FILE becomes one JSON object.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


@dataclass(frozen=True)
class Timed:
    """When a script's optimizer steps were made."""

    wall: tuple[float, ...]
    """Of each step, seconds on the machine's monotonic clock, which all processes share."""
    processor: tuple[float, ...]
    """Seconds of processor time that this process had used by then."""
    peak: int
    """Bytes of memory at the most, up to the last step: what comes after it, such as samples, is no part of training."""

    def seconds(self, skipped: int) -> list[float]:
        """How long each step took, the first ones left out."""
        return [after - before for before, after in zip(self.wall[skipped:], self.wall[skipped + 1 :], strict=False)]

    def processor_seconds(self, skipped: int) -> list[float]:
        """The same in processor time."""
        return [after - before for before, after in zip(self.processor[skipped:], self.processor[skipped + 1 :], strict=False)]


def read_timed(file: Path) -> Timed:
    """What was written. Raises FileNotFoundError if the script was never run."""
    held = json.loads(file.read_text(encoding="utf-8"))
    return Timed(tuple(held["wall"]), tuple(held["processor"]), int(held["peak"]))


def main(arguments: Sequence[str]) -> None:
    """Run the script as the interpreter would, and write the file however it ends."""
    file, script, *others = arguments
    wall: list[float] = []
    processor: list[float] = []
    peak = 0

    def made(optimizer: Optimizer, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        nonlocal peak
        wall.append(time.monotonic())
        processor.append(time.process_time())
        peak = _peak()  # a tenth of a millisecond, of every script alike

    register_optimizer_step_post_hook(made)
    sys.argv = [script, *others]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(file).write_text(json.dumps(asdict(Timed(tuple(wall), tuple(processor), peak))), encoding="utf-8")


def _peak() -> int:
    """Not by getrusage, whose figure a new process takes over from the one that started it (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


if __name__ == "__main__":
    main(sys.argv[1:])

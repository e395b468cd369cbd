"""Memory: what a process holds, and letting go of the encoders while training does without them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import psutil  # type: ignore[import-untyped]
import torch

_PATIENCE = 50  # steps


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors on a GPU take; on the CPU what the process has in memory, other than torch's tensors too."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def restart_peak(device: torch.device) -> None:
    """Begin to measure `peak_bytes` anew. Where Linux does not let a process do so for itself, the peak is that since it began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most that `held_bytes` has been since `restart_peak`; None on a CPU without /proc, such as another system's than Linux's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, Python's collector leaves alone what is there already: modules and what they hold, some 600,000 objects, stay as long as the process.

    To look through them takes a third of a second, and it is done at every change of stages, and unasked now and then during the steps.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def let_go(device: torch.device) -> int:
    """Collect what a stage left behind and hand its memory back to the device; gives `held_bytes` after it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return held_bytes(device)


class Encoders(Protocol):
    """What holds a VAE and text encoders, such as `stages.families.family.Family`."""

    device: torch.device
    encoder_uses: int
    """How often one of them was asked for."""

    @property
    def held_encoders(self) -> tuple[str, ...]:
        """Those that are in memory: `vae`, `text encoders`."""

    def release_encoders(self) -> None:
        """Drop them; they come back at their next use."""


@dataclass(frozen=True)
class Released:
    """What was let go of."""

    parts: tuple[str, ...]
    bytes_before: int
    """As `held_bytes`."""
    bytes_after: int


class EncoderRest:
    """Lets go of VAE and text encoders once a stage's steps do without them, as they do when all that comes is in the cache.

    They go after so many steps in a row, the patience, in which none was asked for. Each time they are asked for again the patience doubles, so over a stage of
    n steps they are loaded log2(n / patience) times more at most.
    """

    def __init__(self, encoders: Encoders, patience: int = _PATIENCE) -> None:
        self.patience = patience
        self._encoders, self._uses = encoders, encoders.encoder_uses
        self._steps = self._idle = 0
        self._let_go = False

    def step(self) -> Released | None:
        """A step was made. Gives what was let go of, if anything."""
        asked, self._uses = self._encoders.encoder_uses != self._uses, self._encoders.encoder_uses
        self._steps += 1
        self._idle = 0 if asked else self._idle + 1
        if asked and self._let_go:
            self.patience, self._let_go = 2 * self.patience, False
        return self._release() if self._idle >= self.patience else None

    def aside(self) -> Released | None:
        """Something beside the steps was done, such as an evaluation; what it loaded goes at once if the steps so far, or as many as the patience, did without."""
        self._uses = self._encoders.encoder_uses
        return self._release() if self._steps and self._idle >= min(self.patience, self._steps) else None

    def _release(self) -> Released | None:
        parts = self._encoders.held_encoders
        if not parts:
            return None
        before = held_bytes(self._encoders.device)
        self._encoders.release_encoders()
        gc.collect()  # a pipeline and its parts may point at one another
        self._encoders.release_encoders()  # hands back to the device what was collected
        self._let_go = True
        return Released(parts, before, held_bytes(self._encoders.device))

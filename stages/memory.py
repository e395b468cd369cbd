"""Memory: what a process holds, and letting go of the encoders while training does without them."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Protocol

import psutil  # type: ignore[import-untyped]
import torch

_PATIENCE = 50  # steps


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors on a GPU take; on the CPU what the process has in memory, other than torch's tensors too."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


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

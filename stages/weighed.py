"""Weighed: what the losses of the step under way were, kept on the device until the step is weighed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixing.batch import MicroBatch
from stages.sent import sent
from stages.shown import Shown


@dataclass(frozen=True)
class Row:
    """An image of the step, as it is named."""

    position: int
    source: str
    key: str
    loss: float
    has_latents: bool
    """Whether its latents, and those of its references, are numbers."""

    @property
    def what(self) -> str:
        """What of it is no number: `latents`, `loss`; empty where all is."""
        return "latents" if not self.has_latents else "" if math.isfinite(self.loss) else "loss"


class Weighed:
    """What the losses of the step under way were. They stay on the device until the step is weighed, with one sum of each image's latents, which is no number if one of them is none."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str, str]] = []
        self._losses: list[Tensor] = []
        self._positions: list[int] = []
        self._latents: list[Tensor] = []

    def see(self, batch: MicroBatch, shown: Shown) -> None:
        """Take in what a micro-batch shows the transformer."""
        self._positions += batch.positions
        self._latents.append(sum((reference.flatten(1).sum(1) for reference in shown.references), shown.x.flatten(1).sum(1)))

    def count(self, batch: MicroBatch, rows: Sequence[int], losses: Tensor) -> None:
        """Take in the losses of some of its images, float32 [b], what is trained."""
        self._rows += [(batch.positions[row], batch.sources[row], batch.keys[row]) for row in rows]
        self._losses.append(losses)

    def total(self, norm: Tensor) -> Tensor:
        """The gradient's norm and the sum of the losses, float64 [2] on the device of the losses; nothing is waited for. It is no number where one of the losses is none."""
        losses = torch.cat(self._losses)
        return torch.stack([sent(norm, losses.device).double(), losses.double().sum()])

    def rows(self) -> list[Row]:
        """Every image of the step on this process, by which the device is waited for."""
        finite = dict(zip(self._positions, torch.cat(self._latents).isfinite().tolist(), strict=True))
        return [Row(*row, loss, finite[row[0]]) for row, loss in zip(self._rows, torch.cat(self._losses).tolist(), strict=True)]

"""Parts: what an objective makes of a micro-batch. Images that the transformer can take in one call stand in one part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.objectives.path import Path
from stages.sent import sent


@dataclass(frozen=True)
class Part:
    """Images of one micro-batch with one size of latents."""

    rows: Tensor
    """Which images of the micro-batch, int64 [b], on the CPU."""
    noised: Tensor
    """What the transformer is given, float32 [b, C, h, w]."""
    t: Tensor
    """The noise level that it is told, float32 [b], in (0, 1)."""
    target: Tensor
    """What it should predict, float32 [b, C, h, w]."""
    weight: Tensor
    """Factor of each image's loss, float32 [b]."""
    scale: float
    """The step of the position ids on the full grid: token i of a row or column stands at scale x i + (scale - 1) / 2."""
    places: Tensor | None = None
    """Factor of each place's loss, float32 [b, 1, h, w]; None for 1."""
    has_references: bool = True
    """Whether it is shown the references that its images have."""

    def only(self, chosen: Tensor, *, has_references: bool) -> Part:
        """Those of its images that are chosen. chosen: bool [b], on the CPU."""
        own = sent(chosen.nonzero().flatten(), self.noised.device)  # by numbers: a GPU asked by true and false tells the CPU how many there are, which waits
        places = None if self.places is None else self.places[own]
        return Part(self.rows[chosen], self.noised[own], self.t[own], self.target[own], self.weight[own], self.scale, places, has_references)


def whole(path: Path, x: Tensor, e: Tensor, t: Tensor) -> Part:
    """All images at full size, as one part, by the model's own path. x, e: float32 [B, C, h, w]; t: float32 [B], on their device."""
    return Part(torch.arange(len(x)), path.blend(x, e, t), t, path.target(x, e, t), torch.ones_like(t), 1.0)


def errors(predicted: Tensor, part: Part) -> Tensor:
    """Mean squared error of each image of a part, unweighted, float32 [b]."""
    return (predicted.float() - part.target).square().flatten(1).mean(dim=1)


def losses(predicted: Tensor, part: Part) -> Tensor:
    """What is trained: the weighted mean squared error of each image of a part, float32 [b]."""
    if part.places is None:
        return part.weight * errors(predicted, part)
    return part.weight * ((predicted.float() - part.target).square() * part.places).flatten(1).mean(dim=1)


def errors_and_losses(predicted: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Both, of which gradients are taken of the losses alone; together they cost little more than one of them."""
    if part.places is None:
        plain = errors(predicted, part)
        return plain.detach(), part.weight * plain
    return errors(predicted.detach(), part), losses(predicted, part)

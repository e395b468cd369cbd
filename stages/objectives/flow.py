"""The straight flow: x_t = (1 - t) x + t e, target v = e - x, t = 1 is noise. Source: Esser et al. 2024, arXiv:2403.03206, section 2.

Noise and timestep of an image are functions of a key, so they do not depend on the process, the batch or what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixing.keys import key, uniform

_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Density:
    """Which t are trained. shift: s in t -> s t / (1 + (s - 1) t), which adds ln s to the logit of t."""

    kind: Literal["logit_normal", "uniform"]
    mean: float
    std: float
    shift: float

    def t(self, quantiles: Tensor) -> Tensor:
        """The t, float32 in (0, 1), at quantiles (float64, in (0, 1)) of the density."""
        if self.kind == "uniform":
            t = quantiles
        else:
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantiles))
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.clamp(_SMALLEST, 1 - _SMALLEST).float()  # float32 would round the outermost to 0 and 1


def quantiles(base: int, positions: Sequence[int]) -> Tensor:
    """A number in (0, 1) for each image of a stage, float64 [B]. base: key of (seed, stage)."""
    words: NDArray[np.uint64] = np.asarray([key(base, "t", position) for position in positions], dtype=np.uint64)
    return torch.from_numpy(uniform(words))


def noise(shape: Sequence[int], image_keys: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 [B, *shape], image i's from its own generator, made on the CPU so that it is the same on every device."""
    # Not torch's CPU generator: of a seed it uses 32 bits (2.13), and a hundred thousand images would share some of their noise.
    drawn = [np.random.Generator(np.random.Philox(key=image_key)).standard_normal(tuple(shape), dtype=np.float32) for image_key in image_keys]
    return torch.from_numpy(np.stack(drawn))


def blend(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t for x, e [B, C, h, w] and t [B], all float32."""
    weight = t.view(-1, 1, 1, 1)
    return (1 - weight) * x + weight * e


def losses(predicted: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """Mean squared error of the velocity for each image, float32 [B]."""
    return (predicted.float() - (e - x)).square().flatten(1).mean(dim=1)

"""The straight flow: x_t = (1 - t) x + t e, target v = e - x, t = 1 is noise. Source: Esser et al. 2024, arXiv:2403.03206, section 2.

Noise and timestep of an image are functions of a key, so they do not depend on the process, the batch or what was drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixing.keys import key, uniform
from mixing.permutation import permute

_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Density:
    """Which t are trained."""

    kind: Literal["logit_normal", "uniform", "mode"]
    mean: float = 0.0
    """Of the logit of t, with logit_normal."""
    std: float = 1.0
    """The same's standard deviation."""
    shift: float = 1.0
    """s in t -> s t / (1 + (s - 1) t), which adds ln s to the logit of t."""
    scale: float = 1.29
    """Of mode: t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) for u uniform. Source: Esser et al. 2024, section 3.1."""
    low: float = 0.0
    """Only t from here ..."""
    high: float = 1.0
    """... to here; inside, the density keeps its shape."""

    def t(self, quantiles: Tensor) -> Tensor:
        """The t, float32 in (0, 1), at quantiles (float64, in (0, 1)) of the density."""
        if (self.low, self.high) != (0.0, 1.0):
            first, last = self.quantile(self.low), self.quantile(self.high)
            quantiles = first + quantiles * (last - first)
        if self.kind == "uniform":
            t = quantiles
        elif self.kind == "mode":
            u = 1 - quantiles
            t = 1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantiles))
        if self.shift != 1:
            t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.clamp(max(_SMALLEST, self.low), min(1 - _SMALLEST, self.high)).float()  # float32 would round the outermost to 0 and 1

    def quantile(self, t: float) -> float:
        """Which part of the density, without its range, lies below t."""
        t = t / (self.shift - (self.shift - 1) * t)
        if self.kind == "uniform" or t <= 0 or t >= 1:
            return min(1.0, max(0.0, t))
        if self.kind == "logit_normal":
            return 0.5 * math.erfc((self.mean - math.log(t / (1 - t))) / (self.std * math.sqrt(2)))
        whole = Density("mode", scale=self.scale)
        below, above = 0.0, 1.0
        for _ in range(60):  # t grows with the quantile for every scale that a plan allows
            middle = (below + above) / 2
            below, above = (middle, above) if float(whole.t(torch.tensor([middle], dtype=torch.float64))) < t else (below, middle)
        return below


def quantiles(base: int, positions: Sequence[int]) -> Tensor:
    """A number in (0, 1) for each image of a stage, float64 [B]. base: key of (seed, stage)."""
    words: NDArray[np.uint64] = np.asarray([key(base, "t", position) for position in positions], dtype=np.uint64)
    return torch.from_numpy(uniform(words))


def stratified(base: int, positions: Sequence[int], first: int, images: int) -> Tensor:
    """The same, but a step's images stand each in a stratum of its own, float64 [B]. first, images: the position of the step's first image, and how many it has.

    Which image stands in which stratum is a keyed permutation: the order inside a step goes with the images' shapes.
    """
    strata = permute(np.asarray(positions) - first, images, key(base, "strata", first)).astype(np.float64)
    return (torch.from_numpy(strata) + quantiles(base, positions)) / images


def noise(shape: Sequence[int], image_keys: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 [B, *shape], image i's from its own generator, made on the CPU so that it is the same on every device."""
    # Not torch's CPU generator: of a seed it uses 32 bits (2.13), and a hundred thousand images would share some of their noise.
    drawn = np.empty((len(image_keys), *shape), dtype=np.float32)
    bits = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(bits), bits.state
    for own, image_key in zip(drawn, image_keys, strict=True):
        fresh["state"]["key"][0] = image_key
        bits.state = fresh  # a Philox of that key, before its first number; to make one takes as long as to draw a thousand numbers
        generator.standard_normal(dtype=np.float32, out=own)
    return torch.from_numpy(drawn)


def blend(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t for x, e [B, C, h, w] (of clips [B, C, F, h, w]) and t [B], all float32."""
    weight = t.view(-1, *(1,) * (x.ndim - 1))
    return (1 - weight) * x + weight * e

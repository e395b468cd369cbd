"""Paths from an image to noise: how the two are mixed at a noise level t in [0, 1], and what of them a transformer predicts. t = 1 is noise.

`Straight` is rectified flow (Esser et al. 2024, arXiv:2403.03206, section 2); `Diffusion` is the discrete process of Ho et al. 2020 (arXiv:2006.11239),
predicting the noise, or the v of Salimans & Ho 2022 (arXiv:2202.00512).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from stages.objectives import flow


class Path(Protocol):
    """x: latents of images, e: noise, both float32 [B, C, h, w], or [B, C, F, h, w] of clips; t: float32 [B]."""

    def blend(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """x_t."""

    def target(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """What is to be predicted."""

    def step(self, x_t: Tensor, predicted: Tensor, t: Tensor, then: Tensor) -> Tensor:
        """x at the noise level `then` by one step of the first order, which is Euler's along a straight path."""

    def snr(self, t: Tensor) -> Tensor:
        """The signal's power over the noise's."""

    def weight_of_x(self, t: Tensor) -> Tensor:
        """What the error of the predicted x, squared, is multiplied by to be the error of what is predicted."""


def _wide(t: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, 1, ...], of as many dimensions as x."""
    return t.view(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Straight:
    """x_t = (1 - t) x + t e; the velocity v = e - x is predicted."""

    def blend(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        return flow.blend(x, e, t)

    def target(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """v."""
        return e - x

    def step(self, x_t: Tensor, predicted: Tensor, t: Tensor, then: Tensor) -> Tensor:
        """Euler's step."""
        return x_t + _wide(then - t, x_t) * predicted

    def snr(self, t: Tensor) -> Tensor:
        """((1 - t) / t)^2."""
        return ((1 - t) / t).square()

    def weight_of_x(self, t: Tensor) -> Tensor:
        """1 / t^2, for x predicted differs from x by -t (v predicted - v)."""
        return t.square().reciprocal()


@dataclass(frozen=True)
class Diffusion:
    """x_t = a x + s e with a^2 + s^2 = 1 from a table; t = n / T stands for the n-th of its T levels, and t = 0 for the image itself."""

    alphas_cumprod: tuple[float, ...]
    """a^2 at each of T levels, the least noise first."""
    predicts: Literal["epsilon", "v_prediction"] = "epsilon"
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The same on each device that asked for it: to copy it there is to wait for the device."""

    def level(self, t: Tensor) -> Tensor:
        """Which of the T levels, int64 in [0, T): the nearest; the discrete timestep that the transformer is told."""
        return (t * len(self.alphas_cumprod)).round().long().clamp(1, len(self.alphas_cumprod)) - 1

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s, float32 [B]."""
        if (table := self._tables.get(t.device)) is None:
            self._tables[t.device] = table = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=t.device)
        power = torch.where(t <= 0, 1.0, table[self.level(t)])
        return power.sqrt().float(), (1 - power).sqrt().float()

    def _wide_parts(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self._parts(t)
        return _wide(a, x), _wide(s, x)

    def blend(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        a, s = self._wide_parts(t, x)
        return a * x + s * e

    def target(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """e, or v = a e - s x."""
        if self.predicts == "epsilon":
            return e
        a, s = self._wide_parts(t, x)
        return a * e - s * x

    def step(self, x_t: Tensor, predicted: Tensor, t: Tensor, then: Tensor) -> Tensor:
        """The deterministic step of DDIM (Song et al. 2020, arXiv:2010.02502, equation 12 with no noise), which is the first of DPM-Solver++."""
        a, s = self._wide_parts(t, x_t)
        x, e = ((x_t - s * predicted) / a, predicted) if self.predicts == "epsilon" else (a * x_t - s * predicted, s * x_t + a * predicted)
        next_a, next_s = self._wide_parts(then, x_t)
        return next_a * x + next_s * e

    def snr(self, t: Tensor) -> Tensor:
        """a^2 / s^2."""
        a, s = self._parts(t)
        return (a / s).square()

    def weight_of_x(self, t: Tensor) -> Tensor:
        """a^2 / s^2 for e, 1 / s^2 for v."""
        _, s = self._parts(t)
        return self.snr(t) if self.predicts == "epsilon" else s.square().reciprocal()


def diffusion_of(betas: Sequence[float], predicts: Literal["epsilon", "v_prediction"]) -> Diffusion:
    """The process of a table of betas, the least noise first."""
    return Diffusion(tuple(torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0).tolist()), predicts)

"""Sampler: from noise to latents, along the way that the model was trained on, by steps of the first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from stages.families.family import Family
from stages.objectives import flow, pyramid
from stages.objectives.windows import Windows
from stages.precision import StagePrecision
from stages.shown import Shown


@dataclass(frozen=True)
class OtherExpert:
    """Another of the model's transformers, for noise levels from `low` up to `high`, and for 1 where that is its end."""

    low: float
    high: float
    transformer: nn.Module


@dataclass(frozen=True)
class Sampler:
    """How samples are made."""

    steps: int
    precision: StagePrecision
    guidance: float | None = None
    """What the family is told where it takes guidance; else classifier-free guidance, 1 for none. None for what the family is usually sampled with."""
    windows: Windows | None = None
    """The levels of a pyramid; then `steps` are shared out among them. None for the way that the model's own pipeline goes."""
    others: tuple[OtherExpert, ...] = ()
    """What samples at noise levels that the transformer at hand is not for."""

    def at(self, t: float, transformer: nn.Module) -> nn.Module:
        """What samples at a noise level. transformer: the one at hand."""
        return next((other.transformer for other in self.others if other.low <= t and (t < other.high or other.high == 1.0)), transformer)


@torch.no_grad()
def sample(family: Family, transformer: nn.Module, shape: Sequence[int], image_keys: Sequence[int], shown: Shown, sampler: Sampler) -> Tensor:
    """Latents [B, C, h, w]. shape: C, h, w. image_keys: what the noise of each image is derived from. shown: what they are samples of; its x is not looked at."""
    guidance = family.usual_guidance if sampler.guidance is None else sampler.guidance
    told = guidance if family.model.sizes.takes_guidance else None
    without = None
    if told is None and guidance != 1.0:
        without = replace(shown, text=family.encode_prompts([""] * len(image_keys)), regions=None)

    def predict(x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        model = sampler.at(float(t[0]), transformer)
        with sampler.precision.autocast():
            predicted = shown.predict(family, model, x, t, scale=scale, guidance=told)
            if without is not None:
                unguided = without.predict(family, model, x, t, scale=scale)
                predicted = unguided + guidance * (predicted - unguided)
        return predicted

    if sampler.windows is not None:
        noise = [each.to(family.device) for each in pyramid.sampling_noise(shape, image_keys, sampler.windows)]
        levels = sampler.windows.levels
        counts = [max(1, (sampler.steps + level) // levels) for level in range(levels)]
        return pyramid.sample_pyramid(predict, noise, sampler.windows, counts)
    x = flow.noise(shape, image_keys).to(family.device)
    for now, then in pairwise(family.sigmas(sampler.steps, family.latent_tokens(x))):
        t, after = now.expand(len(x)), then.expand(len(x))
        x = family.path.step(x, predict(x, t), t, after)
    return x

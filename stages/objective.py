"""Objective: what a stage asks of the transformer for each image: at which noise level, what of the row it is shown, and how much its error counts.

Everything random here follows from the key of (seed, stage) and the image's position in the stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mixing.batch import MicroBatch
from mixing.keys import key, uniform
from stages.families.family import Family
from stages.objectives import flow, pyramid
from stages.objectives.flow import Density
from stages.objectives.levels import LevelShares, shuffled
from stages.objectives.parts import Part, whole
from stages.objectives.windows import Windows
from stages.plan import Changed, Stage
from stages.resolved import level_shares, main_resolution, windows_of
from stages.sent import sent
from stages.shown import Shown

_GRID = 1000  # points over which the bell's mean is taken


@dataclass(frozen=True)
class LeftOut:
    """What dropout leaves out of a micro-batch, for each image."""

    prompts: tuple[bool, ...]
    references: tuple[bool, ...]


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a micro-batch of B images by their places in the stage, on the CPU."""

    left_out: LeftOut
    e: Tensor | None
    """Noise, float32 [B, C, h, w]; None where the latents' shape was not known."""
    t: Tensor
    """Noise levels, float32 [B]; with a pyramid, where inside its level each image is."""
    levels: tuple[int, ...] | None
    """Of a pyramid, for each image."""
    factors: Tensor
    """Of the images' losses by source and size, float32 [B]."""

    def pin_memory(self) -> Drawn:
        """The same in page-locked memory, from which a GPU copies beside its work."""
        return replace(self, e=None if self.e is None else self.e.pin_memory(), t=self.t.pin_memory(), factors=self.factors.pin_memory())


@dataclass(frozen=True)
class Objective:
    """What a stage asks of a family's transformer."""

    family: Family
    stage: Stage
    key: int
    """Of (seed, stage)."""
    compute: torch.dtype
    """What the stage multiplies in."""
    images: int
    """Of the whole stage."""

    @property
    def windows(self) -> Windows | None:
        """The levels of the pyramid, if it is one."""
        return windows_of(self.stage)

    def left_out(self, batch: MicroBatch) -> LeftOut:
        """Which images go without prompt and which without references."""
        asked = self.stage.dropout
        none = (False,) * len(batch.positions)
        prompts = self._chosen("prompt left out", batch.positions, asked.prompt) if asked.prompt else none
        if not batch.references or asked.mode == "joint":
            return LeftOut(prompts, prompts if batch.references else none)
        references = self._chosen("references left out", batch.positions, asked.references) if asked.references else none
        if asked.mode == "nested":
            references = tuple(one and other for one, other in zip(prompts, references, strict=True))
        return LeftOut(prompts, references)

    def _chosen(self, word: str, positions: Sequence[int], share: float) -> tuple[bool, ...]:
        words = np.asarray([key(self.key, word, position) for position in positions], dtype=np.uint64)
        return tuple((uniform(words) < share).tolist())

    def density(self, batch: MicroBatch) -> Density:
        """Which t a micro-batch is trained at: the shift goes with its targets' tokens."""
        asked = self.stage.timesteps
        shift = self.family.shift(self.family.tokens(*batch.targets.size)) if asked.shift == "auto" else 1.0 if asked.shift == "none" else asked.shift
        kind = asked.density or ("uniform" if self.family.facts.objective == "epsilon" else "logit_normal")
        low, high = asked.range
        if self.stage.expert is not None and (low, high) == (0.0, 1.0):
            low, high = self.family.expert_range(self.stage.expert)
        return Density(kind, asked.mean, asked.std, shift, asked.scale, low, high)

    def noise_keys(self, batch: MicroBatch) -> list[int]:
        """What each image's noise is derived from."""
        return [key(self.key, "noise", position) for position in batch.positions]

    def draw(self, batch: MicroBatch, latents: Sequence[int] | None, first: int) -> Drawn:
        """What is drawn for a micro-batch, all of it on the CPU and before anything is encoded. latents: the shape of its targets' latents, if it is known;
        first: as in `parts`."""
        e = None if latents is None else flow.noise(latents, self.noise_keys(batch))
        if self.windows is None:
            quantiles = flow.stratified(self.key, batch.positions, first, batch.step_images) if self.stage.timesteps.stratified else flow.quantiles(self.key, batch.positions)
            return Drawn(self.left_out(batch), e, self.density(batch).t(quantiles), None, self._factors(batch))
        shares = LevelShares(*level_shares(self.stage, self.images))
        # A step of fewer images than it takes for the shares to come round would tie a level to a source.
        places = shuffled(batch.positions, shares.period(), self.key) if shares.last is None and batch.step_images < shares.period() else batch.positions
        return Drawn(self.left_out(batch), e, pyramid.within(self.key, batch.positions), tuple(shares.levels(places)), self._factors(batch))

    def parts(self, batch: MicroBatch, shown: Shown, left_out: LeftOut, first: int) -> list[Part]:
        """A micro-batch as the transformer is shown it, in as many calls as it takes. first: position of the first image of its step, which stratified noise levels need."""
        return self.split(batch, shown, replace(self.draw(batch, shown.x.shape[1:], first), left_out=left_out))

    def split(self, batch: MicroBatch, shown: Shown, drawn: Drawn) -> list[Part]:
        """The same of what was drawn before."""
        x, without = shown.x, drawn.left_out.references
        device = x.device
        e = sent(flow.noise(x.shape[1:], self.noise_keys(batch)) if drawn.e is None else drawn.e, device)
        if (windows := self.windows) is not None:
            assert self.stage.pyramid is not None
            assert drawn.levels is not None
            parts = pyramid.split(
                x, e, drawn.levels, drawn.t, windows, patch=self.family.model.sizes.patch, loss=self.stage.pyramid.loss, seen=lambda t: self.family.seen_timestep(t, self.compute)
            )
        else:
            parts = [whole(self.family.path, x, e, self.family.seen_timestep(sent(drawn.t, device), self.compute))]
        parts = [self._weighed(part, batch, drawn) for part in parts]
        if self.stage.loss.changed is not None and len(shown.references) == 1 and shown.references[0].shape == x.shape:
            weight, of_places = changed_weights(x, shown.references[0], self.stage.loss.changed)
            rows = [sent(part.rows, device) for part in parts]
            parts = [replace(part, weight=part.weight * weight[own], places=of_places[own]) for part, own in zip(parts, rows, strict=True)]
        if not any(without):
            return parts
        gone = torch.tensor(without)
        apart = [(part, gone[part.rows] == is_gone, is_gone) for part in parts for is_gone in (False, True)]
        return [part.only(chosen, has_references=not is_gone) for part, chosen, is_gone in apart if chosen.any()]

    def _weighed(self, part: Part, batch: MicroBatch, drawn: Drawn) -> Part:
        """A part with its losses' factors by source, size and noise level."""
        weight = sent(drawn.factors if len(part.rows) == len(drawn.factors) else drawn.factors[part.rows], part.weight.device)
        if self.windows is not None:
            weight = part.weight * weight
        by_noise = self._by_noise(part.t, batch)
        return replace(part, weight=weight if by_noise is None else weight * by_noise)

    def _factors(self, batch: MicroBatch) -> Tensor:
        """Of each image's loss by its source and size, float32 [B]."""
        asked = self.stage.loss
        by_size = 1.0
        if asked.per == "token":
            side = main_resolution(self.stage)
            by_size = self.family.tokens(*batch.targets.size) / self.family.tokens(side, side)
        return torch.tensor([by_size * asked.sources.get(source, 1.0) for source in batch.sources])

    def _by_noise(self, t: Tensor, batch: MicroBatch) -> Tensor | None:
        """Of each image's loss by its noise level, [b]; None for 1."""
        asked = self.stage.loss
        if asked.weighting == "bell":
            return bell(t) / _mean_of_bell(self.density(batch))
        if asked.weighting == "min_snr":
            return self.family.path.snr(t).clamp(max=asked.gamma) / self.family.path.weight_of_x(t)
        return None


@lru_cache(maxsize=64)
def _mean_of_bell(density: Density) -> float:
    """The bell's mean over the noise levels that a density draws."""
    return float(bell(density.t((torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID)).double().mean())


def bell(t: Tensor) -> Tensor:
    """exp(-2 (t - 1/2)^2) less what it is at the ends. Source: DiffSynth-Studio, diffsynth/diffusion/flow_match.py, training weight."""
    return torch.exp(-2 * (t - 0.5).square()) - math.exp(-0.5)


def changed_weights(x: Tensor, reference: Tensor, asked: Changed) -> tuple[Tensor, Tensor]:
    """Factors of edits' losses: of each image, float32 [B], and of each place, float32 [B, 1, h, w].

    x, reference: latents of target and of what was edited, [B, C, h, w]. A pair that is the same has factor 0; a place that changed counts 1 / (mean difference),
    within limits; where nearly everything changed all places count alike. Source: OmniGen, train.py:208-228, which says it in a comment and never runs it.
    """
    difference = (x - reference).abs().mean(dim=1, keepdim=True)
    mean = difference.flatten(1).mean(dim=1)
    low, high = asked.limits
    much = (1 / mean.clamp(min=1e-12)).clamp(low, high).view(-1, 1, 1, 1)
    places = torch.where(difference > asked.threshold, much, torch.ones_like(difference))
    places = torch.where((mean > asked.different).view(-1, 1, 1, 1), torch.ones_like(places), places)
    return (mean >= asked.same).float(), places

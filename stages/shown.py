"""Shown: what a micro-batch shows the transformer, encoded: latents of targets and references, prompts, regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixing.batch import MicroBatch
from stages.encode import encode
from stages.families.base import RegionTexts, Text
from stages.families.family import Family
from stages.objectives.parts import Part
from stages.sent import sent


@dataclass(frozen=True)
class Shown:
    """A micro-batch of B images on the family's device."""

    x: Tensor
    """Latents of the targets, float32 [B, C, h, w]: what is to be predicted from noise, and not shown itself."""
    text: Text
    references: tuple[Tensor, ...]
    """Latents, each float32 [B, C, h', w']."""
    regions: RegionTexts | None

    def are_numbers(self) -> Tensor:
        """Which images have only finite latents, their references' too, bool [B]."""
        return torch.stack([latents.isfinite().flatten(1).all(dim=1) for latents in (self.x, *self.references)]).all(dim=0)

    def predict(self, family: Family, transformer: nn.Module, noised: Tensor, t: Tensor, *, scale: float = 1.0, guidance: float | None = None) -> Tensor:
        """What the transformer makes of all images, noised to t [B]. guidance: what it is told, if not the plan's."""
        return family.predict(transformer, noised, t, self.text, self.references, regions=self.regions, scale=scale, guidance=guidance)

    def predict_part(self, family: Family, transformer: nn.Module, part: Part) -> Tensor:
        """What it makes of a part of them, as an objective has noised it."""
        if len(part.rows) == len(self.x):
            text, references, regions = self.text, self.references, self.regions
        else:
            rows = sent(part.rows, self.x.device)
            text, references = self.text.rows(rows), tuple(reference[rows] for reference in self.references)
            regions = None if self.regions is None else self.regions.rows(rows)
        return family.predict(transformer, part.noised, part.t, text, references if part.has_references else (), regions=regions, scale=part.scale)


def show(family: Family, batch: MicroBatch, prompts: Sequence[str] | None = None, region_prompts: Sequence[Sequence[str]] | None = None) -> Shown:
    """Encode a micro-batch. prompts, region_prompts: in the place of its own, where some are left out; the second for each region, of each image."""
    x = encode(family, batch.targets)
    references = tuple(encode(family, reference) for reference in batch.references)
    # What sees references is handed their pixels too (`stages.encode.KeptLatents`).
    seen = tuple(reference.tensor() for reference in batch.references) if family.prompts_see_references else ()
    text = family.encode_prompts(batch.prompts if prompts is None else prompts, seen)
    regions = None
    if batch.regions:
        own = [region.prompts for region in batch.regions] if region_prompts is None else region_prompts
        masks = sent(torch.stack([region.masks for region in batch.regions], dim=1), family.device)
        regions = RegionTexts(tuple(family.encode_prompts(each) for each in own), masks)
    return Shown(x, text, references, regions)

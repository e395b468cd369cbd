"""Largest: the micro-batch of a stage that takes the most memory, and one like it, made up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mixing.batch import MicroBatch
from mixing.buckets import Signature, Size
from mixing.keys import key
from mixing.mixture import StageMixture
from mixing.reading import Images
from stages.families.base import RegionTexts, Text
from stages.families.family import Family
from stages.objectives import flow
from stages.shown import Shown


@dataclass(frozen=True)
class Largest:
    """The micro-batch with the most tokens that one process computes at a time."""

    source: str
    signature: Signature
    images: int
    tokens: int
    """Of each image."""
    level: int

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        return f"a micro-batch of {images} of source '{self.source}', {self.signature} pixels, {self.tokens:,} tokens each"


def largest_micro_batch(mixture: StageMixture, processes: int) -> Largest:
    """The largest that a stage has. A process has no more images of a step than fall to it where they are shared out evenly."""
    budget = mixture.budget
    found = []
    for cell, signature in zip(mixture.order.cells, mixture.signatures, strict=True):
        step = max(budget.first, budget.last) // (1 if budget.unit == "images" else cell.tokens)
        images = min(cell.micro, math.ceil(step / processes))
        found.append(Largest(cell.source, signature, images, cell.tokens, cell.level))
    return max(found, key=lambda each: (each.images * each.tokens, each.signature.regions))


def made_up(family: Family, largest: Largest, stage_key: int, channels: int, text: Text) -> tuple[MicroBatch, Shown]:
    """A micro-batch and what it shows: noise in the place of latents, keyed, on the family's device. channels: of latents. text: of as many prompts as there are images."""
    images, signature = largest.images, largest.signature

    def latents(size: Size, word: str) -> torch.Tensor:
        shape = (channels, size[0] // family.factor, size[1] // family.factor)
        return flow.noise(shape, [key(stage_key, word, place) for place in range(images)]).to(family.device)

    x = latents(signature.target, "target")
    references = tuple(latents(size, f"reference {number}") for number, size in enumerate(signature.references))
    regions = None
    if signature.regions:
        regions = RegionTexts((text,) * signature.regions, torch.ones(images, signature.regions, *signature.target, dtype=torch.bool, device=family.device))
    unread = [Images(size, torch.empty(0, *size, 3, dtype=torch.uint8), None, (), ()) for size in (signature.target, *signature.references)]
    names = ("",) * images
    batch = MicroBatch(
        0, 0, tuple(range(images)), (largest.source,) * images, names, names, unread[0], tuple(unread[1:]), tokens=largest.tokens, level=largest.level, step_images=images
    )
    return batch, Shown(x, text, references, regions)

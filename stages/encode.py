"""Encode: images of a micro-batch to latents, those that were made before taken from the cache and the others kept in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixing.content import content_hash
from mixing.reading import Images, to_float
from stages.cache import Cache
from stages.families.family import Family

_NAME = "latents"


@dataclass(frozen=True)
class KeptLatents:
    """The cache as the processes that read images see it: they hand over latents where there are any. Implements `mixing.reading.Latents`."""

    cache: Cache
    of_references: bool = True
    """Whether references are looked up too: not where the text encoder looks at their pixels."""

    def key(self, content: bytes, transform: str) -> bytes:
        """As `Cache.latents_key`."""
        return self.cache.latents_key(content, transform)

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The latents, float32 [C, h, w], or None."""
        found = self.cache.latents.get(key)
        return None if found is None else found[_NAME].numpy()


def encode(family: Family, images: Images) -> Tensor:
    """Normalised latents of the images of one role, float32 [B, C, h, w] on the family's device."""
    cache = family.cache
    if cache is None:
        assert images.latents is None
        return family.encode_images(images.tensor())
    pixels, kept = iter(images.pixels), iter(() if images.latents is None else images.latents)
    latents = []
    for is_encoded, key in zip(images.is_encoded, images.keys, strict=True):
        if is_encoded:
            cache.count("latents", is_hit=True)
            latents.append(next(kept))
        else:  # since it was read ahead another may have made it
            picture = next(pixels)
            latents.append(cache.encode_image(key or _key_of_pixels(cache, picture), to_float(picture[None])[0], family.encode_images))
    return torch.stack(latents).to(family.device)


def _key_of_pixels(cache: Cache, picture: Tensor) -> bytes:
    """What the latents of an image that was read without a cache are known by: its pixels, uint8 [H, W, 3]. The fixed inputs of a handoff are, and references that the text encoder looks at."""
    height, width, _ = picture.shape
    return cache.latents_key(content_hash(picture.numpy().tobytes()), f"{width}x{height} pixels v1")


def kept_latents(family: Family) -> KeptLatents | None:
    """What those that read images ask for latents, if the family keeps any."""
    return None if family.cache is None else KeptLatents(family.cache, not family.prompts_see_references)

"""Encode: images of a micro-batch to latents, those that were made before taken from the cache and the others kept in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixing.reading import Images
from stages.cache import Cache
from stages.families.base import Family

_NAME = "latents"


@dataclass(frozen=True)
class KeptLatents:
    """The cache as the processes that read images see it: they hand over latents where there are any. Implements `mixing.reading.Latents`."""

    cache: Cache

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
    if cache is None or None in images.keys:
        assert images.latents is None
        return family.encode_images(images.tensor())
    pixels, kept = iter(images.tensor()), iter(() if images.latents is None else images.latents)
    latents = []
    for is_encoded, key in zip(images.is_encoded, images.keys, strict=True):
        assert key is not None
        if is_encoded:
            cache.count("latents", is_hit=True)
            latents.append(next(kept))
        else:  # since it was read ahead another may have made it
            latents.append(cache.encode_image(key, next(pixels), family.encode_images))
    return torch.stack(latents).to(family.device)


def kept_latents(family: Family) -> KeptLatents | None:
    """What those that read images ask for latents, if the family keeps any."""
    return None if family.cache is None else KeptLatents(family.cache)

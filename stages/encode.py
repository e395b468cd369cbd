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
    made = family.encode_images(images.tensor()) if len(images.pixels) else None
    if images.latents is None and made is not None and family.cache is None:
        return made
    fresh, kept = iter(() if made is None else made), iter(() if images.latents is None else images.latents.to(family.device))
    latents = []
    for is_encoded, key in zip(images.is_encoded, images.keys, strict=True):
        latents.append(next(kept) if is_encoded else next(fresh))
        if family.cache is not None and key is not None:
            family.cache.count("latents", is_encoded)
            if not is_encoded:
                family.cache.latents.put(key, {_NAME: latents[-1].cpu()})
    return torch.stack(latents)


def kept_latents(family: Family) -> KeptLatents | None:
    """What those that read images ask for latents, if the family keeps any."""
    return None if family.cache is None else KeptLatents(family.cache)

"""Encode: images of a micro-batch to latents, those that were made before taken from the cache and the others kept in it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixing.content import content_hash
from mixing.file_hashes import FileHashes
from mixing.reading import Images, to_float
from stages.cache import Cache
from stages.families.family import Family
from stages.sent import sent

_MOST_AT_HAND = 32 * 2**20  # bytes, in each process that reads
_MOST_KEYS = 16_384  # at some 200 bytes each


class AtHand:
    """Latents that were read from the cache, the least recently used leaving first. To read 16 KB from the disk again takes longer than to train on a small model with them."""

    def __init__(self, most: int = _MOST_AT_HAND) -> None:
        """most: bytes that they may take."""
        self._most, self._bytes = most, 0
        self._held: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The latents, or None."""
        if (found := self._held.get(key)) is not None:
            self._held.move_to_end(key)
        return found

    def keep(self, key: bytes, latents: NDArray[np.float32]) -> None:
        """Keep latents that were not there."""
        self._held[key] = latents
        self._bytes += latents.nbytes
        while self._bytes > self._most:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.nbytes


@dataclass(frozen=True)
class KeptLatents:
    """The cache as the processes that read images see it: they hand over latents where there are any. Implements `mixing.reading.Latents`."""

    cache: Cache
    of_references: bool = True
    """Whether references are looked up too: not where the text encoder looks at their pixels."""
    _at_hand: AtHand = field(default_factory=AtHand, init=False, repr=False, compare=False)
    _keys: dict[tuple[bytes, str], bytes] = field(default_factory=dict, init=False, repr=False, compare=False)
    _hashes: FileHashes = field(default_factory=FileHashes, init=False, repr=False, compare=False)

    def key(self, content: bytes, transform: str) -> bytes:
        """As `Cache.latents_key`."""
        if (known := self._keys.get((content, transform))) is None:
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            self._keys[content, transform] = known = self.cache.latents_key(content, transform)
        return known

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The latents, float32 [C, h, w], or None; not to be changed."""
        if (known := self._at_hand.get(key)) is not None:
            return known
        if (found := self.cache.kept_latents(key)) is None:
            return None
        latents: NDArray[np.float32] = found.numpy()
        self._at_hand.keep(key, latents)
        return latents

    def hash_of(self, path: Path) -> tuple[bytes, bytes | None]:
        """As `FileHashes.hash`."""
        return self._hashes.hash(path)


def encode(family: Family, images: Images) -> Tensor:
    """Normalised latents of the images of one role, float32 [B, C, h, w] on the family's device."""
    cache = family.cache
    if cache is None:
        assert images.latents is None
        return family.encode_images(images.tensor())
    if images.latents is not None and len(images.latents) == len(images):
        for _ in range(len(images)):
            cache.count("latents", is_hit=True)
        return sent(images.latents, family.device)
    pixels, kept = iter(images.pixels), iter(() if images.latents is None else images.latents)
    latents = []
    for is_encoded, key in zip(images.is_encoded, images.keys, strict=True):
        if is_encoded:
            cache.count("latents", is_hit=True)
            latents.append(next(kept))
        else:  # since it was read ahead another may have made it
            picture = next(pixels)
            latents.append(cache.encode_image(key or _key_of_pixels(cache, picture), to_float(picture[None])[0], family.encode_images))
    return sent(torch.stack(latents), family.device)


def _key_of_pixels(cache: Cache, picture: Tensor) -> bytes:
    """What the latents of an image that was read without a cache are known by: its pixels, uint8 [H, W, 3]. The fixed inputs of a handoff are, and references that the text encoder looks at."""
    height, width, _ = picture.shape
    return cache.latents_key(content_hash(picture.numpy().tobytes()), f"{width}x{height} pixels v1")


def kept_latents(family: Family) -> KeptLatents | None:
    """What those that read images ask for latents, if the family keeps any."""
    return None if family.cache is None else KeptLatents(family.cache, not family.prompts_see_references)

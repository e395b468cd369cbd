"""The cache: latents and encoded prompts on disk, by content, shared by stages and runs. What is missing is encoded, one image or prompt at a time, and kept.

Everything that an encoding depends on is in its key: the image's bytes, what was done to its pixels, the prompt, the encoder's weights. So an entry never
goes stale, and one that was made anywhere is the one that would be made here: to the bit on the same kind of machine with as many threads, else to rounding
(on a CPU the latents of 256 pixels and more differ by up to 3e-7 between one thread and two; torch 2.13).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mixing.content import latents_key, text_key
from mixing.keys import key as number_of
from stages.families.base import Text
from stages.tensor_store import TensorStore

_LATENTS, _EMBEDS, _POOLED, _MASK = "latents", "embeds", "pooled", "mask"


class Cache:
    """Latents and encoded prompts of one model's encoders, in a folder that other models' may share."""

    def __init__(self, folder: Path, *, latents_identity: str, text_identity: str, limit_bytes: int | None, writer: str) -> None:
        """Open a cache, or make it. Raises OSError if the folder cannot be made.

        latents_identity, text_identity: the family's; they say which weights. limit_bytes: what both kinds may take together on disk; None for
        no limit. writer: begins the names of this process's files, such as `rank0`.
        """
        self.latents_identity, self.text_identity = latents_identity, text_identity
        stores = {kind: folder / kind for kind in ("latents", "text")}
        self.latents, self.texts = (
            TensorStore(place, limit_bytes=limit_bytes, writer=writer, shared_with=[other for other in stores.values() if other != place]) for place in stores.values()
        )
        self.hits = {"latents": 0, "text": 0}
        """Encodings that were there, by kind."""
        self.misses = {"latents": 0, "text": 0}
        """Encodings that were made."""

    def latents_key(self, content: bytes, transform: str) -> bytes:
        """The key of an image's latents; content: `content_hash` of its file, transform: what was done to its pixels."""
        return latents_key(content, transform, self.latents_identity)

    def count(self, kind: Literal["latents", "text"], is_hit: bool) -> None:
        """Count an encoding that was there, or was made. For those whom another process has handed what it found; the methods here count themselves."""
        (self.hits if is_hit else self.misses)[kind] += 1

    def encode_image(self, key: bytes, image: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The latents [C, h, w] of an image [3, H, W], on the CPU: kept ones, or those that `encode` makes of [1, 3, H, W], which are kept if they are numbers."""
        if (found := self.kept_latents(key)) is not None:
            self.count("latents", True)
            return found
        self.count("latents", False)
        latents = encode(image[None])[0].cpu()
        if latents.isfinite().all():
            self.latents.put(key, {_LATENTS: latents})
        self._stop_together()
        return latents

    def kept_latents(self, key: bytes) -> Tensor | None:
        """The latents that are kept under a key, or None; those that are no numbers, as a former version may have kept them, are none."""
        found = self.latents.get(key)
        return found[_LATENTS] if found is not None and bool(found[_LATENTS].isfinite().all()) else None

    def text(self, prompt: str) -> Text | None:
        """A kept encoded prompt, embeds [L, ...], pooled [P], mask [L], on the CPU; None if there is none. With `keep_text` what `TextCache` reads through."""
        found = self.texts.get(text_key(prompt, self.text_identity))
        self.count("text", found is not None)
        return None if found is None else Text(found[_EMBEDS], found.get(_POOLED), found.get(_MASK))

    def keep_text(self, prompt: str, text: Text) -> None:
        """Keep an encoded prompt, embeds [L, ...], pooled [P], mask [L], if all of it are numbers."""
        tensors = text_tensors(text)
        if all(bool(value.isfinite().all()) for value in tensors.values()):
            self.texts.put(text_key(prompt, self.text_identity), tensors)
        self._stop_together()

    def flush(self) -> None:
        """Write what was kept, so that other processes and later runs find it."""
        self.latents.flush()
        self._stop_together()
        self.texts.flush()
        self._stop_together()

    def close(self) -> None:
        """Flush, and close every file."""
        self.flush()
        self.latents.close()
        self.texts.close()

    def _stop_together(self) -> None:
        """Where one kind cannot be written, the other is not tried: a full disk is one warning."""
        if not (self.latents.is_writing and self.texts.is_writing):
            self.latents.is_writing = self.texts.is_writing = False

    def take_warnings(self) -> list[str]:
        """What went wrong since the last call; none of it stops a run."""
        return self.latents.take_warnings() + self.texts.take_warnings()


def text_tensors(text: Text) -> dict[str, Tensor]:
    """An encoded prompt as it is kept, by name."""
    parts = {_EMBEDS: text.embeds, _POOLED: text.pooled, _MASK: text.mask}
    return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class Verified:
    """What encoding some entries anew has shown."""

    checked: int
    """Entries that were encoded anew and compared."""
    missing: int
    """Entries asked about that are not in the cache: nothing to compare."""
    different: tuple[str, ...]
    """The keys, in hexadecimal, of entries that are not what the encoder makes."""
    largest: float
    """The largest difference between a kept and a new value, relative to the entry's largest value."""


def verify(
    store: TensorStore,
    entries: Iterable[tuple[bytes, Callable[[], Mapping[str, Tensor]]]],
    *,
    fraction: float = 0.01,
    least: int = 8,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Verified:
    """Encode some of the entries anew and compare them with what is kept.

    entries: the key of each entry that is used, and what encodes it anew; a key given twice counts once. fraction: which part of those that are
    in the store is compared, chosen by (seed, key), but at least `least`. tolerance: the difference that passes, relative to the entry's largest
    value: 1e-5 is for float32 on a CPU.
    """
    threshold = fraction * 2.0**64
    seen: set[bytes] = set()
    missing = 0
    chosen: list[tuple[int, bytes, Callable[[], Mapping[str, Tensor]]]] = []
    others: list[tuple[int, bytes, Callable[[], Mapping[str, Tensor]]]] = []  # a heap, the last in rank first
    for key, encode in entries:
        if key in seen:
            continue
        seen.add(key)
        if key not in store:
            missing += 1
        elif (rank := number_of("verify", seed, key.hex())) < threshold:
            chosen.append((rank, key, encode))
        else:
            heapq.heappush(others, (-rank, key, encode))
            if len(others) > least:
                heapq.heappop(others)
    chosen += sorted(others, reverse=True)[: max(0, least - len(chosen))]
    checked, largest, different = 0, 0.0, []
    for _, key, encode in sorted(chosen, key=lambda entry: entry[1]):
        if (kept := store.get(key)) is None:  # deleted or found damaged since
            missing += 1
            continue
        checked += 1
        difference = _difference(kept, encode())
        largest = max(largest, difference)
        if difference > tolerance:
            different.append(key.hex())
    return Verified(checked, missing, tuple(different), largest)


def _difference(kept: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> float:
    """The largest difference of two entries relative to their largest value; infinite where they differ in names, shapes, dtypes or finiteness."""
    if kept.keys() != fresh.keys():
        return math.inf
    largest = 0.0
    for name, old in kept.items():
        new = fresh[name].cpu()
        if old.shape != new.shape or old.dtype != new.dtype:
            return math.inf
        if torch.equal(old, new):
            continue
        if not (old.isfinite().all() and new.isfinite().all()):
            return math.inf
        scale = max(float(old.double().abs().max()), float(new.double().abs().max()))
        largest = max(largest, float((old.double() - new.double()).abs().max()) / scale)
    return largest

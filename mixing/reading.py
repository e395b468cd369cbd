"""Reading: a row's images as a stage sees them, scaled, cropped and mirrored, or as the latents that were made of the same before; and its regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mixing.bad_rows import BadRow, RowError, UnreadableRow
from mixing.buckets import AS_TARGET, RowClass, Signature, Size
from mixing.content import content_hash
from mixing.images import UnreadableImage, decode, fit, header_size
from mixing.keys import key, uniform
from mixing.plain_file import read_plain
from mixing.tasks import Cells, Pixels

_SHARED = 2**20  # bytes from which images go by shared memory (figures in docs/log.md)

Picture = NDArray[np.uint8]
"""An image [H, W, 3]."""

Mask = NDArray[np.bool_]
"""Which pixels of a target are inside of a region, [H, W]."""

_DARK = 127  # of 255; what is lighter is inside


@dataclass(frozen=True)
class View:
    """Which part of a row's images is seen, and whether mirrored."""

    x: float = 0.5
    """Where the part that is kept lies between left (0) and right (1)."""
    y: float = 0.5
    """The same between top and bottom."""
    is_flipped: bool = False
    """Whether left and right change places."""


_CENTER = View()


@dataclass(frozen=True)
class Augmentation:
    """What a plan's `augment` says; as it stands here, nothing is done to an image but the crop of its centre."""

    flip: float = 0.0
    crop: Literal["center", "random"] = "center"
    variants: int = 1

    def view(self, seed: int, source: str, row: str, epoch: int) -> View:
        """The view of a row in an epoch: its variants take turns, and each follows from (seed, source, row, variant)."""
        if not self.flip and self.crop == "center":
            return _CENTER
        variant = epoch % self.variants
        words = [key(seed, word, source, row, variant) for word in ("crop x", "crop y", "flip")]
        x, y, chance = uniform(np.asarray(words, dtype=np.uint64)).tolist()
        return View(x, y, chance < self.flip) if self.crop == "random" else View(is_flipped=chance < self.flip)


class Latents(Protocol):
    """Latents that were made before, by content. Goes through fork and pickling."""

    def key(self, content: bytes, transform: str) -> bytes:
        """What the latents of an image are known by. content: `content_hash` of its file. transform: what was done to its pixels."""

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The latents, or None; they are not to be changed."""

    def hash_of(self, path: Path) -> tuple[bytes, bytes | None]:
        """`content_hash` of a file, and what it holds if it was read for that (`mixing.file_hashes`). Raises OSError."""

    @property
    def of_references(self) -> bool:
        """Whether references are asked for too; if not, their pixels are read every time."""


class Seen(NamedTuple):
    """One image: its pixels, or its latents."""

    pixels: Picture | None
    latents: NDArray[np.float32] | None
    key: bytes | None
    """What its latents are known by; None if none are kept."""


@dataclass(frozen=True)
class Images:
    """The images that play one role in a micro-batch of B: pixels of those that are yet to be encoded, latents of the others."""

    size: Size
    pixels: torch.Tensor
    """uint8 [P, H, W, 3], in order."""
    latents: torch.Tensor | None
    """float32 [B - P, C, h, w], in order; None if there are none."""
    is_encoded: tuple[bool, ...]
    """[B]"""
    keys: tuple[bytes | None, ...]
    """[B]"""

    def tensor(self) -> torch.Tensor:
        """float32 [P, 3, H, W] in [-1, 1], of those that are yet to be encoded."""
        return to_float(self.pixels)

    def __len__(self) -> int:
        return len(self.is_encoded)

    def __reduce__(self) -> tuple[object, ...]:
        """From a worker, small ones go by the pipe, as numpy arrays; torch would put them into shared memory, and that is worth it for large ones only."""
        small = self.pixels.nbytes + (0 if self.latents is None else self.latents.nbytes) < _SHARED
        pixels, latents = (part.numpy() if small and part is not None else part for part in (self.pixels, self.latents))
        return _images, (self.size, pixels, latents, self.is_encoded, self.keys)

    def pin_memory(self) -> Images:
        """The same in page-locked memory, from which a GPU copies beside its work."""
        return replace(self, pixels=self.pixels.pin_memory(), latents=self.latents if self.latents is None else self.latents.pin_memory())


def _images(size: Size, pixels: torch.Tensor | Picture, latents: torch.Tensor | NDArray[np.float32] | None, is_encoded: tuple[bool, ...], keys: tuple[bytes | None, ...]) -> Images:
    latents = torch.from_numpy(latents) if isinstance(latents, np.ndarray) else latents
    return Images(size, torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels, latents, is_encoded, keys)


@dataclass(frozen=True)
class Regions:
    """One region of every image of a micro-batch of B: a part of its target with a prompt of its own."""

    prompts: tuple[str, ...]
    """[B]; "" where the image's caption is left out."""
    masks: torch.Tensor
    """bool [B, H, W], of the target's size: True inside. A region that the crop has cut off is False everywhere."""

    def __reduce__(self) -> tuple[object, ...]:
        """As that of `Images`: from a worker, small ones go by the pipe."""
        return _regions, (self.prompts, self.masks.numpy() if self.masks.nbytes < _SHARED else self.masks)

    def pin_memory(self) -> Regions:
        """The same in page-locked memory."""
        return replace(self, masks=self.masks.pin_memory())


def _regions(prompts: tuple[str, ...], masks: torch.Tensor | Mask) -> Regions:
    return Regions(prompts, torch.from_numpy(masks) if isinstance(masks, np.ndarray) else masks)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """8-bit pixels [B, H, W, 3] as float32 [B, 3, H, W] in [-1, 1], on their device, as `mixing.images.to_tensor` has them."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0


def read_row(source: str, row: str, cells: Cells, row_class: RowClass, signature: Signature, view: View, latents: Latents | None) -> list[Seen]:
    """A row's images: the target, then the references. Raises UnreadableRow, naming the image."""
    seen: list[Seen] = []
    try:
        seen.append(_read(cells.target, signature.target, view, latents))
        of_references = latents if latents is not None and latents.of_references else None
        for pixels, size, each in zip(cells.references, signature.references, row_class.references, strict=True):
            seen.append(_read(pixels, size, view if each == AS_TARGET else View(is_flipped=view.is_flipped), of_references))
    except (RowError, UnreadableImage, OSError) as error:
        name, _ = next(islice(cells.images(), len(seen), None))
        raise UnreadableRow(BadRow(source, row, f"{name}: {error}")) from error
    return seen


def read_masks(source: str, row: str, cells: Cells, signature: Signature, view: View) -> tuple[Mask, ...]:
    """The masks of a row's regions, cropped, scaled (to the nearest pixel) and mirrored as its target is. Raises UnreadableRow, naming the mask.

    Inside is what is lighter than half, once it is scaled. A region may have no pixel left.
    """
    if len(cells.regions) != signature.regions:
        changed = f"{len(cells.regions)} regions, and {signature.regions} when the source was opened; start again, so that it is looked at anew"
        raise UnreadableRow(BadRow(source, row, changed))
    masks: list[Mask] = []
    for name, pixels in islice(cells.images(), 1 + len(cells.references), None):
        try:
            masks.append(_mask(pixels, cells.size or header_size(cells.target), signature.target, view))
        except (RowError, UnreadableImage, OSError) as error:
            raise UnreadableRow(BadRow(source, row, f"{name}: {error}")) from error
    return tuple(masks)


def _mask(pixels: Pixels, of_target: Size, size: Size, view: View) -> Mask:
    """A mask of a target that has such a size on disk, as it is seen. Raises UnreadableImage."""
    image = decode(pixels)
    if (image.height, image.width) != of_target:
        raise UnreadableImage(f"{image.width} x {image.height} pixels, and the target has {of_target[1]} x {of_target[0]}; a mask has the target's size")
    mask = np.asarray(fit(image.convert("L"), *size, x=view.x, y=view.y, resample=Image.Resampling.NEAREST)) > _DARK
    return mask[:, ::-1] if view.is_flipped else mask


def _read(pixels: Pixels, size: Size, view: View, latents: Latents | None) -> Seen:
    if latents is None:
        return Seen(_fitted(pixels, size, view), None, None)
    hashed, content = latents.hash_of(pixels) if isinstance(pixels, Path) else (content_hash(pixels), pixels)
    known_by = latents.key(hashed, f"{size[1]}x{size[0]} at {view.x:.17g},{view.y:.17g}{' flipped' if view.is_flipped else ''} v1")
    found = latents.get(known_by)
    if found is None and content is None:
        assert isinstance(pixels, Path)
        content = read_plain(pixels)
        if content_hash(content) != hashed:  # it has changed this very moment
            return _read(content, size, view, latents)
    return Seen(_fitted(content, size, view) if found is None and content is not None else None, found, known_by)


def _fitted(pixels: Pixels, size: Size, view: View) -> Picture:
    image = fit(decode(pixels, size), *size, x=view.x, y=view.y)
    picture = np.asarray(image)
    return np.ascontiguousarray(picture[:, ::-1]) if view.is_flipped else picture


def gathered_regions(prompts: Sequence[Sequence[str]], masks: Sequence[Sequence[Mask]]) -> tuple[Regions, ...]:
    """The regions of a micro-batch: every image's first, then every image's second, and so on. prompts, masks: of each image, as many of both."""
    pairs = zip(zip(*prompts, strict=True), zip(*masks, strict=True), strict=True)
    return tuple(Regions(texts, torch.from_numpy(np.stack(of_one))) for texts, of_one in pairs)


def _stacked(latents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """As `np.stack`, of which few small arrays take five times as long."""
    together = np.empty((len(latents), *latents[0].shape), dtype=np.float32)
    for place, own in enumerate(latents):
        together[place] = own
    return together


def gathered(size: Size, seen: Sequence[Seen]) -> Images:
    """The images of one role of a micro-batch."""
    pixels = [each.pixels for each in seen if each.pixels is not None]
    ready = [each.latents for each in seen if each.latents is not None]
    return Images(
        size,
        torch.from_numpy(np.stack(pixels)) if pixels else torch.empty((0, *size, 3), dtype=torch.uint8),
        torch.from_numpy(_stacked(ready)) if ready else None,
        tuple(each.latents is not None for each in seen),
        tuple(each.key for each in seen),
    )

"""Reading: what is seen of an image follows from (seed, row, epoch); a target and what is aligned with it are cropped and mirrored alike."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixing.bad_rows import UnreadableRow
from mixing.buckets import Shapes, class_of
from mixing.content import latents_key
from mixing.file_hashes import FileHashes
from mixing.images import decode, fit, to_tensor
from mixing.reading import Augmentation, Images, Seen, View, gathered, read_row, to_float
from mixing.tasks import Cells

RULES = Augmentation(flip=0.3, crop="random", variants=4)


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """Smooth, so that where a part lies can be told; a PNG."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, np.full_like(across, seed)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_views_follow_from_the_row_and_the_epoch_alone_and_take_turns() -> None:
    views = [RULES.view(1, "a", "row", epoch) for epoch in range(12)]
    assert views == [RULES.view(1, "a", "row", epoch) for epoch in range(12)]
    assert views[:4] == views[4:8] == views[8:]
    assert len(set(views[:4])) == 4
    assert RULES.view(2, "a", "row", 0) != views[0] != RULES.view(1, "b", "row", 0)
    assert Augmentation().view(1, "a", "row", 3) == View()


def test_rows_are_flipped_as_often_as_asked_and_crops_lie_everywhere() -> None:
    views = [RULES.view(5, "a", f"row {number}", epoch) for number in range(2500) for epoch in range(4)]
    flipped = sum(view.is_flipped for view in views)
    assert abs(flipped - 3000) < 4 * np.sqrt(10_000 * 0.3 * 0.7)
    for side in ("x", "y"):
        counts = np.bincount([int(getattr(view, side) * 10) for view in views], minlength=10)
        assert counts.min() > 800
    only = [Augmentation(flip=0.5, variants=2).view(5, "a", f"row {number}", 0) for number in range(100)]
    assert Counter((view.x, view.y) for view in only) == {(0.5, 0.5): 100}
    assert {view.is_flipped for view in only} == {True, False}


def test_target_and_aligned_reference_show_the_same_part_and_another_reference_its_centre() -> None:
    target = picture(96, 64)
    aligned, other = picture(192, 128), picture(64, 96)
    row_class = class_of((64, 96), [(128, 192), (96, 64)])
    signature = Shapes(32, 2, max_aspect=1.0).signature(row_class)
    cells = Cells(("a",), target, (aligned, other))
    for view in (View(0.0, 0.0), View(1.0, 0.3), View(0.2, 0.9, is_flipped=True)):
        seen = read_row("a", "row", cells, row_class, signature, view, None)
        shown = [each.pixels for each in seen]
        assert all(each is not None for each in shown)
        across = [float(each[..., 0].mean()) for each in shown if each is not None]
        assert across[0] == pytest.approx(across[1], abs=2)
        assert across[2] == pytest.approx(127.5, abs=2)
        mirrored = bool(shown[0][0, 0, 0] > shown[0][0, -1, 0])  # type: ignore[index]
        assert mirrored == view.is_flipped
        assert bool(shown[2][0, 0, 0] > shown[2][0, -1, 0]) == view.is_flipped  # type: ignore[index]


def test_a_plain_view_is_the_centre_scaled_to_the_bucket() -> None:
    content, row_class = picture(90, 61), class_of((61, 90), [])
    signature = Shapes(32, 2).signature(row_class)
    (seen,) = read_row("a", "row", Cells(("a",), content, ()), row_class, signature, View(), None)
    assert seen.pixels is not None
    assert (seen.pixels == np.asarray(fit(decode(content), *signature.target))).all()
    assert torch.equal(to_float(torch.from_numpy(seen.pixels.copy())[None])[0], to_tensor(fit(decode(content), *signature.target)))


def test_a_large_jpeg_is_seen_as_without_the_shortcut_to_within_a_few_grey_values() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    for turn in (1, 6):  # upright, and turned by EXIF
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif)
        size = (96, 128) if turn == 1 else (128, 96)
        whole, quick = (np.asarray(fit(decode(file.getvalue(), *cover), *size)).astype(int) for cover in ((), (size,)))
        assert decode(file.getvalue(), size).width < decode(file.getvalue()).width
        assert np.abs(whole - quick).max() <= 6
        assert np.abs(whole - quick).mean() < 0.5


class Kept:
    """Latents in memory."""

    def __init__(self) -> None:
        self.held: dict[bytes, np.ndarray] = {}
        self.asked: list[bytes] = []

    of_references = True

    def key(self, content: bytes, transform: str) -> bytes:
        return latents_key(content, transform, "encoder")

    def get(self, key: bytes) -> np.ndarray | None:
        self.asked.append(key)
        return self.held.get(key)

    def hash_of(self, path: Path) -> tuple[bytes, bytes | None]:
        return FileHashes().hash(path)


def test_latents_stand_in_for_pixels_of_the_same_content_and_view_only() -> None:
    kept, row_class = Kept(), class_of((64, 96), [])
    signature = Shapes(32, 2).signature(row_class)
    cells = Cells(("a",), picture(96, 64), ())
    (seen,) = read_row("a", "row", cells, row_class, signature, View(), kept)
    assert seen.key is not None
    kept.held[seen.key] = np.ones((4, 4, 4), dtype=np.float32)
    assert read_row("b", "another", cells, row_class, signature, View(), kept)[0].pixels is None
    for other in (View(0.4), View(is_flipped=True)):
        assert read_row("a", "row", cells, row_class, signature, other, kept)[0].latents is None
    assert read_row("a", "row", Cells(("a",), picture(96, 64, seed=1), ()), row_class, signature, View(), kept)[0].latents is None
    assert len(set(kept.asked)) == 4


def test_a_broken_image_is_named_with_its_role() -> None:
    cells = Cells(("a",), picture(64, 64), (picture(64, 64)[:60],))
    row_class = class_of((64, 64), [(64, 64)])
    with pytest.raises(UnreadableRow, match=r"source 'a': 'row 7': reference 1: broken PNG file"):
        read_row("a", "row 7", cells, row_class, Shapes(32, 2).signature(row_class), View(), None)


@pytest.mark.parametrize("side", [8, 1024])
def test_images_come_through_a_workers_pipe_as_they_were(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    latents = np.random.default_rng(1).normal(size=(4, side, side)).astype(np.float32)
    images = gathered((side, side), [Seen(pixels, None, b"a"), Seen(None, latents, b"b"), Seen(pixels, None, None)])
    if side == 8:
        back = pickle.loads(pickle.dumps(images))  # noqa: S301  its own
        assert isinstance(back, Images)
        assert torch.equal(back.pixels, images.pixels)
        assert back.latents is not None
        assert images.latents is not None
        assert torch.equal(back.latents, images.latents)
        assert (back.is_encoded, back.keys, back.size) == ((False, True, False), (b"a", b"b", None), (8, 8))
    assert images.pixels.shape == (2, side, side, 3)
    assert len(images) == 3

"""Regions: prompts of parts of an image go with their masks from the row to the tokens, and attend to nothing else."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mixing import look
from mixing.bad_rows import SourceError, UnreadableRow
from mixing.batch import MicroBatch, read_rows
from mixing.buckets import RowClass, Shapes, Signature, class_of, classify
from mixing.captions import CaptionRules
from mixing.cells import Level, Micro
from mixing.mixture import StageMixture
from mixing.order import Budget
from mixing.reading import Augmentation, Regions, View, gathered_regions, read_masks, read_row
from mixing.rows import Found
from mixing.selected import Choice, Selection, select
from mixing.source import Source, open_source
from mixing.stream import open_stream
from mixing.tasks import Cells, Region
from models import tiny_flux
from stages.check_sources import source_problems
from stages.families.regions import attention_mask, token_masks
from stages.feed import Sizes
from stages.reader import read_plan

SIDE = 8
SHAPES = Shapes(SIDE, 1)


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# --- rows -----------------------------------------------------------------------------------------------------------------------------


def mask_of(row: int, region: int) -> NDArray[np.uint8]:
    """Another one for each row and region."""
    return np.random.default_rng([row, region]).integers(0, 2, (SIDE, SIDE), dtype=np.uint8) * 255


def num_regions(row: int) -> int:
    return 1 + row % 3


def write_entities(folder: Path, rows: int) -> None:
    (folder / "masks").mkdir(parents=True)
    lines = []
    for row in range(rows):
        (folder / f"{row:02d}.png").write_bytes(encoded(np.full((SIDE, SIDE, 3), row, dtype=np.uint8)))
        masks = [f"masks/{row:02d}-{region}.png" for region in range(num_regions(row))]
        for region, name in enumerate(masks):
            (folder / name).write_bytes(encoded(mask_of(row, region)))
        prompts = [f"entity {row}-{region}" for region in range(num_regions(row))]
        lines.append(json.dumps({"image": f"{row:02d}.png", "prompt": f"scene {row}", "eligen_entity_prompts": prompts, "eligen_entity_masks": masks}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def opened(root: Path, path: str = "rows.jsonl", task: str = "entity", index: Path | None = None) -> Source:
    return open_source("people", path=path, task=task, columns={}, prompt=None, split="train", on_bad_row="skip", root=root, index=index)


def plain_rows(root: Path) -> Source:
    """Rows without regions."""
    folder = root / "photos"
    folder.mkdir()
    for row in range(4):
        (folder / f"{row}.png").write_bytes(encoded(np.full((SIDE, SIDE, 3), 100 + row, dtype=np.uint8)))
        (folder / f"{row}.txt").write_text("a photo")
    return open_source("photos", path="photos", task="text_to_image", columns={}, prompt=None, split="train", on_bad_row="skip", root=root)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("entities")
    write_entities(root, 12)
    return root


def mixture_of(selections: dict[str, Selection]) -> StageMixture:
    return StageMixture(
        selections,
        mix="natural",
        seed=1,
        stage="only",
        levels=[Level(SHAPES)],
        budget=Budget("images", 12, 12, 100),
        micro=Micro(images=3),
        tokens_of=Sizes(1, 5).tokens,
        drawn_before={},
    )


def batches(mixture: StageMixture, last: int, *, workers: int = 0) -> list[MicroBatch]:
    with closing(mixture.batches(0, last, rank=0, processes=1, workers=workers, pin_memory=False)) as reading:
        return list(reading)


def check_regions(batch: MicroBatch, *, is_flipped: bool = False) -> None:
    """Every image has its own prompts and masks."""
    for place, (source, key) in enumerate(zip(batch.sources, batch.keys, strict=True)):
        row = -1 if source == "photos" else int(key.removesuffix(".png"))
        assert len(batch.regions) == (0 if row < 0 else num_regions(row))
        for number, region in enumerate(batch.regions):
            assert region.prompts[place] == f"entity {row}-{number}"
            assert region.masks.dtype == torch.bool
            assert region.masks.shape == (len(batch.keys), *batch.targets.size)
            expected = mask_of(row, number) > 127
            assert np.array_equal(region.masks[place].numpy(), expected[:, ::-1] if is_flipped else expected)


# --- masks ----------------------------------------------------------------------------------------------------------------------------


def entity(target: NDArray[np.uint8], masks: Sequence[NDArray[np.uint8]]) -> Cells:
    return Cells(("a",), encoded(target), (), tuple(Region(f"part {number}", encoded(mask)) for number, mask in enumerate(masks)))


@pytest.mark.parametrize("size", [(96, 128), (61, 90), (20, 33)])  # larger than the bucket, much the same aspect, and scaled up
def test_masks_are_cropped_scaled_and_flipped_as_the_target_is(size: tuple[int, int]) -> None:
    """A target that tells by its colour where a pixel comes from, and masks of what lies right of, and below, a line."""
    height, width = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    target = np.stack([across, down, np.zeros_like(across)], axis=-1).astype(np.uint8)
    cells = entity(target, [np.where(target[..., channel] > line, 255, 0).astype(np.uint8) for channel, line in ((0, 120), (1, 60))])
    row_class = class_of(size, [], 2)
    signature = Shapes(48, 2, max_aspect=1.0, upscale=9.0).signature(row_class)
    for view in (View(), View(0.0, 0.0), View(1.0, 0.3), View(0.2, 0.9, is_flipped=True)):
        (seen,) = read_row("a", "row", cells, row_class, signature, view, None)
        assert seen.pixels is not None
        assert seen.pixels.shape[:2] == (48, 48)
        for mask, channel, line in zip(read_masks("a", "row", cells, signature, view), (0, 1), (120, 60), strict=True):
            shown = seen.pixels[..., channel].astype(int)
            sure = np.abs(shown - line) > 255 / (size[1 - channel] - 1) + 2  # Lanczos and the nearest pixel differ by one on disk
            assert sure.mean() > 0.75
            assert np.array_equal(mask[sure], (shown > line)[sure])


@given(x=st.floats(0, 1), y=st.floats(0, 1), is_flipped=st.booleans(), size=st.tuples(st.integers(16, 24), st.integers(16, 24)))
@settings(max_examples=40, deadline=None)
def test_where_nothing_is_scaled_a_mask_is_the_targets_own_pixels(x: float, y: float, is_flipped: bool, size: tuple[int, int]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (16, size[1]) if size[0] > size[1] else (size[0], 16), dtype=np.uint8)
    cells, signature = entity(np.stack([grey] * 3, axis=-1), [grey]), Signature((16, 16), (), 1)
    (seen,), (mask,) = read_row("a", "row", cells, class_of(grey.shape, [], 1), signature, View(x, y, is_flipped), None), read_masks("a", "row", cells, signature, View(x, y, is_flipped))
    assert seen.pixels is not None
    assert np.array_equal(mask, seen.pixels[..., 0] > 127)


def test_a_scaled_mask_is_made_of_pixels_of_its_own_and_not_of_their_mean() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    (mask,) = read_masks("a", "row", entity(np.zeros((32, 32, 3), dtype=np.uint8), [grey]), Signature((16, 16), (), 1), View())
    assert np.array_equal(mask, grey[1::2, 1::2] > 127)


def test_light_is_inside_and_half_grey_is_not() -> None:
    grey = np.repeat(np.asarray([[0, 100, 127, 128, 200, 255]], dtype=np.uint8), 6, axis=0)
    (mask,) = read_masks("a", "row", entity(np.zeros((6, 6, 3), dtype=np.uint8), [grey]), Signature((6, 6), (), 1), View())
    assert mask[0].tolist() == [False, False, False, True, True, True]


def test_a_region_outside_of_the_crop_keeps_its_prompt_and_has_no_pixel() -> None:
    mask = np.zeros((16, 48), dtype=np.uint8)
    mask[:, :4] = 255
    cells, signature = entity(np.zeros((16, 48, 3), dtype=np.uint8), [mask, 255 - mask]), Signature((16, 16), (), 2)
    found = gathered_regions([[region.prompt for region in cells.regions]], [read_masks("a", "row", cells, signature, View())])
    assert [region.prompts for region in found] == [("part 0",), ("part 1",)]
    assert not found[0].masks.any()
    assert found[1].masks.all()
    tokens = token_masks(torch.stack([region.masks for region in found], dim=1), (4, 4))
    assert tokens.tolist() == [[[False] * 16, [True] * 16]]


def test_a_mask_that_has_changed_is_an_unreadable_row_and_named(tmp_path: Path) -> None:
    """As when its file is replaced while a run goes on."""
    target = np.zeros((6, 4, 3), dtype=np.uint8)
    good, wide, torn = tmp_path / "good.png", tmp_path / "wide.png", tmp_path / "torn.png"
    good.write_bytes(encoded(target[..., 0]))
    wide.write_bytes(encoded(target[..., 0].T))
    torn.write_bytes(good.read_bytes()[:45])
    signature = Signature((6, 4), (), 2)
    for other, reason in ((wide, "mask 2 'wide.png': 6 x 4 pixels, and the target has 4 x 6; a mask has the target's size"), (torn, "mask 2 'torn.png': broken PNG file")):
        with pytest.raises(UnreadableRow) as caught:
            read_masks("a", "row", Cells(("a",), encoded(target), (), (Region("b", good), Region("c", other))), signature, View())
        assert caught.value.bad_row.reason.startswith(reason)
    with pytest.raises(UnreadableRow) as caught:
        read_masks("a", "row", Cells(("a",), encoded(target), (), (Region("b", good),)), signature, View())
    assert caught.value.bad_row.reason == "1 regions, and 2 when the source was opened; start again, so that it is looked at anew"


# --- classes --------------------------------------------------------------------------------------------------------------------------


def test_rows_are_of_one_class_where_they_have_as_many_regions_too() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 900, (200, 2)).astype(np.uint32)
    references, regions = rng.integers(0, 3, 200).astype(np.uint8), rng.choice([0, 1, 2, 255], 200).astype(np.uint8)
    flat = rng.integers(100, 900, (int(references.sum()), 2)).astype(np.uint32)
    index, classes = classify(sizes, references, flat, regions)
    assert list(classes) == sorted(set(classes))
    first = np.cumsum(references.astype(int)) - references
    for row in range(200):
        own = [(int(height), int(width)) for height, width in flat[first[row] : first[row] + references[row]]]
        assert classes[index[row]] == class_of((int(sizes[row, 0]), int(sizes[row, 1])), own, int(regions[row]))
    without, same_classes = classify(sizes, references, flat, np.zeros(200, dtype=np.uint8))
    assert same_classes == classify(sizes, references, flat)[1]
    assert np.array_equal(without, classify(sizes, references, flat)[0])


def test_the_number_of_regions_stands_in_names_and_rows_without_any_keep_theirs() -> None:
    """Checkpoints know classes by their names."""
    assert class_of((512, 768), []).name == class_of((512, 768), [], 0).name == "3:2 37"
    assert [class_of((512, 768), [], number).name for number in (1, 2)] == ["3:2 37 1 region", "3:2 37 2 regions"]
    assert [str(Signature((512, 768), (), number)) for number in (0, 1, 2)] == ["768x512", "1 region in 768x512", "2 regions in 768x512"]
    assert Shapes(512, 16).signature(RowClass(8, 37, (), 3)).regions == 3


def test_each_region_adds_the_tokens_of_a_prompt() -> None:
    assert [Sizes(4, 77).tokens(Signature((8, 8), ((4, 8),), number)) for number in (0, 1, 3)] == [4 + 2 + 77, 4 + 2 + 2 * 77, 4 + 2 + 4 * 77]


# --- micro-batches --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_micro_batch_have_as_many_regions_and_each_its_own(world: Path, tmp_path: Path, workers: int) -> None:
    mixture = mixture_of({"people": select(opened(world), Choice(), 0), "photos": select(plain_rows(tmp_path), Choice(), 0)})
    assert {signature.regions for signature in mixture.signatures} == {0, 1, 2, 3}
    found = batches(mixture, 4, workers=workers)
    for batch in found:
        check_regions(batch)
        assert batch.tokens == SIDE * SIDE + 5 * (1 + len(batch.regions))
    assert {len(batch.regions) for batch in found} == {0, 1, 2, 3}
    assert any(len(batch.keys) > 1 for batch in found if batch.regions)
    drawn = Counter(key for batch in found for source, key in zip(batch.sources, batch.keys, strict=True) if source == "people")
    assert drawn == {f"{row:02d}.png": 3 for row in range(12)}  # 48 images, 12 of 16 rows have regions


def test_masks_of_a_flipped_image_are_flipped(world: Path) -> None:
    selection = select(opened(world), Choice(), 0, augmentation=Augmentation(flip=1.0))
    for batch in batches(mixture_of({"people": selection}), 1):
        check_regions(batch, is_flipped=True)


def test_where_the_prompt_is_left_out_so_are_those_of_all_regions_and_nowhere_else(world: Path) -> None:
    selection = select(opened(world), Choice(), 0, captions=CaptionRules(trigger="sks", dropout=0.4))
    left_out, kept = 0, 0
    for batch in batches(mixture_of({"people": selection}), 10):
        for place, prompt in enumerate(batch.prompts):
            entities = [region.prompts[place] for region in batch.regions]
            row = int(batch.keys[place].removesuffix(".png"))
            assert entities == ([""] * num_regions(row) if prompt == "" else [f"entity {row}-{number}" for number in range(num_regions(row))])
            left_out, kept = left_out + (prompt == ""), kept + (prompt == f"sks, scene {row}")
    assert left_out + kept == 120
    assert abs(left_out - 48) < 4 * np.sqrt(120 * 0.4 * 0.6)


def test_rows_that_are_measured_on_carry_their_regions(world: Path) -> None:
    found, bad = read_rows(select(opened(world), Choice(), 0, captions=CaptionRules(dropout=0.9)), range(12), SHAPES)
    assert bad == []
    assert sorted(len(batch.keys) for batch in found) == [4, 4, 4]
    for batch in found:
        check_regions(batch)


def test_a_row_whose_mask_is_gone_is_replaced_and_named(tmp_path: Path) -> None:
    write_entities(tmp_path, 12)
    selection = select(opened(tmp_path), Choice(), 0)
    (tmp_path / "masks/04-1.png").unlink()
    found = batches(mixture_of({"people": selection}), 2)
    bad = [row for batch in found for row in batch.bad]
    assert {(row.key, row.reason) for row in bad} == {("04.png", "mask 2 '04-1.png': No such file or directory")}
    for batch in found:
        check_regions(batch)
    assert sum(len(batch.keys) for batch in found) == 24
    _, unreadable = read_rows(selection, [3, 4], SHAPES)
    assert [row.key for row in unreadable] == ["04.png"]


def test_as_a_dataset_rows_have_the_regions_that_training_sees(world: Path) -> None:
    mixture = mixture_of({"people": select(opened(world), Choice(), 0)})
    expected = [(batch, place) for batch in batches(mixture, 2) for place in range(len(batch.keys))]
    for row, (batch, place) in zip(mixture.as_dataset(2), expected, strict=True):
        assert row["entity_prompts"] == [region.prompts[place] for region in batch.regions]
        assert np.array_equal(np.asarray(row["entity_masks"]), torch.stack([region.masks[place] for region in batch.regions]).numpy())


@pytest.mark.parametrize("side", [4, 800])  # by the pipe, and by shared memory
def test_regions_go_through_pickling_whole(side: int) -> None:
    region = Regions(("a", ""), torch.rand(2, side, side) > 0.5)
    again = pickle.loads(pickle.dumps(region))  # noqa: S301 - our own bytes: it is how a worker hands over
    assert again.prompts == region.prompts
    assert torch.equal(again.masks, region.masks)
    assert again.masks.dtype == torch.bool


# --- sources --------------------------------------------------------------------------------------------------------------------------


def test_the_number_of_regions_of_each_row_is_known_when_a_source_is_opened_and_when_it_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entities(tmp_path, 6)
    time.sleep(0.06)  # until the files are no longer fresh
    looked: list[str] = []
    see = look._see

    def noting(found: Found) -> look.Seen | str:
        looked.append(found.key)
        return see(found)

    monkeypatch.setattr(look, "_see", noting)
    expected = [1, 2, 3, 1, 2, 3]
    for index in (None, tmp_path / "index", tmp_path / "index"):
        looked.clear()
        source = opened(tmp_path, index=index)
        assert source.num_regions is not None
        assert source.num_regions.tolist() == expected
        assert source.num_regions.dtype == np.dtype(np.uint8)
    assert looked == []
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    changed = json.loads(lines[2]) | {"eligen_entity_prompts": ["one"], "eligen_entity_masks": ["masks/02-0.png"]}
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[5], json.dumps(changed), lines[0]]) + "\n")
    source = opened(tmp_path, index=tmp_path / "index")
    assert source.num_regions is not None
    assert source.num_regions.tolist() == [3, 1, 1]
    assert select(source, Choice(), 0).class_of(0).regions == 3


def test_a_stream_of_entities_is_refused_before_and_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = "task {} is not streamed: how many regions its rows have must be known beforehand; remove {}"
    os.mkdir("model")
    Path("plan.yaml").write_text(
        "model: model\nsources:\n  people: {path: rows.parquet, task: entity, stream: true}\nstages:\n  - {name: one, steps: 1, resolution: 8, batch: 1, lr: 1e-4}\n"
    )
    problems = [(problem.where, problem.message) for problem in source_problems(read_plan(Path("plan.yaml"), []), tmp_path)]
    assert problems == [("sources.people.stream", said.format("entity", "it"))]
    with pytest.raises(SourceError) as caught:
        open_stream(
            "people", path="rows.parquet", task="entity", columns={}, prompt=None, split="train", references=None, on_bad_row="skip", root=tmp_path, seed=0, lanes=1, held_out=0
        )
    assert str(caught.value) == f"source 'people' (rows.parquet): {said.format(repr('entity'), '`stream: true`')}"


# --- tokens ---------------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), rows=st.integers(1, 4), columns=st.integers(1, 4), scale=st.tuples(st.integers(1, 3), st.integers(1, 3)), regions=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_token_is_inside_where_any_of_its_pixels_is(data: st.DataObject, rows: int, columns: int, scale: tuple[int, int], regions: int) -> None:
    masks = torch.rand(2, regions, rows * scale[0], columns * scale[1], generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.15
    found = token_masks(masks, (rows, columns))
    assert found.shape == (2, regions, rows * columns)
    for row in range(rows):
        for column in range(columns):
            block = masks[:, :, row * scale[0] : (row + 1) * scale[0], column * scale[1] : (column + 1) * scale[1]]
            assert torch.equal(found[:, :, row * columns + column], block.flatten(2).any(dim=2))


def test_a_line_of_one_pixel_is_not_lost() -> None:
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[0, 0, 37] = True
    assert token_masks(masks, (4, 4)).view(4, 4).tolist() == [[False] * 4, [False] * 4, [True] * 4, [False] * 4]


def test_masks_of_another_kind_or_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks: bool \[B, R, H, W\] is needed, this is torch.uint8 \[1, 1, 8, 8\]"):
        token_masks(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), (4, 4))
    with pytest.raises(ValueError, match="masks of 8 x 8 pixels do not divide into 3 x 4 tokens"):
        token_masks(torch.zeros(1, 1, 8, 8, dtype=torch.bool), (3, 4))


# --- attention ------------------------------------------------------------------------------------------------------------------------

# Two entities on a 4 x 4 grid, one token for each prompt: the left half and the upper right corner.
LEFT, CORNER = "##..##..##..##..", "..##..##........"


def grid(text: str) -> Tensor:
    return torch.tensor([[letter == "#" for letter in text]])


def test_two_entities_on_a_grid_of_sixteen_tokens() -> None:
    image = f"{'#' * 17}"  # the image's own prompt, and every token of the image
    expected = [
        f"#..{LEFT}",
        f".#.{CORNER}",
        f"..#{'#' * 16}",
        *(f"{left}{corner}{image}" for left, corner in zip(LEFT, CORNER, strict=True)),
    ]
    found = attention_mask(torch.stack([grid(LEFT), grid(CORNER)], dim=1), 1, 1)
    assert found.shape == (1, 1, 19, 19)
    assert ["".join(".#"[value] for value in row) for row in found[0, 0].tolist()] == expected


def test_an_empty_mask_leaves_an_entity_to_itself_alone() -> None:
    found = attention_mask(torch.stack([grid("." * 16), grid(CORNER)], dim=1), 2, 3)[0, 0]
    assert found[:2].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert found[:, :2].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_without_regions_everything_attends_to_everything() -> None:
    assert attention_mask(torch.zeros(2, 0, 6, dtype=torch.bool), 5, 3, 4).shape == (2, 1, 13, 13)
    assert attention_mask(torch.zeros(2, 0, 6, dtype=torch.bool), 5, 3, 4).all()


@given(
    seed=st.integers(0, 99), lengths=st.lists(st.integers(0, 3), max_size=3), prompt=st.integers(0, 3), image=st.integers(1, 5), references=st.integers(0, 3), pads=st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_who_attends_to_whom_is_the_rule_token_by_token(seed: int, lengths: list[int], prompt: int, image: int, references: int, pads: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(2, len(lengths), image, generator=generator) < 0.4
    text = sum(lengths) + prompt
    valid = torch.rand(2, text, generator=generator) < (0.7 if pads else 2.0)
    found = attention_mask(inside, lengths, prompt, references, valid if pads else None)
    kinds = [("entity", number) for number, length in enumerate(lengths) for _ in range(length)]
    kinds += [("prompt", 0)] * prompt + [("image", number) for number in range(image)] + [("reference", 0)] * references
    assert found.shape == (2, 1, len(kinds), len(kinds))
    assert torch.equal(found, found.transpose(2, 3))
    assert found.any(dim=3).all()
    for each in range(2):
        for i, one in enumerate(kinds):
            for j, other in enumerate(kinds):
                if i == j:
                    expected = True
                elif (i < text and not valid[each, i]) or (j < text and not valid[each, j]):
                    expected = False
                elif "entity" not in (one[0], other[0]):
                    expected = True
                elif one[0] == other[0]:
                    expected = one[1] == other[1]
                else:
                    region, (kind, number) = (one[1], other) if one[0] == "entity" else (other[1], one)
                    expected = kind == "image" and bool(inside[each, region, number])
                assert bool(found[each, 0, i, j]) == expected, (one, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"entity_tokens": [1]}, "entity_tokens: 1 lengths for 2 regions"),
        ({"prompt_tokens": -1}, "numbers of tokens are 0 or more"),
        ({"text_valid": torch.ones(1, 5, dtype=torch.bool)}, r"text_valid: bool \[1, 3\] is needed, this is torch.bool \[1, 5\]"),
        ({"token_masks": torch.zeros(1, 2, 4)}, "token_masks: bool .* is needed, this is torch.float32"),
    ],
)
def test_attention_of_other_shapes_is_refused(change: dict[str, object], said: str) -> None:
    asked: dict[str, object] = {"token_masks": torch.zeros(1, 2, 4, dtype=torch.bool), "entity_tokens": 1, "prompt_tokens": 1}
    with pytest.raises(ValueError, match=said):
        attention_mask(**(asked | change))  # type: ignore[arg-type]


# --- Flux -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_an_entity_reaches_the_image_inside_of_its_mask_alone_in_every_kind_of_block_of_flux(blocks: str, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(tiny_flux(tmp_path / "flux", pixels=True), subfolder="transformer").eval()
    others = {"transformer_blocks", "single_transformer_blocks"} - {blocks}
    for name in others:
        setattr(model, name, torch.nn.ModuleList())
    shown: list[Tensor] = []
    getattr(model, blocks)[0].register_forward_hook(lambda module, given, output: shown.append(torch.cat(output, dim=1)))  # text, then image
    generator = torch.Generator().manual_seed(0)
    text, image, reference = 3, 16, 4
    length = 3 * text + image + reference
    mask = attention_mask(torch.stack([grid(LEFT), grid(CORNER)], dim=1), text, text, reference)
    embeds, hidden, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((3 * text, 16), (image + reference, 12), (8,)))
    places = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(1), torch.arange(image + reference), indexing="ij"), dim=-1).view(-1, 3).float()

    def changed(of: slice, kept: Tensor | None) -> list[int]:
        """Tokens that come out of the block otherwise once some prompt's embedding is another."""
        outputs: list[Tensor] = []
        for each in (embeds, embeds.clone()):
            if outputs:
                each[:, of] += 1.0
            with torch.no_grad():
                model(
                    hidden_states=hidden,
                    encoder_hidden_states=each,
                    pooled_projections=pooled,
                    timestep=torch.tensor([0.5]),
                    img_ids=places,
                    txt_ids=torch.zeros(3 * text, 3),
                    joint_attention_kwargs=None if kept is None else {"attention_mask": kept},
                )
            outputs.append(shown.pop())
        return [token for token in range(length) if not torch.equal(*(output[:, token] for output in outputs))]

    of_image = 3 * text
    for number, inside in enumerate((LEFT, CORNER)):
        own = slice(number * text, (number + 1) * text)
        assert changed(own, mask) == [*range(own.start, own.stop), *(of_image + place for place, letter in enumerate(inside) if letter == "#")]
    assert changed(slice(2 * text, 3 * text), mask) == list(range(2 * text, length))
    assert changed(slice(0, text), None) == list(range(length))

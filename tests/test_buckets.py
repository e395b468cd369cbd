"""Buckets: a row's class from its sizes alone, and the shapes that a resolution makes of it."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from mixing.buckets import AS_TARGET, ASPECTS, LARGEST, RowClass, Shapes, class_of, classify, shape, stream_class


def random_sizes(number: int, seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(int(10 ** draw.uniform(1, 3.6)), int(10 ** draw.uniform(1, 3.6))) for _ in range(number)]


@pytest.mark.parametrize(("multiple", "pixels"), [(16, 512), (16, 256), (32, 1024), (2, 8), (64, 768), (8, 384)])
def test_shapes_are_multiples_within_the_budget_and_near_their_aspect(multiple: int, pixels: int) -> None:
    for name, aspect in ASPECTS.items():
        height, width = shape(float(pixels**2), aspect, multiple)
        assert height % multiple == width % multiple == 0
        assert height * width <= pixels**2 or (height, width) == (multiple, multiple)
        if pixels >= 24 * multiple:
            assert abs(math.log(width / height / aspect)) < 0.1, name
            assert height * width >= 0.85 * pixels**2


def test_a_square_at_its_resolution_is_that_square() -> None:
    for pixels, multiple in ((512, 16), (8, 2), (1024, 64)):
        assert Shapes(pixels, multiple).signature(class_of((pixels, pixels), [])).target == (pixels, pixels)


@pytest.mark.parametrize(("size", "target"), [((1000, 1500), (416, 624)), ((1500, 1000), (624, 416)), ((1080, 1920), (384, 672)), ((900, 1200), (432, 576)), ((2000, 2000), (512, 512))])
def test_common_photographs_keep_their_aspect(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert Shapes(512, 16).signature(class_of(size, [])).target == target


def test_no_side_grows_beyond_the_limit() -> None:
    for size in random_sizes(2000, 1):
        for upscale in (1.0, 1.5, 3.0):
            height, width = Shapes(1024, 2, upscale=upscale).signature(class_of(size, [])).target
            seen = min(height / size[0], width / size[1])  # the side that is not cropped
            assert seen <= upscale * 1.05 or max(height, width) <= 4


def test_extreme_images_are_cropped_to_the_widest_aspect_and_all_to_squares_where_that_is_asked() -> None:
    for size in [(height * 20, width * 20) for height, width in random_sizes(500, 2)]:
        height, width = Shapes(512, 16).signature(class_of(size, [])).target
        assert max(height, width) / min(height, width) <= 2.2
        square = Shapes(512, 16, max_aspect=1.0).signature(class_of(size, [(5, 9)])).target
        assert square[0] == square[1]


def test_a_reference_of_its_targets_aspect_is_cropped_as_the_target() -> None:
    row = class_of((600, 900), [(800, 1200)])
    assert row.references == (AS_TARGET,)
    signature = Shapes(512, 16).signature(row)
    assert signature.references == (signature.target,)
    other = class_of((600, 900), [(1200, 800)])
    assert Shapes(512, 16).signature(other).references == ((624, 416),)


def test_references_have_a_budget_by_their_number() -> None:
    side = {number: Shapes(512, 16).reference_side(number) for number in (1, 2, 3, 4, 9)}
    assert side == {1: 512, 2: 512, 3: 384, 4: 256, 9: 256}
    own = Shapes(512, 16, references=(256, 128))
    assert [own.reference_side(number) for number in (1, 2, 3)] == [256, 128, 128]
    assert own.signature(class_of((900, 900), [(50, 50)])).references == ((256, 256),)
    assert all(height * width <= 128**2 for height, width in own.signature(class_of((900, 900), [(50, 90), (90, 50)])).references)


def test_many_references_make_few_classes() -> None:
    sizes = random_sizes(3000, 3)
    for number, most in ((1, 6), (2, 16), (3, 8), (4, 16)):
        found = {class_of((1000, 1000), sizes[first : first + number]).references for first in range(0, 2900, 7)}
        assert len(found) <= most


def test_classes_of_many_rows_are_those_of_each() -> None:
    draw = random.Random(4)
    targets = random_sizes(400, 5)
    references = [random_sizes(draw.choice([0, 0, 1, 2, 3, 5, 60]), row) for row in range(400)]
    flat = np.asarray(list(itertools.chain(*references)), dtype=np.uint32).reshape(-1, 2)
    index, classes = classify(np.asarray(targets, dtype=np.uint32), np.asarray([len(each) for each in references], dtype=np.uint8), flat)
    assert list(classes) == sorted(set(classes))
    assert len({each.name for each in classes}) == len(classes)
    for row in range(400):
        assert classes[index[row]] == class_of(targets[row], references[row])


def test_a_class_does_not_depend_on_the_resolution_and_shapes_only_on_the_class() -> None:
    """So a row's epoch goes on over stages of other resolutions."""
    one, other = class_of((601, 899), []), class_of((605, 903), [])
    assert one == other
    assert Shapes(256, 16).signature(one) == Shapes(256, 16).signature(other)
    assert Shapes(256, 16).signature(one) != Shapes(512, 16).signature(one)


def test_rows_of_a_stream_are_squares_at_every_resolution() -> None:
    for pixels in (256, 512, 4096):
        signature = Shapes(pixels, 16).signature(stream_class(2))
        assert signature.target == (pixels, pixels)
        assert signature.references == ((pixels, pixels),) * 2
    assert stream_class(0) == RowClass(list(ASPECTS).index("1:1"), LARGEST, ())

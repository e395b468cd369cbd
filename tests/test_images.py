"""Images are read right, whatever they are stored as, or refused with a reason."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mixing.images import MAX_PIXELS, UnreadableImage, decode, fit, from_tensor, header_size, to_tensor

COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [255, 255, 255], [0, 0, 0]]], dtype=np.uint8
)
"""2 x 3 pixels, all different."""


def stored(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes | Path) -> list[list[list[int]]]:
    image = decode(data)
    assert image.mode == "RGB"
    assert header_size(data) == (image.height, image.width)
    values: list[list[list[int]]] = np.asarray(image).tolist()
    return values


def grey(*values: int) -> list[list[list[int]]]:
    return [[[value] * 3 for value in values]]


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "PPM", "QOI", "WEBP", "JPEG2000"])
def test_lossless_formats_give_the_very_pixels(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    assert pixels(stored(Image.fromarray(COLOURS), format, **options)) == COLOURS.tolist()


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    file = tmp_path / "really_a_png.jpg"
    file.write_bytes(stored(Image.fromarray(COLOURS), "PNG"))
    assert pixels(file) == COLOURS.tolist()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners = Image.fromarray(np.kron(COLOURS, np.ones((16, 16, 1), dtype=np.uint8)))
    data = stored(corners, format, exif=exif, **({"quality": 100} if format == "JPEG" else {}))
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    result = decode(data)
    assert result.size == (corners.size if orientation < 5 else corners.size[::-1])
    assert header_size(data) == (result.height, result.width)
    assert np.array_equal(np.asarray(result), np.asarray(expected))
    assert result.getexif().get(0x0112, 1) == 1


def test_an_orientation_that_is_no_orientation_changes_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert pixels(stored(Image.fromarray(COLOURS), "PNG", exif=exif)) == COLOURS.tolist()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 300, 128 * 257, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        assert pixels(stored(Image.fromarray(values), format)) == grey(0, 1, 1, 128, 255)
    assert pixels(stored(Image.fromarray(values.astype(np.int32)), "PPM")) == grey(0, 1, 1, 128, 255)


def test_float_grey_is_read_from_0_to_1_and_refused_outside() -> None:
    assert pixels(stored(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "TIFF")) == grey(0, 128, 255)
    for values in ([[0, 255]], [[-3, 1]], [[0, float("nan")]], [[0, float("inf")]]):
        with pytest.raises(UnreadableImage, match=r"float pixels from .* allowed is 0"):
            decode(stored(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF"))


def test_32_bit_grey_is_refused_because_nothing_says_what_is_white() -> None:
    with pytest.raises(UnreadableImage, match="which value is white; save as 8 or 16 bits"):
        decode(stored(Image.fromarray(np.array([[0, 1, 2]], dtype=np.int32)), "TIFF"))


def test_what_is_transparent_is_laid_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], dtype=np.uint8)
    assert pixels(stored(Image.fromarray(rgba), "PNG")) == [[[200, 0, 0], [255, 255, 255], [227, 127, 127]]]
    la = np.array([[[40, 255], [40, 0]]], dtype=np.uint8)
    assert pixels(stored(Image.fromarray(la), "PNG")) == grey(40, 255)
    levels = Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint8))
    assert pixels(stored(levels, "PNG", transparency=100)) == grey(0, 255, 200)
    deep = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert pixels(stored(deep, "PNG", transparency=0)) == grey(255, 1, 255)


def test_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    expected = [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    assert pixels(stored(image, "PNG", transparency=1)) == expected
    assert pixels(stored(image, "PNG", transparency=bytes([255, 0, 255]))) == expected
    assert pixels(stored(image, "GIF", transparency=1)) == expected


def test_cmyk_jpeg_becomes_rgb() -> None:
    for colour in ((255, 0, 0), (0, 0, 0), (255, 255, 255), (20, 90, 200)):
        data = stored(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=100)
        assert np.abs(np.asarray(decode(data)).astype(int) - colour).max() <= 3


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = stored(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert pixels(data) == [[[255, 0, 0]] * 4] * 4


def test_an_image_is_free_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(stored(Image.fromarray(COLOURS), "PNG"))
    image = decode(file)
    file.unlink()
    assert type(image) is Image.Image
    assert np.array_equal(np.asarray(image), COLOURS)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_a_truncated_image_keeps_its_header_and_is_refused_when_decoded(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    data = stored(Image.fromarray(noise), format)
    half = data[: len(data) // 2] if format != "TIFF" else data[:-3000]
    assert header_size(half) == (64, 48)
    with pytest.raises(UnreadableImage, match=f"broken {format} file"):
        decode(half)


def test_what_is_no_image_is_refused_with_its_reason(tmp_path: Path) -> None:
    for data, reason in (
        (b"", "empty"),
        (bytes(1000), "not an image"),
        (b"a caption, not an image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC file, which cannot be read; save it as JPEG or PNG"),
    ):
        for read in (decode, header_size):
            with pytest.raises(UnreadableImage, match=reason):
                read(data)
    with pytest.raises(UnreadableImage, match="No such file"):
        decode(tmp_path / "absent.png")
    with pytest.raises(UnreadableImage, match="directory"):
        decode(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [MAX_PIXELS // 9000, 30_000])
def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(side: int) -> None:
    data = bytearray(stored(Image.new("1", (1, 1)), "BMP"))
    data[18:26] = struct.pack("<ii", 9001 if side < 30_000 else side, side)
    for read in (decode, header_size):
        with pytest.raises(UnreadableImage, match="at most 89,478,485 pixels are read; scale it down"):
            read(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_are_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    format = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "QOI", "JPEG2000"]))
    content = bytearray(stored(Image.fromarray(noise), format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(content))
    except UnreadableImage:
        return
    assert image.mode == "RGB"
    assert header_size(bytes(content)) == (image.height, image.width)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = Image.fromarray(COLOURS)
    assert fit(image, 2, 3) is image


def test_where_nothing_is_scaled_the_centre_is_cut_out_unchanged() -> None:
    values = np.arange(9 * 4 * 3, dtype=np.uint8).reshape(4, 9, 3)
    assert np.array_equal(np.asarray(fit(Image.fromarray(values), 4, 4)), values[:, 2:6])
    assert np.array_equal(np.asarray(fit(Image.fromarray(values), 1, 9)), values[1:2])


def test_fit_equals_scaling_all_and_cropping_the_centre() -> None:
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((80, 60), Image.Resampling.BICUBIC)
    for height, width in ((30, 30), (120, 100), (20, 40), (90, 30)):
        scale = max(height / 60, width / 80)
        whole = image.resize((round(80 * scale), round(60 * scale)), Image.Resampling.LANCZOS)
        left, top = (whole.width - width) // 2, (whole.height - height) // 2
        expected = np.asarray(whole.crop((left, top, left + width, top + height))).astype(int)
        assert np.abs(np.asarray(fit(image, height, width)) - expected).max() <= 1


def test_an_extremely_long_image_is_fitted_in_little_memory() -> None:
    values = np.zeros((60_000, 1, 3), dtype=np.uint8)
    values[30_000] = 200
    values[29_999] = 100
    for image in (Image.fromarray(values), Image.fromarray(values.transpose(1, 0, 2))):
        fitted = np.asarray(fit(image, 512, 512))  # scaled as a whole it would be 47 gigabytes
        assert fitted.shape == (512, 512, 3)
        assert 90 <= fitted.min() <= fitted.max() <= 210


@settings(max_examples=150, deadline=None)
@given(*[st.integers(1, 90)] * 4)
def test_fit_gives_the_size_asked_and_keeps_a_plain_colour(
    width: int, height: int, to_height: int, to_width: int
) -> None:
    fitted = fit(Image.new("RGB", (width, height), (7, 77, 177)), to_height, to_width)
    assert fitted.size == (to_width, to_height)
    assert np.array_equal(np.unique(np.asarray(fitted).reshape(-1, 3), axis=0), [[7, 77, 177]])


def test_fit_refuses_an_empty_size() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        fit(Image.new("RGB", (3, 3)), 0, 3)


def test_every_pixel_value_comes_back_from_its_tensor() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(from_tensor(tensor)), values)
    assert to_tensor(Image.fromarray(COLOURS))[:, 0, 1].tolist() == [-1.0, 1.0, -1.0]


def test_tensors_outside_the_range_are_clipped_and_wrong_shapes_refused() -> None:
    tensor = torch.tensor([-9.0, 9.0, float("nan")]).expand(3, 1, 3)
    assert np.asarray(from_tensor(tensor.bfloat16())).tolist() == grey(0, 255, 0)
    with pytest.raises(ValueError, match=r"\[3, H, W\] is needed, this one is \[1, 2, 2\]"):
        from_tensor(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="mode RGB is needed, this one is L"):
        to_tensor(Image.new("L", (2, 2)))


@pytest.mark.parametrize("x", [0.0, 0.3, 0.5, 1.0])
def test_an_image_one_pixel_too_small_is_scaled_and_not_cropped_beyond_its_edge(x: float) -> None:
    """A place of -1 x 0.5 pixels, rounded towards nought, would pass for one inside."""
    for width, height in ((9, 12), (12, 9)):
        fitted = np.asarray(fit(Image.new("RGB", (width, height), (200, 200, 200)), 12 if width == 9 else 10, 10 if width == 9 else 12, x=x, y=x))
        assert (fitted == 200).all()

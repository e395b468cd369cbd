"""Images: from bytes or a file to upright 8-bit RGB, from there to a tensor, and back."""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from mixing.bombs import MAX_SCANS, named_bytes, num_scans
from mixing.plain_file import open_plain

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
"""What is read, told by content, whatever the file is called. Others of Pillow's run programs or accept any bytes."""

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
        *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
        *(".heic", ".heif", ".jxl"),  # cannot be read: they stand here so that they are reported and not passed over
    }
)
"""What the name of an image ends in, in lower case."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a small file can claim to be huge. Pillow warns from here on."""

MAX_PIXELS_JPEG2000 = 2**25
"""The same of a JPEG2000, whose decoder (openjpeg 2.5) takes 19 to 24 bytes of memory a pixel, where others take at most 12."""

_LARGEST = f"at most {MAX_PIXELS:,} pixels are read; scale it down"

_AT_ONCE = 2**20  # pixels that are changed together, so that a large image does not take its memory several times over

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what sets the image upright. From 5 on, height and width change places."""

# What Pillow 12.3 raised over 400,000 damaged files (RuntimeError: AVIF; IndexError: QOI; TypeError: TIFF), and what
# its ImageFile takes for a broken header. Caught around Pillow's calls alone.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, IndexError, TypeError, KeyError, EOFError, struct.error)


class UnreadableImage(ValueError):
    """An image cannot be read; the message is the reason."""


def decode(data: bytes | Path, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The image, mode RGB, upright, without metadata.

    at_least: height and width that it will be scaled down to cover; a JPEG of more than four times that is decoded at a half, a quarter
    or an eighth of its size, which takes a fraction of the time (its DCT is cut off, which is a good low-pass filter; twice the size is left for Lanczos).
    Not a JPEG2000, whose lower levels lie beside the pixels: at an eighth by 3.5 of them, which is off by 11 of 255 in the mean where there is much detail.

    EXIF orientation is applied; 12- and 16-bit grey is scaled to 8 bits and rounded; float grey is read as 0 black to
    1 white; what is transparent is laid on white; of an animation the first frame is taken. Colour profiles are not
    applied. An orientation that a PNG carries behind its pixels is not seen. Takes at most eight bytes of memory a pixel, beside what
    the format's own decoder takes. Raises UnreadableImage.
    """
    with _content(data) as file:
        image, orientation = _opened(file)
        with image:
            if "progressive" in image.info and (scans := num_scans(file)) > MAX_SCANS:
                raise UnreadableImage(f"a JPEG of {scans:,} scans; at most {MAX_SCANS} are read; save it anew")
            try:
                if at_least is not None and image.format == "JPEG":
                    _shrink(image, at_least[::-1] if orientation < 5 else at_least)
                image.load()
                colours = None if _is_deep_grey(image) else _to_rgb(image)
            except _BROKEN as error:
                raise UnreadableImage(f"broken {image.format} file: {_said(error)}") from error
            if colours is None:
                colours = _grey_to_rgb(image)
    return colours.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else colours


def _shrink(image: Image.Image, cover: tuple[int, int]) -> None:
    """Let a JPEG be decoded smaller, where more than twice of what covers `cover` (width, height as stored) is left."""
    scale = max(cover[0] / image.width, cover[1] / image.height)
    if scale < 0.5:
        image.draft(None, (math.ceil(2 * scale * image.width), math.ceil(2 * scale * image.height)))


def header_size(data: bytes | Path) -> tuple[int, int]:
    """(height, width) of the upright image in pixels, from its header; the rest may be bad. Raises UnreadableImage."""
    with _content(data) as file:
        image, orientation = _opened(file)
        with image:
            width, height = image.size
    return (width, height) if orientation >= 5 else (height, width)


def fit(
    image: Image.Image, height: int, width: int, *, x: float = 0.5, y: float = 0.5, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scale the image to cover height x width pixels, and crop it; the image itself if it fits.

    x, y: where the part that is kept lies, from left (0) to right (1) and from top (0) to bottom (1). resample: how it is scaled. The part that will be
    seen is scaled and no more, so that a 1 x 4000 image needs no more memory than another. Raises ValueError for a size below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{height} x {width} pixels asked; both must be at least 1")
    if image.size == (width, height):
        return image
    if (image.width == width and image.height > height) or (image.height == height and image.width > width):  # nothing to scale
        left, top = int((image.width - width) * x), int((image.height - height) * y)
        return image.crop((left, top, left + width, top + height))
    scale = max(height / image.height, width / image.width)
    seen_width, seen_height = min(width / scale, image.width), min(height / scale, image.height)
    left_edge, top_edge = (image.width - seen_width) * x, (image.height - seen_height) * y
    box = (left_edge, top_edge, left_edge + seen_width, top_edge + seen_height)
    return image.resize((width, height), resample, box=box)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The RGB image as float32 [3, H, W] in [-1, 1]. Raises ValueError for another mode."""
    if image.mode != "RGB":
        raise ValueError(f"an image of mode RGB is needed, this one is {image.mode}")
    values = torch.from_numpy(np.array(image))
    return values.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0


def from_tensor(tensor: torch.Tensor) -> Image.Image:
    """The RGB image of a tensor [3, H, W] in [-1, 1]: the inverse of `to_tensor`.

    Values outside are clipped, not-a-number is black. Raises ValueError for another shape.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"a tensor [3, H, W] is needed, this one is {list(tensor.shape)}")
    values = tensor.detach().to("cpu", torch.float32).nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    pixels = ((values + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def may_be_image(start: bytes) -> bool:
    """Whether a file that begins with these bytes, 16 or more, may be of a format that is read; if not, the rest of it tells no more."""
    Image.init()
    accepts = [Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN]
    return any(accept is None or accept(start[:16]) is True for accept in accepts)


def _content(data: bytes | Path) -> BinaryIO:
    """The content as an open file. Raises UnreadableImage."""
    if isinstance(data, bytes):
        file: BinaryIO = io.BytesIO(data)
        size = len(data)
    else:
        try:
            file = open_plain(data)
        except OSError as error:
            raise UnreadableImage(_said(error)) from error
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        file.close()
        raise UnreadableImage("the file is empty")
    return file


def _opened(file: BinaryIO) -> tuple[Image.Image, int]:
    """The image with its header read, and the EXIF orientation that is left to apply. Raises UnreadableImage."""
    _look_at_tags(file, "its")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
            raise UnreadableImage("a HEIC file, which cannot be read; save it as JPEG or PNG") from error
        raise UnreadableImage(f"not an image, or its header is broken (read are {', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        number = re.search(r"\(([0-9]+) pixels\)", str(error))  # Pillow 12.3 names its own limit beside it, which is another
        raise UnreadableImage(f"{int(number[1]):,} pixels; {_LARGEST}" if number else _LARGEST) from error
    except _BROKEN as error:
        if "MAX_TEXT" in str(error):  # PngImagePlugin, Pillow 12.3
            raise UnreadableImage("text or a colour profile in it is larger than a megabyte once unpacked; save it without") from error
        raise UnreadableImage(f"broken header: {_said(error)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadableImage(f"{width} x {height} pixels; {_LARGEST}")
    if image.format == "JPEG2000" and width * height > MAX_PIXELS_JPEG2000:
        image.close()
        raise UnreadableImage(f"{width} x {height} pixels; at most {MAX_PIXELS_JPEG2000:,} of a JPEG2000 are read; scale it down, or save it as PNG or JPEG")
    if image.format == "TIFF":
        return image, 1  # Pillow 12.3 gives the upright size here, and turns the pixels itself in load()
    try:
        if (exif := _exif(image)) is not None:
            _look_at_tags(io.BytesIO(exif), "its EXIF")
        # Not image.getexif(): PngImageFile's (Pillow 12.3) decodes all pixels where the header has no EXIF.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except UnreadableImage:
        image.close()
        raise
    except _BROKEN:
        orientation = 1  # EXIF that cannot be read says nothing about the pixels, and viewers show them as they are
    return image, orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _exif(image: Image.Image) -> bytes | None:
    """The EXIF of an image, from where Pillow takes it, without what stands before it, once or several times. Raises ValueError for text that is none."""
    exif, profile = image.info.get("exif"), image.info.get("Raw profile type exif")
    if exif is None and profile is not None:
        exif = bytes.fromhex("".join(str(profile).split("\n")[3:]))
    while isinstance(exif, bytes) and exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif if isinstance(exif, bytes) else None


def _look_at_tags(file: BinaryIO, called: str) -> None:
    """Raise UnreadableImage if tags name far more bytes than there are."""
    if named := named_bytes(file):
        raise UnreadableImage(f"{called} tags name {named:,} bytes, and it has {file.seek(0, 2):,}; save it anew")


def _bands(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """The image in bands from top to bottom, each with where it lies."""
    rows = max(_AT_ONCE // image.width, 1)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image's pixels in mode RGB, before orientation. Raises what Pillow raises."""
    if image.has_transparency_data:
        colours = Image.new("RGB", image.size)
        for box, band in _bands(image):
            white = Image.new("RGBA", band.size, (255, 255, 255, 255))
            colours.paste(Image.alpha_composite(white, band.convert("RGBA")).convert("RGB"), box)
    else:
        colours = image.convert("RGB")
    colours.info.clear()  # with EXIF in it, a copy saved later could be turned a second time
    return colours


def _is_deep_grey(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits, which Pillow's convert would clip."""
    return image.mode == "F" or image.mode.startswith("I")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as RGB of 8. Raises UnreadableImage where the file does not say which value is white."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "F":
        lows, highs = zip(*((values.min(), values.max()) for _, band in _bands(image) for values in [np.asarray(band)]), strict=True)
        low, high = float(np.min(lows)), float(np.max(highs))
        if not (low >= -0.01 and high <= 1.01):  # not-a-number fails this too
            raise UnreadableImage(
                f"float pixels from {low:g} to {high:g}; allowed is 0 (black) to 1 (white); save as 8 or 16 bits"
            )
        white = 1.0
    elif image.mode.startswith("I;16"):
        white = 2.0 ** int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]) - 1.0
    elif image.mode == "I" and image.format == "PPM":
        white = 65535.0  # Pillow has scaled the file's own maximum to this
    else:
        raise UnreadableImage(
            f"{image.format} with pixels of mode {image.mode}: nothing says which value is white; save as 8 or 16 bits"
        )
    is_inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # 0 is white; Pillow inverts 8 bits, but not these
    transparent = image.info.get("transparency")
    colours = Image.new("RGB", image.size)
    for box, band in _bands(image):
        values = np.asarray(band)
        grey = np.clip(values.astype(np.float64) / white, 0.0, 1.0)
        if is_inverted:
            grey = 1.0 - grey
        if isinstance(transparent, int):  # a PNG's one transparent grey
            grey = np.where(values == transparent, 1.0, grey)
        pixels: NDArray[np.uint8] = np.rint(grey * 255.0).astype(np.uint8)
        colours.paste(Image.fromarray(pixels).convert("RGB"), box)
    return colours


def _said(error: BaseException) -> str:
    """What an error says, without the errno and path that OSErrors carry."""
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__

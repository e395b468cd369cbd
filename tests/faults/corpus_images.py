"""Images of which each is read right, or refused with its reason."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from faults.corpus_case import FILLERS, GOOD, Case, Row, Values, colours, fill, put, stored

_TURNED: dict[int, Callable[[Values], Values]] = {
    1: lambda v: v,
    2: lambda v: v[:, ::-1],
    3: lambda v: v[::-1, ::-1],
    4: lambda v: v[::-1],
    5: lambda v: v.transpose(1, 0, 2),
    6: lambda v: np.rot90(v, -1),
    7: lambda v: v[::-1, ::-1].transpose(1, 0, 2),
    8: lambda v: np.rot90(v),
}
"""EXIF orientation to the upright pixels. Source: Exif 3.0, tag 0x0112."""

_NOT = "not an image, or its header is broken"
_SIDE = 5_000  # of an image whose memory is measured: 25 million pixels, which take 300 MB at 12 bytes each


def image_cases() -> Iterator[Case]:
    """All of them."""
    yield from _cut()
    yield from _bombs()
    yield from _kinds_of_pixels()
    yield from _turned()
    yield from _no_images()


def _write(name: str, content: bytes, folder: Path) -> None:
    fill(folder / "rows")
    put(folder / "rows" / name, content)


def _case(name: str, content: bytes, file: str, *, shows: Values | tuple[int, int] | None = None, tolerance: int = 0, bad: str = "", broken: str = "") -> Case:
    """A folder of good images and this one."""
    called = f"target {file!r}: "
    return Case(
        name,
        partial(_write, file, content),
        rows={} if shows is None else {file: Row(("x",), shows, tolerance)},
        bad={file: called + bad} if bad else {},
        broken={file: called + broken} if broken else {},
        fillers=FILLERS,
        asked={"prompt": "x"},
    )


def _cut() -> Iterator[Case]:
    photo = Image.fromarray(colours(96, 96))
    for format, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tif"), ("BMP", "bmp"), ("AVIF", "avif"), ("JPEG2000", "jp2"), ("QOI", "qoi")):
        whole = stored(photo, format)
        yield _case(f"cut short: {format} inside its first bytes", whole[:3], f"cut.{suffix}", bad=_NOT)
        if format in ("JPEG", "PNG", "GIF", "BMP", "QOI", "JPEG2000"):  # the others hold a place or a length of what follows in their headers
            yield _case(f"cut short: {format} in the middle", whole[: len(whole) // 2], f"cut.{suffix}", broken=f"broken {format} file")
    whole = stored(photo, "JPEG", progressive=True)
    yield _case("cut short: progressive JPEG in its last scan", whole[:-40], "cut.jpg", broken="broken JPEG file")
    yield _case("cut short: PNG before its end marker", GOOD[:-12], "cut.png", shows=colours())
    whole = stored(photo, "WEBP")
    yield _case("cut short: WEBP in the middle", whole[: len(whole) // 2], "cut.webp", bad="broken header")
    whole = stored(photo, "TIFF", compression="tiff_lzw")
    yield _case("cut short: TIFF whose tags stand behind the cut", whole[: len(whole) // 2], "cut.tif", bad=_NOT)
    flipped = bytearray(stored(photo))
    flipped[len(flipped) // 2] ^= 0x10
    yield _case("damaged: PNG with a flipped bit", bytes(flipped), "flip.png", broken="broken PNG file")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(more) + _chunk(b"IDAT", pixels or zlib.compress(bytes(64))) + _chunk(b"IEND", b"")


def _overlapping_tags(number: int, size: int) -> bytes:
    """A TIFF of 1 x 1 pixel with so many tags that all name the same bytes."""
    basic = ((256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (274, 3, 1, 6), (277, 3, 1, 1), (279, 4, 1, 1))
    place = 8 + 2 + 12 * (len(basic) + number) + 4
    tags = [struct.pack("<HHII", *tag) for tag in basic] + [struct.pack("<HHII", 40_000 + each, 7, size, place) for each in range(number)]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4) + bytes(size)


def _jpeg2000(width: int, height: int, *, box: bool = True) -> bytes:
    """A JPEG2000 of 9 x 6 pixels whose codestream says that it has others, and so do its tiles. box: whether the header before it says so too. The codestream begins at byte 85."""
    whole = bytearray(stored(colours(), "JPEG2000"))
    assert whole[85:89] == b"\xff\x4f\xff\x51"
    for place in (93, 109):  # SIZ: of the image, of a tile
        whole[place : place + 8] = struct.pack(">II", width, height)
    if box:
        place = whole.index(b"ihdr") + 4
        whole[place : place + 8] = struct.pack(">II", height, width)
    return bytes(whole)


def _bombs() -> Iterator[Case]:
    most = "at most 89,478,485 pixels are read; scale it down"
    yield _case("bomb: PNG of 30,000 x 30,000 pixels in a few bytes", _png(30_000, 30_000), "bomb.png", bad=f"900,000,000 pixels; {most}")
    yield _case("bomb: PNG of 10,000 x 10,000 pixels in a few bytes", _png(10_000, 10_000), "bomb.png", bad=f"10000 x 10000 pixels; {most}")
    yield _case("bomb: PNG of 2,147,483,647 x 1 pixels", _png(2**31 - 1, 1), "bomb.png", bad=f"2,147,483,647 pixels; {most}")
    yield _case("bomb: GIF whose first frame is 60,000 x 60,000", b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\2\2\x4c\1\0;", "bomb.gif", bad=f"3,600,000,000 pixels; {most}")
    tags = struct.pack("<H", 9) + b"".join(
        struct.pack("<HHII", *tag) for tag in ((256, 4, 1, 50_000), (257, 4, 1, 50_000), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 50_000), (279, 4, 1, 9))
    )
    yield _case("bomb: TIFF of 50,000 x 50,000 pixels in a few bytes", b"II*\0" + struct.pack("<I", 8) + tags + bytes(4), "bomb.tif", bad=f"2,500,000,000 pixels; {most}")
    yield _case("bomb: BMP of 40,000 x 40,000 pixels in a few bytes", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0), "bomb.bmp", bad=f"1,600,000,000 pixels; {most}")
    yield _case("bomb: PNG whose text is 200 MB once unpacked", _png(4, 4, _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(200_000_000), 1))), "bomb.png", bad="text or a colour profile in it is larger than a megabyte once unpacked; save it without")
    yield _case("bomb: PNG whose colour profile is 200 MB once unpacked", _png(4, 4, _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200_000_000), 1))), "bomb.png", bad="text or a colour profile in it is larger than a megabyte once unpacked; save it without")
    yield _case("bomb: PNG of 4 x 4 with 200 MB of pixels", _png(4, 4, pixels=zlib.compress(bytes(200_000_000), 1)), "bomb.png", shows=np.zeros((4, 4, 3), dtype=np.uint8))
    yield _case("bomb: TIFF whose tags all name the same megabyte", _overlapping_tags(1_000, 1_000_000), "bomb.tif", bad="its tags name 1,000,000,0")
    exif = b"Exif\0\0" + _overlapping_tags(1_000, 1_000_000)
    yield _case("bomb: PNG whose EXIF tags all name the same megabyte", stored(colours(), exif=exif), "bomb.png", bad="its EXIF tags name 1,000,000,0")
    yield _case("bomb: WebP whose EXIF tags all name the same megabyte", stored(colours(), "WEBP", lossless=True, exif=exif), "bomb.webp", bad="its EXIF tags name 1,000,000,0")
    content = stored(colours(), exif=b"Exif\0\0" + exif)
    yield _case("bomb: the same behind EXIF's beginning given twice", content, "bomb.png", bad="its EXIF tags name 1,000,000,0")
    progressive = stored(Image.new("RGB", (2_000, 2_000), (9, 9, 9)), "JPEG", progressive=True)
    last = progressive[progressive.rfind(b"\xff\xda") : -2]
    yield _case("bomb: JPEG of 10,000 scans", progressive[:-2] + last * 10_000 + b"\xff\xd9", "bomb.jpg", broken="a JPEG of 10,010 scans; at most 100 are read; save it anew")
    yield _case("bomb: gzip named .png", gzip.compress(bytes(50_000_000), 1), "bomb.png", bad=_NOT)
    yield _case("bomb: JPEG2000 of 6,000 x 6,000 pixels in a few bytes", _jpeg2000(6_000, 6_000), "bomb.jp2", bad="6000 x 6000 pixels; at most 33,554,432 of a JPEG2000 are read; scale it down, or save it as PNG or JPEG")
    yield _case("bomb: JPEG2000 whose pixels are more than its header says", _jpeg2000(30_000, 30_000, box=False), "bomb.jp2", broken="broken JPEG2000 file")
    yield _case("bomb: JPEG2000 without a box, of 50,000 x 50,000 pixels", _jpeg2000(50_000, 50_000)[85:], "bomb.j2k", bad=f"2,500,000,000 pixels; {most}")
    for mode, colour, format, options in (
        ("RGBA", (10, 200, 30, 128), "PNG", {"compress_level": 1}),
        ("I;16", 40_000, "PNG", {"compress_level": 1}),
        ("F", 0.5, "TIFF", {"compression": "tiff_deflate"}),
    ):
        yield _large(mode, colour, format, options)


def _large(mode: str, colour: float | tuple[int, ...], format: str, options: Mapping[str, Any]) -> Case:
    """An image whose pixels are changed before they are RGB, so large that more than three copies of it would be too much."""

    def write(folder: Path) -> None:
        _write("large", stored(Image.new(mode, (_SIDE, _SIDE), colour), format, **options), folder)
        (folder / "rows" / "large").rename(folder / "rows" / "large.png")

    return Case(f"large: {format} of 25 million pixels of mode {mode}", write, rows={"large.png": Row(("x",), (_SIDE, _SIDE))}, fillers=FILLERS, asked={"prompt": "x"})


def _kinds_of_pixels() -> Iterator[Case]:
    pixels = colours()
    frames = [Image.fromarray(colours(seed=seed)) for seed in range(4)]
    for format in ("GIF", "WEBP", "PNG"):
        several: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 40}
        if format == "GIF":
            shown = np.asarray(frames[0].quantize(256).convert("RGB"))
            several = {**several, "append_images": [frame.quantize(256) for frame in frames[1:]]}
            yield _case("animated: GIF gives its first frame", stored(frames[0].quantize(256), "GIF", **several), "moves.gif", shows=shown)
        else:
            yield _case(f"animated: {format} gives its first frame", stored(frames[0], format, **several, **({"lossless": True} if format == "WEBP" else {})), f"moves.{format.lower()}", shows=pixels)
    yield _case("animated: TIFF of several pages gives its first", stored(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "pages.tif", shows=pixels)

    flat = np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8)
    yield _case("colours: CMYK JPEG", stored(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=100), "cmyk.jpg", shows=flat, tolerance=4)
    yield _case("colours: CMYK TIFF", stored(Image.fromarray(flat).convert("CMYK"), "TIFF"), "cmyk.tif", shows=flat, tolerance=1)
    deep = np.array([[0, 255, 300, 128 * 257, 65_535]], dtype=np.uint16)
    grey = np.rint(deep.astype(float) / 65_535 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    yield _case("colours: 16-bit grey PNG", stored(deep), "deep.png", shows=grey)
    yield _case("colours: 16-bit grey TIFF", stored(deep, "TIFF"), "deep.tif", shows=grey)
    rgb16 = zlib.compress(b"\0" + struct.pack(">6H", 65_535, 32_896, 0, 257, 514, 65_278))
    content = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + _chunk(b"IDAT", rgb16) + _chunk(b"IEND", b"")
    yield _case("colours: 16-bit RGB PNG", content, "deep.png", shows=np.array([[[255, 128, 0], [1, 2, 254]]], dtype=np.uint8), tolerance=1)
    yield _case("colours: float TIFF from 0 to 1", stored(np.array([[0, 0.25, 1]], dtype=np.float32), "TIFF"), "float.tif", shows=np.array([[[0] * 3, [64] * 3, [255] * 3]], dtype=np.uint8))
    for name, values in (("beyond 1", [[0.0, 255.0]]), ("with NaN", [[0.0, float("nan")]]), ("with infinity", [[0.0, float("inf")]])):
        yield _case(f"colours: float TIFF {name}", stored(np.array(values, dtype=np.float32), "TIFF"), "float.tif", broken="float pixels from")
    yield _case("colours: 32-bit grey TIFF", stored(np.array([[0, 1]], dtype=np.int32), "TIFF"), "wide.tif", broken="TIFF with pixels of mode I: nothing says which value is white")
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    laid = np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 255]]], dtype=np.uint8)
    yield _case("transparent: palette PNG with one transparent colour", stored(palette, transparency=1), "palette.png", shows=laid)
    yield _case("transparent: palette PNG with an alpha for each colour", stored(palette, transparency=bytes([255, 0, 255])), "palette.png", shows=laid)
    yield _case("transparent: palette GIF", stored(palette, "GIF", transparency=1), "palette.gif", shows=laid)
    yield _case("transparent: grey with alpha", stored(np.array([[[40, 255], [40, 0]]], dtype=np.uint8)), "la.png", shows=np.array([[[40] * 3, [255] * 3]], dtype=np.uint8))
    yield _case("transparent: RGBA", stored(np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], dtype=np.uint8)), "rgba.png", shows=np.array([[[200, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    bits = np.array([[0, 255, 0]], dtype=np.uint8)
    yield _case("colours: 1-bit PNG", stored(Image.fromarray(bits).convert("1")), "bits.png", shows=bits[..., None].repeat(3, axis=2))
    yield _case("colours: 1-bit TIFF, white is 0", stored(Image.fromarray(bits).convert("1"), "TIFF", compression="group4"), "bits.tif", shows=bits[..., None].repeat(3, axis=2))
    yield _case("colours: Lab TIFF", stored(Image.new("LAB", (4, 3), (255, 128, 128)), "TIFF"), "lab.tif", shows=np.full((3, 4, 3), 255, dtype=np.uint8), tolerance=2)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield _case("profile: sRGB is not applied", stored(pixels, icc_profile=profile), "icc.png", shows=pixels)
    yield _case("profile: broken", stored(pixels, icc_profile=b"no profile at all"), "icc.png", shows=pixels)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a prompt " * 60_000)
    yield _case("colours: PNG with half a megabyte of text", stored(pixels, pnginfo=info), "text.png", shows=pixels)
    for height, width in ((1, 1), (1, 10_000), (10_000, 1)):
        long = colours(height, width)
        yield _case(f"shape: {width} x {height} pixels", stored(long), "long.png", shows=long)


def _turned() -> Iterator[Case]:
    pixels = colours()
    for orientation, upright in _TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format, suffix, options in (("PNG", "png", {}), ("TIFF", "tif", {}), ("WEBP", "webp", {"lossless": True})):
            yield _case(f"turned: {format} with EXIF orientation {orientation}", stored(pixels, format, exif=exif, **options), f"turned.{suffix}", shows=upright(pixels))
        large = np.kron(pixels, np.ones((16, 16, 1), dtype=np.uint8))
        yield _case(f"turned: JPEG with EXIF orientation {orientation}", stored(large, "JPEG", exif=exif, quality=100, subsampling=0), "turned.jpg", shows=upright(large), tolerance=6)
    yield _case("EXIF: orientation 77", stored(pixels, exif=_exif(struct.pack("<HHIHH", 0x0112, 3, 1, 77, 0))), "exif.png", shows=pixels)
    yield _case("EXIF: orientation as a 32-bit number", stored(pixels, exif=_exif(struct.pack("<HHII", 0x0112, 4, 1, 6))), "exif.png", shows=np.rot90(pixels, -1))
    yield _case("EXIF: orientation as text", stored(pixels, exif=_exif(struct.pack("<HHI4s", 0x0112, 2, 2, b"6\0\0\0"))), "exif.png", shows=pixels)
    yield _case("EXIF: noise", stored(pixels, exif=b"Exif\0\0" + np.random.default_rng(1).bytes(200)), "exif.png", shows=pixels)
    yield _case("EXIF: cut in its first tag", stored(pixels, exif=_exif(struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0))[:-10]), "exif.png", shows=pixels)
    yield _case("EXIF: empty", stored(pixels, exif=b"Exif\0\0"), "exif.png", shows=pixels)


def _exif(tag: bytes) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4)


def _no_images() -> Iterator[Case]:
    yield _case("no image: no byte at all", b"", "empty.png", bad="the file is empty")
    yield _case("no image: zeros", bytes(4096), "zeros.jpg", bad=_NOT)
    yield _case("no image: text named .jpg", b"hello", "text.jpg", bad=_NOT)
    yield _case("no image: a page that says 404, named .jpg", b"<!DOCTYPE html><html><title>404 Not Found</title></html>", "page.jpg", bad=_NOT)
    yield _case("no image: a HEIC file", b"\0\0\0\x18ftypheic" + bytes(40), "phone.heic", bad="a HEIC file, which cannot be read")
    yield _case("no image: SVG named .png", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "drawing.png", bad=_NOT)
    yield _case("no image: PostScript named .png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "program.png", bad=_NOT)
    yield _case("no image: a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n", "pointer.png", bad=_NOT)
    yield _case("wrong name: PNG named .jpg", GOOD, "png.jpg", shows=colours())
    yield _case("wrong name: JPEG named .PNG", stored(np.full((16, 16, 3), 90, dtype=np.uint8), "JPEG"), "jpeg.PNG", shows=np.full((16, 16, 3), 90, dtype=np.uint8), tolerance=2)

"""Bombs: image files that are small and would take far more memory or time than their pixels; told before they are read."""

from __future__ import annotations

import struct
from typing import BinaryIO

MAX_SCANS = 100
"""Scans of a progressive JPEG. Ten are usual, a decoder goes over all pixels in each, and one takes no more than a dozen bytes."""

_MUCH = 64 * 2**20  # bytes that tags may name together though the file is smaller: damaged ones can name the same bytes twice
_NUM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # of a value, by its kind
_BLOCK = 2**20


def named_bytes(file: BinaryIO) -> int:
    """How many bytes the tags of a TIFF, or of EXIF, which is one, name together, where that is far more than it has; else 0.

    Tags may name the same bytes, and Pillow 12.3 takes a copy for each: a megabyte becomes gigabytes. Leaves the file at its beginning.
    Source: TIFF 6.0, section 2; BigTIFF.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    total = 0
    if order is not None and len(start) == 16:
        is_big = struct.unpack_from(f"{order}H", start, 2)[0] == 43
        number_form, tag_form, tag_bytes = (f"{order}Q", f"{order}HHQ", 20) if is_big else (f"{order}H", f"{order}HHI", 12)
        place = struct.unpack_from(f"{order}Q", start, 8)[0] if is_big else struct.unpack_from(f"{order}I", start, 4)[0]
        if place < size:
            file.seek(place)
            number = file.read(struct.calcsize(number_form))
            if len(number) == struct.calcsize(number_form):
                tags = file.read(min(struct.unpack(number_form, number)[0], 2**16) * tag_bytes)
                for at in range(0, len(tags) - tag_bytes + 1, tag_bytes):
                    _, kind, count = struct.unpack_from(tag_form, tags, at)
                    total += min(_NUM_BYTES.get(kind, 0) * count, size)
        file.seek(0)
    return total if total > max(_MUCH, 2 * size) else 0


def num_scans(file: BinaryIO) -> int:
    """How many scans a JPEG has, or a few more: what begins a scan is a marker that pixels never contain, but a thumbnail can. Leaves the file at its beginning."""
    file.seek(0)
    scans, last = 0, b""
    while block := file.read(_BLOCK):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(0)
    return scans

"""Tiles: the previews as single pictures, which the report sets side by side over the stages."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from stages.sampling import Preview

LONGEST_SIDE = 224
"""Pixels of a tile."""
_KEPT_EXACT = 64  # pixels of a longer side up to which a tile is a PNG; JPEG would smear a picture of so few


def write_image(file: Path, image: Image.Image, **how: int) -> None:
    """Write a picture in the format that the file's name says. how: what PIL is told besides.

    Encoded before it is written, for where PIL (12) writes it itself its error on a full disk says nothing of the disk.
    """
    content = io.BytesIO()
    image.save(content, {".png": "PNG", ".jpg": "JPEG"}[file.suffix], **how)
    file.write_bytes(content.getvalue())


def write_tiles(folder: Path, name: str, shown: Sequence[Preview], base: str | None = None) -> list[dict[str, Any]]:
    """Write previews into previews/`name` of a run's folder: each output whole as SOURCE-ROW.png, and in tiles/ every picture small.

    base: the name under which those of the model before any training were written, if they were. Returns what metrics.jsonl says of each row:
    source, row (from 1), prompt, and the tiles' paths in the run's folder: references, target, output and, where it is there, base.
    """
    tiles = folder / "previews" / name / "tiles"
    tiles.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    numbers: Counter[str] = Counter()
    for preview in shown:
        numbers[preview.source] += 1
        row = f"{preview.source}-{numbers[preview.source]}"
        write_image(tiles.parent / f"{row}.png", preview.output)

        def tile(image: Image.Image, kind: str, row: str = row) -> str:
            small = image.convert("RGB")
            small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            file = tiles / f"{row}-{kind}.{'png' if max(small.size) <= _KEPT_EXACT else 'jpg'}"
            write_image(file, small, quality=82)
            return file.relative_to(folder).as_posix()

        output = tile(preview.output, "output")
        event: dict[str, Any] = {
            "source": preview.source,
            "row": numbers[preview.source],
            "prompt": preview.prompt,
            "references": [tile(image, f"reference-{place}") for place, image in enumerate(preview.references, 1)],
            "target": tile(preview.target, "target"),
            "output": output,
        }
        before = None if base is None else folder / "previews" / base / "tiles" / Path(output).name
        rows.append(event if before is None or not before.is_file() else event | {"base": before.relative_to(folder).as_posix()})
    return rows

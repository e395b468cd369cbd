"""The report's sheets of samples, of a run that wrote its previews as sheets alone."""

from __future__ import annotations

import base64
import io
import struct
from html import escape
from pathlib import Path

from PIL import Image

from stages.report.page import count, folded, section
from stages.report.record import Record
from stages.report.values import finite, text

MOST_SHEETS = 6
LARGE_SHEET = 1_500_000
"""Bytes of a preview above which it is made smaller."""
LARGEST_SHEET = 60_000_000
"""Pixels of a preview above which it is left out."""


def sheets(record: Record) -> str:
    """The sheet of the last stage, and those before it folded away."""
    events = {text(event.get("file")): event for event in record.events.get("preview", ())}
    shown = []
    for file, event in list(events.items())[-MOST_SHEETS:]:
        where = f"After {text(event.get('stage'))}, step {count(finite(event.get('step')))}"
        picture, problem = _picture(record.folder, file)
        if problem:
            shown.append(f'<p class="note">{escape(where)}: {escape(problem)}</p>')
        else:
            alt = escape(f"{where}: for each row the reference, the output, the target and the caption")
            image = f'<div class="wide" role="region" aria-label="{escape(where)}" tabindex="0"><img alt="{alt}" {picture}></div>'
            shown.append(f'<figure class="sheet"><figcaption>{escape(where)}</figcaption>{image}</figure>')
    if not shown:
        return ""
    note = "Held-out rows at fixed seeds, the same in every stage: reference, output, and target."
    earlier = folded(f"Earlier ({len(shown) - 1})", "".join(reversed(shown[:-1]))) if len(shown) > 1 else ""
    return section("previews", "What it draws", note, shown[-1] + earlier)


def file_in(folder: Path, file: str) -> Path | None:
    """A file of the run's folder by the name that an event gives it; None if there is none, or it lies outside."""
    try:
        path = (folder / file.replace("\0", "")).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError):  # a name that is too long, or that no file system could have
        return None


def _picture(folder: Path, file: str) -> tuple[str, str]:
    """Attributes of an <img> that holds a preview, or why it cannot be shown. A large sheet is made smaller."""
    path = file_in(folder, file)
    if path is None:
        return "", f"{file} is not in the run folder."
    data, kind = path.read_bytes(), "png"
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return "", f"{file} is not a PNG."
    width, height = struct.unpack(">II", data[16:24])
    if len(data) > LARGE_SHEET:
        if width * height > LARGEST_SHEET:
            return "", f"{file} has {width} x {height} pixels, too many for this page."
        try:
            with Image.open(io.BytesIO(data)) as image:
                small = image.convert("RGB")
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for a torn file
            return "", f"{file} cannot be read."
        small.thumbnail((1400, 14_000))
        (width, height), out = small.size, io.BytesIO()
        small.save(out, "JPEG", quality=86)
        data, kind = out.getvalue(), "jpeg"
    times = max(1, 480 // max(1, width)) if width <= 160 else 1  # a sheet of bare thumbnails
    tiny = ' class="tiny"' if times > 1 else ""
    return (
        f'{tiny} width="{width * times}" height="{height * times}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}"',
        "",
    )

"""The report's previews: for each source a grid of held-out rows by stages, at the same seeds, with references and targets beside."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from stages.report.curves import colour
from stages.report.page import count, region, section
from stages.report.record import Record
from stages.report.sheets import file_in, sheets
from stages.report.values import Event, mapping, text, whole

MOST_COLUMNS = 6
"""Stages in a grid; of more, the last ones."""
MOST_REFERENCES = 3
MOST_TILES = 240
"""Pictures of all grids together; of more, fewer rows of each source are shown, and then fewer sources."""
LARGEST_TILE = 60_000
"""Bytes of a picture above which it is left out."""
_PIXELATED = 64  # pixels of a longer side up to which a picture is enlarged without smoothing


@dataclass(frozen=True)
class _Column:
    """A stage's previews, by source and row."""

    stage: str
    step: int
    rows: Mapping[tuple[str, int], Event]


def previews(record: Record) -> str:
    """The grids; of a run whose previews are sheets alone, those."""
    columns = _columns(record)
    return _grids(record, columns) if columns else sheets(record)


def _columns(record: Record) -> list[_Column]:
    """The stages that wrote their previews as single pictures, the last ones of many."""
    latest = {text(event.get("stage")): event for event in record.events.get("preview", ())}  # a resumed run repeats some
    columns = []
    for stage, event in latest.items():
        listed = event.get("rows")
        rows = [mapping(row) for row in listed] if isinstance(listed, list) else []
        by_place = {(text(row.get("source")), whole(row.get("row"))): row for row in rows if text(row.get("source"))}
        if by_place:
            columns.append(_Column(stage, whole(event.get("step")), by_place))
    return columns[-MOST_COLUMNS:]


def _grids(record: Record, columns: Sequence[_Column]) -> str:
    last = columns[-1]
    by_source: dict[str, list[int]] = {}
    for source, row in last.rows:
        by_source.setdefault(source, []).append(row)
    across = len(columns) + 2 + max(_num_references(row) for row in last.rows.values())
    sources = dict(list(by_source.items())[: max(1, MOST_TILES // across)])
    deep = max(1, MOST_TILES // (across * len(sources)))
    grids = "".join(_grid(record, columns, source, sorted(rows)[:deep]) for source, rows in sources.items())
    note = "Held-out rows, which are never trained on, sampled at the end of each stage from the same noise."
    if any("base" in row for row in last.rows.values()):
        note += " Base is the model before any training."
    if len(sources) < len(by_source) or any(len(rows) > deep for rows in by_source.values()):
        note += f" The first {count(deep)} of each source are here." if len(sources) == len(by_source) else f" The first {len(sources)} sources are here."
    note += " The samples in full size are in previews/."
    most = max(_num_columns(columns, source, rows) for source, rows in by_source.items())
    small = " small" if "<img class=tiny" in grids else ""
    return section("previews", "What it draws", note, f'<div class="sampled{small}" style="--columns:{most}">{grids}</div>')


def _num_columns(columns: Sequence[_Column], source: str, rows: Sequence[int]) -> int:
    """Pictures across in the grid of a source."""
    last = columns[-1]
    return max(_num_references(last.rows[source, row]) for row in rows) + 1 + any("base" in last.rows[source, row] for row in rows) + len(columns)


def _num_references(row: Event) -> int:
    references = row.get("references")
    return min(MOST_REFERENCES, len(references)) if isinstance(references, list) else 0


def _grid(record: Record, columns: Sequence[_Column], source: str, rows: Sequence[int]) -> str:
    """A table: a row for each held-out row of a source; caption, references, target, base and stages across."""
    last = columns[-1]
    num_references = max(_num_references(last.rows[source, row]) for row in rows)
    has_base = any("base" in last.rows[source, row] for row in rows)
    given = ["Reference"] if num_references == 1 else [f"Reference {k + 1}" for k in range(num_references)]
    names = [*given, "Target", *(["Base"] if has_base else [])]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    head += "".join(f'<th scope="col" title="after step {count(column.step)}"><b>{escape(column.stage)}</b></th>' for column in columns)
    body = []
    for row in rows:
        event = last.rows[source, row]
        listed = event.get("references")
        references = [text(file) for file in listed] if isinstance(listed, list) else []
        files = [references[k] if k < len(references) else None for k in range(num_references)]
        files += [text(event.get("target")), *([text(event.get("base"))] if has_base else [])]
        cells = [_cell(record, file, f"{source}, row {row}: {name.lower()}") for name, file in zip(names, files, strict=True)]
        for column in columns:
            made = text(column.rows.get((source, row), {}).get("output"))
            cells.append(_cell(record, made, f"{source}, row {row}: after {column.stage}"))
        body.append(f'<tr><th scope="row">{escape(_caption(event)) or "(no caption)"}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    shade = colour(record, source) if source in record.sources else "--ink"
    table = f'<table class="tiles" style="--columns:{len(names) + len(columns)}"><thead><tr><th scope="col">Caption</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    heading = f'<h3><i class="swatch" style="background:var({shade})"></i>{escape(source)}</h3>'
    return f'<div class="samples">{heading}{region(f"Samples of {source}", table)}</div>'


def _caption(event: Event) -> str:
    """A row's caption on one line, cut where it is very long."""
    caption = " ".join(text(event.get("prompt")).split())
    return caption if len(caption) <= 300 else caption[:299].rstrip() + "…"


def _cell(record: Record, file: str | None, said: str) -> str:
    """A picture in the page; a dash where there is none, or where it cannot be shown."""
    path = file_in(record.folder, file) if file else None
    data = path.read_bytes() if path is not None and path.stat().st_size <= LARGEST_TILE else b""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        kind, exact = "png", max(struct.unpack(">II", data[16:24])) <= _PIXELATED
    elif data[:3] == b"\xff\xd8\xff":
        kind, exact = "jpeg", False
    else:
        return "" if file is None else '<span class="soft">–</span>'
    held = base64.b64encode(data).decode()
    return f'<img{" class=tiny" if exact else ""} alt="{escape(said)}" src="data:image/{kind};base64,{held}">'

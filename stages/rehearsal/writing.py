"""Writing: made rows, in each kind of place that a plan's path may name."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["captioned", "metadata", "jsonl", "json", "csv", "parquet", "arrow", "tar"]

_SHARD = 12  # rows of a .tar or a .parquet


@dataclass(frozen=True)
class Names:
    """The columns of each role."""

    target: str
    references: tuple[str, ...]
    prompt: str
    entity_prompts: str
    entity_masks: tuple[str, ...]


def _write_captioned(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    for number, row in enumerate(rows):
        (folder / f"{number:04d}.png").write_bytes(_bytes(row[named.target]))
        if isinstance(prompt := row.get(named.prompt), str):
            (folder / f"{number:04d}.txt").write_text(prompt, encoding="utf-8")
    return str(folder)


def _write_metadata(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    _write_lines(folder / "metadata.jsonl", _as_files(folder, rows))
    return str(folder)


def _write_jsonl(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    return _write_lines(folder / "rows.jsonl", _as_files(folder, rows))


def _write_json(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    file = folder / "rows.json"
    file.write_text(json.dumps(list(_as_files(folder, rows))), encoding="utf-8")
    return str(file)


def _write_csv(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    file = folder / "rows.csv"
    values = [{name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in _as_files(folder, rows)]
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.DictWriter(opened, list(dict.fromkeys(name for row in values for name in row)))
        table.writeheader()
        table.writerows(values)
    return str(file)


def _write_lines(file: Path, rows: Iterator[dict[str, object]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def _as_files(folder: Path, rows: Sequence[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """The rows, each image written into a file and named by it."""
    (folder / "images").mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        values: dict[str, object] = {}
        for place, (name, value) in enumerate(row.items()):
            contents = value if isinstance(value, list) else [value]
            if not contents or not all(isinstance(content, bytes) for content in contents):
                values[name] = value
                continue
            files = [f"images/{number:04d}-{place}-{each}.png" for each in range(len(contents))]
            for file, content in zip(files, contents, strict=True):
                (folder / file).write_bytes(_bytes(content))
            values[name] = files if isinstance(value, list) else files[0]
        yield values


def _columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """The rows as columns; images as `datasets` stores them."""

    def stored(value: object) -> object:
        if isinstance(value, list):
            return [stored(each) for each in value]
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [stored(row.get(name)) for row in rows] for name in names}
    for name, values in columns.items():
        if any(isinstance(value, list) for value in values):
            columns[name] = [value if isinstance(value, list) or value is None else [value] for value in values]
    return columns


def _write_parquet(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(_columns(rows))
    for shard, start in enumerate(range(0, len(rows), _SHARD)):
        parquet.write_table(table.slice(start, _SHARD), folder / f"rows-{shard:03d}.parquet", row_group_size=_SHARD // 2)
    return str(folder / "*.parquet")


def _write_arrow(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    import pyarrow as pa

    table = pa.table(_columns(rows))
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return str(folder / "rows.arrow")


def _write_tar(folder: Path, rows: Sequence[Mapping[str, object]], named: Names) -> str:
    """Members by their column's name; what can be none, a text or a number of another column than a caption's, goes into the row's .json."""
    for shard, start in enumerate(range(0, len(rows), _SHARD)):
        with tarfile.open(folder / f"rows-{shard:03d}.tar", "w") as tar:
            for number, row in enumerate(rows[start : start + _SHARD], start):
                fields: dict[str, object] = {}
                for name, value in row.items():
                    if isinstance(value, bytes):
                        _add(tar, f"{number:04d}.{name}", value)
                    elif name == named.prompt and isinstance(value, str) and name in ("txt", "caption"):
                        _add(tar, f"{number:04d}.{name}", value.encode())
                    else:
                        fields[name] = value
                if fields:
                    _add(tar, f"{number:04d}.json", json.dumps(fields).encode())
    return str(folder / "*.tar")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


WRITERS: Mapping[Kind, Callable[[Path, Sequence[Mapping[str, object]], Names], str]] = {
    "captioned": _write_captioned,
    "metadata": _write_metadata,
    "jsonl": _write_jsonl,
    "json": _write_json,
    "csv": _write_csv,
    "parquet": _write_parquet,
    "arrow": _write_arrow,
    "tar": _write_tar,
}
"""Each writes rows into a folder and returns the path that a plan names them by. A row is a value by column: images as bytes, or lists of them."""

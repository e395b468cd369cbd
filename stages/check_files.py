"""Check of files of rows: whether .jsonl, .json, .csv, .parquet, .arrow and .tar files have what a task needs, by headers and first rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mixing.bad_rows import RowError, SourceError
from mixing.plain_file import open_plain
from mixing.records import MOST_TEXT, object_in, records
from mixing.saved import outside_of_saved
from mixing.tar_members import Torn, check_tar, fields_of, members, split_name, usual_members
from mixing.where import BUILT_IN, WhereError, parse
from stages.check_patterns import Wrong, pattern_files
from stages.columns import column_problem
from stages.paths import read_json
from stages.plan import Source
from stages.problems import listed, nearest, quoted

if TYPE_CHECKING:
    from pyarrow import parquet

_MOST_READ = 8 * 2**20  # bytes of a .jsonl, or of a .json's rows, that are looked at
_MOST_ROWS = 10_000  # of a .csv, that are looked at
_MOST_TABLES = 64  # files whose rows are counted
_MOST_MEMBERS = 200  # of a .tar, that are looked at
_UNREADABLE = (OSError, ValueError, MemoryError)  # pyarrow's own errors are ValueErrors; a damaged length asks for any memory
_MOST_COUNTED = 64 * 2**20  # bytes of a .jsonl whose lines are counted


def look_at_records(source: Source, files: Sequence[str]) -> int | None:
    """One or more .jsonl, .json or .csv files."""
    columns: dict[str, None] = {}
    broken = ""
    for file in files[:100]:
        for number, row in _first_records(file):
            if isinstance(row, str):
                broken = broken or f"; {os.path.basename(file)}:{number}: {row}"
            else:
                columns.update(dict.fromkeys(row))
    if not columns:
        raise Wrong(f"{quoted(source.path)} holds no rows{broken}")
    look_at_columns(source, list(columns))
    lines = [file for file in files if file.endswith(".jsonl")]
    others = [file for file in files if not file.endswith(".jsonl")]
    if sum(map(os.path.getsize, lines)) > _MOST_COUNTED or sum(map(os.path.getsize, others)) > _MOST_READ:
        return None
    return sum(map(_count_lines, lines)) + sum(1 for file in others for _ in records(file))


def _first_records(file: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    """The first rows, by line (of a .json by number), or what is wrong with them. Raises Wrong."""
    if file.endswith(".jsonl"):
        for number, line in first_lines(file):
            yield number, object_of(line)
        return
    left = _MOST_READ
    try:
        for number, row in islice(records(file), _MOST_ROWS):
            yield number, row
            left -= len(row) if isinstance(row, str) else len(json.dumps(row))
            if left < 0:
                return
    except SourceError as error:
        raise Wrong(str(error)) from error


def first_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by number from 1, up to 8 MiB of them. Raises Wrong."""
    left = _MOST_READ
    try:
        with open_plain(file) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MOST_READ), b""), 1):
                left -= len(line)
                if left < 0:
                    return
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise Wrong(f"{quoted(file)} cannot be read: {(error.strerror or str(error)).lower()}") from error


def object_of(line: bytes) -> dict[str, object] | str:
    try:
        return object_in(line.decode("utf-8"), "the line")
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 ({error.reason} at byte {error.start + 1})"


def _count_lines(file: str) -> int:
    """Lines that are not blank."""
    with open_plain(file) as lines:
        return sum(not line.isspace() for line in lines)


def look_at_parquet(source: Source, root: Path) -> int | None:
    """One or more .parquet files, of which the first's schema is looked at."""
    if not (files := pattern_files(source.path, root)):
        return None
    try:
        footers = [_footer(file) for file in files[:_MOST_TABLES]]
        columns = footers[0].schema.to_arrow_schema().names
        rows = sum(footer.num_rows for footer in footers)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0][:200]
        raise Wrong(f"{quoted(source.path)} is not readable parquet: {reason}") from error
    look_at_columns(source, columns)
    return rows if len(files) <= _MOST_TABLES else None


def look_at_arrow(source: Source, files: Sequence[str]) -> int | None:
    """One or more .arrow files, of which the first's schema is looked at."""
    if not files:
        return None
    try:
        found = [_arrow_facts(file) for file in files[:_MOST_TABLES]]
        columns = found[0][0]
        rows = sum(each for _, each in found)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0][:200]
        raise Wrong(f"{quoted(source.path)} is not readable Arrow: {reason}") from error
    look_at_columns(source, columns)
    return rows if len(files) <= _MOST_TABLES else None


def _footer(file: str) -> parquet.FileMetaData:
    from pyarrow import parquet  # takes 0.2 s, and few plans need it

    with open_plain(file) as opened:
        return parquet.read_metadata(opened)


def _arrow_facts(file: str) -> tuple[list[str], int]:
    """The columns of the table in a file, and its rows. No image is read: only a column that holds none, if there is one, since those that are compressed are unpacked."""
    import pyarrow as pa  # takes 0.2 s, and few plans need it

    with open_plain(file) as stream:
        is_random_access = stream.read(6) == b"ARROW1"
    opened = pa.ipc.open_file if is_random_access else pa.ipc.open_stream
    schema = opened(pa.memory_map(file)).schema
    smallest = next((number for number, field in enumerate(schema) if pa.types.is_primitive(field.type)), 0)
    table = opened(pa.memory_map(file), options=pa.ipc.IpcReadOptions(included_fields=[smallest])).read_all()
    return schema.names, table.num_rows


def look_at_saved(source: Source, place: str) -> int | None:
    """A folder that `save_to_disk` wrote, or the part of it that is one split."""
    state = read_json(os.path.join(place, "state.json"))
    if isinstance(state, str):
        raise Wrong(f"{quoted(source.path)}: state.json {state}; save the dataset again")
    noted = state.get("_data_files")
    names = [file.get("filename") for file in noted if isinstance(file, dict)] if isinstance(noted, list) else []
    files = [os.path.join(place, name) for name in names if isinstance(name, str)]
    if not files:
        raise Wrong(f"{quoted(source.path)}: state.json names no files; save the dataset again")
    if (outside := outside_of_saved(place)) is not None:
        raise Wrong(f"{quoted(source.path)}: state.json names {quoted(outside)}, which lies outside of it; save the dataset again")
    return look_at_arrow(source, files)


def split_of(source: Source, place: str) -> str:
    """The split that a source names, of those that a folder holds."""
    facts = read_json(os.path.join(place, "dataset_dict.json"))
    splits = facts.get("splits") if isinstance(facts, dict) else None
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise Wrong(f"{quoted(source.path)}: dataset_dict.json does not name the splits; save the dataset again")
    if source.split not in splits:
        raise Wrong(f"no split {quoted(source.split)} (splits: {listed(splits)}){nearest(source.split, splits)}", "split")
    return source.split


def look_at_tar(source: Source, root: Path) -> None:
    """One or more .tar shards, of which the first's first members are looked at."""
    if not (files := pattern_files(source.path, root)):
        return
    file = files[0]
    extensions: dict[str, None] = {}
    fields: dict[str, None] = {}
    try:
        with open_plain(file) as stream:
            check_tar(stream, source.path)
            for member in islice(members(stream), _MOST_MEMBERS):
                if (parts := split_name(member.name)) is None:
                    continue
                extensions[parts[1]] = None
                if parts[1] == "json" and member.kind == "file" and member.num_bytes <= MOST_TEXT:
                    fields.update(dict.fromkeys(_fields(os.pread(stream.fileno(), member.num_bytes, member.offset))))
    except Torn as error:
        if not extensions:
            raise Wrong(f"{quoted(os.path.basename(file))} is cut: {error}, and no member before it is whole; copy it again") from error
    except SourceError as error:
        raise Wrong(str(error)) from error
    except OSError as error:
        raise Wrong(f"{quoted(file)} cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not extensions:
        raise Wrong(f"{quoted(source.path)} holds no rows; members of one row agree up to the first dot: 0001.jpg, 0001.txt")
    try:
        columns, asked = usual_members(extensions, fields, source.columns)
    except SourceError as error:
        raise Wrong(str(error)) from error
    look_at_columns(source, columns, {str(role): names for role, names in asked.items()})


def _fields(content: bytes) -> tuple[str, ...]:
    try:
        return tuple(fields_of(content))
    except RowError:
        return ()  # a bad row


def look_at_columns(source: Source, columns: Sequence[str], asked: Mapping[str, str | Sequence[str]] | None = None) -> None:
    """Raise Wrong if the columns are not what the task needs. asked: the source's `columns`, or what they come to."""
    asked = {str(role): names for role, names in source.columns.items()} if asked is None else asked
    found = column_problem(source.task, columns, asked, source.prompt is not None)
    if found is not None:
        raise Wrong(found[1], found[0])
    look_at_choice(source, columns)


def look_at_choice(source: Source, columns: Sequence[str]) -> None:
    """Raise Wrong if `where` or `take.column` names a column that is not there."""
    wanted: list[tuple[str, str]] = []
    if source.where is not None:
        with suppress(WhereError):  # told where conditions are read
            wanted += [("where", name) for name in sorted(parse(source.where).names - set(BUILT_IN))]
    if source.take is not None and source.take.column is not None:
        wanted.append(("take.column", source.take.column))
    for field, name in wanted:
        if name not in columns:
            raise Wrong(f"no column {quoted(name)} (columns: {listed(columns)}){nearest(name, [*columns, *BUILT_IN])}", field)

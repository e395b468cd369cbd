"""Selected rows: those of a source that a run uses, by class, and those that it only measures itself on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixing.bad_rows import BadRow, RowError, SourceError, UnreadableRow
from mixing.buckets import RowClass, class_of, classify, stream_class
from mixing.captions import CaptionRules
from mixing.images import UnreadableImage, header_size
from mixing.reading import Augmentation
from mixing.selection import By, held_out_rows, row_hashes, selection_record, take_rows
from mixing.source import Source
from mixing.stream import Stream
from mixing.tasks import Cells
from mixing.where import WhereError, parse

RowNumbers = NDArray[np.int32]

_PLAIN_CAPTIONS, _PLAIN_VIEW = CaptionRules(), Augmentation()
_UNKNOWN = 2**31 - 1  # rows of a stream that does not say how many it has: it never runs short of them for a micro-batch
_MANY = 256  # rows from which their numbers are kept on disk
_AT_ONCE = 1 << 16  # rows whose keys are in memory together


@dataclass(frozen=True)
class Choice:
    """Which rows of a source a plan asks for: `where`, `take` and `repeat`; as it stands here, all of them."""

    where: str | None = None
    count: int | None = None
    fraction: float | None = None
    by: By = "random"
    column: str | None = None
    seed: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class Selection:
    """The rows of a source that a run uses: those that it trains on, by class, and those that it only measures itself on."""

    source: Source
    """Of a stream, its held-out rows."""
    training: Mapping[RowClass, RowNumbers | range]
    """An epoch visits each once."""
    held_out: RowNumbers
    """Never trained on."""
    captions: CaptionRules = _PLAIN_CAPTIONS
    augmentation: Augmentation = _PLAIN_VIEW
    repeat: int = 1
    """How often the rows count in a mix by size."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """How they were chosen, for the ledger."""
    stream: Stream | None = None
    """Where training rows come from one after another."""

    @property
    def size(self) -> int:
        """How many rows are trained on; of a stream what the plan says, or more than any has."""
        return sum(len(rows) for rows in self.training.values())

    @property
    def counted(self) -> int:
        """How many rows a mix by size counts."""
        return self.size * self.repeat

    def class_of(self, row: int) -> RowClass:
        """The class of one row."""
        source = self.source
        first = int(source.num_references[:row].sum())
        references = source.reference_sizes[first : first + int(source.num_references[row])]
        regions = 0 if source.num_regions is None else int(source.num_regions[row])
        return class_of((int(source.sizes[row, 0]), int(source.sizes[row, 1])), [(int(height), int(width)) for height, width in references], regions)

    def cells(self, row: int) -> Cells:
        """What a row holds. Raises UnreadableRow where its files are gone since the source was opened."""
        try:
            return self.source.rows.cells(row)
        except (RowError, UnreadableImage, OSError) as error:
            raise UnreadableRow(BadRow(self.source.name, self.source.key(row), str(error))) from error


def select(source: Source, choice: Choice, held_out: int, *, captions: CaptionRules = _PLAIN_CAPTIONS, augmentation: Augmentation = _PLAIN_VIEW, folder: Path | None = None) -> Selection:
    """Choose a source's training and held-out rows.

    held_out: how many of the chosen rows are held out, at most a tenth of them: those whose key's hash is smallest, so that adding rows to a source
    changes the set as little as can be. folder: where the numbers of very many rows are kept. Raises ValueError, naming the source, if the condition
    cannot be read or leaves no row, or `count` is more than there are.
    """
    name, of = source.name, len(source)
    candidates = np.arange(of, dtype=np.int64) if choice.where is None else np.flatnonzero(_holds(source, choice.where))
    if choice.where is not None and not len(candidates):
        raise ValueError(f"sources.{name}.where: no row of {of:,} fulfils `{choice.where}`")
    strata = source.extra[choice.column].take(candidates) if choice.by == "stratified" and choice.column is not None else None
    taken = take_rows(candidates, count=choice.count, fraction=choice.fraction, by=choice.by, strata=strata, seed=choice.seed, name=name, filtered=choice.where is not None)
    asked = choice.count if choice.count is not None else choice.fraction
    is_chosen = asked is not None or choice.where is not None
    hashes = row_hashes(name, _keys(source, taken)) if is_chosen or min(held_out, len(taken) // 10) else np.empty(0, dtype=np.uint64)
    record = selection_record(by=choice.by, column=choice.column, seed=choice.seed, where=choice.where, asked=asked, of=len(candidates), hashes=hashes) | {"source_rows": of} if is_chosen else {}
    apart = held_out_rows(taken, hashes, held_out)
    training = taken[~np.isin(taken, apart, assume_unique=True)] if len(apart) else taken
    regions = None if source.num_regions is None else np.asarray(source.num_regions)
    index, classes = classify(np.asarray(source.sizes), np.asarray(source.num_references), np.asarray(source.reference_sizes), regions)
    own = index[training]
    rows = training[np.argsort(own, kind="stable")].astype(np.int32)
    if folder is not None and len(rows) >= _MANY:
        rows = _on_disk(rows, folder / f"{name}.npy")
    ends = np.cumsum(np.bincount(own, minlength=len(classes)))
    groups = {each: rows[end - number : end] for each, end, number in zip(classes, ends.tolist(), np.diff(ends, prepend=0).tolist(), strict=True) if number}
    return Selection(source, groups, np.sort(apart).astype(np.int32), captions, augmentation, choice.repeat, record)


def select_stream(stream: Stream, rows: int | None, *, repeat: int = 1, captions: CaptionRules = _PLAIN_CAPTIONS, augmentation: Augmentation = _PLAIN_VIEW) -> Selection:
    """A stream's training rows, and its held-out ones, which are read here. rows: how many it has, if the plan says so."""
    held = stream.held_out_rows()
    sizes = [[header_size(pixels) for _, pixels in cells.images()][: 1 + len(cells.references)] for _, cells in held]
    source = Source(
        stream.name,
        stream.task,
        np.full(len(held), stream.references, dtype=np.uint8),
        np.asarray([each[0] for each in sizes], dtype=np.uint32).reshape(-1, 2),
        stream.bad,
        stream.fingerprint,
        _HeldRows(tuple(held)),
        np.asarray(list(chain.from_iterable(each[1:] for each in sizes)), dtype=np.uint32).reshape(-1, 2),
    )
    return Selection(source, {stream_class(stream.references): range(rows or _UNKNOWN)}, np.arange(len(held), dtype=np.int32), captions, augmentation, repeat, {}, stream)


@dataclass(frozen=True)
class _HeldRows:
    """Rows in memory."""

    held: tuple[tuple[str, Cells], ...]

    def key(self, index: int) -> str:
        return self.held[index][0]

    def keys(self, indices: NDArray[Any]) -> list[str]:
        return [self.held[index][0] for index in indices.tolist()]

    def cells(self, index: int) -> Cells:
        return self.held[index][1]

    def saved(self) -> Mapping[str, Any]:
        return {}


def _keys(source: Source, rows: NDArray[np.int64]) -> chain[str]:
    """The rows' keys, some at a time."""
    return chain.from_iterable(source.keys(rows[start : start + _AT_ONCE]) for start in range(0, len(rows), _AT_ONCE))


def _holds(source: Source, text: str) -> NDArray[np.bool_]:
    """For which rows a condition holds. Raises ValueError."""
    sizes = np.asarray(source.sizes, dtype=np.int64)
    built_in: dict[str, Callable[[], Any]] = {
        "height": lambda: sizes[:, 0],
        "width": lambda: sizes[:, 1],
        "pixels": lambda: sizes.prod(axis=1),
        "aspect": lambda: sizes[:, 1] / np.maximum(sizes[:, 0], 1),
        "references": lambda: np.asarray(source.num_references, dtype=np.int64),
        "prompt": partial(_prompts, source),
    }
    try:
        condition = parse(text)
        condition.check_names([*source.extra, *built_in])
        columns = {name: column for name, column in source.extra.items() if name in condition.names}
        columns |= {name: make() for name, make in built_in.items() if name in condition.names and name not in columns}
        return condition.holds(columns, len(source))
    except WhereError as error:
        raise ValueError(f"sources.{source.name}.where: {error}") from None


def _prompts(source: Source) -> Any:
    import pyarrow as pa

    return pa.array([source.rows.cells(row).prompt for row in range(len(source))], pa.large_string())


def _on_disk(rows: RowNumbers, file: Path) -> RowNumbers:
    """The same numbers, mapped into memory from a file. Raises SourceError if it cannot be written."""
    partial_file = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial_file.open("wb") as opened:
            np.save(opened, rows)
        partial_file.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial_file.unlink(missing_ok=True)
        raise SourceError(f"the row numbers in {file.parent} cannot be written: {error.strerror or error}; make room, or choose another folder for the cache") from error
    mapped: RowNumbers = np.load(file, mmap_mode="r")
    return mapped

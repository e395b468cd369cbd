"""Sources: a place with rows, opened once. Every row is looked at; bad ones are named and counted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mixing.bad_rows import BadRow, RowError, SourceError, UnreadableRow
from mixing.folder import list_folder, list_json_lines
from mixing.images import UnreadableImage
from mixing.index import place_of
from mixing.records import SUFFIXES
from mixing.rows import Listing, Rows
from mixing.survey import survey
from mixing.tar import compression, list_tar
from mixing.tasks import TASKS, Asked, Example, nearest, to_example

__all__ = ["BadRow", "Source", "SourceError", "UnreadableRow", "open_source"]

KINDS = (
    "a folder of images with .txt captions or metadata.jsonl, a .jsonl, .json or .csv file, .parquet or .arrow files, .tar shards, "
    "a folder that save_to_disk wrote, or hub/USER/DATASET"
)


@dataclass(frozen=True, eq=False)
class Source:
    """The good rows of a source, numbered from 0, read when asked for. Goes through fork and pickling."""

    name: str
    task: str
    num_references: NDArray[np.uint8]
    """[rows]: reference images of each row."""
    sizes: NDArray[np.uint32]
    """[rows, 2]: height and width of each upright target on disk, in pixels."""
    bad: tuple[BadRow, ...]
    """The bad rows found at opening."""
    fingerprint: str
    """SHA-256 over the rows' keys, prompts and image sizes in bytes: another one means that the source has changed."""
    rows: Rows
    reference_sizes: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint32))
    """[references, 2]: height and width of each upright reference, row after row: `num_references` of them for each."""
    extra: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)
    """[rows]: values of the further columns that were asked for, by name."""
    num_regions: NDArray[np.uint8] | None = None
    """[rows]: regions of each row; None where no row has any."""

    def __len__(self) -> int:
        return len(self.num_references)

    def key(self, index: int) -> str:
        """The row's identity, the same when others are added: its target's path; FILE:ROW or SPLIT:ROW in a table."""
        return self.rows.key(self._checked(index))

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """The identities of many rows, taken together: in about a microsecond each, where they are files."""
        if len(indices):
            self._checked(int(indices.min()))
            self._checked(int(indices.max()))
        return self.rows.keys(indices)

    def example(self, index: int) -> Example:
        """The row, decoded. Raises UnreadableRow if its pixels turn out to be broken, or its files are gone since."""
        index = self._checked(index)
        try:
            return to_example(self.rows.key(index), self.rows.cells(index))
        except (RowError, UnreadableImage) as error:
            raise UnreadableRow(BadRow(self.name, self.rows.key(index), str(error))) from error

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"source '{self.name}' has no row {index}; it has {len(self)}")
        return int(index)


def open_source(
    name: str,
    *,
    path: str,
    task: str,
    columns: Asked,
    prompt: str | None,
    split: str,
    on_bad_row: Literal["skip", "stop"],
    root: Path,
    extra: Sequence[str] = (),
    index: Path | None = None,
) -> Source:
    """Open a source and look at every row once; no pixels are decoded.

    name: the source's name in the plan; path, task, columns, prompt, split, on_bad_row: as the plan has them; root: the
    folder that a relative path starts from. extra: columns whose values are kept in `Source.extra`. index: a folder in
    which what was seen is remembered: then only rows whose files have changed since are looked at, and what the source
    holds for each row is mapped into memory from there; None: all is looked at, and held in memory. Files must lie in the
    source's own folder (that of the .jsonl or .parquet): rows that lead outside, by `..`, an absolute path or a symbolic
    link, are bad. Raises SourceError.
    """
    if task not in TASKS:
        raise SourceError(f"source '{name}': no task '{task}' (tasks: {', '.join(TASKS)}){nearest(task, TASKS)}")
    try:
        listing = _listing(path, task, columns, prompt, split, root, extra)
        place = None
        if index is not None:
            real = path if path.startswith("hub/") else os.path.realpath(root / os.path.expanduser(path))
            place = place_of(index, real, task, sorted(columns.items()), prompt, split, on_bad_row, list(extra))
        seen = survey(name, listing, on_bad_row, extra, place)
    except SourceError as error:
        raise SourceError(f"source '{name}' ({path}): {error}") from error
    return Source(
        name, task, seen.num_references, seen.sizes, seen.bad, seen.fingerprint, seen.rows, seen.reference_sizes, seen.extra, seen.num_regions
    )


def _listing(
    path: str, task: str, columns: Asked, prompt: str | None, split: str, root: Path, extra: Sequence[str] = ()
) -> Listing:
    if path.startswith("hub/"):
        dataset = path.removeprefix("hub/")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
            raise SourceError("a Hub dataset is written hub/USER/DATASET")
        from mixing.table import list_hub  # `datasets` takes 50 MB of memory and half a second, and files need none of it

        return list_hub(dataset, split, task, columns, prompt, extra)
    path = os.path.expanduser(path)
    place = root / path
    if any(os.path.isfile(place / name) for name in ("dataset_dict.json", "state.json")):  # by `save_to_disk`: several splits, or one
        from mixing.table import list_saved

        return list_saved(place, split, task, columns, prompt, extra)
    if split != "train":
        raise SourceError(f"split: only Hub datasets and folders that save_to_disk wrote have one ('{split}' found); leave it out")
    if os.path.isdir(place):
        return list_folder(place, task, columns, prompt, extra)
    if path.endswith((".parquet", ".arrow")):
        from mixing.table import list_arrow, list_parquet

        list_files = list_parquet if path.endswith(".parquet") else list_arrow
        return list_files(path, root, task, columns, prompt, extra)
    if path.endswith(".tar"):
        return list_tar(path, root, task, columns, prompt, extra)
    if not os.path.exists(place):
        raise SourceError(f"no such file or folder; a source is {KINDS}{nearest(place.name, _names_in(place.parent))}")
    if (compressed := compression(path)) is not None:
        raise SourceError(compressed)
    if place.suffix not in SUFFIXES:
        raise SourceError(f"it cannot be read; a source is {KINDS}")
    return list_json_lines(place, task, columns, prompt, extra)


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

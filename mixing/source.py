"""Sources: a place with rows, opened once. Every row is looked at; bad ones are named and counted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixing.bad_rows import BadRow, RowError, SourceError, UnreadableRow
from mixing.folder import list_folder, list_json_lines
from mixing.images import UnreadableImage
from mixing.rows import Listing, Rows, survey
from mixing.table import list_hub, list_parquet
from mixing.tasks import TASKS, Asked, Example, nearest, to_example

__all__ = ["BadRow", "Source", "SourceError", "UnreadableRow", "open_source"]

KINDS = "a folder of images with .txt captions or metadata.jsonl, a .jsonl file, .parquet files, or hub/USER/DATASET"


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

    def __len__(self) -> int:
        return len(self.num_references)

    def key(self, index: int) -> str:
        """The row's identity, the same when others are added: its target's path; FILE:ROW or SPLIT:ROW in a table."""
        return self.rows.key(self._checked(index))

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
) -> Source:
    """Open a source and look at every row once; no pixels are decoded.

    name: the source's name in the plan; path, task, columns, prompt, split, on_bad_row: as the plan has them; root: the
    folder that a relative path starts from. Files must lie in the source's own folder (that of the .jsonl or .parquet):
    rows that lead outside, by `..`, an absolute path or a symbolic link, are bad. Raises SourceError.
    """
    if task not in TASKS:
        raise SourceError(f"source '{name}': no task '{task}' (tasks: {', '.join(TASKS)}){nearest(task, TASKS)}")
    try:
        listing = _listing(path, task, columns, prompt, split, root)
        seen = survey(name, listing, on_bad_row)
    except SourceError as error:
        raise SourceError(f"source '{name}' ({path}): {error}") from error
    return Source(name, task, seen.num_references, seen.sizes, seen.bad, seen.fingerprint, seen.rows)


def _listing(path: str, task: str, columns: Asked, prompt: str | None, split: str, root: Path) -> Listing:
    if path.startswith("hub/"):
        dataset = path.removeprefix("hub/")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
            raise SourceError("a Hub dataset is written hub/USER/DATASET")
        return list_hub(dataset, split, task, columns, prompt)
    if split != "train":
        raise SourceError(f"split: only Hub datasets have one ('{split}' found); leave it out")
    path = os.path.expanduser(path)
    place = root / path
    if os.path.isdir(place):
        return list_folder(place, task, columns, prompt)
    if path.endswith(".parquet"):
        return list_parquet(path, root, task, columns, prompt)
    if not os.path.exists(place):
        raise SourceError(f"no such file or folder; a source is {KINDS}{nearest(place.name, _names_in(place.parent))}")
    if place.suffix != ".jsonl":
        raise SourceError(f"it cannot be read; a source is {KINDS}")
    return list_json_lines(place, task, columns, prompt)


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

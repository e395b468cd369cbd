"""Shards of a dataset of the Hub: its .parquet files or .tar files, or else what `datasets` streams."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
from huggingface_hub import HfFileSystem

from mixing.bad_rows import RowError, SourceError
from mixing.columns import Asked, Columns, choose_columns
from mixing.folder import locate
from mixing.parquet_shards import parquet_shards
from mixing.shards import Row, Shards, Values, fingerprint_of
from mixing.tar_shards import tar_shards

# What datasets 5.2 and huggingface_hub 2.4 raise over a dataset that is missing, gated, unreachable or damaged.
_REFUSED = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


@dataclass(frozen=True, eq=False)
class HubShards:
    """One split of a dataset, streamed by `datasets`: images with a table beside them, .jsonl, .csv, ..."""

    names: tuple[str, ...]
    dataset: datasets.IterableDataset
    """Images not decoded."""
    repo: str
    split: str
    num_rows: int | None
    """Rows of the split, if the dataset says how many it has."""
    folder: str | None
    """Real path of the folder, where the dataset is one on this machine."""
    files: tuple[str, ...]
    """The split's files, as `datasets` names them."""

    def choose(self, rows: Sequence[Values], task: str, asked: Asked, prompt: str | None) -> Columns:
        """By the columns' names."""
        return choose_columns(task, [name for row in rows for name in row], asked, prompt)

    def read(self, shard: int, row: int, at: Values | None, columns: Columns | None) -> Iterator[Row]:
        """The rows of a shard from one on; `at` holds the state of `datasets`."""
        rows = self.dataset.shard(len(self.names), shard)  # an object of its own, for it holds the place at which it stands
        if columns is not None and rows.column_names is not None:
            rows = rows.select_columns(list(columns.used()))
        if at is not None:
            rows.load_state_dict(copy.deepcopy(dict(at)))
        name = self.split if len(self.names) == 1 else f"{self.split}-{shard:05d}"
        number = row if at is not None else 0
        try:
            for values in rows:
                if number >= row:
                    yield Row(f"{name}:{number}", number, partial(self._values, values), rows.state_dict())
                number += 1
        except OSError:
            raise
        except (pa.ArrowException, ValueError, datasets.exceptions.DatasetsError) as error:
            raise SourceError(f"shard {self.names[shard]} of dataset {self.repo} cannot be read: {_said(error)}") from error

    def locate(self, shard: int, name: str) -> Path:
        """The file, if the dataset is a folder on this machine."""
        if self.folder is None:
            raise RowError(f"{name!r} is a name without an image; the dataset does not hold the file")
        return locate(name, self.folder, (self.folder,))

    def count(self, limit: int) -> int | None:
        """Rows, if the dataset says how many it has."""
        return self.num_rows

    def fingerprint(self) -> str:
        """Over names, and sizes or hashes."""
        names = [os.path.relpath(file, self.folder) for file in self.files] if self.folder is not None else self.names
        return fingerprint_of(names, self.files)

    def _values(self, values: Values) -> Values:
        return {column: self._fetched(value) for column, value in values.items()}

    def _fetched(self, value: object) -> object:
        """The value with what it names on the Hub, in this dataset, in it."""
        match value:
            case {"bytes": None, "path": str() as path} if re.match(rf"hf://datasets/{re.escape(self.repo)}[@/]", path):
                return HfFileSystem().cat_file(path)
            case list():
                return [self._fetched(each) for each in value]
        return value


def list_hub_shards(repo: str, split: str, lanes: int) -> Shards:
    """One split of a dataset of the Hub, USER/NAME, or of a folder of that name where the command is typed. Raises SourceError."""
    try:
        builder = datasets.load_dataset_builder(repo)
        dataset = builder.as_streaming_dataset(split=split)
        dataset = dataset.decode(False) if dataset.features else dataset
    except _REFUSED as error:
        raise SourceError(f"dataset {repo}, split '{split}', cannot be streamed: {_said(error)}") from error
    files = tuple(str(file) for file in (builder.config.data_files or {}).get(split, ()))
    folder = os.path.realpath(repo) if os.path.isdir(repo) else None
    if files and all(file.endswith(".parquet") for file in files):
        return parquet_shards(files, folder, lanes)
    if files and all(file.endswith(".tar") for file in files):
        return tar_shards(files, folder or "")
    number = dataset.num_shards
    names = files if len(files) == number else tuple(f"{split} part {part} of {number}" for part in range(number))
    known = (dataset.info.splits or {}).get(split)
    return HubShards(names, dataset, repo, split, (known.num_examples or None) if known is not None else None, folder, files)


def _said(error: BaseException) -> str:
    """What an error says, and what caused it, on one line."""
    said = " ".join(str(error).split())[:400] or type(error).__name__
    return f"{said}: {_said(error.__cause__)}" if error.__cause__ is not None else said

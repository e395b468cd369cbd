"""Check of the sources: whether what the plan names lies there and has what its task needs, as far as names, headers and first rows tell.

`mixing.source` opens a source and looks at every row; this is the look that takes no torch and well under a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mixing.columns import TASKS
from mixing.records import SUFFIXES
from mixing.tar_members import compression
from stages.check_files import first_lines, look_at_arrow, look_at_choice, look_at_parquet, look_at_records, look_at_saved, look_at_tar, object_of, split_of
from stages.check_patterns import Wrong, pattern_files
from stages.paths import missing, place_of
from stages.plan import Source
from stages.problems import Problem, quoted, written
from stages.reader import ReadPlan

KINDS = (
    "a folder of images with .txt captions or metadata.jsonl, a .jsonl, .json or .csv file, .parquet or .arrow files, .tar shards, "
    "a folder that save_to_disk wrote, or hub/USER/DATASET"
)
"""As mixing.source.KINDS, which cannot be imported without torch; a test holds the two together."""
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
        *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".heic", ".heif", ".jxl"),
    }
)
"""As mixing.images.SUFFIXES, which cannot be imported without torch; a test holds the two together."""
METADATA = "metadata.jsonl"
METADATA_FILES = (METADATA, "metadata.csv")

_MOST_LISTED = 300_000  # files of all sources together; a larger folder is judged by these and not counted


@dataclass(frozen=True)
class _Files:
    """What lies in a folder and below, hidden files left out; relative names."""

    names: tuple[str, ...]
    is_whole: bool
    """Whether that is all of them."""


@dataclass
class _Listing:
    """Lists folders: each once, and only so many files in all."""

    left: int
    known: dict[str, _Files] = field(default_factory=dict)

    def of(self, place: str) -> _Files:
        """What lies in a folder."""
        if place not in self.known:
            names: list[str] = []
            folders = [""]
            while folders and len(names) <= self.left:
                inner = folders.pop()
                with suppress(OSError), os.scandir(os.path.join(place, inner)) as entries:  # what may not be looked at is not there
                    for entry in entries:
                        if entry.name[0] == ".":
                            continue
                        if not _is_folder(entry):
                            names.append(inner + entry.name)
                        elif not entry.is_symlink():
                            folders.append(f"{inner}{entry.name}/")
            self.left -= len(names)
            self.known[place] = _Files(tuple(names), not folders)
        return self.known[place]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def source_problems(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """What is wrong with the plan's sources, and with the folder of labelled images."""
    listing = _Listing(_MOST_LISTED)
    for name, source in read.plan.sources.items():
        try:
            if source.stream and not source.path.startswith("hub/") and not source.path.endswith((".tar", ".parquet")):
                raise Wrong("only .tar shards, .parquet files and Hub datasets are streamed; remove it", "stream")
            if source.stream and TASKS[source.task].regions:
                raise Wrong(f"task {source.task} is not streamed: how many regions its rows have must be known beforehand; remove it", "stream")
            most = _most_rows(source, root, listing)
            if source.take is not None and source.take.count is not None and most is not None and source.take.count > most:
                raise Wrong(f"{source.take.count:,} rows are asked for, and there are {most:,}", "take.count")
        except Wrong as error:
            location = ("sources", name, *(error.field.split(".") if error.field else ()))
            place = read.place(*location) if location in read.places else read.place("sources", name, "path")
            yield Problem(place, written(location), str(error))
    accuracy = read.plan.evaluate.accuracy
    if accuracy is not None:
        location = ("evaluate", "accuracy", "labelled")
        try:
            _look_at_labels(root, accuracy.labelled)
        except Wrong as error:
            yield Problem(read.place(*location), written(location), str(error))


def source_notes(read: ReadPlan) -> Iterator[Problem]:
    """That datasets of the Hub are not looked up."""
    for name, source in read.plan.sources.items():
        if source.path.startswith("hub/"):
            place = read.place("sources", name, "path")
            yield Problem(place, f"sources.{name}.path", f"{quoted(source.path)} lies on the Hub, which was not asked")


def _prior(source: Source, root: Path) -> int:
    """Look at what images a model is to make, and say how many. Raises Wrong."""
    prior = source.prior
    assert prior is not None
    if source.path:
        raise Wrong("the model makes the rows of `prior` itself, and a path is given too; remove one of the two", "path")
    if source.task != "text_to_image":
        raise Wrong(f"'{source.task}', but what the model makes from prompts alone is text_to_image; remove it", "task")
    if isinstance(prior.prompts, str) and not os.path.isfile(place_of(root, prior.prompts)):
        raise Wrong(missing(root, prior.prompts), "prior.prompts")
    return prior.count


def _most_rows(source: Source, root: Path, listing: _Listing) -> int | None:
    """Look at a source, and say how many rows it has at most; None if that is not counted cheaply. Raises Wrong."""
    if source.prior is not None:
        return _prior(source, root)
    path = source.path
    if not path:
        raise Wrong("says nothing of where its rows are; give `path`, or `prior` for images that the model makes itself", "")
    if path.startswith("hub/"):
        if not re.fullmatch(r"hub/[\w.-]+/[\w.-]+", path):
            raise Wrong(f"{quoted(path)}: a dataset of the Hub is written hub/USER/DATASET")
        return None
    place = place_of(root, path)
    if os.path.isfile(os.path.join(place, "dataset_dict.json")):
        return look_at_saved(source, os.path.join(place, split_of(source, place)))
    if source.split != "train":
        raise Wrong("only a Hub dataset, or a folder of several that save_to_disk wrote, has splits; remove it", "split")
    if os.path.isfile(os.path.join(place, "state.json")):
        return look_at_saved(source, place)
    if os.path.isdir(place):
        return _folder(source, place, listing)
    if path.endswith(".parquet"):
        return look_at_parquet(source, root)
    if path.endswith(".arrow"):
        return look_at_arrow(source, pattern_files(path, root))
    if path.endswith(".tar"):
        look_at_tar(source, root)
        return None
    if not os.path.exists(place):
        if re.search(r"[*?{\[]", path):
            raise Wrong(f"{quoted(path)}: a pattern names .parquet, .arrow or .tar files; a source is {KINDS}")
        raise Wrong(missing(root, path))
    if not os.path.isfile(place):
        raise Wrong(f"{quoted(path)} is neither a file nor a folder")
    if (reason := compression(path)) is not None:
        raise Wrong(reason)
    if not path.endswith(SUFFIXES):
        raise Wrong(f"{quoted(path)} cannot be read; a source is {KINDS}")
    return look_at_records(source, [place])


def _folder(source: Source, place: str, listing: _Listing) -> int | None:
    """A folder of images with captions, or with metadata."""
    files = listing.of(place)
    metadata = [name for name in files.names if os.path.basename(name) in METADATA_FILES and os.path.isfile(os.path.join(place, name))]
    if metadata:
        return look_at_records(source, [os.path.join(place, name) for name in metadata])
    images = sum(_suffix(name) in IMAGE_SUFFIXES for name in files.names)
    shown = quoted(source.path)
    if not images:
        tables = sorted(name for name in files.names if name.endswith((*SUFFIXES, ".parquet", ".arrow", ".tar")))
        hint = f"; it holds {quoted(tables[0])}: name the file in `path`" if tables else ""
        others = "1 file of another kind" if len(files.names) == 1 else f"{len(files.names):,} files of other kinds"
        raise Wrong(f"{shown} holds no images ({others}){hint}")
    if TASKS[source.task].references or TASKS[source.task].regions:
        needs = "references" if TASKS[source.task].references else "regions"
        message = f"{source.task} needs {needs}, and a folder of captioned images has none; write a {METADATA} into {shown}"
        raise Wrong(message, "task")
    if source.columns:
        raise Wrong(f"{shown} is a folder of captioned images, which has no columns; remove it", "columns")
    look_at_choice(source, ())
    if source.prompt is None and not any(_suffix(name) == ".txt" for name in files.names):
        counted = "1 image" if images == 1 else f"{images:,} images"
        message = f"{shown} holds {counted} and no caption; write a .txt of the same name beside each, or give `prompt`"
        raise Wrong(message)
    return images if files.is_whole else None


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _look_at_labels(root: Path, path: str) -> None:
    """The folder on which the classifier is fitted. Raises Wrong."""
    place = place_of(root, path)
    if not os.path.isdir(place):
        raise Wrong(f"{quoted(path)} is not a folder" if os.path.exists(place) else missing(root, path))
    file = os.path.join(place, METADATA)
    if not os.path.isfile(file):
        raise Wrong(f"{quoted(path)} has no {METADATA} (lines of file_name and label)")
    for number, line in islice(first_lines(file), 1):
        row = object_of(line)
        if isinstance(row, str) or not {"file_name", "label"} <= row.keys():
            raise Wrong(f"{quoted(path)}: {METADATA}:{number}: a line needs file_name and label")
        return
    raise Wrong(f"{quoted(path)}: {METADATA} holds no rows")

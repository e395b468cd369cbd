"""Streams: sources that are too large to look at first, opened by their first rows and read in lanes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np

from mixing.bad_rows import BadRow, RowError, SourceError
from mixing.columns import TASKS, Asked, Columns, nearest
from mixing.images import UnreadableImage, header_size
from mixing.keys import key
from mixing.lanes import STALLED, WINDOW, LaneReader, Place, Waiting, Window, place
from mixing.parquet_shards import list_parquet_shards
from mixing.permutation import permute
from mixing.retries import WAITS, read_on
from mixing.rows import FEW, MOST_BAD
from mixing.shards import Row, Shards, Values
from mixing.tar_shards import list_tar_shards
from mixing.tasks import Cells, to_cells

_LOOKED_AT = 10  # rows from which the columns are known
_JUDGED = 100  # rows of a lane's epoch from which on its bad ones are judged

Seen = Cells | str
"""What a row holds, or what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Stream:
    """A source that is read in lanes. Holds nothing open, so it goes through fork and pickling."""

    name: str
    task: str
    references: int
    """Reference images of each row."""
    num_lanes: int
    num_held_out: int
    """Good rows that are never trained on: the first of the source, in its own order."""
    fingerprint: str
    """SHA-256 over the shards' names and sizes: another one means that the source has changed."""
    shards: Shards
    columns: Columns
    prompt: str | None
    on_bad_row: Literal["skip", "stop"]
    seed: int
    first: tuple[int, int]
    """Shard and row of the first row that is not held out."""
    bad: tuple[BadRow, ...]
    """Bad rows found among those held out."""

    def held_out_rows(self) -> list[tuple[str, Cells]]:
        """Keys and contents of the held-out rows, read anew. Raises SourceError."""
        good = ((row.key, seen) for _, row, seen in self._in_order() if not isinstance(seen, str))
        try:
            return list(islice(good, self.num_held_out))
        except SourceError as error:
            raise SourceError(f"source '{self.name}': {error}") from error

    def lanes(
        self,
        mine: Iterable[int],
        states: Mapping[int, Mapping[str, object]],
        *,
        on_bad: Callable[[BadRow], None],
        stalled: Callable[[str], None],
        rows: int = WINDOW,
        waits: Sequence[float] = WAITS,
        stalled_after: float = STALLED,
    ) -> LaneReader:
        """Read some of the lanes, in this process.

        mine: which; process r of W reads r, r + W, ... states: lane to what `LaneReader.state` gave, for those that do not begin at their
        start; rows asked for behind that are found by reading on. on_bad, stalled, stalled_after: as `LaneReader` has them. rows: of a window;
        what is drawn depends on it. waits: as `mixing.retries.read_on` has them. Raises ValueError for a lane or state that cannot be.
        """
        numbers = sorted(set(mine))
        if numbers and not 0 <= numbers[0] <= numbers[-1] < self.num_lanes:
            raise ValueError(f"source '{self.name}' has lanes 0 to {self.num_lanes - 1}; {numbers} were asked for")
        starts = {lane: place(states[lane]) if lane in states else Place() for lane in numbers}

        def read(lane: int, start: Place, wait: Waiting) -> Generator[Window, None, None]:
            try:
                yield from self._windows(lane, start, rows, waits, wait)
            except SourceError as error:
                raise SourceError(f"source '{self.name}': {error}") from error

        return LaneReader(self.name, self.num_lanes, starts, read, on_bad, stalled, stalled_after)

    def _windows(self, lane: int, start: Place, rows: int, waits: Sequence[float], wait: Waiting) -> Generator[Window, None, None]:
        """The windows of a lane from a place on, without end. rows: of a window; the last of an epoch has what is left. Raises SourceError."""
        at, bad = start, list[BadRow]()
        for epoch in count(start.epoch):
            if epoch > at.epoch:
                at = Place(at.index, epoch, whole=at.whole)
            seen, wrong, named, window = at.seen, at.bad, list[BadRow](), list[tuple[str, Cells]]()
            order = self._order(lane, epoch, at.whole)
            for position in range(at.position, len(order)):
                row, beyond = (at.row, at.at) if position == at.position else (0, None)
                for each, found in self._lane_rows(lane, order[position], row, beyond, at.whole, waits, wait):
                    seen += 1
                    if isinstance(found, str):
                        wrong += 1
                        named.append(BadRow(self.name, each.key, found))
                        self._judge(seen, wrong, named, ended=False)
                        if epoch == 0 and not at.whole:
                            bad.append(named[-1])
                        continue
                    window.append((each.key, found))
                    if len(window) == rows:
                        yield self._shuffled(lane, at, window, bad)
                        at = Place(at.index + rows, epoch, at.window + 1, position, each.number + 1, each.after, seen, wrong, at.whole)
                        window, bad = [], []
            self._judge(seen, wrong, named, ended=True)
            if window:
                yield self._shuffled(lane, at, window, bad)
                at, bad = Place(at.index + len(window), epoch, at.window + 1, whole=at.whole), []
            if seen == wrong:
                if at.whole:
                    raise SourceError("it holds no row to train on")
                yield from self._windows(lane, Place(whole=True), rows, waits, wait)

    def _lane_rows(
        self, lane: int, shard: int, row: int, at: Values | None, whole: bool, waits: Sequence[float], wait: Waiting
    ) -> Iterator[tuple[Row, Seen]]:
        """The lane's rows of a shard, from a row on."""
        if shard < self.first[0]:
            return  # all of it is held out
        first = self.first[1] if shard == self.first[0] else 0
        shards = len(self.shards.names)
        together = 1 if whole else len(range(lane % shards, self.num_lanes, shards)) or 1  # lanes that share the shard
        number = 0 if together == 1 else lane // shards

        def look(each: Row) -> Seen | None:
            return self._look(shard, each) if each.number >= first and each.number % together == number else None

        for each, found in read_on(self.shards, shard, row, at, self.columns, look, waits, wait):
            if found is not None:
                yield each, found

    def _order(self, lane: int, epoch: int, whole: bool) -> list[int]:
        """The lane's shards in the order of an epoch."""
        shards = len(self.shards.names)
        spread = permute(np.arange(shards), shards, key(self.seed, "lanes", self.name))
        mine = spread if whole else spread[lane :: self.num_lanes] if shards >= self.num_lanes else spread[lane % shards :][:1]
        return [int(mine[place]) for place in permute(np.arange(len(mine)), len(mine), key(self.seed, "shards", self.name, lane, epoch))]

    def _shuffled(self, lane: int, start: Place, rows: Sequence[tuple[str, Cells]], bad: Sequence[BadRow]) -> Window:
        base = key(self.seed, "window", self.name, lane, start.epoch, start.window)
        order = permute(np.arange(len(rows)), len(rows), base).tolist()
        return Window(start, tuple(rows[place] for place in order), tuple(bad))

    def _look(self, shard: int, row: Row) -> Seen:
        try:
            cells = to_cells(row.read(), self.task, self.columns, self.prompt, partial(self.shards.locate, shard))
            if len(cells.references) != self.references:
                return f"it has {len(cells.references)} references; `references: {self.references}` holds for the source"
            sizes = []
            for name, pixels in cells.images():
                try:
                    sizes.append(header_size(pixels))
                except UnreadableImage as error:
                    return f"{name}: {error}"
            return cells.misfit(sizes) or cells
        except RowError as error:
            return str(error)

    def _judge(self, seen: int, wrong: int, named: Sequence[BadRow], ended: bool) -> None:
        """Raise SourceError if too many rows are bad; before the end of an epoch a few at its start may be chance."""
        if named and self.on_bad_row == "stop":
            raise SourceError(f"bad row {_listed(named)}; repair or remove it, or say on_bad_row: skip to go on without")
        if seen >= _JUDGED and wrong > MOST_BAD * (seen if ended else max(seen, FEW)):
            raise SourceError(f"{wrong} of {seen} rows are bad; at most {MOST_BAD:.0%} are skipped; repair or remove them: {_listed(named)}")

    def _in_order(self) -> Iterator[tuple[int, Row, Seen]]:
        """All rows in the source's own order, each with its shard."""
        for shard in range(len(self.shards.names)):
            for row, seen in read_on(self.shards, shard, 0, None, self.columns, partial(self._look, shard), WAITS, _sleep):
                yield shard, row, seen


def open_stream(
    name: str,
    *,
    path: str,
    task: str,
    columns: Asked,
    prompt: str | None,
    split: str,
    references: int | None,
    on_bad_row: Literal["skip", "stop"],
    root: Path,
    seed: int,
    lanes: int,
    held_out: int,
) -> Stream:
    """Open a source by its first rows. On every process, and at every resume, it comes out the same.

    name, path, task, columns, prompt, split, references, on_bad_row, lanes: as the plan has them; root: the folder that a relative path starts
    from; seed: the run's. held_out: how many good rows, the first of the source, are never trained on; of a source with fewer than ten times as
    many rows it is a tenth, and none of one with fewer than ten. Raises SourceError.
    """
    try:
        if task not in TASKS:
            raise SourceError(f"no task '{task}' (tasks: {', '.join(TASKS)}){nearest(task, TASKS)}")
        if TASKS[task].regions:  # the rows of a micro-batch have equally many, and how many a row has would only be known once it is read
            raise SourceError(f"task '{task}' is not streamed: how many regions its rows have must be known beforehand; remove `stream: true`")
        shards = _shards(path, split, root, lanes)
        chosen = shards.choose(_first_values(shards), task, columns, prompt)
        declared = references if references is not None else int(TASKS[task].references)
        stream = Stream(name, task, declared, lanes, 0, shards.fingerprint(), shards, chosen, prompt, on_bad_row, seed, (0, 0), ())
        return _hold_out(stream, held_out)
    except SourceError as error:
        raise SourceError(f"source '{name}' ({path}): {error}") from error
    except OSError as error:  # a file that was listed is gone, or what the Hub is asked for its fingerprint
        raise SourceError(f"source '{name}' ({path}): it cannot be read: {error}") from error


def _hold_out(stream: Stream, held_out: int) -> Stream:
    """The stream with its first rows held out. Raises SourceError if none of the first rows is good, or too many bad."""
    first = list(islice(stream._in_order(), _LOOKED_AT))
    if all(isinstance(seen, str) for _, _, seen in first):
        named = [BadRow(stream.name, row.key, str(seen)) for _, row, seen in first]
        raise SourceError(f"none of its first {len(first)} rows can be used; repair or remove them: {_listed(named)}")
    number = min(held_out, _count(stream.shards, 10 * held_out) // 10)
    good, bad = 0, list[BadRow]()
    for seen_before, (shard, row, seen) in enumerate(stream._in_order() if number else ()):
        if isinstance(seen, str):
            bad.append(BadRow(stream.name, row.key, seen))
            stream._judge(seen_before + 1, len(bad), bad, ended=False)
            continue
        good += 1
        if good == number:
            return replace(stream, num_held_out=good, first=(shard, row.number + 1), bad=tuple(bad))
    return stream


def _count(shards: Shards, limit: int) -> int:
    """How many rows there are, up to the limit."""
    known = shards.count(limit)
    if known is not None:
        return min(known, limit)
    number = 0
    for shard in range(len(shards.names)):
        rows = read_on(shards, shard, 0, None, None, lambda row: None, WAITS, _sleep)
        number += sum(1 for _ in islice(rows, limit - number))
        if number == limit:
            break
    return number


def _first_values(shards: Shards) -> list[Values]:
    """What the first rows hold, to choose columns from."""
    found: list[Values] = []
    bad: list[BadRow] = []
    for shard in range(len(shards.names)):
        left = _LOOKED_AT - len(found) - len(bad)
        for row, values in islice(read_on(shards, shard, 0, None, None, _values, WAITS, _sleep), left):
            if isinstance(values, str):
                bad.append(BadRow("", row.key, values))
            else:
                found.append(values)
    if not found:
        raise SourceError(f"none of its first {len(bad)} rows can be read; repair or remove them: {_listed(bad)}" if bad else "it holds no rows")
    return found


def _values(row: Row) -> Values | str:
    try:
        return row.read()
    except RowError as error:
        return str(error)


def _shards(path: str, split: str, root: Path, lanes: int) -> Shards:
    """The shards of a source's path, as a plan has it."""
    if path.startswith("hub/"):
        from mixing.hub_shards import list_hub_shards  # only here `datasets` is needed

        return list_hub_shards(path.removeprefix("hub/"), split, lanes)
    if split != "train":
        raise SourceError(f"split: only Hub datasets have one ('{split}' found); leave it out")
    path = os.path.expanduser(path)
    if path.endswith(".tar"):
        return list_tar_shards(path, root)
    if path.endswith(".parquet"):
        return list_parquet_shards(path, root, lanes)
    raise SourceError("only .tar shards, .parquet files and Hub datasets (hub/USER/NAME) are streamed; remove `stream: true`")


def _listed(bad: Sequence[BadRow]) -> str:
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return "; ".join(f"{row.key!r}: {row.reason}" for row in bad[:5]) + more


def _sleep(seconds: float, doing: str) -> None:
    time.sleep(seconds)

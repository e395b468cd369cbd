"""Lanes: rows of a source that is too large to look at first, read one after another, in an order that depends on nothing but keys.

A stream is read in V *lanes*. Draw n of the source is row n // V of lane n % V, and process r of W opens the lanes v with v % W == r, so what
draw n gives depends neither on W nor on restarts. The shards come in a keyed order: with at least V of them lane v has the shards v, v + V, ...
of that order; with fewer, lanes share a shard and each takes every k-th row of it. So a row belongs to one lane. In each of a lane's epochs its
shards come in another keyed order, and its rows are shuffled by key inside windows. A lane for which no row is left (a source of one row, read
in 8 lanes) reads the whole source instead; those rows are then given by more lanes than one.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from mixing.bad_rows import BadRow, SourceError
from mixing.shards import Values
from mixing.tasks import Cells

WINDOW = 256
"""Rows that are shuffled together."""

STALLED = 60.0
"""Seconds after which a source that is waited for is named."""

State = dict[str, object]
"""A place in a lane, as JSON."""

Waiting = Callable[[float, str], None]
"""Waits so many seconds (0: not at all), and is told what is being done, for messages. It raises where the waiter is to give up."""

_AHEAD = 1  # whole windows that wait to be used
_KEPT = 4096  # windows whose starts are remembered behind the last one read
_SPARES = 4  # rows of a window that can stand in for another one of it


@dataclass(frozen=True)
class Place:
    """The start of a window: where a lane goes on. Counts are from 0."""

    index: int = 0
    """Of the window's first row, in the lane."""
    epoch: int = 0
    window: int = 0
    """In the epoch."""
    position: int = 0
    """Of the shard in the epoch's order."""
    row: int = 0
    """In that shard."""
    at: Values | None = None
    """What the shard's reader keeps beside the row."""
    seen: int = 0
    """Rows of the lane's epoch looked at before."""
    bad: int = 0
    """How many of them were bad."""
    whole: bool = False
    """Whether the lane has no row of its own and reads the whole source."""

    def state(self) -> State:
        """As JSON."""
        at = None if self.at is None else dict(self.at)
        numbers = {name: getattr(self, name) for name in ("index", "epoch", "window", "position", "row", "seen", "bad")}
        return {**numbers, "at": at, "whole": self.whole}


def place(state: Mapping[str, object]) -> Place:
    """The place that a state tells. Raises ValueError if it tells none."""
    names = ("index", "epoch", "window", "position", "row", "seen", "bad")
    numbers = [state.get(name) for name in names]
    at, whole = state.get("at"), state.get("whole")
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(at, dict | None) or not isinstance(whole, bool):
        raise ValueError(f"the state of a lane holds {', '.join(names)} (numbers from 0), at and whole; found: {dict(state)}")
    index, epoch, window, position, row, seen, bad = (int(str(number)) for number in numbers)
    return Place(index, epoch, window, position, row, at, seen, bad, whole)


@dataclass(frozen=True)
class Window:
    """Rows of a lane, shuffled, with the place where they begin."""

    start: Place
    rows: tuple[tuple[str, Cells], ...]
    """Keys and what they hold."""
    bad: tuple[BadRow, ...]
    """Bad rows found on the way, in the lane's first epoch."""


class LaneRow(NamedTuple):
    """A row as a lane gives it."""

    key: str
    """Its identity in its source."""
    cells: Cells
    """What it holds, images not decoded."""
    epoch: int
    """How often the lane has been through its rows before."""
    instead: tuple[tuple[str, Cells], ...] = ()
    """Keys and contents of other rows of its window, should its images turn out to be broken: the same wherever the lane is read from."""


class LaneReader:
    """Some lanes of a stream, read ahead by a thread each, at most two windows. Close it, and the threads are gone.

    read: gives the windows of a lane from a place on; it is handed a function that waits, and that raises where the reader is closed. on_bad:
    is told of bad rows, in the caller's thread; after a resume of some a second time. stalled: is told, in the caller's thread, each time
    that a row has been waited for another `stalled_after` seconds.
    """

    def __init__(
        self,
        source: str,
        num_lanes: int,
        starts: Mapping[int, Place],
        read: Callable[[int, Place, Waiting], Generator[Window, None, None]],
        on_bad: Callable[[BadRow], None],
        stalled: Callable[[str], None],
        stalled_after: float,
    ) -> None:
        self.source, self.num_lanes = source, num_lanes
        self._open = False
        self._lanes = {lane: _Lane(source, lane, start, read, on_bad, stalled, stalled_after) for lane, start in starts.items()}
        # Also where nobody closes it: a thread that is inside pyarrow when the interpreter ends aborts the process.
        self._close = weakref.finalize(self, _close, os.getpid(), tuple(self._lanes.values()))

    def row(self, lane: int, index: int) -> LaneRow:
        """A row of a lane, by number from 0; rows are asked for in rising order, and those passed over are lost.

        Waits until it is read. Raises SourceError if the source cannot be read, ValueError for another process's lane or a row that has passed.
        """
        self._check(lane)
        if not self._open:
            self._open = True
            for each in self._lanes.values():
                each.open()
        return self._lanes[lane].row(index)

    def draw(self, number: int) -> LaneRow:
        """What draw `number` of the source gives; in rising order, as `row`."""
        return self.row(number % self.num_lanes, number // self.num_lanes)

    def state(self, lane: int, index: int) -> State:
        """From where a new reader gives row `index` of the lane, and those behind it, having read no row before its window.

        index: rises from call to call. Raises ValueError if it lies before what is remembered.
        """
        self._check(lane)
        return self._lanes[lane].state(index)

    def states(self, draws: int) -> dict[int, State]:
        """The state of each lane when so many draws of the source are done."""
        return {lane: self.state(lane, len(range(lane, draws, self.num_lanes))) for lane in self._lanes}

    def close(self) -> None:
        """End the threads; one that hangs in a read is left to end by itself."""
        self._close()

    def __enter__(self) -> LaneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, lane: int) -> None:
        if lane not in self._lanes:
            raise ValueError(f"source '{self.source}': lane {lane} is not read here; these are: {', '.join(map(str, self._lanes))}")


def _close(process: int, lanes: Sequence[_Lane]) -> None:
    if os.getpid() != process:
        return  # a fork has the object and not its threads, and one of them may have held a lock
    for lane in lanes:
        lane.close()
    for lane in lanes:
        lane.join()


class _Closed(Exception):
    """The reader is closed while its thread reads or waits."""


class _Lane:
    """One lane, with its thread. At most `_AHEAD` whole windows wait, and one is being read."""

    def __init__(
        self,
        source: str,
        number: int,
        start: Place,
        read: Callable[[int, Place, Waiting], Generator[Window, None, None]],
        on_bad: Callable[[BadRow], None],
        stalled: Callable[[str], None],
        stalled_after: float,
    ) -> None:
        self.source, self.number = source, number
        self._start, self._read, self._on_bad, self._stalled, self._stalled_after = start, read, on_bad, stalled, stalled_after
        self._rows: list[tuple[str, Cells] | None] = []  # of the window that rows are taken from; None: taken
        self._spares: tuple[tuple[str, Cells], ...] = ()
        self._first, self._epoch, self._next = start.index, start.epoch, start.index
        self._changed = threading.Condition()  # guards what follows
        self._ready: deque[Window] = deque()
        self._starts: deque[Place] = deque([start], maxlen=_KEPT)
        self._doing = "the first shard"
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start the thread, once."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name=f"lane {self.number} of {self.source}", daemon=True)
            self._thread.start()

    def row(self, index: int) -> LaneRow:
        if index < self._next:
            raise ValueError(f"source '{self.source}': row {index} of lane {self.number} has passed; the next is {self._next}")
        while index >= self._first + len(self._rows):
            window = self._take()
            self._rows, self._first, self._epoch = list(window.rows), window.start.index, window.start.epoch
            self._spares = window.rows[:_SPARES]
            for bad in window.bad:
                self._on_bad(bad)
        taken = self._rows[index - self._first]
        assert taken is not None
        for passed in range(max(self._next, self._first), index + 1):
            self._rows[passed - self._first] = None
        self._next = index + 1
        return LaneRow(*taken, self._epoch, tuple(spare for spare in self._spares if spare is not taken))

    def state(self, index: int) -> State:
        with self._changed:
            while len(self._starts) > 1 and self._starts[1].index <= index:
                self._starts.popleft()
            start = self._starts[0]
        if start.index > index:
            raise ValueError(f"source '{self.source}': the state of lane {self.number} at row {index} is forgotten; it is known from row {start.index} on")
        return start.state()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _take(self) -> Window:
        waited = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._error or self._closed, self._stalled_after)
                if self._ready:
                    self._changed.notify_all()
                    return self._ready.popleft()
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise ValueError(f"source '{self.source}': lane {self.number} is closed")
                doing = self._doing
            waited += self._stalled_after
            self._stalled(f"source '{self.source}': lane {self.number} has been waited for {waited:.0f} seconds, at {doing}")

    def _run(self) -> None:
        try:
            with closing(self._read(self.number, self._start, self._wait)) as windows:
                for window in windows:
                    if not self._put(window):
                        return
        except _Closed:
            return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            if not isinstance(error, SourceError):
                raise

    def _put(self, window: Window) -> bool:
        """Hand a window over once there is room; False if the reader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < _AHEAD)
            if self._closed:
                return False
            self._ready.append(window)
            self._starts.append(window.start)
            self._changed.notify_all()
            return True

    def _wait(self, seconds: float, doing: str) -> None:
        self._doing = doing
        if seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, seconds)
        if self._closed:
            raise _Closed

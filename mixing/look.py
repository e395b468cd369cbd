"""The look at every row of a source, in several processes: is what it names there, and how large are its images?"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixing.bad_rows import RowError, SourceError
from mixing.images import UnreadableImage, header_size
from mixing.rows import Found, Listing, Rows, Stored
from mixing.tasks import Cells

BLOCK = 256  # rows that a process looks at and hands over together
ALONE = 2_000  # rows looked at before other processes are started: that takes as long as looking at some hundred
_MOST_PROCESSES = 32
_MOST_WAITING = 8.0  # times as many processes as cores, at most, where a file system is slow to answer
NO_STAMP = bytes(16)
_PATIENCE = 120.0  # seconds for a block; a process that takes longer hangs, as one can that was forked while another thread held a lock


@dataclass(frozen=True)
class Seen:
    """What was seen of a good row."""

    cells: Cells
    """Images that it holds as bytes are left out."""
    look: Look


@dataclass(frozen=True)
class Look:
    """What is remembered of a good row, beside what its source keeps."""

    sizes: tuple[tuple[int, int], ...]
    """Height and width of the upright target, then of each reference."""
    content: bytes
    """16 bytes that stand for its key, its prompts and the sizes of its images in bytes."""
    extra: tuple[object, ...]
    """Values of the further columns that were asked for."""
    regions: int
    """How many there are."""


@dataclass(frozen=True)
class Looked:
    """A row and what came of it: why it is bad, or which row of an earlier opening it is, unchanged, or what was seen."""

    place: str
    key: str
    stamp: bytes
    """16 bytes that stand for its key and stamp; zeros if it has no stamp."""
    outcome: str | int | Seen


@dataclass(frozen=True, eq=False)
class Earlier:
    """What an earlier opening of the source gave. N: its good rows, R: their references."""

    rows: Rows
    stored: Mapping[str, Stored]
    """num_references [N], num_regions [N], sizes [N, 2], reference_sizes [R, 2], stamps and contents [N, 2] (16 bytes as two words), extra (a table)."""
    ends: NDArray[np.int64]
    """[N]: references up to the end of each row."""
    order: NDArray[np.int64]
    """[N]: rows by rising first word of their stamps."""
    words: NDArray[np.uint64]
    """[N]: those first words."""

    @classmethod
    def of(cls, rows: Rows, stored: Mapping[str, Stored]) -> Earlier:
        """Make it ready to be searched."""
        order = np.argsort(stored["stamps"][:, 0], kind="stable")
        return cls(rows, stored, np.cumsum(stored["num_references"], dtype=np.int64), order, stored["stamps"][order, 0])

    def find(self, stamps: Sequence[bytes]) -> list[int]:
        """The row of each stamp, or -1."""
        wanted = np.frombuffer(b"".join(stamps), dtype=np.uint64).reshape(-1, 2)
        at = np.minimum(np.searchsorted(self.words, wanted[:, 0]), len(self.words) - 1)
        rows = self.order[at]
        same = (self.stored["stamps"][rows] == wanted).all(axis=1) & wanted.any(axis=1)
        return [int(row) for row in np.where(same, rows, -1)]

    def look(self, row: int) -> Look:
        """What was seen of a row."""
        end = int(self.ends[row])
        references = self.stored["reference_sizes"][end - int(self.stored["num_references"][row]) : end].tolist()
        sizes = (self.stored["sizes"][row].tolist(), *references)
        extra: Any = self.stored.get("extra")
        further = () if extra is None else tuple(column[row].as_py() for column in extra.columns)
        return Look(sizes, self.stored["contents"][row].tobytes(), further, int(self.stored["num_regions"][row]))


def looked_at(listing: Listing, stamped: bool, earlier: Earlier | None) -> Iterator[Looked]:
    """Every row in order. Those that have not changed since an earlier opening are not read.

    stamped: whether stamps are wanted. Once there is more to read than pays for it, forked processes take a block each in turn; what comes
    out is the same. If one of them ends before its time, or hangs, the rest is read here, so that its error, should it return, is this process's own.
    """
    read, wall, busy = 0, 0.0, 0.0
    for number, block in enumerate(_blocks(listing)):
        began, began_busy = time.perf_counter(), time.thread_time()
        looked = look(block, stamped, earlier)
        wall, busy = wall + time.perf_counter() - began, busy + time.thread_time() - began_busy
        yield from looked
        read += sum(not isinstance(row.outcome, int) for row in looked)
        if read > ALONE and (processes := _processes(wall / max(busy, 1e-9))) > 1:
            yield from _shared_out(listing, stamped, earlier, number + 1, processes)
            return


def look(block: Sequence[Found], stamped: bool, earlier: Earlier | None) -> list[Looked]:
    """Look at some rows."""
    stamps = [_stamp(found) if stamped else NO_STAMP for found in block]
    rows = [-1] * len(block) if earlier is None else earlier.find(stamps)
    return [
        Looked(found.place, found.key, stamp, _see(found) if row < 0 else row)
        for found, stamp, row in zip(block, stamps, rows, strict=True)
    ]


def is_unchanged(listing: Listing, earlier: Earlier, bad: Sequence[tuple[str, str]]) -> bool:
    """Whether a source has the rows of an earlier opening, unchanged and in the same order. Bad rows are looked at again.

    bad: place and reason of each row that was bad. Stops at the first difference.
    """
    next_good = next_bad = 0
    for block in _blocks(listing):
        for found, row in zip(block, earlier.find([_stamp(found) for found in block]), strict=True):
            if row >= 0 and row == next_good:
                next_good += 1
            elif next_bad < len(bad) and (found.place, _see(found)) == bad[next_bad]:
                next_bad += 1
            else:
                return False
    return next_good == len(earlier.ends) and next_bad == len(bad)


def _blocks(listing: Listing) -> Iterator[list[Found]]:
    rows = listing.found()
    while block := list(islice(rows, BLOCK)):
        yield block


def _processes(waiting: float) -> int:
    """How many processes to start; waiting: how many times longer than computing the rows took so far."""
    if multiprocessing.current_process().daemon or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(round(cores * min(waiting, _MOST_WAITING)), max(cores, _MOST_PROCESSES))


def _shared_out(listing: Listing, stamped: bool, earlier: Earlier | None, first: int, processes: int) -> Iterator[Looked]:
    """The rows from block number `first` on, read by forked processes."""
    Image.init()  # or each process would load Pillow's formats for itself
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    workers: list[ForkProcess] = []
    try:
        for number in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            pipes.append(ours)
            own = range(first + number, 1 << 62, processes)
            worker = context.Process(target=_work, args=(listing, stamped, earlier, own, theirs, tuple(pipes)), daemon=True)
            worker.start()
            workers.append(worker)
            theirs.close()
        for number in count(first):
            pipe = pipes[(number - first) % processes]
            try:
                if not pipe.poll(_PATIENCE):
                    break
                looked = pipe.recv()
            except (EOFError, OSError):
                break
            if not looked:
                return
            yield from looked
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.terminate()
            worker.join()
    for later, block in enumerate(_blocks(listing)):
        if later >= number:
            yield from look(block, stamped, earlier)


def _work(listing: Listing, stamped: bool, earlier: Earlier | None, own: range, pipe: Connection, others: Sequence[Connection]) -> None:
    """Look at the blocks of one's own and send them, and at the end an empty one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()  # or a pipe would not break when the parent is killed
    with pipe:
        try:
            for number, block in enumerate(_blocks(listing)):
                if number in own:
                    pipe.send(look(block, stamped, earlier))
            pipe.send([])
        except (SourceError, BrokenPipeError):
            return  # the parent meets the error itself, or has gone


def _stamp(found: Found) -> bytes:
    stamp = found.stamp()
    if stamp is None:
        return NO_STAMP
    return hashlib.blake2b(f"{found.key}\0{stamp}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _see(found: Found) -> Seen | str:
    """What a row holds, or why it is bad."""
    try:
        cells = found.read()
        sizes: list[tuple[int, int]] = []
        num_bytes: list[int] = []
        for name, pixels in cells.images():
            try:
                sizes.append(cells.size if cells.size and not sizes else header_size(pixels))
            except UnreadableImage as error:
                return f"{name}: {error}"
            if cells.unread is not None and not num_bytes:
                num_bytes.append(cells.unread)
            else:
                num_bytes.append(os.stat(pixels).st_size if isinstance(pixels, Path) else len(pixels))
    except (RowError, OSError) as error:
        return str(error)
    if (misfit := cells.misfit(sizes)) is not None:
        return misfit
    described = [found.key, cells.prompts, num_bytes, [region.prompt for region in cells.regions]]
    content = hashlib.blake2b(json.dumps(described).encode(), digest_size=16).digest()
    return Seen(_light(cells), Look((sizes[0], *sizes[cells.are_references()]), content, cells.extra, len(cells.regions)))


def _light(cells: Cells) -> Cells:
    """The row without images that are held as bytes: it goes through a pipe."""
    if not any(isinstance(pixels, bytes) for _, pixels in cells.images()):
        return cells
    target, *others = (pixels if isinstance(pixels, Path) else b"" for _, pixels in cells.images())
    masks = others[len(cells.references) :]
    regions = tuple(replace(region, mask=mask) for region, mask in zip(cells.regions, masks, strict=True))
    return replace(cells, target=target, references=tuple(others[: len(cells.references)]), regions=regions)

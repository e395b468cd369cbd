"""The mixture: rows of many sources become the micro-batches of a stage, in the exact order of `mixing.order`, from any step on."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from mixing.images import fit
from mixing.keys import key
from mixing.order import Cell, Order, permute
from mixing.shares import Mix, shares, weights
from mixing.source import BadRow, Source, UnreadableRow
from mixing.tasks import Example

if TYPE_CHECKING:
    import datasets

Rows = NDArray[np.int32]

_SAMPLED_AT_ONCE = 64  # steps whose order is worked out together
_ATTEMPTS = 100  # rows tried in the place of one that cannot be decoded


class TooManyBadRows(ValueError):
    """A source has more unreadable rows than its plan lets pass."""


@dataclass(frozen=True)
class Selection:
    """The rows of a source that a run uses: those that it trains on, by signature, and those that it only measures itself on."""

    source: Source
    training: Mapping[str, Rows]
    """Signature to rows; an epoch visits each once."""
    held_out: Rows
    """Never trained on."""

    @property
    def size(self) -> int:
        """How many rows are trained on."""
        return sum(len(rows) for rows in self.training.values())


def select(source: Source, take: int | None, by: Literal["random", "first"], take_seed: int, held_out: int) -> Selection:
    """Choose a source's training and held-out rows.

    take: cap on the rows used, or None; `random` chooses by a keyed permutation, the same in every epoch, `first` by file order.
    held_out: how many of the taken rows are held out, at most a tenth of them: those whose key's hash is smallest, so that adding rows to
    a source changes the set as little as can be. Raises ValueError if `take` is more than the source has.
    """
    total = len(source)
    if take is not None and take > total:
        raise ValueError(f"sources.{source.name}.take: {take:,} rows asked, the source has {total:,} that can be read; take at most that, or leave `take` out")
    taken = np.arange(total if take is None else take, dtype=np.int64)
    if take is not None and by == "random":
        taken = np.sort(permute(taken, total, key(take_seed, "take", source.name)))
    number = min(held_out, len(taken) // 10)
    hashes = np.fromiter((_row_hash(source.name, source.key(int(row))) for row in taken), dtype=np.uint64, count=len(taken)) if number else np.empty(0, np.uint64)
    chosen = np.argsort(hashes, kind="stable")[:number]
    kept = np.ones(len(taken), dtype=bool)
    kept[chosen] = False
    training = taken[kept]
    references = source.num_references[training]
    return Selection(
        source,
        {f"{count} references": training[references == count].astype(np.int32) for count in np.unique(references).tolist()},
        np.sort(taken[chosen]).astype(np.int32),
    )


def _row_hash(source: str, row: str) -> int:
    return int.from_bytes(blake2b(f"{source}\0{row}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def cells(selections: Mapping[str, Selection], mix: Mix, drawn_before: Mapping[tuple[str, str], int]) -> tuple[Cell, ...]:
    """The cells that a mix draws from: a source's share is divided among its signatures by their rows. Errors as `mixing.shares.weights`."""
    drawn = weights(mix, {name: selection.size for name, selection in selections.items()})
    return tuple(
        Cell(name, signature, len(rows), weight * Fraction(len(rows), selections[name].size), drawn_before.get((name, signature), 0))
        for name, weight in drawn.items()
        for signature, rows in selections[name].training.items()
    )


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward and backward pass, all of one signature. B: images; H, W: pixels; values in [-1, 1]."""

    step: int
    micro: int
    """Place of this micro-batch in its step, over all processes."""
    positions: tuple[int, ...]
    """Number of each image in the stage: what its noise and timestep are derived from."""
    sources: tuple[str, ...]
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    targets: torch.Tensor
    """float32 [B, 3, H, W]."""
    references: tuple[torch.Tensor, ...]
    """Each float32 [B, 3, H, W]; the first is every image's first reference, and so on."""
    bad: tuple[BadRow, ...] = ()
    """Rows that could not be decoded, and in whose place others stand."""

    def pin_memory(self) -> MicroBatch:
        """The same with its tensors in page-locked memory, from which a GPU copies beside its work."""
        return replace(self, targets=self.targets.pin_memory(), references=tuple(r.pin_memory() for r in self.references))


@dataclass(frozen=True)
class _Request:
    step: int
    micro: int
    cells: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass(frozen=True)
class _Read:
    """A micro-batch as workers hand it over: 8-bit pixels, by the pipe.

    Tensors would go by shared memory, and a micro-batch of two would be waited for twice as long (torch 2.13; figures in docs/log.md).
    """

    request: _Request
    sources: tuple[str, ...]
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    pixels: tuple[NDArray[np.uint8], ...]
    """[B, H, W, 3] each: the targets, then the first references, and so on."""
    bad: tuple[BadRow, ...]


def _read(examples: Sequence[Example], side: int) -> tuple[NDArray[np.uint8], ...]:
    """The pixels of examples of one signature, scaled and cropped to a square."""
    images = zip(*((example.target, *example.references) for example in examples), strict=True)
    return tuple(np.stack([np.asarray(fit(image, side, side)) for image in same]) for same in images)


def _tensors(pixels: Sequence[NDArray[np.uint8]]) -> tuple[torch.Tensor, ...]:
    """8-bit pixels [B, H, W, 3] as float32 [B, 3, H, W] in [-1, 1], as `mixing.images.to_tensor` has them."""
    return tuple(torch.from_numpy(each).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0 for each in pixels)


class StageMixture(Dataset[_Read]):
    """One stage's stream of micro-batches: a pure function of the plan, the seed and the step.

    selections: every source of the plan. stage: its name. resolution: side of the square, pixels. images, micro: of a step and of a
    micro-batch. drawn_before: images that earlier stages have drawn of each (source, signature).
    """

    def __init__(
        self,
        selections: Mapping[str, Selection],
        *,
        mix: Mix,
        seed: int,
        stage: str,
        resolution: int,
        images: int,
        micro: int,
        drawn_before: Mapping[tuple[str, str], int],
    ) -> None:
        self.selections = dict(selections)
        self.seed, self.resolution = seed, resolution
        self.order = Order(seed, stage, cells(selections, mix, drawn_before), images, micro)
        self.asked = shares(mix, {name: selection.size for name, selection in selections.items()})
        self._rows = tuple(selections[cell.source].training[cell.signature] for cell in self.order.cells)

    def drawn_after(self, steps: int) -> dict[tuple[str, str], int]:
        """Images of each (source, signature) drawn in the whole run once this stage has made so many steps."""
        counts = self.order.counts(np.asarray(steps))
        return {(cell.source, cell.signature): cell.drawn_before + int(count) for cell, count in zip(self.order.cells, counts, strict=True)}

    def __getitem__(self, request: Any) -> _Read:
        """Read and decode the images of a request, which `batches` makes. A row that cannot be decoded is replaced by another of its cell."""
        assert isinstance(request, _Request)
        bad: list[BadRow] = []
        examples = []
        for number, draw in zip(request.cells, request.draws, strict=True):
            cell, rows = self.order.cells[number], self._rows[number]
            row = int(cell.row(np.asarray([draw], dtype=np.int64), self.seed)[0])
            for attempt in range(_ATTEMPTS):
                try:
                    examples.append(self.selections[cell.source].source.example(int(rows[row])))
                    break
                except UnreadableRow as error:
                    bad.append(error.bad_row)
                    row = key(self.seed, "instead", cell.source, cell.signature, draw, attempt) % cell.rows
            else:
                return _Read(request, (), (), (), (), tuple(bad))  # not raised here: through a worker's pipe it would bring its traceback along
        return _Read(
            request,
            sources=tuple(self.order.cells[number].source for number in request.cells),
            keys=tuple(example.key for example in examples),
            prompts=tuple(example.prompt for example in examples),
            pixels=_read(examples, self.resolution),
            bad=tuple(bad),
        )

    def _micro_batch(self, read: _Read) -> MicroBatch:
        targets, *references = _tensors(read.pixels)
        first = (read.request.step * self.order.micro_batches + read.request.micro) * self.order.micro
        positions = tuple(range(first, first + len(read.keys)))
        return MicroBatch(read.request.step, read.request.micro, positions, read.sources, read.keys, read.prompts, targets, tuple(references), read.bad)

    def batches(self, first_step: int, last_step: int, *, rank: int, processes: int, workers: int, pin_memory: bool) -> Generator[MicroBatch, None, None]:
        """This process's micro-batches of steps first_step ... last_step - 1, in order, read ahead by worker processes.

        Of each step's M micro-batches process r gets numbers r, r + W, ... Raises ValueError if W does not divide M. There is no state: to
        resume, ask for the step at which training stands. Close it (`contextlib.closing`), and the workers are gone.
        """
        check_processes(self.order.micro_batches, processes)
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=_Requests(self.order, first_step, last_step, rank, processes),
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),
        )
        iterator = iter(loader)
        try:
            for read in iterator:
                if not read.keys:
                    last = read.bad[-1]
                    raise TooManyBadRows(f"source '{last.source}': {_ATTEMPTS} rows tried in the place of one and none could be read; the last: {last.key}: {last.reason}")
                batch = self._micro_batch(read)
                yield batch.pin_memory() if pin_memory else batch
        finally:
            # An exception's traceback would keep the iterator, and with it the workers, until the interpreter's exit waits for them (torch 2.13).
            if workers:
                iterator._shutdown_workers()  # type: ignore[attr-defined]

    def as_dataset(self, steps: int) -> datasets.IterableDataset:
        """The first steps as a `datasets.IterableDataset` of rows, in the order of training and as training sees them: to look at, map or export.

        Columns: step, micro, source, key, prompt, target (8-bit pixels [H, W, 3]), references (a list of such).
        """
        import datasets

        return datasets.IterableDataset.from_generator(_generate_rows, gen_kwargs={"mixture": self, "steps": list(range(steps))})


def _generate_rows(mixture: StageMixture, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    for step in steps:
        for request in _Requests(mixture.order, step, step + 1, 0, 1):
            read = mixture[request]
            for place, (source, row, prompt) in enumerate(zip(read.sources, read.keys, read.prompts, strict=True)):
                target, *references = (pixels[place] for pixels in read.pixels)
                yield {"step": step, "micro": request.micro, "source": source, "key": row, "prompt": prompt, "target": target, "references": references}


def check_processes(micro_batches: int, processes: int) -> None:
    """Raise ValueError unless the processes share out a step's micro-batches evenly."""
    if micro_batches % processes:
        possible = [count for count in range(1, micro_batches + 1) if micro_batches % count == 0]
        raise ValueError(
            f"a step has {micro_batches} micro-batches (batch.images / batch.micro), which {processes} processes cannot share evenly; "
            f"start {', '.join(map(str, possible))} processes, or choose another batch.micro"
        )


class _Requests(Sampler[_Request]):
    def __init__(self, order: Order, first: int, last: int, rank: int, processes: int) -> None:
        self.order, self.first, self.last, self.rank, self.processes = order, first, last, rank, processes

    def __iter__(self) -> Iterator[_Request]:
        for start in range(self.first, self.last, _SAMPLED_AT_ONCE):
            drawn = self.order.steps(start, min(_SAMPLED_AT_ONCE, self.last - start))
            for offset in range(drawn.cell.shape[0]):
                for micro in range(self.rank, self.order.micro_batches, self.processes):
                    yield _Request(start + offset, micro, tuple(drawn.cell[offset, micro].tolist()), tuple(drawn.draw[offset, micro].tolist()))


def _as_it_is(batch: Any) -> Any:
    return batch


_LAST_SECONDS = 30


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach the whole process group; a worker that died of them would take with it the step that is to be saved.
    # But the interpreter ends leftover workers by SIGTERM, and waits for them: so they go a little later, not never.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))
    torch.set_num_threads(1)


def read_rows(source: Source, rows: Sequence[int], resolution: int) -> tuple[list[MicroBatch], list[BadRow]]:
    """Some rows of a source as micro-batches, one for each number of references, and those that could not be decoded."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(int(source.num_references[row]), []).append(row)
    batches: list[MicroBatch] = []
    bad: list[BadRow] = []
    for group in groups.values():
        examples = []
        for row in group:
            try:
                examples.append(source.example(row))
            except UnreadableRow as error:
                bad.append(error.bad_row)
        if examples:
            targets, *references = _tensors(_read(examples, resolution))
            keys, prompts = tuple(example.key for example in examples), tuple(example.prompt for example in examples)
            batches.append(MicroBatch(0, 0, tuple(range(len(keys))), (source.name,) * len(keys), keys, prompts, targets, tuple(references)))
    return batches, bad

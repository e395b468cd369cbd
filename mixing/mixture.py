"""The mixture: rows of many sources become the micro-batches of a stage, in the exact order of `mixing.order`, from any step on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mixing.bad_rows import BadRow, UnreadableRow
from mixing.batch import MicroBatch
from mixing.buckets import Signature
from mixing.captions import caption, entity_captions
from mixing.cells import Level, Micro, cells
from mixing.keys import key
from mixing.order import Budget, Order
from mixing.reading import Images, Latents, Mask, Regions, Seen, gathered, gathered_regions, read_masks, read_row
from mixing.selected import Selection
from mixing.share_out import TooFewImages, read_by, share_out
from mixing.shares import Changing, Mix, Ramp, mix_steps
from mixing.tasks import Cells

if TYPE_CHECKING:
    import datasets

    from mixing.lanes import LaneReader

_SAMPLED_AT_ONCE = 64  # steps whose order is worked out together
_MOST_CHECKED = 1_000_000  # steps; what comes later is found when it comes
_CHECKED_AT_ONCE = 4096  # steps of which it is worked out together whether each process has an image
_ATTEMPTS = 100  # rows tried in the place of one that cannot be decoded
_MESSAGE = 4 * 2**20  # bytes of pixels that a worker hands over together


class TooManyBadRows(ValueError):
    """A source has more unreadable rows than its plan lets pass."""


@dataclass(frozen=True)
class _Request:
    """Images of one micro-batch that one process is to read."""

    step: int
    micro: int
    step_images: int
    is_last: bool
    positions: tuple[int, ...]
    cells: tuple[int, ...]
    draws: tuple[int, ...]
    places: tuple[int, ...]
    """Which row of its group each gets."""
    given: tuple[tuple[str, Cells, int] | None, ...]
    """Of each image that comes from a stream: its key, what it holds, and its epoch."""


@dataclass(frozen=True)
class _Read:
    """A micro-batch as workers hand it over."""

    request: _Request
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    images: tuple[Images, ...]
    """The targets, then the first references, and so on."""
    bad: tuple[BadRow, ...]
    broken: tuple[int, ...] = ()
    """Which of its images came from a stream and could not be decoded: it is to be read again with others in their place."""
    regions: tuple[Regions, ...] = ()
    """The first ones, and so on."""


@dataclass(frozen=True)
class _Row:
    """One image of a micro-batch, as it is seen."""

    key: str
    prompt: str
    images: list[Seen]
    """The target, then the references."""
    entity_prompts: tuple[str, ...]
    masks: tuple[Mask, ...]


class StageMixture(Dataset[list[_Read]]):
    """One stage's stream of micro-batches: a pure function of the plan, the seed and the step.

    selections: every source of the plan. stage: its name. levels: its resolutions. budget: what a step holds. micro: what a micro-batch may hold.
    tokens_of: tokens of an image with its references and prompts, by their shapes. drawn_before: images that earlier stages have drawn of each (source,
    class). latents: what was encoded before, if anything is kept.
    """

    def __init__(
        self,
        selections: Mapping[str, Selection],
        *,
        mix: Mix | Ramp | Changing,
        seed: int,
        stage: str,
        levels: Sequence[Level],
        budget: Budget,
        micro: Micro,
        tokens_of: Callable[[Signature], int],
        drawn_before: Mapping[tuple[str, str], int],
        latents: Latents | None = None,
    ) -> None:
        self.selections = dict(selections)
        self.seed, self.levels, self.budget, self.latents = seed, tuple(levels), budget, latents
        parts = mix_steps(mix, {name: selection.size for name, selection in selections.items()}, budget.steps, {name: selection.counted for name, selection in selections.items()})
        is_changing = isinstance(mix, Changing)
        average = {name: float(sum(part[name] for _, part in (parts[:1] if is_changing else parts))) for name in parts[0][1]}
        made = cells(selections, average, levels, micro, tokens_of, budget, drawn_before)
        whole: dict[str, Fraction] = {}
        for cell, _, _ in made:
            whole[cell.source] = whole.get(cell.source, Fraction(0)) + cell.weight
        self._within = [(cell.source, cell.weight / whole[cell.source]) for cell, _, _ in made]
        self.order = Order(seed, stage, [cell for cell, _, _ in made], budget, [(first, self._weights(part)) for first, part in parts], grows=is_changing)
        self.signatures = tuple(signature for _, _, signature in made)
        """Of each cell."""
        self.sources = tuple(whole)
        """Those that are drawn at some time."""
        self._classes = tuple(row_class for _, row_class, _ in made)
        self._rows = tuple(selections[cell.source].training[row_class] for cell, row_class, _ in made)

    def _weights(self, shares: Mapping[str, Fraction]) -> list[Fraction]:
        """Of each cell, from those of the sources."""
        return [shares[source] * own for source, own in self._within]

    def changed(self, step: int, shares: Mapping[str, Fraction]) -> StageMixture:
        """The same stage, of one whose mix is `Changing`, with other shares of its sources from a step on at which they may change."""
        mixture = copy(self)
        mixture.order = self.order.changed(step, self._weights(shares))
        return mixture

    def asked(self) -> dict[str, float]:
        """Source to the share of the stage's images that it is asked for. Where shares may change thousands of times this takes seconds when it is first asked."""
        return self.order.asked(self.budget.steps)

    @property
    def streams(self) -> dict[str, Selection]:
        """The sources that are read one row after another."""
        return {name: self.selections[name] for name in self.sources if self.selections[name].stream is not None}

    def check_processes(self, first_step: int, processes: int) -> None:
        """Raise TooFewImages, before anything is read, if a step from this one on has too few images for so many processes, those counted that one alone can read."""
        cells, steps = self.order.cells, min(self.budget.steps, first_step + _MOST_CHECKED)
        lanes = {name: selection.stream.num_lanes for name, selection in self.streams.items() if selection.stream is not None}
        fewest = min(self.budget.first, self.budget.last) // max(cell.tokens if self.budget.unit == "tokens" else 1 for cell in cells) - 1
        if not lanes and fewest >= processes:
            return
        for start in range(first_step, steps if processes > 1 else first_step, _CHECKED_AT_ONCE):
            counts = self.order.counts(np.arange(start, min(start + _CHECKED_AT_ONCE, steps) + 1))
            free = np.diff(counts[:, [cell.source not in lanes for cell in cells]].sum(axis=1))
            pinned = np.zeros((len(free), processes), dtype=np.int64)
            for name, number in lanes.items():
                own = [place for place, cell in enumerate(cells) if cell.source == name]
                pinned += np.diff(read_by(counts[:, own].sum(axis=1) + cells[own[0]].drawn_before, number, processes), axis=0)
            short = np.flatnonzero((pinned == 0).sum(axis=1) > free)
            if len(short):
                step, images = start + int(short[0]), int(np.diff(counts[short[0] : short[0] + 2].sum(axis=1))[0])
                uneven = [name for name, number in lanes.items() if number % processes]
                cure = f", or set sources.{uneven[0]}.lanes to a multiple of {processes}" if uneven else ""
                why = "" if images < processes else ", since its streams are read by the others"
                raise TooFewImages(f"step {step}, of {images} images, leaves one of the {processes} processes without any{why}; start fewer, or make batch larger{cure}")

    def images_before(self, step: int) -> int:
        """Images of the stage before a step."""
        return int(self.order.counts(np.asarray(step)).sum())

    def tokens_before(self, step: int) -> int:
        """Tokens of the stage before a step: of targets, references and prompts, those of regions too."""
        return int(self.order.counts(np.asarray(step)) @ np.asarray([cell.tokens for cell in self.order.cells]))

    def __getitem__(self, requests: Any) -> list[_Read]:
        """Read and decode the images of requests, which `batches` makes. A row that cannot be decoded is replaced by another of its group."""
        return [self._read(request) for request in requests]

    def _read(self, request: _Request) -> _Read:
        bad: list[BadRow] = []
        rows: list[_Row] = []
        broken: list[int] = []
        draws = list(zip(request.cells, request.draws, request.places, request.given, strict=True))
        # All rows are read before any is decoded: taking turns costs a tenth of the decoding of small images.
        found = [self._found(number, draw, row, given) for number, draw, row, given in draws]
        for place, ((number, draw, _, given), first) in enumerate(zip(draws, found, strict=True)):
            for attempt in range(_ATTEMPTS if given is None else 1):
                try:
                    rows.append(self._seen(number, first if attempt == 0 else self._found(number, draw, self._instead(number, draw, attempt), None)))
                    break
                except UnreadableRow as error:
                    bad.append(error.bad_row)
            else:
                if given is None:
                    return _Read(request, (), (), (), tuple(bad))  # not raised here: through a worker's pipe it would bring its traceback along
                broken.append(place)
        if broken:
            return _Read(request, (), (), (), tuple(bad), tuple(broken))
        signature = self.signatures[request.cells[0]]
        sizes = (signature.target, *signature.references)
        images = tuple(gathered(size, role) for size, role in zip(sizes, zip(*(row.images for row in rows), strict=True), strict=True))
        regions = gathered_regions([row.entity_prompts for row in rows], [row.masks for row in rows])
        keys, prompts = tuple(row.key for row in rows), tuple(row.prompt for row in rows)
        # What a stream gave need not go back through a worker's pipe.
        request = replace(request, given=()) if any(request.given) else request
        return _Read(request, keys, prompts, images, tuple(bad), regions=regions)

    def _instead(self, number: int, draw: int, attempt: int) -> int:
        """Another row of the group of a draw whose own row cannot be decoded. attempt: 1 is the first."""
        cell = self.order.cells[number]
        return key(self.seed, "instead", cell.source, cell.group, draw, attempt - 1) % cell.rows

    def _found(self, number: int, draw: int, place: int, given: tuple[str, Cells, int] | None) -> tuple[str, Cells, int] | UnreadableRow:
        """Key, content and epoch of a row of a draw's group, or why it cannot be read."""
        if given is not None:
            return given
        cell = self.order.cells[number]
        selection, row = self.selections[cell.source], int(self._rows[number][place])
        try:
            return selection.source.key(row), selection.cells(row), draw // cell.rows
        except UnreadableRow as error:
            return error

    def _seen(self, number: int, found: tuple[str, Cells, int] | UnreadableRow) -> _Row:
        """A row as it is seen in an epoch. Raises UnreadableRow."""
        if isinstance(found, UnreadableRow):
            raise found
        name, held, epoch = found
        cell, selection = self.order.cells[number], self.selections[self.order.cells[number].source]
        view = selection.augmentation.view(self.seed, cell.source, name, epoch)
        signature, rules = self.signatures[number], selection.captions
        seen = read_row(cell.source, name, held, self._classes[number], signature, view, self.latents)
        masks = read_masks(cell.source, name, held, signature, view)
        prompt = caption(held.prompts, rules, seed=self.seed, source=cell.source, row=name, epoch=epoch)
        entity_prompts = entity_captions([region.prompt for region in held.regions], rules, seed=self.seed, source=cell.source, row=name, epoch=epoch)
        return _Row(name, prompt, seen, entity_prompts, masks)

    def _mended(self, read: _Read, spares: Mapping[int, Iterator[tuple[str, Cells]]]) -> _Read:
        """A micro-batch read again, with spares in the place of the stream's rows that could not be decoded. Raises TooManyBadRows.

        spares: of each position, the rows that can stand in.
        """
        while read.broken:
            given = list(read.request.given)
            for place in read.broken:
                was = given[place]
                assert was is not None
                spare = next(spares[read.request.positions[place]], None)
                if spare is None:
                    bad = read.bad[-1]
                    raise TooManyBadRows(f"source '{bad.source}': a row and those that could stand in its place cannot be read; the last: {bad.key}: {bad.reason}")
                given[place] = (*spare, was[2])
            again = self._read(replace(read.request, given=tuple(given)))
            read = replace(again, bad=(*read.bad, *again.bad))
        return read

    def _micro_batch(self, read: _Read) -> MicroBatch:
        request = read.request
        first, sources = self.order.cells[request.cells[0]], tuple(self.order.cells[number].source for number in request.cells)
        targets, *references = read.images
        return MicroBatch(
            request.step,
            request.micro,
            request.positions,
            sources,
            read.keys,
            read.prompts,
            targets,
            tuple(references),
            first.tokens,
            first.level,
            request.step_images,
            request.is_last,
            read.bad,
            read.regions,
        )

    def batches(
        self, first_step: int, last_step: int, *, rank: int, processes: int, workers: int, pin_memory: bool, lanes: Mapping[str, LaneReader] | None = None
    ) -> Generator[MicroBatch, None, None]:
        """This process's micro-batches of steps first_step ... last_step - 1, in order, read ahead by worker processes; with none, read when they are asked for.

        There is no state: to resume, ask for the step at which training stands. lanes: an open reader of this process's lanes of each stream.
        Close it (`contextlib.closing`), and the workers are gone.
        """
        requests = _Requests(self, first_step, last_step, rank, processes, lanes or {})
        with ExitStack() as leaving:
            for message in self._read_by(requests, workers, leaving) if workers else map(self.__getitem__, requests):
                for read in message:
                    spares = {position: iter(requests.spares.pop(position, ())) for position in read.request.positions}
                    if read.broken:
                        read = self._mended(read, spares)
                    if not read.keys:
                        last = read.bad[-1]
                        raise TooManyBadRows(f"source '{last.source}': {_ATTEMPTS} rows tried in the place of one and none could be read; the last: {last.key}: {last.reason}")
                    batch = self._micro_batch(read)
                    yield batch.pin_memory() if pin_memory else batch

    def _read_by(self, requests: _Requests, workers: int, leaving: ExitStack) -> Iterator[list[_Read]]:
        """What worker processes read, in order. leaving: at its end they are gone."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=4,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),
        )
        iterator: Iterator[list[_Read]] = iter(loader)
        # An exception's traceback would keep the iterator, and with it the workers, until the interpreter's exit waits for them (torch 2.13).
        leaving.callback(iterator._shutdown_workers)  # type: ignore[attr-defined]
        return iterator

    def as_dataset(self, steps: int) -> datasets.IterableDataset:
        """The first steps as a `datasets.IterableDataset` of rows, in the order of training and as training sees them: to look at, map or export.

        Columns: step, micro, source, key, prompt, target (8-bit pixels [H, W, 3]), references (a list of such), entity_prompts (a list of texts),
        entity_masks (true and false [H, W], one for each of these). Raises ValueError over a stream.
        """
        import datasets

        if self.streams:
            raise ValueError(f"source '{next(iter(self.streams))}' is a stream, which is read once; leave it out of the mix to look at the others")
        return datasets.IterableDataset.from_generator(_generate_rows, gen_kwargs={"mixture": _without_latents(self), "steps": list(range(steps))})


def _without_latents(mixture: StageMixture) -> StageMixture:
    """The same mixture, whose images come as pixels always."""
    plain = copy(mixture)
    plain.latents = None
    return plain


def _generate_rows(mixture: StageMixture, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    for step in steps:
        for requests in _Requests(mixture, step, step + 1, 0, 1, {}):
            for read in mixture[requests]:
                batch = mixture._micro_batch(read)
                for place, (source, row, prompt) in enumerate(zip(batch.sources, batch.keys, batch.prompts, strict=True)):
                    target, *references = (images.pixels[place].numpy() for images in read.images)
                    regions = {"entity_prompts": [each.prompts[place] for each in batch.regions], "entity_masks": [each.masks[place].numpy() for each in batch.regions]}
                    yield {"step": step, "micro": batch.micro, "source": source, "key": row, "prompt": prompt, "target": target, "references": references, **regions}


class _Requests(Sampler[tuple[_Request, ...]]):
    """What this process is to read, a worker's message at a time."""

    def __init__(self, mixture: StageMixture, first: int, last: int, rank: int, processes: int, lanes: Mapping[str, LaneReader]) -> None:
        self.mixture, self.first, self.last, self.rank, self.processes, self.lanes = mixture, first, last, rank, processes, lanes
        self.spares: dict[int, tuple[tuple[str, Cells], ...]] = {}
        """Of each position that a stream's row was asked for: what can stand in for it. They stay in this process."""
        self._lanes = {name: selection.stream.num_lanes for name, selection in mixture.streams.items() if selection.stream}

    def __iter__(self) -> Iterator[tuple[_Request, ...]]:
        for start in range(self.first, self.last, _SAMPLED_AT_ONCE):
            drawn = self.mixture.order.steps(start, min(_SAMPLED_AT_ONCE, self.last - start))
            rows = self.mixture.order.rows(drawn, self.mixture.seed)
            images = list(zip(*(part.tolist() for part in (drawn.micro, drawn.cell, drawn.draw, rows)), strict=True))
            starts = drawn.starts.tolist()
            for offset, (begin, end) in enumerate(pairwise(starts)):
                yield from self._messages(list(self._step(start + offset, drawn.first_position + begin, images[begin:end])))

    def _step(self, step: int, first: int, images: Sequence[tuple[int, int, int, int]]) -> Iterator[_Request]:
        """A step's requests. first: the position of its first image. images: of each its micro-batch, cell, draw, and row of its group."""
        cells, lanes = self.mixture.order.cells, self._lanes
        own: Sequence[int] = range(len(images))
        if self.processes > 1:
            tokens = np.asarray([cells[cell].tokens for _, cell, _, _ in images])
            owner = np.asarray([draw % lanes[cells[cell].source] % self.processes if cells[cell].source in lanes else -1 for _, cell, draw, _ in images])
            own = share_out(tokens, owner, self.processes)[self.rank].tolist()
        given: dict[int, tuple[str, Cells, int]] = {}
        if lanes:  # a lane gives its rows in the order of their numbers
            for place in sorted(own, key=lambda place: images[place][2]):
                _, cell, draw, _ = images[place]
                if (name := cells[cell].source) in lanes:
                    row = self.lanes[name].draw(draw)
                    given[place] = (row.key, row.cells, row.epoch)
                    self.spares[first + place] = row.instead
        places: dict[int, list[int]] = {}
        for place in own:
            places.setdefault(images[place][0], []).append(place)
        for number, among in sorted(places.items()):
            _, cell_of, draws, of_group = zip(*(images[place] for place in among), strict=True)
            is_last = number == max(places)
            yield _Request(step, number, len(images), is_last, tuple(first + place for place in among), cell_of, draws, of_group, tuple(given.get(place) for place in among))

    def _messages(self, requests: Sequence[_Request]) -> Iterator[tuple[_Request, ...]]:
        """A step's requests, together while they are small: handing over costs a millisecond, however little."""
        message: list[_Request] = []
        size = 0
        for request in requests:
            signature = self.mixture.signatures[request.cells[0]]
            own = len(request.cells) * sum(3 * height * width for height, width in (signature.target, *signature.references))
            own += len(request.cells) * signature.regions * signature.target[0] * signature.target[1]
            if message and size + own > _MESSAGE:
                yield tuple(message)
                message, size = [], 0
            message.append(request)
            size += own
        if message:
            yield tuple(message)


def _as_it_is(batch: Any) -> Any:
    return batch


_LAST_SECONDS = 30


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach the whole process group; a worker that died of them would take with it the step that is to be saved.
    # But the interpreter ends leftover workers by SIGTERM, and waits for them: so they go a little later, not never.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))
    torch.set_num_threads(1)

"""Peers: the same rows through the mixing of other libraries, each used as its own documentation does.

`datasets` is there; torchdata and MosaicML streaming are measured where they are installed. All give rows undecoded, so that what is compared is the
mixing and the reading, and not who decodes. MosaicML's package imports torchvision, and asks for older versions of numpy and transformers than
Medley: `pip install --no-deps --target FOLDER mosaicml-streaming==0.13.0 torchdata==0.11.0` with what the import asks for, and PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Mapping[str, Any]]
"""A micro-batch of rows: image, text."""

BATCH = 8
_BUFFER = 100  # rows of a shuffle buffer, with their images


@dataclass(frozen=True)
class First:
    """Seconds to the first micro-batch, in turns at the beginning and at a position."""

    position: int
    at_start: tuple[float, ...]
    at_position: tuple[float, ...]


@dataclass(frozen=True)
class Peer:
    """How a library mixes. Its functions import it."""

    needs: str
    """Package that must be installed."""
    read: Callable[[Mapping[str, datasets.Dataset], Mapping[str, int], Path], Iterator[Rows]]
    """Micro-batches without end, of tables with shares; a folder for copies."""
    first: Callable[[int, int, Path], First]
    """Rows of numbers alone: how often to measure, and at which position, at most."""
    drawn: Callable[[Sequence[int], int, Path], NDArray[np.int64]] | None = None
    """The source of each of so many draws by weights; None: those of another function here."""

    def is_installed(self) -> bool:
        """Whether it can be measured."""
        return find_spec(self.needs) is not None


def in_turns(repeats: int, position: int, batch: Callable[[int], object]) -> First:
    """Measure the first micro-batch at 0 and at a position, in turns. batch: opens everything anew and reads it."""
    times: dict[int, list[float]] = {0: [], position: []}
    for _ in range(repeats):
        for place, taken in times.items():
            start = time.perf_counter()
            batch(place)
            taken.append(time.perf_counter() - start)
    return First(position, tuple(times[0]), tuple(times[position]))


def _probabilities(weights: Sequence[int]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _enough(weights: Sequence[int], draws: int) -> list[int]:
    """Rows of each source of which independent draws use no more, but for one case in a billion."""
    return [math.ceil(share * draws + 7 * math.sqrt(share * draws) + 50) for share in _probabilities(weights)]


def _numbered(weights: Sequence[int], draws: int) -> list[datasets.Dataset]:
    """Sources whose rows are nothing but their number."""
    return [datasets.Dataset.from_dict({"source": np.full(rows, number)}) for number, rows in enumerate(_enough(weights, draws))]


# --- datasets.interleave_datasets ------------------------------------------------------------------------------------------------------


def _interleaved_map(tables: Mapping[str, datasets.Dataset], shares: Mapping[str, int], folder: Path) -> Iterator[Rows]:
    sources = [tables[name].shuffle(seed=number) for number, name in enumerate(shares)]
    mixed = datasets.interleave_datasets(sources, _probabilities(list(shares.values())), seed=0, stopping_strategy="all_exhausted")
    for start in count(0, BATCH):
        yield mixed.__getitems__([number % len(mixed) for number in range(start, start + BATCH)])


def _interleaved_iterable(tables: Mapping[str, datasets.Dataset], shares: Mapping[str, int], folder: Path) -> Iterator[Rows]:
    sources = [tables[name].to_iterable_dataset().shuffle(seed=number, buffer_size=_BUFFER).repeat(None) for number, name in enumerate(shares)]
    rows = iter(datasets.interleave_datasets(sources, _probabilities(list(shares.values())), seed=0, stopping_strategy="all_exhausted"))
    while True:
        yield list(islice(rows, BATCH))


def _first_of_map(repeats: int, position: int, folder: Path) -> First:
    weights = (50, 20, 10, 10, 10)
    sources = _numbered(weights, position + 1000)

    def batch(place: int) -> object:
        return datasets.interleave_datasets(sources, _probabilities(weights), seed=0).__getitems__(list(range(place, place + BATCH)))

    return in_turns(max(2, repeats // 5), position, batch)


def _first_of_iterable(repeats: int, position: int, folder: Path) -> First:
    weights, position = (50, 20, 10, 10, 10), min(position, 50_000)  # to come to a state it must go there, at some thousand rows a second
    sources = _numbered(weights, position + 1000)

    def mixed() -> Any:
        return datasets.interleave_datasets([source.to_iterable_dataset() for source in sources], _probabilities(weights), seed=0)

    there = mixed()
    rows = iter(there)
    for _ in islice(rows, position):
        pass
    states = {0: None, position: there.state_dict()}

    def batch(place: int) -> object:
        again = mixed()
        if (state := states[place]) is not None:
            again.load_state_dict(state)
        return list(islice(again, BATCH))

    return in_turns(repeats, position, batch)


def _drawn_by_datasets(weights: Sequence[int], draws: int, folder: Path) -> NDArray[np.int64]:
    mixed = datasets.interleave_datasets(_numbered(weights, draws), _probabilities(weights), seed=0)
    return np.asarray(mixed.with_format("numpy")[:draws]["source"], dtype=np.int64)


# --- torchdata ---------------------------------------------------------------------------------------------------------------------------


def _weighted(sources: Mapping[str, Any], weights: Sequence[int]) -> Any:
    from torchdata.nodes import MultiNodeWeightedSampler, StopCriteria

    shares = dict(zip(sources, _probabilities(weights), strict=True))
    return MultiNodeWeightedSampler(sources, shares, stop_criteria=StopCriteria.CYCLE_FOREVER, seed=0)


def _weighted_rows(tables: Mapping[str, datasets.Dataset], shares: Mapping[str, int], folder: Path) -> Iterator[Rows]:
    from torch.utils.data import RandomSampler
    from torchdata.nodes import Batcher, Loader, MapStyleWrapper

    sources = {name: MapStyleWrapper(tables[name], RandomSampler(tables[name])) for name in shares}
    yield from Loader(Batcher(_weighted(sources, list(shares.values())), BATCH))


def _first_of_nodes(repeats: int, position: int, folder: Path) -> First:
    from torch.utils.data import RandomSampler
    from torchdata.nodes import Batcher, Loader, MapStyleWrapper

    weights = (50, 20, 10, 10, 10)

    def mixed() -> Any:
        rows = _enough(weights, position + 1000)
        sources = {str(number): MapStyleWrapper(range(rows[number]), RandomSampler(range(rows[number]))) for number in range(len(weights))}
        return Loader(Batcher(_weighted(sources, weights), BATCH))

    there = mixed()
    batches = iter(there)
    for _ in islice(batches, position // BATCH):
        pass
    states = {0: None, position: there.state_dict()}

    def batch(place: int) -> object:
        again = mixed()
        if (state := states[place]) is not None:
            again.load_state_dict(state)
        return next(iter(again))

    return in_turns(max(2, repeats // 5), position, batch)


class _Endless:
    """A source that gives its number, again and again."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        return repeat(self.number)


def _drawn_by_nodes(weights: Sequence[int], draws: int, folder: Path) -> NDArray[np.int64]:
    from torchdata.nodes import IterableWrapper, Loader

    sources = {str(number): IterableWrapper(_Endless(number)) for number in range(len(weights))}
    return np.fromiter(islice(Loader(_weighted(sources, weights)), draws), dtype=np.int64)


# --- MosaicML streaming ------------------------------------------------------------------------------------------------------------------


def _written(folder: Path, columns: Mapping[str, str], rows: Iterator[Mapping[str, Any]]) -> None:
    from streaming.base import MDSWriter

    with MDSWriter(out=str(folder), columns=dict(columns)) as writer:
        for row in rows:
            writer.write(row)


def _streamed(folders: Sequence[Path], weights: Sequence[int], epoch: int) -> Any:
    from streaming.base import Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [Stream(local=str(folder), proportion=share) for folder, share in zip(folders, _probabilities(weights), strict=True)]
    return StreamingDataset(streams=streams, batch_size=BATCH, shuffle=True, epoch_size=epoch, num_canonical_nodes=1, shuffle_block_size=4_000_000)


def _begun(mixed: Any, rows: int) -> list[Mapping[str, Any]]:
    """The first rows. Its threads are stopped, which streaming 0.13.0 does only where another iteration begins."""
    begun = list(islice(mixed, rows))
    mixed._iterator.exit()
    return begun


def _streamed_rows(tables: Mapping[str, datasets.Dataset], shares: Mapping[str, int], folder: Path) -> Iterator[Rows]:
    folders = [folder / "mds" / name for name in shares]
    for name, place in zip(shares, folders, strict=True):
        if not place.exists():
            _written(place, {"image": "bytes", "text": "str"}, ({"image": row["image"]["bytes"], "text": row["text"]} for row in tables[name]))
    mixed = _streamed(folders, list(shares.values()), 4 * sum(map(len, tables.values())))
    try:
        while True:
            rows = iter(mixed)
            while batch := [{"image": {"bytes": row["image"]}, "text": row["text"]} for row in islice(rows, BATCH)]:
                yield batch
    finally:
        mixed._iterator.exit()


def _numbered_folders(folder: Path, number: int) -> list[Path]:
    folders = [folder / "mds-numbers" / str(source) for source in range(number)]
    for source, place in enumerate(folders):
        if not place.exists():
            _written(place, {"source": "int"}, repeat({"source": source}, 100))
    return folders


def _first_of_streams(repeats: int, position: int, folder: Path) -> First:
    weights = (50, 20, 10, 10, 10)
    folders = _numbered_folders(folder, len(weights))

    def batch(place: int) -> object:
        again = _streamed(folders, weights, 2 * position)
        again.load_state_dict({**again.state_dict(0, True), "epoch": 0, "sample_in_epoch": place})
        return _begun(again, BATCH)

    return in_turns(max(2, repeats // 5), position, batch)


def _drawn_by_streams(weights: Sequence[int], draws: int, folder: Path) -> NDArray[np.int64]:
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    mixed = _streamed(_numbered_folders(folder, len(weights)), weights, draws)
    rows = generate_work("random", mixed, World.detect(), 0, 0).ravel()
    sources: NDArray[np.int64] = np.searchsorted(mixed.sample_offset_per_stream, rows[rows >= 0][:draws], side="right") - 1
    return sources


PEERS: Mapping[str, Peer] = {
    "datasets.interleave_datasets, map-style": Peer("datasets", _interleaved_map, _first_of_map, _drawn_by_datasets),
    "datasets.interleave_datasets, iterable": Peer("datasets", _interleaved_iterable, _first_of_iterable),
    "torchdata MultiNodeWeightedSampler": Peer("torchdata", _weighted_rows, _first_of_nodes, _drawn_by_nodes),
    "MosaicML streaming": Peer("streaming", _streamed_rows, _first_of_streams, _drawn_by_streams),
}

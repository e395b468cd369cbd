"""Memory that a mixture of many rows holds, measured in a process of its own: `python -m benchmarks.memory FOLDER SOURCES` prints one JSON object."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.rows import computed_facts, computed_sources
from mixing.buckets import Shapes, Signature
from mixing.cells import Level, Micro
from mixing.mixture import StageMixture
from mixing.order import Budget
from mixing.selected import Choice, Selection, select


@dataclass(frozen=True)
class Held:
    """What a process holds once a mixture has been made and has given its first micro-batch, beyond what it held after a tiny one."""

    sources: int
    rows: int
    held: int
    """Bytes of memory that no file stands behind, once the allocator has given back what it keeps free."""
    anonymous: int
    """The same with what the allocator keeps free: what was needed for a moment, in arrays of up to 32 MB (glibc)."""
    peak: int
    """Bytes of resident memory at the most, pages of mapped files included, beyond what was resident before."""
    seconds: float
    """From open sources to the first micro-batch."""


def harmonic(number: int) -> tuple[int, ...]:
    """Shares of so many sources: the k-th gets 1 / k of what the first gets."""
    return tuple(round(100_000 / place) for place in range(1, number + 1))


def mixture_of(selections: Mapping[str, Selection], shares: Sequence[int], *, images: int = 64, micro: int = 8, steps: int = 10**6, max_aspect: float = 1.0) -> StageMixture:
    """A stage over rows, at 256 x 256 pixels. shares: of the sources, in their order."""
    return StageMixture(
        selections,
        mix={name: float(share) for name, share in zip(selections, shares, strict=True)},
        seed=1,
        stage="only",
        levels=[Level(Shapes(256, 16, max_aspect=max_aspect))],
        budget=Budget("images", images, images, steps),
        micro=Micro(images=micro),
        tokens_of=_tokens,
        drawn_before={},
    )


def measure(folder: Path, sources: int, rows: int) -> Held:
    """Make rows, and measure a mixture of them in a fresh process."""
    facts = folder / f"rows-{rows}"
    if not facts.exists():
        computed_facts(facts, rows)
    command = [sys.executable, "-m", "benchmarks.memory", str(facts), str(sources)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    return Held(**json.loads(said.stdout))


def per_row(held: Held, least: Held) -> float:
    """Bytes of each row: what is held for so many rows beyond what is held for few, of as many sources."""
    return (held.held - least.held) / (held.rows - least.rows)


def _tokens(signature: Signature) -> int:
    return sum(height * width // 256 for height, width in (signature.target, *signature.references))


def _first_batch(facts: Path, sources: int, kept: Path) -> StageMixture:
    opened = computed_sources(facts, [f"source-{number}" for number in range(sources)])
    mixture = mixture_of({source.name: select(source, Choice(), 0, folder=kept) for source in opened}, harmonic(sources))
    with closing(mixture.batches(0, 1, rank=0, processes=1, workers=0, pin_memory=False)) as reading:
        next(reading)
    return mixture


def _bytes(*names: str) -> list[int]:
    """Figures of this process, in bytes: RssAnon, VmHWM, VmRSS."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(lines[name].split()[0]) for name in names]


def _held(facts: Path, sources: int) -> Held:
    computed_facts(facts.parent / "tiny", 1000)
    _first_batch(facts.parent / "tiny", 5, facts)  # whatever is imported or set up once is there from here on
    gc.collect()
    allocator = ctypes.CDLL(None)
    allocator.malloc_trim(0)
    before, resident = _bytes("RssAnon", "VmRSS")
    start = time.perf_counter()
    mixture = _first_batch(facts, sources, facts / f"kept-{sources}")
    seconds = time.perf_counter() - start
    gc.collect()
    after, peak = _bytes("RssAnon", "VmHWM")
    allocator.malloc_trim(0)
    trimmed = _bytes("RssAnon")[0]
    return Held(sources, sum(selection.size for selection in mixture.selections.values()), trimmed - before, after - before, peak - resident, seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(_held(Path(sys.argv[1]), int(sys.argv[2])))))

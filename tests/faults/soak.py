"""Long runs, watched from outside: whether memory, file handles, threads and files stay as they are however long it goes on.

    cd tests && ../.venv/bin/python -m faults.soak --whole

20,000 steps by one process and by two, 199 stages of 10 steps, and 2,000 evaluations, each through train.py in a process of its own with the smallest possible model, all duties and two
trackers. Lost is a run whose memory grows by more than 1 MB in 1,000 steps, in 1,000 evaluations, or by more than 0.3 MB in a stage, by the line through what is held after the first fifth, two standard errors
taken off; or whose least number of handles, threads or processes in its last fifth is above that in its middle one; or of whose checkpoints, logs or evaluations more lies there than is to be
kept. The short form, of 300 steps, cannot tell a megabyte in a thousand steps from what a process is still settling: there the bound is 5 MB. What grows by design is printed, and
what a million steps make of it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from faults.table import Fault, main  # noqa: E402
from models import tiny_flux  # noqa: E402
from runs import make_data, plan_of, write_plan  # noqa: E402
from stages.evaluations import MOST_BETWEEN  # noqa: E402
from stages.log_files import log_bytes, log_files, log_lines  # noqa: E402

PART_BYTES = 2**16
"""Of the logs' parts here, so that there are some."""
_START = "import sys; import stages.log_files as log_files; log_files.PART_BYTES = int(sys.argv.pop(1)); import train; sys.exit(train.main())"
_LINES = 2**17  # the longest that one line, or a trace's lines that are written together, may be
MEGABYTE = 1e6


@dataclass(frozen=True)
class Soak:
    """One long run."""

    name: str
    processes: int
    of: str
    """What it has many of: `step`, `stage` or `eval`, which is the event that is counted."""
    number: int
    """How many of them."""
    plan: Callable[[Path, int], dict[str, Any]]
    bound: float = MEGABYTE
    """Bytes that memory may grow by in 1,000 of them."""


@dataclass(frozen=True)
class Sample:
    """What a run holds at an instant, all its processes together."""

    done: int
    """How many of what it has many of were done."""
    bytes: int
    """Of memory that no file lies behind, in each process. A data worker begins with the trainer's pages, which are counted in both, for they part as one of the two writes to
    them: counted once, they would seem to grow, up to twice what they are, with nothing kept. Libraries' files are left out."""
    handles: int
    """Of the processes that train."""
    threads: int
    processes: int
    files: Mapping[str, int]
    """Bytes of files by kind."""
    checkpoints: int
    """The most that one stage has."""
    evaluations: int
    """The most rows' files that one stage has."""


# --- what is carried out -------------------------------------------------------------------------------------------------------------------


def _plan(world: Path, **changes: Any) -> dict[str, Any]:
    stage = {"resolution": 8, "batch": {"images": 2, "micro": 2}, "lr": 0.001, "precision": "fp32", "ema": 0.9, "mix": {"photos": 1, "edits": 1}}
    return plan_of(world, name="soak", model=str(world / "model"), workers=1, track=["trackio", "tensorboard"], cache={"folder": "cache"}, keep=2, stages=[stage], **changes)


def _steps(world: Path, number: int) -> dict[str, Any]:
    plan = _plan(world, log_every=5, save_every=max(50, number // 100), evaluate={"rows": 2, "every": max(25, number // 200)})
    return {**plan, "stages": [{**plan["stages"][0], "name": "long", "steps": number}]}


def _stages(world: Path, number: int) -> dict[str, Any]:
    plan = _plan(world, log_every=5, save_every=7, evaluate={"rows": 2})
    return {**plan, "stages": [{**plan["stages"][0], "name": f"stage{place}", "steps": 10, **({"handoff": {"optimizer": "keep"}} if place else {})} for place in range(number)]}


def _evaluations(world: Path, number: int) -> dict[str, Any]:
    plan = _plan(world, log_every=10, save_every=200, evaluate={"rows": 2, "every": 1})
    return {**plan, "stages": [{**plan["stages"][0], "name": "measured", "steps": number}]}


def soaks(whole: bool) -> tuple[Soak, ...]:
    """What is carried out."""
    if not whole:
        return (Soak("300 steps", 1, "step", 300, _steps, 5 * MEGABYTE),)
    return (
        Soak("20,000 steps", 1, "step", 20_000, _steps),
        Soak("20,000 steps of two processes", 2, "step", 20_000, _steps),
        Soak("199 stages", 1, "stage", 199, _stages, 300 * MEGABYTE),
        Soak("2,000 evaluations", 1, "eval", 2_000, _evaluations),
    )


def start(folder: Path, processes: int) -> list[subprocess.Popen[bytes]]:
    """train.py in processes of its own, as a launcher starts them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in range(processes):
        own = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": str(TESTS.parent), "HF_HUB_OFFLINE": "1"}
        if processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (folder / f"log-{rank}").open("wb") as log:
            command = [sys.executable, "-c", _START, str(PART_BYTES), "plan.yaml", "--out", "run", "--trace"]
            started.append(subprocess.Popen(command, cwd=folder, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    return started


# --- what is seen --------------------------------------------------------------------------------------------------------------------------


class Counter:
    """How many events of one kind a run has logged, read as they come."""

    def __init__(self, run: Path, soak: Soak) -> None:
        self._run, self._kind = run, soak.of
        self._part, self._at, self._number = 1, 0, 0

    def number(self) -> int:
        """So many by now."""
        while True:
            closed = self._run / f"metrics-{self._part:06d}.jsonl"
            try:
                with (is_closed := closed if closed.exists() else self._run / "metrics.jsonl").open("rb") as file:
                    file.seek(self._at)
                    lines = file.read()
            except FileNotFoundError:
                return self._number
            lines = lines[: lines.rfind(b"\n") + 1]
            self._at += len(lines)
            for line in lines.splitlines():
                self._take(line)
            if is_closed != closed:
                return self._number
            self._part, self._at = self._part + 1, 0

    def _take(self, line: bytes) -> None:
        event = json.loads(line)
        if event["event"] != self._kind:
            return
        if self._kind == "step":
            self._number = int(event["step"])
        else:
            self._number += self._kind != "stage" or event.get("state") == "end"


def sample(folder: Path, trained: Sequence[psutil.Process], done: int) -> Sample | None:
    """What a run holds now; None if a process ends meanwhile."""
    run = folder / "run"
    try:
        everybody = [each for process in trained for each in (process, *process.children(recursive=True))]
        return Sample(
            done,
            sum(map(_anonymous, everybody)),
            sum(process.num_fds() for process in trained),
            sum(process.num_threads() for process in trained),
            len(everybody),
            _files(folder),
            max((sum(1 for _ in stage.glob("step-*")) for stage in run.glob("stages/*")), default=0),
            max((sum(1 for _ in run.glob(f"evaluations/{stage.name}-*")) for stage in run.glob("stages/*")), default=0),
        )
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, KeyError):
        return None


def _anonymous(process: psutil.Process) -> int:
    """Resident anonymous and shared memory. Raises FileNotFoundError or ProcessLookupError if the process is gone, KeyError while it ends."""
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return sum(1024 * int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem"))


_KINDS = {
    "metrics, in parts": ("run", "metrics*.jsonl"),
    "trace, in parts": ("run", "trace*.jsonl"),
    "evaluations": ("run", "evaluations/*"),
    "previews": ("run", "previews/**/*"),
    "checkpoints": ("run", "stages/**/*"),
    "one state.json": ("run", "stages/*/step-*/state.json"),
    "ledger": ("run", "ledger.json"),
    "report": ("run", "report.html"),
    "tensorboard": ("run", "tensorboard/*"),
    "trackio": ("trackio", "**/*"),
    "cache": ("cache", "**/*"),
}


def _files(folder: Path) -> dict[str, int]:
    sizes = {}
    for name, (place, pattern) in _KINDS.items():
        found = []
        for path in (folder / place).glob(pattern):
            with suppress(FileNotFoundError):
                found.append(path.stat().st_size if path.is_file() else 0)
        sizes[name] = max(found, default=0) if name.startswith("one ") else sum(found)
    return sizes


def watch(soak: Soak, world: Path, folder: Path, most: int = 400) -> list[Sample]:
    """Carry out one and look at it again and again, some `most` times. Raises AssertionError if it fails."""
    folder.mkdir(parents=True)
    write_plan(folder / "plan.yaml", soak.plan(world, soak.number))
    started = start(folder, soak.processes)
    trained = [psutil.Process(each.pid) for each in started]
    counter, seen, last = Counter(folder / "run", soak), list[Sample](), -1
    while all(each.poll() is None for each in started):
        done = counter.number()
        if done and done >= last + soak.number / most and (found := sample(folder, trained, done)):
            seen.append(found)
            last = done
        time.sleep(0.05)  # a quick machine makes five steps in a tenth of a second
    codes = [each.wait(60) for each in started]
    assert codes == [0] * soak.processes, (folder / "log-0").read_text(errors="replace")[-2000:]
    return [each for each in seen if each.done < 0.95 * soak.number]  # before the end the data worker has read everything and leaves, and at it the run publishes, once


# --- what is made of it --------------------------------------------------------------------------------------------------------------------


def slope(samples: Sequence[Sample], value: Callable[[Sample], float]) -> tuple[float, float]:
    """By how much a value grows in 1,000, and the standard error: the line by least squares through the means of ten parts, after the first fifth. Means, since neighbours err alike."""
    settled = samples[len(samples) // 5 :]
    parts = [settled[len(settled) * part // 10 : len(settled) * (part + 1) // 10] for part in range(10)]
    x = np.array([np.mean([each.done for each in part]) for part in parts if part]) / 1000
    y = np.array([np.mean([value(each) for each in part]) for part in parts if part])
    around = x - x.mean()
    growth = float((around * y).sum() / (around**2).sum())
    left = y - y.mean() - growth * around
    return growth, float(np.sqrt((left**2).sum() / (len(x) - 2) / (around**2).sum()))


def judged(soak: Soak, samples: Sequence[Sample], folder: Path) -> list[Fault]:
    """What was promised of one, each with what was seen instead."""
    assert len(samples) >= 20, f"{soak.name}: looked at {len(samples)} times"
    growth, error = slope(samples, lambda each: each.bytes)
    middle = [each for each in samples if 2 <= 5 * each.done / soak.number < 3]  # of the steps, not of the looks, and not before all images were seen: their cache is held open then
    last = [each for each in samples if 5 * each.done / soak.number >= 4]
    # What is held at the least: a tracker that writes just then, or what opens or measures a stage, has some more, and which of them is met is chance.
    least = {name: [min(getattr(each, name) for each in part) for part in (middle, last)] for name in ("handles", "threads", "processes")}
    kept = max(each.checkpoints for each in samples)
    between = max(each.evaluations for each in samples)
    run = folder / "run"
    long = [f"{path.name} has {path.stat().st_size:,} bytes" for name in ("metrics", "trace") for path in log_files(run, name) if path.stat().st_size > PART_BYTES + _LINES]
    lines = sum(1 for _ in log_lines(run, "metrics"))
    few = [] if log_bytes(run, "metrics") <= PART_BYTES or len(log_files(run, "metrics")) > 1 else [f"metrics.jsonl, {lines} lines, is one file"]
    return [
        _fault(f"{soak.name}: memory", [] if growth - 2 * error < soak.bound else [f"grows by {growth / MEGABYTE:.2f} ± {error / MEGABYTE:.2f} MB in 1,000"]),
        _fault(f"{soak.name}: handles, threads, processes", [f"{name}: {now:g}, and {before:g} before" for name, (before, now) in least.items() if now > before]),
        _fault(f"{soak.name}: checkpoints kept", [f"{kept} of one stage"] if kept > 4 else []),  # two, the one being written, and the one before it is taken away
        _fault(f"{soak.name}: logs in parts", long + few),
        _fault(f"{soak.name}: evaluations kept", [f"{between} of one stage"] if between > MOST_BETWEEN + 3 else []),
    ]


def _fault(name: str, lost: Sequence[str]) -> Fault:
    return Fault(name, 1, 0 if lost else 1, ("; ".join(lost),) if lost else ())


def told(soak: Soak, samples: Sequence[Sample]) -> str:
    """What grows, and what a million make of it."""
    first, last = samples[len(samples) // 5], samples[-1]
    lines = [f"{soak.name}: {len(samples)} looks; from {first.done:,} to {last.done:,}, and in 1,000:"]
    growth, error = slope(samples, lambda each: each.bytes)
    lines.append(f"  memory: {first.bytes / MEGABYTE:.1f} -> {last.bytes / MEGABYTE:.1f} MB, {growth / MEGABYTE:+.3f} ± {error / MEGABYTE:.3f} MB")
    for name in ("handles", "threads", "processes", "checkpoints", "evaluations"):
        lines.append(f"  {name}: {getattr(first, name)} -> {getattr(last, name)}, {slope(samples, lambda each, name=name: getattr(each, name))[0]:+.3f}")  # type: ignore[misc]
    for name in _KINDS:
        growth, _ = slope(samples, lambda each, name=name: each.files[name])  # type: ignore[misc]
        lines.append(f"  {name}: {first.files[name]:,} -> {last.files[name]:,} bytes, {growth:+,.0f}; a million: {growth / MEGABYTE * 1000:,.1f} MB")
    return "\n".join(lines)


def carry_out(whole: bool) -> list[Fault]:
    """What was promised of each long run."""
    found: list[Fault] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "world" / "data")
        tiny_flux(folder / "world" / "model", pixels=False)
        for number, soak in enumerate(soaks(whole)):
            samples = watch(soak, folder / "world", folder / str(number))
            print(told(soak, samples), flush=True)
            found += judged(soak, samples, folder / str(number))
    return found


if __name__ == "__main__":
    sys.exit(main("soak", __doc__, carry_out))

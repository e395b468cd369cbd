"""Runs that are killed at random instants, told to stop, or robbed of one process of two, and then go on by the same command.

    cd tests && ../.venv/bin/python -m faults.kills --whole

A try is lost unless the same command, typed until it goes through, ends in what the uninterrupted run left: the published adapter, previews, the last checkpoints, the ledger, the rows
drawn, what was measured and what the tracker shows, byte for byte but for what a clock decides. One that is told to stop must besides have saved and be gone in ten seconds,
and of two processes of which one is killed the other must be gone in a minute.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from test_hub import REPO, ask, on_hub  # noqa: E402
from test_track import of_tensorboard, of_trackio  # noqa: E402

from faults.kill_places import BETWEEN, MEETING, PLACES, Watched  # noqa: E402
from faults.launched import LaunchedProcesses  # noqa: E402
from faults.table import Fault, main  # noqa: E402
from hub_server import hub_server  # noqa: E402
from models import tiny_flux  # noqa: E402
from runs import break_pixels, make_data, plan_of, started, write_plan, write_tars  # noqa: E402
from stages import log_files  # noqa: E402
from stages.log_files import Place  # noqa: E402

SEED = 7
PART_BYTES = 3000  # of the logs here, so that runs are killed while one is closed and the next begun
SOON, STOPS = 60.0, 10.0  # seconds in which the other process of two is gone, and one that is told to stop
MOMENT = 0.5  # seconds, at most, by which one process of two outlives the other

KILL, ONE_OF_TWO, APART, TERM, INT = "kill -9", "kill -9 of one process of two", "kill -9 of one process of two, and of the other a moment later", "SIGTERM", "SIGINT"
_SIGNALS = {TERM: signal.SIGTERM, INT: signal.SIGINT}
_TRIES = {KILL: (8, 200), ONE_OF_TWO: (1, 12), APART: (1, 24), TERM: (2, 14), INT: (1, 14)}
"""How often each is tried in the short form and in the whole one."""

_CLOCK = {"time", "seconds", "images_per_second", "tokens_per_second", "data_wait", "memory_bytes", "encoded"}  # the last is counted in each launch
_OF_LOGS = {"seconds", "metrics_part", "metrics_bytes", "trace_part", "trace_bytes"}
_COMPARED = {"step", "eval", "shares", "handoff", "stage", "ledger", "preview", "save", "publish", "warning"}


@dataclass(frozen=True)
class Way:
    """A plan, and by how many processes it is carried out."""

    name: str
    processes: int
    to_hub: bool = False

    def plan(self, world: Path) -> dict[str, Any]:
        """The plan, with its cache and its run in the folder where the command is typed."""
        return {**_PLANS[self.name](world), "cache": {"folder": "cache"}}


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    folder: Path
    seconds: float
    on_hub: Mapping[str, bytes]


@dataclass(frozen=True)
class Try:
    """One run that is not left in peace."""

    number: int
    how: str
    way: Way
    fraction: float
    """Of the time of the uninterrupted run, at which it happens."""


@dataclass(frozen=True)
class Outcome:
    """What came of a try: what the main process was doing, and what was not kept, nothing if all was."""

    doing: str
    lost: str


# --- what is carried out -------------------------------------------------------------------------------------------------------------------


def _three_stages(world: Path) -> dict[str, Any]:
    """Every weight, then an adapter in bf16, then with references and a moving average."""
    plan = plan_of(world, track="tensorboard", log_every=1, save_every=2, evaluate={"rows": 2, "every": 3})
    plan["stages"] = [{**stage, "steps": 4} for stage in plan["stages"]]
    return plan


def _latents(world: Path) -> dict[str, Any]:
    """A model with a VAE, whose latents are kept; shards read in lanes by workers."""
    plan = plan_of(world, model=str(world / "latent"), workers=1, log_every=1, save_every=3, evaluate={"rows": 2, "every": 2})
    plan["sources"] |= {"tars": {"path": str(world / "tars" / "*.tar"), "stream": True, "lanes": 2}}
    stage = {**plan["stages"][1], "resolution": 16, "batch": {"images": 8, "micro": 2}, "mix": {"photos": 2, "tars": 2, "edits": 1}}
    plan["stages"] = [{**stage, "steps": 5, "name": "low"}, {**stage, "resolution": 24, "precision": "fp32", "steps": 4, "name": "high", "ema": 0.9, "handoff": {"optimizer": "keep"}}]
    return plan


def _adaptive(world: Path) -> dict[str, Any]:
    """Shares that follow what is measured."""
    plan = plan_of(world, track="trackio", log_every=1, save_every=3, evaluate={"rows": 4, "every": 2})
    stage = {**plan["stages"][1], "precision": "fp32", "lr": 0.05}
    plan["stages"] = [{**stage, "name": "follow", "mix": {"adaptive": {"photos": 3, "edits": 1}, "lookback": 1}, "steps": 9}, {**stage, "name": "after", "steps": 2}]
    return plan


def _to_hub(world: Path) -> dict[str, Any]:
    """What is trained, and checkpoints, go to the Hub after each stage."""
    plan = plan_of(world, log_every=1, save_every=2, publish={"repo": REPO, "when": "stage", "checkpoints": True})
    plan["stages"] = [{**stage, "steps": 4} for stage in plan["stages"][1:]]
    return plan


_PLANS: dict[str, Callable[[Path], dict[str, Any]]] = {"three stages": _three_stages, "latents": _latents, "adaptive": _adaptive, "to the Hub": _to_hub}
WAYS = tuple(Way(name, processes, to_hub=name == "to the Hub") for name in _PLANS for processes in (1, 2))


def make_world(folder: Path) -> Path:
    """Data and models for all plans."""
    make_data(folder / "data")
    write_tars(folder / "tars", (9, 7, 8))
    break_pixels(folder / "tars" / "s-001.tar", ["0012.png"])
    tiny_flux(folder / "model", pixels=True)
    tiny_flux(folder / "latent", pixels=False)
    return folder


# --- one launch ----------------------------------------------------------------------------------------------------------------------------


class Launch(LaunchedProcesses):
    """The processes of one launch of a way, in a folder of its own."""

    def __init__(self, folder: Path, way: Way, url: str) -> None:
        self.folder, self.watched, log = folder, Watched(), folder / "log"

        def before(rank: int) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
            os.chdir(folder)
            log_files.PART_BYTES = PART_BYTES
            os.environ["TRACKIO_DIR"] = str(folder / "trackio")
            if way.to_hub:
                ask(pytest.MonkeyPatch(), url, folder / "home")
            if rank == 0:
                self.watched.tell()

        super().__init__(started(["plan.yaml", "--out", "run", "--trace"], processes=way.processes, output=log, timeout=300, before=before), log)

    def kill(self, *, with_children: bool) -> None:
        """End all by kill -9. with_children: data workers, and what sends to the Hub, too, as where a machine goes; else they find out themselves."""
        children = [child for number in self.left() for child in psutil.Process(number).children(recursive=True)] if with_children else []
        self.send(signal.SIGKILL)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.wait(SOON)


# --- one try -------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _hub(way: Way) -> Iterator[tuple[str, Callable[[], dict[str, bytes]]]]:
    """Where the Hub is, and what it holds in the end: no history, which says how often something was sent."""
    if not way.to_hub:
        yield "", dict
        return
    with hub_server() as server:
        yield server.url, lambda: {f"{branch}/{name}": content for branch in server.repos[REPO].branches for name, content in on_hub(server, branch).items()}


def run_whole(way: Way, world: Path, folder: Path) -> Whole:
    """The uninterrupted run."""
    folder.mkdir(parents=True)
    write_plan(folder / "plan.yaml", way.plan(world))
    with _hub(way) as (url, held):
        began = time.monotonic()
        launch = Launch(folder, way, url)
        launch.wait(300)
        assert launch.codes() == [0] * way.processes, launch.log.read_text()
        return Whole(folder, time.monotonic() - began, held())


def carry_out_one(tried: Try, whole: Whole, world: Path, folder: Path) -> Outcome:
    """Disturb a run, go on with it until it goes through, and compare."""
    draw = np.random.default_rng([SEED, tried.number])
    way, fraction = tried.way, tried.fraction
    for attempt in range(5):
        place = folder / f"{tried.number}-{attempt}"
        place.mkdir(parents=True)
        write_plan(place / "plan.yaml", way.plan(world))
        with _hub(way) as (url, held):
            launch = Launch(place, way, url)
            if launch.wait(fraction * whole.seconds, one=True):
                launch.wait(SOON)
                fraction *= 0.7  # the run was through before, on a machine that is less busy now
                continue
            doing = launch.watched.doing
            lost = _disturb(launch, tried.how, draw)
            while not lost and draw.random() < 0.3:  # killed again on the way
                launch = Launch(place, way, url)
                launch.wait(draw.random() * 0.6 * whole.seconds, one=True)
                launch.kill(with_children=bool(draw.random() < 0.5))
            if not lost:
                launch = Launch(place, way, url)
                launch.wait(240)
                ended = launch.codes()
                lost = differences(whole, place, held()) if ended == [0] * way.processes else f"went on and ended in {ended}: {launch.end()}"
        return Outcome(doing, f"{tried.number}, {way.name}, {way.processes} processes, while {doing}: {lost} ({place})" if lost else "")
    return Outcome(BETWEEN, f"{tried.number}: the run was through five times before it was disturbed")


def _disturb(launch: Launch, how: str, draw: np.random.Generator) -> str:
    """Do it; says what was not kept."""
    doing, began = launch.watched.doing, time.monotonic()
    if how == KILL:
        launch.kill(with_children=bool(draw.random() < 0.5))
        return ""
    if how == ONE_OF_TWO:
        launch.send(signal.SIGKILL, rank=int(draw.integers(2)))
        gone = doing == MEETING or launch.wait(SOON)  # before they have met only a launcher knows of both, and it ends the other
        launch.kill(with_children=False)
        return "" if gone else f"the other process was there after {SOON:.0f} seconds: {launch.end()}"
    if how == APART:
        launch.send(signal.SIGKILL, rank=int(draw.integers(2)))
        time.sleep(float(draw.random()) * MOMENT)
        launch.kill(with_children=bool(draw.random() < 0.5))
        return ""
    number = _SIGNALS[how]
    launch.send(number)
    gone = launch.wait(STOPS)
    seconds, codes = time.monotonic() - began, launch.codes()
    launch.kill(with_children=False)
    if not gone:
        return f"there after {seconds:.0f} seconds, while {launch.watched.doing}: {launch.end()}"
    if 128 + number in codes and not _is_saved(launch.folder / "run"):
        return f"left steps unsaved: {launch.end()}"
    if doing in (MEETING, BETWEEN) or set(codes) <= {0, 128 + number}:  # before processes have met and once a run is over nobody listens, and there is nothing to save
        return ""
    return f"ended in {codes}: {launch.end()}"


def _is_saved(run: Path) -> bool:
    """Whether the newest checkpoint holds every step that was made."""
    states = [json.loads(file.read_text()) for file in run.glob("stages/*/step-*/state.json")]
    written = Place(1 + len(log_files.closed_files(run, "trace")), log_files.current_file(run, "trace").stat().st_size)
    return written == max((log_files.place_of("trace", state) for state in states), key=lambda place: (place.part, place.bytes), default=log_files.BEGINNING)


# --- what must be alike --------------------------------------------------------------------------------------------------------------------


def differences(whole: Whole, place: Path, on_hub_now: Mapping[str, bytes]) -> str:
    """What of a run is not as in the uninterrupted one; nothing if all is."""
    mine, theirs = left_by(place), left_by(whole.folder)
    saves = theirs["save in metrics.jsonl"]
    mine["save in metrics.jsonl"] = [save for save in mine["save in metrics.jsonl"] if save in saves]  # one that is told to stop saves besides
    found = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    sent = {name for name in on_hub_now.keys() | whole.on_hub.keys() if name.endswith(".safetensors") and on_hub_now.get(name) != whole.on_hub.get(name)}
    return ", ".join([*found, *(f"{name} on the Hub" for name in sorted(sent))])


def left_by(place: Path) -> dict[str, Any]:
    """What a run has left behind, by name, without what a clock decides, or the line to the Hub. Where a log's parts end follows from when it was written, which a stop does at once."""
    run = place / "run"
    left: dict[str, Any] = {"ledger.json": (run / "ledger.json").read_bytes()}
    left["the trace"] = b"".join(log_files.log_lines(run, "trace"))
    for pattern in ("adapter/**/*.safetensors", "model/**/*.safetensors", "previews/**/*.png", "stages/**/*.safetensors", "stages/*", "stages/*/*"):
        left |= {str(path.relative_to(run)): path.read_bytes() if path.is_file() else b"" for path in run.glob(pattern)}
    for state in run.glob("stages/*/*/state.json"):
        left[str(state.relative_to(run))] = {name: value for name, value in json.loads(state.read_text()).items() if name not in _OF_LOGS}
    lines = [line for line in map(json.loads, log_files.log_lines(run, "metrics")) if line["event"] != "warning" or REPO not in line["message"]]
    for kind in _COMPARED:
        left[f"{kind} in metrics.jsonl"] = [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines if line["event"] == kind]
    if (run / "tensorboard").exists():
        left["the curve in tensorboard"] = of_tensorboard(run, "loss")
    if (place / "trackio").exists():
        left["the curve in trackio"] = [(step, values["loss"]) for step, values in of_trackio(place / "trackio", run, "tiny") if "loss" in values]
    return left


# --- all of them ---------------------------------------------------------------------------------------------------------------------------


def tries(whole: bool) -> list[Try]:
    """What is tried: instants spread over the length of each way's run, drawn inside equal parts of it."""
    draw, made = np.random.default_rng(SEED), []
    for how, numbers in _TRIES.items():
        number = numbers[whole]
        ways = [way for way in WAYS if how not in (ONE_OF_TWO, APART) or way.processes == 2]
        fractions = (draw.permutation(number) + draw.random(number)) / number
        made += [Try(len(made) + each, how, ways[each % len(ways)], float(fraction)) for each, fraction in enumerate(fractions)]
    return made


def carry_out(whole: bool) -> list[Fault]:
    """A row for each place in which a run was killed, and for each other way to be disturbed."""
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(os.cpu_count(), get_context("fork"), torch.set_num_threads, (1,)) as pool:
        folder = Path(name)
        world, asked = make_world(folder / "world"), tries(whole)
        wholes = dict(zip(WAYS, pool.map(run_whole, WAYS, [world] * len(WAYS), [folder / f"whole-{number}" for number in range(len(WAYS))]), strict=True))
        outcomes = list(pool.map(carry_out_one, asked, [wholes[each.way] for each in asked], [world] * len(asked), [folder / "tries"] * len(asked)))
    return [fault for how in _TRIES for fault in _rows(how, [outcome for tried, outcome in zip(asked, outcomes, strict=True) if tried.how == how])]


def _rows(how: str, outcomes: list[Outcome]) -> list[Fault]:
    if how == KILL:
        return [_row(f"{how} while {place}", here) for place in PLACES if (here := [outcome for outcome in outcomes if outcome.doing == place])]
    return [_row({APART: how, ONE_OF_TWO: f"{how}: the other is gone within a minute"}.get(how, f"{how}: saved, and gone within ten seconds"), outcomes)]


def _row(name: str, outcomes: list[Outcome]) -> Fault:
    lost = tuple(outcome.lost for outcome in outcomes if outcome.lost)
    return Fault(name, len(outcomes), len(outcomes) - len(lost), lost)


if __name__ == "__main__":
    sys.exit(main("kills", __doc__, carry_out))

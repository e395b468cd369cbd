"""Disks that are full, read-only or gone, files that are damaged or another run's, and two launches on one folder.

    cd tests && ../.venv/bin/python -m faults.storage --whole

A disk is a small tmpfs of its own. Mounting it needs root, or a kernel that lets a user be root in a namespace; where none can be mounted, that is a fault that was lost, and said. It is filled, up to so many bytes, when a run comes to a duty for the n-th time.
A run whose disk was full is lost unless it says so, leaves the last checkpoint whole, goes on once there is room, or, stopped meanwhile, by the same command, and ends in what the undisturbed run left, byte
for byte but for what a clock decides. A damaged run folder is lost unless what is damaged is named, and the run ends the same, or refuses with what to do; a traceback is always a loss.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce, wraps
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from faults.kills import Whole, left_by  # noqa: E402
from faults.launched import LaunchedProcesses  # noqa: E402
from faults.table import Fault, main  # noqa: E402
from models import tiny_flux  # noqa: E402
from runs import make_data, plan_of, started, write_plan  # noqa: E402

SEED = 11
DISK_BYTES, FILES = 48 * 2**20, 100_000
SOON = 10.0
"""Seconds in which a run that waits for room, and is told to stop, is gone; and in which a second launch is refused."""
LONG = 120.0


# --- a disk --------------------------------------------------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT = 1, 32


@contextmanager
def disk(place: Path) -> Iterator[Path]:
    """A tmpfs of DISK_BYTES. Raises OSError where none can be mounted."""
    place.mkdir(parents=True)
    mount(place, 0, FILES)
    try:
        yield place
    finally:
        _LIBC.umount2(os.fsencode(place), 2)  # lazily: a process that was killed may not be gone yet
        place.rmdir()


def mount(place: Path, flags: int, files: int) -> None:
    """Mount a tmpfs, or mount it anew with other flags. files: how many it takes. Raises OSError."""
    if _LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, f"size={DISK_BYTES},nr_inodes={files}".encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(place))


def fill(place: Path, left: int) -> None:
    """Take all of a disk but for some bytes, in pages of 4,096."""
    with (place / "filler").open("ab") as file:
        while (free := os.statvfs(place).f_bavail * os.statvfs(place).f_frsize) > left:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free - left)
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:  # another process of the run has written meanwhile
                    raise


def use_up_files(place: Path) -> None:
    """Have it take no file more, though bytes are free."""
    found = os.statvfs(place)
    mount(place, _REMOUNT, found.f_files - found.f_ffree)


def make_room(place: Path) -> None:
    """Give it back."""
    (place / "filler").unlink(missing_ok=True)
    mount(place, _REMOUNT, FILES)


# --- runs ----------------------------------------------------------------------------------------------------------------------------------

DUTIES: Mapping[str, str] = {
    "the run is opened": "stages.open_run:write_whole",
    "the untrained model is kept": "stages.untrained:_keep",
    "metrics.jsonl is written": "stages.track:Log.write",
    "trace.jsonl is written": "stages.track:Trace.write",
    "an evaluation is kept": "stages.measured:Measured.save",
    "a checkpoint is written": "stages.save_leg:write_checkpoint",
    "the ledger is written": "stages.save_leg:write_whole",
    "previews are written": "stages.finish_leg:_write_previews",
    "the cache is written": "stages.cache:Cache.flush",
    "the model is published": "stages.finish:_write_model",
    "the adapter is published": "stages.finish:make_adapter",
    "the adapter comes into view": "stages.finish:show_adapter",
    "the report is written": "stages.run:write_report",
}
"""What is done, and the function that does it, by the place where it is looked up when it is called."""


def make_plan(world: Path) -> dict[str, Any]:
    """Every weight, then an adapter with a moving average; the cache lies on the run's disk."""
    plan = plan_of(world, log_every=1, save_every=2, keep=2, evaluate={"rows": 2, "every": 2}, cache={"folder": "cache"})
    plan["stages"] = [{**plan["stages"][0], "steps": 2}, {**plan["stages"][2], "steps": 6}]
    return plan


def make_world(folder: Path) -> Path:
    """Data, and a model without a VAE and with one."""
    make_data(folder / "data")
    tiny_flux(folder / "latent", pixels=False)
    tiny_flux(folder / "model", pixels=True)
    return folder


class Launch(LaunchedProcesses):
    """The processes of one launch in a folder."""

    def __init__(self, folder: Path, processes: int = 1, at: tuple[str, int, Callable[[], object]] | None = None, before: Callable[[], object] | None = None) -> None:
        """at: a duty, and what is done, in the main process, when it is come to for the n-th time. before: what is done in it at first."""
        self.folder, log = folder, folder.parent / f"{folder.name}-{time.monotonic_ns()}.log"  # beside the disk
        self._mark = mmap.mmap(-1, 1)

        def prepare(rank: int) -> None:
            import stages.room

            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            stages.room.LOOKS, stages.room._TRIES = 0.05, 0.5
            if before and rank == 0:
                before()
            if at is not None and rank == 0:
                duty, number, act = at
                self._watch(DUTIES[duty], number, act)

        super().__init__(started(["plan.yaml", "--out", "run", "--trace"], processes=processes, output=log, timeout=300, before=prepare), log)

    def _watch(self, function: str, number: int, act: Callable[[], object]) -> None:
        """In the process: act when the function is called for the n-th time."""
        module, _, path = function.partition(":")
        *inside, name = path.split(".")
        owner, calls, own = reduce(getattr, inside, import_module(module)), 0, os.getpid()
        original = getattr(owner, name)

        @wraps(original)
        def watching(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if os.getpid() == own and threading.current_thread() is threading.main_thread():
                calls += 1
                if calls == number:
                    act()
                    self._mark[0] = 1
            return original(*arguments, **named)

        setattr(owner, name, watching)

    @property
    def has_acted(self) -> bool:
        """Whether what was to be done at a duty is done."""
        return bool(self._mark[0])

    def kill(self) -> None:
        """End what is left of it."""
        self.send(signal.SIGKILL)
        self.wait(LONG)


def carried_out(folder: Path, plan: Mapping[str, Any], processes: int = 1) -> Launch:
    """A launch that is waited for."""
    write_plan(folder / "plan.yaml", plan)
    launch = Launch(folder, processes)
    launch.wait(LONG)
    launch.kill()
    return launch


def whole_run(folder: Path, plan: Mapping[str, Any], processes: int = 1) -> Whole:
    """The undisturbed run."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    launch = carried_out(folder, plan, processes)
    assert launch.codes() == [0] * processes, launch.said()
    return Whole(folder, time.monotonic() - began, {})


def other_than(whole: Whole, place: Path, *but: str) -> str:
    """What of a run is not as in the undisturbed one, but for warnings and what is named; nothing if all is."""
    mine, theirs = left_by(place), left_by(whole.folder)
    without = ("warning in metrics.jsonl", "save in metrics.jsonl" if "half" in but else "", *but)  # a run that was stopped has saved once more
    return ", ".join(sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name) and name not in without))


# --- a full disk ---------------------------------------------------------------------------------------------------------------------------

WAITS, TERM, INT, KILL = "room is made while it waits", "SIGTERM while it waits, then room", "SIGINT while it waits, then room", "kill -9 while it waits, then room"
_MAKES_FILES = ("a checkpoint is written", "an evaluation is kept", "the adapter is published", "the cache is written")


@dataclass(frozen=True)
class Full:
    """One try with a full disk."""

    number: int
    duty: str
    how: str
    call: int
    """The duty is come to for the n-th time."""
    left: int | None
    """Bytes; None where they are free, and no file more can be made."""
    processes: int = 1


def try_full(tried: Full, whole: Whole, world: Path, folder: Path) -> str:
    """Fill the disk, do what is asked, go on, and compare; what was lost, nothing if all was kept."""
    draw = np.random.default_rng([SEED, tried.number])
    place = folder / f"full-{tried.number}"
    name = f"{tried.duty}, call {tried.call}, {'no files' if tried.left is None else f'{tried.left} bytes'} left, {tried.how}, {tried.processes} processes"
    act = partial(use_up_files, place) if tried.left is None else partial(fill, place, tried.left)
    with disk(place):
        write_plan(place / "plan.yaml", make_plan(world))
        launch = Launch(place, tried.processes, (tried.duty, tried.call, act))
        try:
            lost = _full(tried, launch, place, whole, float(draw.uniform(0.2, 2.0)))
        finally:
            launch.kill()
        if not lost:
            lost = other_than(whole, place)
            if not lost and (left := [str(path) for path in (place / "run").rglob(".*.partial")]):
                lost = f"left {left}"
        return f"{name}: {lost}" if lost else ""


def _full(tried: Full, launch: Launch, place: Path, whole: Whole, pause: float) -> str:
    if launch.wait(LONG, until=lambda: launch.has_acted) and not launch.has_acted:
        return f"ended in {launch.codes()} before the disk was full: {launch.end()}"
    launch.wait(pause + 1.0, until=lambda: "waiting for room" in launch.said())
    ended = launch.wait(pause)
    if "Traceback" in launch.said():
        return f"a traceback: {launch.end()}"
    is_waiting = "waiting for room" in launch.said() and not ended
    if ended and launch.codes() == [0] * tried.processes:  # what was left was enough
        make_room(place)
        return ""
    if ended:
        return f"ended in {launch.codes()}: {launch.end()}"
    if broken := _broken_checkpoints(place / "run"):
        return f"while it waits {broken}"
    if tried.how == WAITS or not is_waiting:
        make_room(place)
        if not launch.wait(LONG) or launch.codes() != [0] * tried.processes:
            return f"with room again ended in {launch.codes()}: {launch.end()}"
        return "" if "Traceback" not in launch.said() else f"a traceback: {launch.end()}"
    if tried.how == KILL:
        launch.kill()
    else:
        launch.send(signal.SIGTERM if tried.how == TERM else signal.SIGINT)
        if not launch.wait(SOON):
            return f"there {SOON:.0f} seconds after {tried.how}: {launch.end()}"
        if launch.codes()[0] != 1 or "Traceback" in launch.said() or "full" not in launch.end():
            return f"ended in {launch.codes()}: {launch.end()}"
        if broken := _broken_checkpoints(place / "run"):
            return f"after it was stopped {broken}"
    make_room(place)
    again = Launch(place, tried.processes)
    again.wait(LONG)
    again.kill()
    return "" if again.codes() == [0] * tried.processes else f"typed again ended in {again.codes()}: {again.end()}"


def _broken_checkpoints(run: Path) -> str:
    from stages.checkpoint import read_checkpoint

    for folder in run.glob("stages/*/step-*"):
        try:
            read_checkpoint(folder)
        except ValueError as error:
            return f"{error}"
    return ""


def full_tries(whole: bool) -> list[Full]:
    """Each duty with each amount left and each way to go on, in an order drawn; the short form has one that fails in the middle of a checkpoint, and one that is stopped."""
    if not whole:
        return [Full(0, "a checkpoint is written", WAITS, 3, 60_000), Full(1, "the adapter is published", TERM, 1, 0)]
    draw, tries = np.random.default_rng(SEED), []
    for duty in DUTIES:
        for how in (WAITS, WAITS, TERM, INT, KILL):
            for processes in (1, 2):
                call = int(draw.integers(1, {"metrics.jsonl is written": 30, "trace.jsonl is written": 8, "a checkpoint is written": 5, "an evaluation is kept": 6}.get(duty, 2)))
                left = int(draw.choice([0, 0, 4096, draw.integers(0, 40_000), draw.integers(0, 300_000)]))
                tries.append(Full(len(tries), duty, how, call, left, processes))
    tries += [Full(len(tries) + number, duty, how, 1, None) for number, (duty, how) in enumerate(product(_MAKES_FILES, (WAITS, TERM, KILL)))]
    return tries


# --- a disk that fails, and a folder that is gone ------------------------------------------------------------------------------------------


def read_only(folder: Path) -> None:
    """Let what is asked for by its path be read only, as a disk that an error has made so."""
    for flags in (4096, 4096 | _REMOUNT | _READ_ONLY):  # a bind mount onto itself, then read-only: files that are open stay so
        if _LIBC.mount(os.fsencode(folder), os.fsencode(folder), None, flags, None):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))


def writable(folder: Path) -> None:
    """Take that back."""
    _LIBC.umount2(os.fsencode(folder), 2)


def _fails(name: str, error: int) -> None:
    """In the process: what the system is asked fails."""

    def failing(*arguments: Any, **named: Any) -> Any:
        raise OSError(error, os.strerror(error))

    setattr(os, name, failing)


def try_failing(what: str, duty: str, whole: Whole, world: Path, folder: Path) -> str:
    """A disk that turns read-only, answers with an input/output error, or a run folder that is deleted, moved away or replaced: the run ends in words, and goes on once all is well."""
    place = folder / f"fails-{time.monotonic_ns()}"
    with disk(place):
        write_plan(place / "plan.yaml", make_plan(world))
        run, kept = place / "run", place / "kept"
        acts: dict[str, Callable[[], object]] = {
            "read-only": lambda: read_only(run),
            "input/output errors": lambda: _fails("fsync", 5),
            "the run folder is moved away": lambda: run.rename(kept),
            "the run folder is replaced": lambda: (run.rename(kept), run.mkdir()),
        }
        launch = Launch(place, 1, (duty, 2, acts[what]))
        try:
            ended = launch.wait(LONG)
        finally:
            launch.kill()
        if what == "read-only":
            writable(run)
        said = launch.said()
        if not ended or launch.codes() != [1] or "Traceback" in said or "the same command goes on" not in said:
            return f"{what} while {duty}: ended in {launch.codes()}: {launch.end()}"
        if what.startswith("the run folder"):
            if found := [*run.glob("stages/*/step-*"), *run.glob("*.json*"), *run.glob("*.yaml")]:
                return f"{what} while {duty}: wrote {[path.name for path in found]} into another folder, which could be taken for a run's"
            shutil.rmtree(run, ignore_errors=True)
            kept.rename(run)
        again = carried_out(place, make_plan(world))
        lost = other_than(whole, place) if again.codes() == [0] else f"typed again ended in {again.codes()}: {again.end()}"
        return f"{what} while {duty}: {lost}" if lost else ""


def obey_permissions() -> None:
    """In the process: let the bits of files hold for root too."""
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if _LIBC.capget(header, held):
        raise OSError(ctypes.get_errno(), "capget")
    held[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if _LIBC.capset(header, held):
        raise OSError(ctypes.get_errno(), "capset")


def try_not_writable(how: str, world: Path, folder: Path) -> str:
    """A run folder that cannot be written into is refused as the plan's affair."""
    place = folder / f"refused-{time.monotonic_ns()}"
    with disk(place):
        write_plan(place / "plan.yaml", make_plan(world))
        run = place / "run"
        if how == "a file":
            run.write_text("a file")
        else:
            run.mkdir()
        if how == "read-only":
            read_only(run)
        if how == "for its owner to read":
            run.chmod(0o555)
        launch = Launch(place, before=obey_permissions if how == "for its owner to read" else None)
        try:
            ended = launch.wait(LONG)
        finally:
            launch.kill()
        if how == "read-only":
            writable(run)
        is_refused = ended and launch.codes() == [2] and "Traceback" not in launch.said() and "pass --out" in launch.said()
        return "" if is_refused else f"{how}: ended in {launch.codes()}: {launch.end()}"


# --- damage --------------------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Flip a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    """Take the second half away."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Leave a file of no bytes, as a disk does after the power failed."""
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    """Bytes of something else."""
    path.write_bytes(np.random.default_rng(SEED).bytes(max(100, path.stat().st_size if path.is_file() else 100)))


def another_digit(path: Path) -> None:
    """A number that is still one, and another."""
    text = path.read_text()
    at = next(place for place, letter in enumerate(text) if letter in "123456789" and place > len(text) // 3)
    path.write_text(text[:at] + str(int(text[at]) % 9 + 1) + text[at + 1 :])


HARMS: Mapping[str, Callable[[Path], object]] = {"a flipped bit": flip, "half a file": cut_short, "no bytes": empty, "garbage": garbage, "a missing file": Path.unlink, "another digit": another_digit}


def _folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


@dataclass(frozen=True)
class Damage:
    """One kind of damage, and what is to come of it."""

    name: str
    of: str
    """Of which run: `half`, which was stopped in its last stage, or `done`."""
    harm: Callable[[Path], object]
    """Is given the run folder."""
    says: str
    """What has to be said; nothing where nothing was lost."""
    refused: bool = False
    cure: Callable[[Path], object] | None = None
    """What the refusal says to do: then the run ends the same."""
    but: tuple[str, ...] = ()
    """What may differ in the end."""


def _newest(run: Path, stage: str = "2-refine") -> Path:
    return max((run / "stages" / stage).glob("step-*"))


def _all_newer(run: Path, harm: Callable[[Path], object]) -> None:
    for folder in (run / "stages" / "2-refine").glob("step-*"):
        harm(folder / "adapter.safetensors")


def _swapped(run: Path) -> None:
    one, two, aside = run / "stages" / "1-found", run / "stages" / "2-refine", run / "stages" / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def _into_links(run: Path) -> None:
    """A checkpoint that lies elsewhere, and is linked to."""
    folder = _newest(run)
    elsewhere = run.parent / f"elsewhere-{run.name}-{time.monotonic_ns()}"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def _leftovers(run: Path) -> None:
    stage = run / "stages" / "2-refine"
    (stage / ".step-000006.partial").write_text("a file where a folder is made")
    (stage / ".step-000004.old").mkdir()
    (stage / ".step-000004.old" / "adapter.safetensors").write_bytes(b"half")
    (stage / "step-final").mkdir()
    (run / ".ledger.json.partial").write_text("half")
    (run / ".adapter.partial").mkdir()
    (run / ".adapter.partial" / "half").write_text("half")


def _foreign(run: Path, other: Path) -> None:
    """A checkpoint of another plan's run, as the newest one."""
    shutil.rmtree(_newest(run))
    shutil.copytree(max((other / "stages" / "2-refine").glob("step-*")), run / "stages" / "2-refine" / max((other / "stages" / "2-refine").glob("step-*")).name)


def _without(run: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(run / "stages" / stage)


def damages(other: Path) -> list[Damage]:
    """All of them. other: the run folder of another plan."""
    found: list[Damage] = []
    for name, harm in HARMS.items():
        for file in ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
            if name == "another digit" and file.endswith(".safetensors"):
                continue
            found.append(Damage(f"{name}: {file} of the newest checkpoint", "half", lambda run, harm=harm, file=file: harm(_newest(run) / file), "skipping a checkpoint"))  # type: ignore[misc]
        if name != "another digit":
            found.append(Damage(f"{name}: every checkpoint of the stage under way", "half", lambda run, harm=harm: _all_newer(run, harm), "skipping a checkpoint"))  # type: ignore[misc]
            found.append(
                Damage(f"{name}: the checkpoint of a finished stage", "half", lambda run, harm=harm: harm(_newest(run, "1-found") / "transformer.safetensors"), "'found' was finished", True, _without_all)  # type: ignore[misc]
            )
            found.append(
                Damage(f"{name}: the last checkpoint of a run that is done", "done", lambda run, harm=harm: harm(_newest(run) / "ema.safetensors"), "trained to its end", True, lambda run: _without(run, "2-refine"), ("publish in metrics.jsonl",))  # type: ignore[misc]
            )
            found.append(Damage(f"{name}: the published adapter", "done", lambda run, harm=harm: harm(run / "adapter" / "pytorch_lora_weights.safetensors"), ""))  # type: ignore[misc]
        for file in ("ledger.json", "environment.json", "plan.yaml"):
            found.append(Damage(f"{name}: {file}", "half", lambda run, harm=harm, file=file: harm(run / file), ""))  # type: ignore[misc]
        for file in ("base-8.json", "base-8-accuracy.json", "base-8.safetensors"):
            if name == "another digit" and file != "base-8.json":
                continue
            said = "" if name == "a missing file" else "measured anew"
            found.append(Damage(f"{name}: evaluations/{file}", "half", lambda run, harm=harm, file=file: harm(run / "evaluations" / file), said))  # type: ignore[misc]
        said = "" if name == "a missing file" else "changes since the stage began are left out"
        found.append(Damage(f"{name}: evaluations/2-refine-start.json", "half", lambda run, harm=harm: harm(run / "evaluations" / "2-refine-start.json"), said, but=("eval in metrics.jsonl",)))  # type: ignore[misc]
    of_metrics = tuple(f"{kind} in metrics.jsonl" for kind in ("step", "eval", "shares", "handoff", "stage", "ledger", "preview", "save", "publish", "memory"))
    return [
        *found,
        Damage("half of metrics.jsonl is gone", "half", lambda run: cut_short(run / "metrics.jsonl"), "metrics.jsonl is", but=of_metrics),
        Damage("metrics.jsonl is gone", "half", lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is", but=of_metrics),
        Damage("metrics.jsonl is garbage", "half", lambda run: garbage(run / "metrics.jsonl"), "", but=of_metrics),
        Damage("half of trace.jsonl is gone", "half", lambda run: cut_short(run / "trace.jsonl"), "trace.jsonl is", but=("the trace", "stages/2-refine/step-000006/state.json")),
        Damage("a finished stage is gone", "half", lambda run: _without(run, "1-found"), "'found' was finished", True, lambda run: _without(run, "2-refine")),
        Damage("two stages are swapped", "half", _swapped, "another plan", True, _swapped),
        Damage("a checkpoint of another plan", "half", lambda run: _foreign(run, other), "another plan", True, lambda run: _without(run, "2-refine")),
        Damage("a checkpoint under another step's name", "half", lambda run: shutil.copytree(_newest(run), _newest(run).with_name("step-000099")), "skipping a checkpoint"),
        Damage("a manifest that is a folder", "half", lambda run: _folder_for(_newest(run) / "manifest.json"), "skipping a checkpoint"),
        Damage("a checkpoint that is a file", "half", lambda run: (shutil.rmtree(_newest(run)), (run / "stages" / "2-refine" / "step-000099").write_text("a file")), "skipping a checkpoint"),
        Damage("a checkpoint that is a link", "half", _into_links, ""),
        Damage("a dangling link in a checkpoint", "half", lambda run: ((_newest(run) / "ema.safetensors").unlink(), (_newest(run) / "ema.safetensors").symlink_to("nowhere")), "skipping a checkpoint"),
        Damage("what killed runs leave, and more", "half", _leftovers, "", but=("stages/2-refine/step-final",)),  # which is none of ours, and stays
        Damage("the adapter folder is gone", "done", lambda run: shutil.rmtree(run / "adapter"), ""),
        Damage("the adapter folder is empty", "done", lambda run: (shutil.rmtree(run / "adapter"), (run / "adapter").mkdir()), ""),
        Damage("the adapter is a file", "done", lambda run: (shutil.rmtree(run / "adapter"), (run / "adapter").write_text("a file")), ""),
        Damage("half of the published model's weights", "done", lambda run: cut_short(run / "model" / "transformer" / "diffusion_pytorch_model.safetensors"), ""),
        Damage("a flipped bit in the published model's weights", "done", lambda run: flip(run / "model" / "transformer" / "diffusion_pytorch_model.safetensors"), ""),
        Damage("the published model's mark is garbage", "done", lambda run: garbage(run / "model" / "medley.json"), ""),
    ]


def _without_all(run: Path) -> None:
    _without(run, "1-found", "2-refine")


def _only_lines(metrics: Path) -> None:
    """Leave what of a log is JSON, for the comparison; the report's reader does the same."""

    def is_json(line: bytes) -> bool:
        try:
            json.loads(line)
        except ValueError:
            return False
        return True

    lines = metrics.read_bytes().splitlines(keepends=True)
    if not all(map(is_json, lines)):
        metrics.write_bytes(b"".join(filter(is_json, lines)))


def try_damage(number: int, runs: Mapping[str, Path], whole: Whole, world: Path, folder: Path) -> tuple[str, str]:
    """Damage a copy of a run, type its command, and look at what comes of it. Gives the damage's name, and what was lost."""
    damage = damages(runs["other"])[number]
    place = folder / f"damage-{number}"
    shutil.copytree(runs[damage.of].parent, place, symlinks=True)
    damage.harm(place / "run")
    launch = carried_out(place, make_plan(world))
    said = " ".join(launch.said().split())
    if "Traceback" in said or damage.says not in said or launch.codes() != [2 if damage.refused else 0]:
        return damage.name, f"{damage.name}: ended in {launch.codes()}, '{damage.says}' {'was' if damage.says in said else 'was not'} said: {launch.end()}"
    if damage.refused:
        assert damage.cure is not None
        damage.cure(place / "run")
        launch = carried_out(place, make_plan(world))
        if launch.codes() != [0]:
            return damage.name, f"{damage.name}: cured, it ended in {launch.codes()}: {launch.end()}"
    _only_lines(place / "run" / "metrics.jsonl")
    lost = other_than(whole, place, damage.of, *damage.but)
    return damage.name, f"{damage.name}: {lost}" if lost else ""


# --- two launches on one folder ------------------------------------------------------------------------------------------------------------


def try_lock(how: str, processes: int, whole: Whole, world: Path, folder: Path) -> str:
    """Two launches on one run folder: one trains, the other is refused in seconds, and a kill leaves no lock behind."""
    place = folder / f"lock-{time.monotonic_ns()}"
    place.mkdir(parents=True)
    with_workers = {"workers": 1} if how == _LOCKS[-1] else {}
    write_plan(place / "plan.yaml", {**make_plan(world), **with_workers})
    name = f"{how}, {processes} processes"
    if how == "at the same moment":
        launches = [Launch(place, processes), Launch(place, processes)]
        for launch in launches:
            launch.wait(LONG)
            launch.kill()
        codes = sorted((launch.codes() for launch in launches), key=str)
        refused = next((launch for launch in launches if launch.codes()[0] == 2), None)
        if refused is None or [0] * processes not in codes or "another launch" not in refused.said():
            return f"{name}: ended in {codes}: {[launch.end() for launch in launches]}"
    else:
        first = Launch(place, processes, ("a checkpoint is written", 2, lambda: None))
        first.wait(LONG, until=lambda: first.has_acted)
        if how == "one after the other":
            began, second = time.monotonic(), Launch(place, processes)
            second.wait(LONG, until=lambda: second.codes()[0] is not None)
            seconds = time.monotonic() - began
            gone = second.wait(2 * SOON)
            second.kill()
            if second.codes()[0] != 2 or not gone or seconds > 2 * SOON or "another launch" not in second.said():
                return f"{name}: the second ended in {second.codes()} after {seconds:.0f} s: {second.end()}"
            first.wait(LONG)
            first.kill()
        else:
            first.send(signal.SIGKILL)  # and its data workers find out themselves
            first.wait(LONG)
            first = Launch(place, processes)
            first.wait(LONG)
            first.kill()
        if first.codes() != [0] * processes:
            return f"{name}: the first ended in {first.codes()}: {first.end()}"
    lost = other_than(whole, place, *(["adapter/pytorch_lora_weights.safetensors"] if with_workers else []))  # the plan stands in it
    return f"{name}: {lost}" if lost else ""


# --- one cache of two runs -----------------------------------------------------------------------------------------------------------------

_SHARED = ("without a limit", "with a limit that holds a part of it", "one of them is killed by kill -9 and goes on")


def cached_plan(world: Path, cache: Path, *, limit: bool) -> dict[str, Any]:
    """A model with a VAE, and a cache, which may be too small for what both stages encode."""
    plan = make_plan(world)
    plan["stages"] = [{**stage, "resolution": 16, "batch": {"images": 8, "micro": 2}} for stage in plan["stages"]]
    return {**plan, "model": str(world / "latent"), "cache": {"folder": str(cache), **({"limit": "0.02MB"} if limit else {})}}


def try_shared(how: str, world: Path, folder: Path) -> str:
    """Two runs at once that fill one cache, and use it: each ends as one that has a cache of its own."""
    place, limit = folder / f"shared-{time.monotonic_ns()}", how == _SHARED[1]
    alone = whole_run(place / "alone", cached_plan(world, place / "own", limit=limit))
    launches = []
    for number in range(2):
        (place / str(number)).mkdir()
        write_plan(place / str(number) / "plan.yaml", cached_plan(world, place / "shared", limit=limit))
        launches.append(Launch(place / str(number), 1, ("a checkpoint is written", 1, lambda: None)))
    if how == _SHARED[2]:
        launches[0].wait(LONG, until=lambda: launches[0].has_acted)
        launches[0].kill()
        launches[0] = Launch(place / "0", 1)
    for number, launch in enumerate(launches):
        launch.wait(LONG)
        launch.kill()
        if launch.codes() != [0] or "Traceback" in launch.said():
            return f"{how}: ended in {launch.codes()}: {launch.end()}"
        if lost := other_than(alone, place / str(number), "adapter/pytorch_lora_weights.safetensors"):  # the plan stands in it
            return f"{how}: {lost}"
    return ""


# --- all of them ---------------------------------------------------------------------------------------------------------------------------

_SHORT_DAMAGES = ("a flipped bit: adapter.safetensors of the newest checkpoint",)
_LOCKS = ("one after the other", "at the same moment", "the first is killed by kill -9, not its workers")
_FAILURES = ("read-only", "input/output errors", "the run folder is moved away", "the run folder is replaced")
_FAIL_AT = ("metrics.jsonl is written", "an evaluation is kept", "a checkpoint is written", "the report is written")


def carry_out(whole: bool) -> list[Fault]:
    """A row for each duty that a full disk was met in, and for each other kind of fault."""
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(os.cpu_count(), get_context("fork"), torch.set_num_threads, (1,)) as pool:
        folder = Path(name)
        world = make_world(folder / "world")
        undisturbed = {processes: pool.submit(whole_run, folder / "whole" / str(processes), make_plan(world), processes) for processes in ((1, 2) if whole else (1,))}
        stopped = pool.submit(_half, folder / "half", make_plan(world))
        other = pool.submit(_half, folder / "other", {**make_plan(world), "seed": 4}) if whole else stopped
        wholes = {processes: future.result() for processes, future in undisturbed.items()}
        done = wholes[1]
        runs = {"done": done.folder / "run", "half": stopped.result(), "other": other.result()}
        asked = full_tries(whole)
        full = [(each, pool.submit(_or_said, try_full, each, wholes[each.processes], world, folder)) for each in asked]
        failing = [(f"{what}: the run ends in words, and goes on", pool.submit(_or_said, try_failing, what, at, done, world, folder)) for what in _FAILURES for at in (_FAIL_AT if whole else ())]
        failing += [("a run folder that cannot be written into is refused", pool.submit(_or_said, try_not_writable, how, world, folder)) for how in (("a file", "read-only", "for its owner to read") if whole else ("read-only",))]
        named = [each.name for each in damages(runs["other"])]
        numbers = range(len(named)) if whole else [named.index(each) for each in _SHORT_DAMAGES]
        harmed = [pool.submit(try_damage, number, runs, done, world, folder) for number in numbers]
        locks = [(how, pool.submit(try_lock, how, processes, wholes[processes], world, folder)) for how in (_LOCKS if whole else _LOCKS[1:2]) for processes in ((1, 2) if whole else (1,))]
        shared = [pool.submit(try_shared, how, world, folder) for how in (_SHARED if whole else ())]
        rows: dict[str, list[str]] = {}
        for each, future in full:
            rows.setdefault(f"the disk is full when {each.duty}" if each.left is not None else "no file more can be made on the disk, though bytes are free", []).append(future.result())
        for row, future in failing:
            rows.setdefault(row, []).append(future.result())
        for found in harmed:
            damaged, lost = found.result()
            rows.setdefault(f"damaged: {damaged.split(': ', 1)[-1]}", []).append(lost)
        for how, future in locks:
            rows.setdefault(f"two launches on one folder: {how}", []).append(future.result())
        for each in shared:
            rows.setdefault("two runs that share a cache", []).append(each.result())
    return [Fault(row, len(lost), lost.count(""), tuple(filter(None, lost))) for row, lost in rows.items()]


def _half(folder: Path, plan: Mapping[str, Any]) -> Path:
    """A run that was stopped in its last stage, with two checkpoints of it; gives its folder."""
    place = folder / "1"
    place.mkdir(parents=True)
    write_plan(place / "plan.yaml", plan)
    launch = Launch(place, 1, ("a checkpoint is written", 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    launch.wait(LONG)
    launch.kill()
    assert launch.codes() == [128 + signal.SIGTERM], launch.said()
    assert len(list((place / "run" / "stages" / "2-refine").glob("step-*"))) == 2, launch.said()
    return place / "run"


def _or_said(carry_out_one: Callable[..., str], *arguments: Any) -> str:
    """What was lost; where no disk can be mounted, that."""
    try:
        return carry_out_one(*arguments)
    except PermissionError as error:
        return f"not tried: a disk of its own needs root ({error})"


_AS_ROOT = ("unshare", "--user", "--map-root-user", "--mount")
"""Runs a command as root of a namespace of its own, where it may mount."""


if __name__ == "__main__":
    if os.geteuid() and shutil.which(_AS_ROOT[0]) and subprocess.run([*_AS_ROOT, "true"], capture_output=True, check=False).returncode == 0:
        os.execvp(_AS_ROOT[0], [*_AS_ROOT, sys.executable, "-m", "faults.storage", *sys.argv[1:]])
    sys.exit(main("storage", __doc__, carry_out))

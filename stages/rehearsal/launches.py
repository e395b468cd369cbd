"""Launches: the two runs of a rehearsal, as processes of their own. One goes straight through, one is killed inside a stage and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.log_files import log_lines
from stages.plan import Plan

_TRAIN = Path(__file__).resolve().parents[2] / "train.py"
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_", "MASTER_", "NODE_RANK")
"""What a launcher leaves in the environment begins with these words; a process of a rehearsal is none of its."""

_LONGEST = 1800.0  # seconds, after which a run counts as stuck and is ended
_TRIES = 4  # runs begun to be killed
_SHOWN = 12  # last lines of a run that failed


@dataclass(frozen=True)
class Killed:
    """Where a run was killed."""

    stage: str
    step: int
    """The last step that it had logged."""
    saved: int
    """The step of its newest checkpoint."""


@dataclass(frozen=True)
class Launched:
    """What became of the two runs."""

    straight: Path
    killed: Path
    at: Killed | None
    """None if the run was at its end, or had failed, before it could be killed inside a stage."""
    failures: tuple[str, ...]
    """Of each run that failed, its exit code and last lines."""
    seconds: float


def launch_both(plan: Path, small: Plan, folder: Path, tell: Callable[[str], None]) -> Launched:
    """Carry out a plan twice, side by side. small: the same, read. tell: is told what is under way, about once a second."""
    straight, killed = folder / "straight", folder / "killed"
    began = time.monotonic()
    first = _start(plan, straight)
    while any(source.prior is not None for source in small.sources.values()) and first.poll() is None and not logged(straight, "step"):
        time.sleep(0.1)  # what the model makes itself is made once
    second = _start(plan, killed)
    at: Killed | None = None
    again: subprocess.Popen[bytes] | None = None
    try:
        told, tries = 0.0, 1
        while (first.poll() is None or (again or second).poll() is None) and time.monotonic() - began < _LONGEST:
            if at is None and second.poll() is None and killable(small, killed) is not None:
                # Held still first, so that what is read is what is there when it is killed.
                os.kill(second.pid, signal.SIGSTOP)
                at = killable(small, killed)
                os.kill(second.pid, signal.SIGKILL if at is not None else signal.SIGCONT)
                if at is not None:
                    second.wait()
                    again = _start(plan, killed)
            elif at is None and second.poll() == 0 and tries < _TRIES:
                # It was through before it was looked at: steps take milliseconds, and a busy machine looks away for longer.
                tries += 1
                shutil.rmtree(killed)
                second = _start(plan, killed)
            if time.monotonic() - told > 1:
                told = time.monotonic()
                tell(f"straight through: {_place(straight)}; {'killed and started again' if again else 'to be killed'}: {_place(killed)}")
            time.sleep(0.01)
    finally:
        for process in (first, second, again):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    last = again or second
    failures = [_failure("straight through", first.returncode, straight)] if first.returncode else []
    if last.returncode:
        is_same = bool(failures) and _lines(straight)[-1:] == _lines(killed)[-1:]
        failures.append(f"the run to be killed ended alike, with exit code {last.returncode}" if is_same else _failure("to be killed", last.returncode, killed))
    return Launched(straight, killed, at, tuple(failures), time.monotonic() - began)


def killable(plan: Plan, folder: Path) -> Killed | None:
    """Where a run stands, if it may be killed: in the second half of its stages, after a checkpoint inside a stage and further steps that are not saved."""
    eligible = [stage.name for stage in plan.stages][len(plan.stages) // 2 :]
    lines = [line for line in logged(folder) if line["event"] in ("step", "save")]
    if not lines or lines[-1]["event"] != "step" or lines[-1]["stage"] not in eligible:
        return None
    stage, step = str(lines[-1]["stage"]), int(str(lines[-1]["step"]))
    steps = next(each.steps for each in plan.stages if each.name == stage)
    saved = [int(str(line["step"])) for line in lines if line["stage"] == stage and line["event"] == "save"]
    # A save is logged before it is written: it counts once a later step is logged.
    if not saved or not saved[-1] < step < steps:
        return None
    return Killed(stage, step, saved[-1])


def logged(folder: Path, event: str | None = None) -> list[dict[str, object]]:
    """The whole lines of metrics.jsonl, of one event or of all; none if there is no file yet."""
    lines = []
    for line in log_lines(folder, "metrics"):
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the last one, half written
        if isinstance(value, dict) and event in (None, value.get("event")):
            lines.append(value)
    return lines


def _start(plan: Path, folder: Path) -> subprocess.Popen[bytes]:
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, str(_TRAIN), str(plan), "--out", str(folder), "--trace"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(os.environ))


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of one process of its own, on the CPU, with one thread: the two runs share the machine, and the number of threads changes sums."""
    own = {name: value for name, value in given.items() if not name.startswith(_LAUNCHERS)}
    return own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}


def _place(folder: Path) -> str:
    steps = logged(folder, "step")
    return f"{steps[-1]['stage']} {steps[-1]['step']}" if steps else "begins"


def _failure(name: str, code: int, run: Path) -> str:
    return "\n".join([f"the run {name} ended with exit code {code}; {run.with_suffix('.log')} says:", *(f"    {line}" for line in _lines(run)[-_SHOWN:])])


def _lines(run: Path) -> Sequence[str]:
    """What a run printed."""
    return run.with_suffix(".log").read_text(encoding="utf-8", errors="replace").rstrip().splitlines()

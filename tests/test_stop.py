"""A signal while something is measured or sampled: it is broken off, nothing of the steps is lost, and the run ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import stages.open_run
import stages.prior
import stages.run
from runs import adapter_bytes, carry_out, events, make_world, plan_of, started, write_plan
from stages.aside import aside

pytestmark = pytest.mark.launch


def told_at(number: int, file: Path, folder: Path, processes: int) -> tuple[Sequence[int], str]:
    """Launch a run whose last process is told to stop when it begins to measure or sample for the so many-th time; gives exit codes and what was printed."""

    def before(rank: int) -> None:
        count = 0

        def telling(*arguments: Any) -> AbstractContextManager[None]:
            nonlocal count
            count += 1
            if count == number and rank == processes - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return aside(*arguments)

        for module in (stages.run, stages.open_run):
            setattr(module, "aside", telling)  # noqa: B010

    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    children = started([str(file), "--out", str(folder), "--trace"], processes=processes, output=log, before=before)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], log.read_text()


BEFORE, LAST = "before a step of 'follow'", "after the last step of 'follow', saved"
# At which of all that is measured and sampled a launch is told to stop: of the untrained model held-out rows and previews, the stage's start; after each step; after the last one twice.
PLACES = {
    1: [(1, BEFORE), (3, BEFORE), (2, "after step 1 of 'follow', saved"), (1, BEFORE), (3, LAST), (2, LAST)],
    2: [(4, "after step 1 of 'follow', saved"), (3, LAST)],
}


@pytest.mark.parametrize("processes", [1, 2])
def test_signal_breaks_off_what_is_measured_and_the_run_ends_as_if_it_had_not_come(processes: int, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    stage = {**plan_of(world)["stages"][1], "precision": "fp32", "lr": 0.05, "ema": 0.5}
    plan = plan_of(world, evaluate={"rows": 2, "every": 1}, save_every=50, log_every=1)
    plan["stages"] = [{**stage, "name": "follow", "mix": {"adaptive": {"photos": 3, "edits": 1}, "lookback": 1}, "steps": 3}, {**stage, "name": "after", "steps": 1}]
    carry_out(tmp_path / "whole", plan, "--trace", processes=processes)
    file, folder = write_plan(tmp_path / "plan.yaml", plan), tmp_path / "stopped"
    for number, words in PLACES[processes]:
        codes, said = told_at(number, file, folder, processes)
        assert set(codes) == {128 + signal.SIGTERM}, said
        assert f"stopped by SIGTERM {words}" in said, said
    codes, said = told_at(10**6, file, folder, processes)
    assert codes == [0] * processes, said
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")
    assert (folder / "trace.jsonl").read_bytes() == (tmp_path / "whole" / "trace.jsonl").read_bytes()
    assert (folder / "ledger.json").read_bytes() == (tmp_path / "whole" / "ledger.json").read_bytes()
    clock = ("time", "seconds", "encoded")
    for kind in ("eval", "shares", "preview", "handoff", "stage"):
        of_each = [[{name: value for name, value in line.items() if name not in clock} for line in events(run, kind)] for run in (tmp_path / "whole", folder)]
        assert of_each[0] == of_each[1], kind


def test_images_that_the_model_makes_first_are_gone_on_with_where_a_signal_broke_them_off(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    source = {"prior": {"prompts": ["a red disc", "a blue square"], "count": 9, "steps": 2}}
    plan = plan_of(world, previews={"rows": 0}, evaluate={"rows": 0}, cache="none")
    plan = {**plan, "sources": {"prior": source}, "stages": [{**plan["stages"][1], "steps": 1, "batch": 2}]}
    file, folder = write_plan(tmp_path / "plan.yaml", plan), tmp_path / "run"
    calls: list[int] = []

    def before(rank: int) -> None:
        original = stages.prior.sample

        def telling(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return original(*arguments)

        stages.prior.sample = telling

    log = tmp_path / "log"
    [child] = started([str(file), "--out", str(folder)], output=log, before=before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT, log.read_text()
    assert "stopped by SIGINT before a step was made" in log.read_text()
    [half] = (folder / "prior").glob(".*.partial")
    made = {file.name: file.stat().st_mtime_ns for file in half.glob("*.png")}
    assert len(made) == 4
    assert "4 of them are there already" in carry_out(folder, plan)
    [whole] = (folder / "prior").glob("prior-*")
    assert made.items() <= {file.name: file.stat().st_mtime_ns for file in whole.glob("*.png")}.items()
    assert len(list(whole.glob("*.png"))) == 9


def test_a_run_that_needs_images_which_another_is_making_waits_for_them_and_heeds_signals(tmp_path: Path) -> None:
    world, gate = make_world(tmp_path / "world"), tmp_path / "gate"
    source = {"prior": {"prompts": ["a red disc", "a blue square"], "count": 3, "steps": 1}}
    plan = plan_of(world, previews={"rows": 0}, evaluate={"rows": 0}, cache={"folder": str(tmp_path / "cache")})
    file = write_plan(tmp_path / "plan.yaml", {**plan, "sources": {"prior": source}, "stages": [{**plan["stages"][1], "steps": 1, "batch": 2}]})

    def slow(rank: int) -> None:
        original = stages.prior.sample

        def sample(*arguments: Any) -> Any:
            gate.with_suffix(".reached").touch()
            until(gate.exists)
            return original(*arguments)

        stages.prior.sample = sample

    def until(holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.02)

    def begun(name: str, processes: int = 1, before: Callable[[int], None] | None = None) -> tuple[list[int], Path]:
        return started([str(file), "--out", str(tmp_path / name)], processes=processes, output=tmp_path / f"{name}.log", before=before), tmp_path / f"{name}.log"

    def waits(log: Path) -> bool:
        return log.exists() and "another run is making the images" in log.read_text()

    def ended(children: list[int]) -> list[int]:
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    first, log_of_first = begun("first", before=slow)
    until(gate.with_suffix(".reached").exists)
    told, log = begun("told", 2)
    until(lambda: waits(log))
    os.kill(told[1], signal.SIGTERM)
    assert ended(told) == [128 + signal.SIGTERM] * 2, log.read_text()
    second, log_of_second = begun("second", 2)
    until(lambda: waits(log_of_second))
    gate.touch()
    assert ended(first) == [0], log_of_first.read_text()
    assert ended(second) == [0, 0], log_of_second.read_text()
    assert "makes its 3 images" in " ".join(log_of_first.read_text().split())
    assert "makes its" not in log_of_second.read_text()
    [made] = (tmp_path / "cache" / "prior").glob("prior-*")
    assert len(list(made.glob("*.png"))) == 3

"""What the kill matrix of tests/faults/kills.py has found, each as the instant at which it happened."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

import stages.save_leg
from runs import break_pixels, carry_out, events, free_port, make_world, plan_of, started, write_plan, write_tars
from stages.checkpoint import read_checkpoint
from stages.finish import is_published

pytestmark = pytest.mark.launch


def test_run_killed_between_its_last_checkpoint_and_the_ledger_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    plan = plan_of(world, previews={"rows": 0}, evaluate={"rows": 1})
    plan["stages"] = [{**plan["stages"][1], "steps": 3}]
    keep = stages.save_leg.keep_newest

    def killed(folder: Path, number: int, written: int) -> None:
        if written == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        keep(folder, number, written)

    with monkeypatch.context() as patch:
        patch.setattr(stages.save_leg, "keep_newest", killed)
        carry_out(tmp_path / "run", plan, kill_at=10**9)
    ledger, stage = tmp_path / "run" / "ledger.json", tmp_path / "run" / "stages" / "1-expose"
    assert json.loads(ledger.read_text())["stages"][0]["images"] == 16
    carry_out(tmp_path / "run", plan)
    assert json.loads(ledger.read_text())["stages"][0]["images"] == 24
    assert [folder.name for folder in stage.iterdir()] == ["step-000003"]


def _before_the_line() -> None:
    from stages.track import Log

    write = Log.write
    Log.write = lambda log, record: _end() if record["event"] == "publish" else write(log, record)  # type: ignore[method-assign]


def _before_it_is_shown() -> None:
    from stages import finish

    finish.show_adapter = lambda folder: _end()


def _between_the_renames() -> None:
    rename = Path.rename
    Path.rename = lambda path, target: _end() if path.name == ".adapter.partial" else rename(path, target)  # type: ignore[method-assign]


def _once_it_is_shown() -> None:
    from stages import finish, publish

    sync = publish.sync
    publish.sync = lambda path: _end() if path.name == "run" else sync(path)  # the run's folder, right after the last rename
    assert finish.show_adapter is publish.show_adapter


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_publication_has_one_line_whichever_instant_around_it_a_run_is_killed_at(tmp_path: Path) -> None:
    """The line comes before the adapter is in view; of a stage that others follow it stands where the next one is killed before its first checkpoint."""
    folder = tmp_path / "run"
    plan = plan_of(make_world(tmp_path / "world"), previews={"rows": 0}, evaluate={"rows": 0}, log_every=1)
    first, second = ({**plan["stages"][1], "name": name, "precision": "fp32", "steps": 2} for name in ("first", "second"))
    carry_out(folder, {**plan, "stages": [first]})
    published = events(folder, "publish")
    assert len(published) == 1
    checkpoint = folder / "stages" / "1-first" / "step-000002"
    assert is_published(folder, read_checkpoint(checkpoint))

    def killed(how: Callable[[], None]) -> None:
        file = write_plan(tmp_path / "both.yaml", {**plan, "stages": [first, second]})
        [number] = started([str(file), "--out", str(folder)], output=tmp_path / "log", before=lambda rank: how())
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL, (tmp_path / "log").read_text()

    killed(lambda: setattr(stages.save_leg, "write_checkpoint", lambda *arguments: _end()))
    assert events(folder, "publish") == published
    assert len(events(folder, "step")) == 4
    checkpoint = folder / "stages" / "2-second" / "step-000002"
    for how, lines, is_in_view in ((_before_the_line, 1, False), (_before_it_is_shown, 2, False), (_between_the_renames, 2, False), (_once_it_is_shown, 2, True)):
        killed(how)
        assert len(events(folder, "publish")) == lines
        assert is_published(folder, read_checkpoint(checkpoint)) == is_in_view
        assert (folder / "adapter").exists() != (how is _between_the_renames)
    carry_out(folder, {**plan, "stages": [first, second]})
    told = events(folder, "publish")
    assert told[0] == published[0]
    assert len(told) == 2
    assert [(line["stage"], line["step"]) for line in events(folder, "save")] == [("first", 2), ("second", 2)]
    assert [(line["stage"], line["step"]) for line in events(folder, "step")] == [(name, step) for name in ("first", "second") for step in (1, 2)]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".adapter")]


def test_row_that_cannot_be_read_is_warned_of_once_though_its_run_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, tars = make_world(tmp_path / "world"), tmp_path / "tars"
    plan = plan_of(world, previews={"rows": 0}, evaluate={"rows": 0}, save_every=3, sources={"tars": {"path": write_tars(tars, (8, 8, 8)), "stream": True, "lanes": 1}})
    plan["stages"] = [{**plan["stages"][1], "precision": "fp32", "mix": {"tars": 1}}]
    break_pixels(tars / "s-001.tar", ["0011.png"])
    step, made = AdamW.step, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        return step(*arguments, **named) if made <= 4 else _end()

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", counted)
        carry_out(tmp_path / "run", plan, kill_at=10**9)
    assert len(events(tmp_path / "run", "warning")) == 1
    assert "there is no row to compare outputs on" in carry_out(tmp_path / "run", plan)  # a stream of which nothing is held out is published too
    [warning] = events(tmp_path / "run", "warning")
    assert "s-001.tar:0011" in warning["message"]


def test_process_that_another_one_never_meets_ends_as_soon_as_it_is_told(tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.yaml", plan_of(make_world(tmp_path / "world")))

    def alone(rank: int) -> None:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    [number] = started([str(file), "--out", str(tmp_path / "run")], output=tmp_path / "log", before=alone, timeout=20)
    time.sleep(2)
    os.kill(number, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGTERM, (tmp_path / "log").read_text()

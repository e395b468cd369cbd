"""What the kill matrix of tests/faults/kills.py has found, each as the instant at which it happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import stages.save_leg
from runs import carry_out, free_port, make_world, plan_of, started, write_plan

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


def test_process_that_another_one_never_meets_ends_as_soon_as_it_is_told(tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.yaml", plan_of(make_world(tmp_path / "world")))

    def alone(rank: int) -> None:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    [number] = started([str(file), "--out", str(tmp_path / "run")], output=tmp_path / "log", before=alone, timeout=20)
    time.sleep(2)
    os.kill(number, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGTERM, (tmp_path / "log").read_text()

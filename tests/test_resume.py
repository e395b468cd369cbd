"""Killed anywhere, started again: the very same weights, the very same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import adapter_bytes, events, launch, make_world, plan_of, write_plan

KILLS = 5  # for each of the four ways of running: 20 points in all


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.launch
@pytest.mark.parametrize(
    ("processes", "workers", "accumulation"),
    [(1, 0, 1), (1, 2, 4), (2, 0, 4), (2, 2, 1)],
)
def test_killed_run_ends_bit_equal_to_uninterrupted_run(world: Path, tmp_path: Path, processes: int, workers: int, accumulation: int) -> None:
    """Killed (kill -9) at five points, counted in optimizer steps, syncs and renames, so that they fall into steps, saves, handoffs and publishing."""
    plan = plan_of(world, workers=workers)
    for stage in plan["stages"]:
        stage["batch"] = {"images": 8, "micro": 8 // (processes * accumulation)}
    file = write_plan(tmp_path / "tiny.yaml", plan)
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert launch([str(file), "--out", str(whole), "--trace"], processes=processes, record=tmp_path / "count", output=log) == [0] * processes, log.read_text()
    count = int((tmp_path / "count").read_text())
    assert count > 60
    stages_seen = set()
    for number in range(KILLS):
        codes = launch([str(file), "--out", str(killed), "--trace"], processes=processes, kill_at=count // (KILLS + 1) + 2 * number + 1, output=log)
        assert codes[0] == -9, log.read_text()
        stages_seen |= {folder.name for folder in (killed / "stages").iterdir() if any(folder.glob("step-*"))}
    assert launch([str(file), "--out", str(killed), "--trace"], processes=processes, output=log) == [0] * processes, log.read_text()
    assert stages_seen >= {"1-found", "2-expose"}
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert (killed / "trace.jsonl").read_bytes() == (whole / "trace.jsonl").read_bytes()
    losses = [[(line["stage"], line["step"], line["loss"]) for line in events(folder, "step")] for folder in (whole, killed)]
    assert losses[0] == losses[1]

"""Runs with each optimizer, and with steps that fp16 skips: killed and started again, on two processes, handed on, and refused where the plan cannot be meant."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runs import adapter_bytes, carry_out, events, make_world, plan_of
from stages.check import check_plan
from stages.precision import StagePrecision
from stages.reader import PlanError, read_plan
from stages.rehearsal.verdicts import rates

LAUNCHED = pytest.mark.launch
PRODIGY = {"lr": {"peak": 1.0, "warmup": 2, "schedule": "cosine"}, "optimizer": {"name": "prodigy", "d0": 1e-4}}
EIGHT_BITS = {"optimizer": {"name": "adamw8bit"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_with(world: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Stages of plan_of with other settings; one that trains every weight, others that train the adapter with an average."""
    plan = plan_of(world, previews={"rows": 0}, **changes)
    full, _, adapter = plan["stages"]
    plan["stages"] = [{**(full if asked.get("train") == "full" else adapter), "name": f"stage{number}", **asked} for number, asked in enumerate(stages, start=1)]
    return plan


def state_of(folder: Path, stage: int) -> dict[str, Any]:
    """The state.json of a stage's last checkpoint."""
    read: dict[str, Any] = json.loads((last_step(folder, stage) / "state.json").read_text())
    return read


def last_step(folder: Path, stage: int) -> Path:
    return sorted((folder / "stages" / f"{stage}-stage{stage}").glob("step-*"))[-1]


# --- each optimizer in runs -------------------------------------------------------------------------------------------------------------


@LAUNCHED
def test_killed_run_ends_bit_equal_to_uninterrupted_run_with_each_optimizer(world: Path, tmp_path: Path) -> None:
    """Killed in either stage. The optimizers' state is the same too, in whatever dtype it is."""
    plan = plan_with(world, {**EIGHT_BITS, "train": "full", "steps": 4}, {**PRODIGY, "steps": 4})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    carry_out(whole, plan, record=tmp_path / "count")
    count = int((tmp_path / "count").read_text())
    for point in (0.3, 0.6):
        carry_out(killed, plan, kill_at=int(count * point))
    carry_out(killed, plan)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    for stage, dtype in ((1, torch.uint8), (2, torch.float64)):
        states = [last_step(folder, stage) / "optimizer.safetensors" for folder in (whole, killed)]
        assert states[0].read_bytes() == states[1].read_bytes()
        assert dtype in {value.dtype for value in load_file(states[0]).values()}


@LAUNCHED
def test_two_processes_make_the_steps_that_one_makes_with_each_optimizer(world: Path, tmp_path: Path) -> None:
    """But for rounding, which a large eps keeps from becoming whole steps."""
    plan = plan_with(world, *({**asked, "optimizer": {**asked["optimizer"], "eps": 1e-2}, "steps": 4} for asked in (EIGHT_BITS, PRODIGY)))
    ends = []
    for processes in (1, 2):
        carry_out(tmp_path / str(processes), plan, processes=processes)
        ends.append(load_file(tmp_path / str(processes) / "adapter" / "pytorch_lora_weights.safetensors"))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) <= 1e-5


@LAUNCHED
def test_prodigys_step_size_is_logged_and_grows(world: Path, tmp_path: Path) -> None:
    carry_out(tmp_path / "run", plan_with(world, {**PRODIGY, "steps": 60, "lr": 1.0}, log_every=1))
    lines = events(tmp_path / "run", "step")
    assert lines[0]["step_size"] == 0.0, "the warm-up's first rate is 0"
    assert lines[-1]["step_size"] > 2e-4
    assert lines[-1]["lr"] == 1.0
    assert "step size" in (tmp_path / "run.log").read_text()
    assert "by prodigy" in (tmp_path / "run" / "report.html").read_text()


@LAUNCHED
def test_state_is_handed_on_where_the_plan_says_so_and_counts_on(world: Path, tmp_path: Path) -> None:
    prodigy, kept = {**PRODIGY, "steps": 4}, {"handoff": {"optimizer": "keep"}}
    carry_out(tmp_path / "run", plan_with(world, {**EIGHT_BITS, "steps": 3}, {**EIGHT_BITS, "steps": 3, **kept}, prodigy, {**prodigy, **kept}, prodigy))
    counts = []
    for stage in range(1, 6):
        state = load_file(last_step(tmp_path / "run", stage) / "optimizer.safetensors")
        counts += {int(value) for name, value in state.items() if name.endswith("::step")}
    assert counts == [3, 6, 2, 4, 2], "the first rate of a warm-up and the last of a cosine are 0, and prodigy makes no step of that"
    assert all("skipped" not in line and ("step_size" in line) == (line["stage"] in ("stage3", "stage4", "stage5")) for line in events(tmp_path / "run", "step"))
    assert [any("optimizer" in word for word in event["kept"]) for event in events(tmp_path / "run", "handoff")] == [True, False, True, False]


# --- steps that fp16 skips --------------------------------------------------------------------------------------------------------------

HALF = {"precision": "fp16", "steps": 12, "ema": 0.9, "lr": {"peak": 0.01, "warmup": 6, "warmup_from": 0.001, "schedule": "cosine"}}


LARGE = 2.0**24  # of the loss scale: gradients of the tiny model overflow until some 2**18


@pytest.fixture
def begin_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the loss scale that fp16 begins with; the forked runs inherit it. A large one makes the first gradients overflow."""

    def begin(scale: float) -> None:
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=scale))

    return begin


def rates_of(made: Sequence[bool], steps: int) -> list[float]:
    """The rates of HALF: a skipped step's rate is the next one's again."""
    found, number = [], 0
    for each in made:
        if number < 6:
            found.append(0.001 + 0.009 * number / 6)
        else:
            found.append(0.01 * (1 + math.cos(math.pi * (number - 6) / (steps - 1 - 6))) / 2)
        number += each
    return found


def test_whether_a_step_was_made_is_seen_from_the_scale() -> None:
    """It falls where one is skipped, also by no number, and grows or stays where one is made; a scale of 0 makes none. Other modes make every step."""
    precision, weight = StagePrecision("fp16", torch.device("cpu")), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)

    def step(factor: float) -> bool:
        precision.scaler.scale((weight * factor).sum()).backward()
        precision.scaler.unscale_(optimizer)
        precision.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return precision.update_scale()

    assert [step(factor) for factor in (1.0, math.inf, math.nan, 1.0)] == [True, False, False, True]
    precision.load_scale({**precision.scaler.state_dict(), "growth_interval": 1, "_growth_tracker": 0, "scale": 8.0})
    assert [step(factor) for factor in (1.0, 1.0, math.inf)] == [True, True, False]
    assert precision.scaler.get_scale() == 16.0
    precision.load_scale({**precision.scaler.state_dict(), "scale": 0.0})
    assert not step(1.0)
    assert StagePrecision("bf16", torch.device("cpu")).update_scale()


@LAUNCHED
def test_a_skipped_step_is_counted_and_moves_neither_rate_nor_average_nor_moments_on(world: Path, tmp_path: Path, begin_with: Any) -> None:
    begin_with(LARGE)
    carry_out(tmp_path / "run", plan_with(world, HALF, log_every=1), "--trace")
    lines = events(tmp_path / "run", "step")
    counts = [0, *(line["skipped"] for line in lines)]
    made = [after == before for before, after in pairwise(counts)]
    skipped = counts[-1]
    assert 2 <= skipped <= 10, "the scale was to be too large at first, and then not"
    assert not made[0]
    assert made[-1]
    assert [line["loss_scale"] for line in lines] == [LARGE / 2**count for count in counts[1:]]
    assert [line["lr"] for line in lines] == pytest.approx(rates_of(made, 12), rel=1e-12)
    assert all((line["grad_norm"] is not None) == each for line, each in zip(lines, made, strict=True))
    assert all(math.isfinite(line["loss"]) for line in lines)
    state = state_of(tmp_path / "run", 1)
    assert (state["skipped"], state["skipped_in_a_row"], state["ema_updates"]) == (skipped, 0, 12 - skipped)
    moments = load_file(last_step(tmp_path / "run", 1) / "optimizer.safetensors")
    assert {float(value) for name, value in moments.items() if name.endswith("::step")} == {12 - skipped}
    assert len((tmp_path / "run" / "trace.jsonl").read_text().splitlines()) == 12 * 8, "the data goes on"
    assert events(tmp_path / "run", "stage")[-1]["skipped"] == skipped
    assert f"skipped {skipped}" in (tmp_path / "run.log").read_text()
    assert f"{skipped} steps skipped" in (tmp_path / "run" / "report.html").read_text()
    assert rates(read_plan(tmp_path / "run.yaml").plan, tmp_path / "run").outcome == "proved", "a rehearsal knows of them"


@LAUNCHED
def test_killed_run_that_skips_steps_ends_bit_equal_to_uninterrupted_run(world: Path, tmp_path: Path, begin_with: Any) -> None:
    """On two processes; killed after a checkpoint among the skipped steps."""
    begin_with(LARGE)
    plan = plan_with(world, HALF, log_every=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    carry_out(whole, plan, processes=2, record=tmp_path / "count")
    count = int((tmp_path / "count").read_text())
    carry_out(killed, plan, processes=2, kill_at=int(count * 0.35))
    assert state_of(killed, 1)["skipped_in_a_row"] > 0
    carry_out(killed, plan, processes=2)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    seen = [[(line["step"], line["lr"], line["skipped"], line["loss"], line["loss_scale"]) for line in events(folder, "step")] for folder in (whole, killed)]
    assert seen[0] == seen[1]
    assert seen[0][-1][2] >= 2


@LAUNCHED
def test_two_processes_skip_the_steps_that_one_skips_at_twice_the_scale(world: Path, tmp_path: Path, begin_with: Any) -> None:
    """Each of two has its part of the gradient doubled, since their mean is taken, and so it leaves the range at half the scale."""
    plan = plan_with(world, {**HALF, "optimizer": {"eps": 1e-2}}, log_every=1)
    seen, ends = [], []
    for processes in (1, 2):
        begin_with(2 * LARGE / processes)
        carry_out(tmp_path / str(processes), plan, processes=processes)
        seen.append([(line["step"], line["lr"], line["skipped"], line["loss_scale"] * processes) for line in events(tmp_path / str(processes), "step")])
        ends.append(load_file(tmp_path / str(processes) / "adapter" / "pytorch_lora_weights.safetensors"))
    assert seen[0] == seen[1]
    assert seen[0][-1][2] >= 2
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) <= 1e-4


@LAUNCHED
def test_optimizers_that_are_not_torchs_skip_steps_too(world: Path, tmp_path: Path, begin_with: Any) -> None:
    begin_with(LARGE)
    carry_out(tmp_path / "run", plan_with(world, *({"precision": "fp16", "steps": 12, **asked, "lr": 0.5} for asked in (EIGHT_BITS, PRODIGY))))
    for stage in (1, 2):
        skipped = state_of(tmp_path / "run", stage)["skipped"]
        assert 2 <= skipped <= 10
        moments = load_file(last_step(tmp_path / "run", stage) / "optimizer.safetensors")
        assert {int(value) for name, value in moments.items() if name.endswith("::step")} == {12 - skipped}
        assert all(bool(value.isfinite().all()) for value in moments.values() if value.is_floating_point())


@LAUNCHED
def test_fifty_skipped_steps_in_a_row_end_the_run_and_say_what_to_do(world: Path, tmp_path: Path, begin_with: Any) -> None:
    begin_with(2.0**110)
    plan = plan_with(world, {**HALF, "steps": 60}, save_every=40)
    printed = carry_out(tmp_path / "run", plan, expect=1)
    assert "failed: stage 'stage1': 50 steps in a row were skipped, the last of them step 50" in printed
    assert "Write precision: bf16 or fp32" in printed
    assert "Traceback" not in printed
    again = carry_out(tmp_path / "run", plan, expect=1)  # goes on from step 40, and counts those before it
    assert "50 steps in a row were skipped, the last of them step 50" in again


# --- what a plan may not ask ------------------------------------------------------------------------------------------------------------

PLAN = """\
model: MODEL
ADAPTER
sources:
  photos: {path: data/photos}
stages:
  - {name: one, steps: 100, resolution: 8, batch: 8, FIRST}
  - {name: two, steps: 100, resolution: 8, batch: 8, SECOND}
"""


def problems(world: Path, tmp_path: Path, first: str, second: str, adapter: str = "") -> list[str]:
    """What --check says, without the file's name."""
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("MODEL", str(world / "model")).replace("ADAPTER", adapter).replace("FIRST", first).replace("SECOND", second))
    try:
        return [f"{problem.where}: {problem.message}" for problem in check_plan(read_plan(file), world)]
    except PlanError as error:
        return [line.split(": ", 1)[1] for line in str(error).splitlines()]


A, E, P = "lr: 1e-4", "lr: 1e-4, optimizer: {name: adamw8bit}", "lr: 1, optimizer: {name: prodigy}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (A, P),
        (P, E),
        ("lr: 0.1, optimizer: {name: prodigy, d0: 1e-5, d_coef: 2}", "lr: {peak: 10, schedule: cosine}, optimizer: {name: prodigy}"),
        (P, f"{P}, handoff: {{optimizer: keep}}"),
        (P, f"{P}, handoff: {{optimizer: keep_v}}"),
        (E, f"{E}, handoff: {{optimizer: keep_v}}"),
    ],
)
def test_what_the_optimizers_can_do_is_sound(world: Path, tmp_path: Path, first: str, second: str) -> None:
    assert problems(world, tmp_path, first, second) == []


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (A, "lr: 1e-4, optimizer: {name: prodigy}", "stages[1].lr: 0.0001, and with optimizer prodigy it is a factor of the step size that prodigy finds, 0.1 to 10; write 1, or choose adamw"),
        (A, "lr: {peak: 100}, optimizer: {name: prodigy}", "stages[1].lr.peak: 100, and with optimizer prodigy it is a factor of the step size that prodigy finds, 0.1 to 10; write 1, or choose adamw"),
        (A, "lr: {peak: 1, schedule: linear}, optimizer: {name: prodigy}", "stages[1].lr.schedule: 'linear', and prodigy is meant for a factor that is constant or falls by a cosine; choose one of these"),
        (A, f"{A}, optimizer: {{d0: 1e-5}}", "stages[1].optimizer.d0: adamw takes steps of the size that `lr` says; remove it, or choose name: prodigy"),
        (A, "lr: 1e-4, optimizer: {name: adamw8bit, d_coef: 2}", "stages[1].optimizer.d_coef: adamw8bit takes steps of the size that `lr` says; remove it, or choose name: prodigy"),
        (A, f"{E}, handoff: {{optimizer: keep}}", "stages[1].handoff.optimizer: 'keep', but stage 'one' has optimizer adamw and this one adamw8bit, whose state is another; choose reset"),
        (P, f"{A}, handoff: {{optimizer: keep_v}}", "stages[1].handoff.optimizer: 'keep_v', but stage 'one' has optimizer prodigy and this one adamw, whose state is another; choose reset"),
        (P, f"{P}, train: ['transformer.*'], handoff: {{optimizer: keep}}", "stages[1].handoff.optimizer: 'keep', but prodigy's step size belongs to all of its weights together, and stage 'one' trains others; choose reset"),
    ],
)
def test_what_the_optimizers_cannot_do_is_refused_with_the_cure(world: Path, tmp_path: Path, first: str, second: str, said: str) -> None:
    assert problems(world, tmp_path, first, second) == [said]


def test_prodigys_state_is_not_kept_over_an_adapter_that_grows(world: Path, tmp_path: Path) -> None:
    said = problems(world, tmp_path, P, f"{P}, handoff: {{optimizer: keep, adapter: grow}}", "adapter: {variant: dora}")
    assert said == ["stages[1].handoff.optimizer: 'keep', but prodigy's step size belongs to all of its weights together, and with adapter: grow most begin anew; choose reset"]


def test_unknown_optimizer_is_named_beside_those_that_there_are(world: Path, tmp_path: Path) -> None:
    (said,) = problems(world, tmp_path, A, "lr: 1, optimizer: {name: prodgy}")
    assert "'prodgy' is not one of adamw, adamw8bit, prodigy; did you mean 'prodigy'?" in said

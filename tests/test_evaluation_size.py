"""How many held-out rows are measured follows from measured times, stays within its part of the time, is the same on every process and after a restart, and changes nothing that is learnt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stages.untrained
from mixing.buckets import Shapes
from mixing.selected import Choice, Selection, select
from mixing.source import open_source
from models import tiny_flux
from runs import adapter_bytes, carry_out, copy_run, events, make_data, plan_of, write_plan
from stages.check import check_plan
from stages.engine import ALONE
from stages.evaluate import Way, portions
from stages.evaluation_size import Size, StageCost, Timed, _busiest, choose, passes_of, stage_costs, time_rows, time_taken
from stages.families.open import open_family
from stages.feed import Sizes
from stages.measured import VERSION
from stages.plan import Plan
from stages.precision import StagePrecision
from stages.reader import read_plan

CPU = torch.device("cpu")


# --- the choice -------------------------------------------------------------------------------------------------------------------------


def stage_cost(evaluations: int, tokens: int, held_out: int, seconds: float) -> StageCost:
    return StageCost(evaluations, lambda rows: min(rows, held_out) * tokens, seconds)


def test_the_most_rows_are_chosen_that_stay_within_their_part_of_the_time() -> None:
    draw = np.random.default_rng(0)
    chosen = []
    for _ in range(300):
        held_out, limit = int(draw.integers(1, 65)), float(draw.uniform(0.005, 0.1))
        stages = [stage_cost(int(draw.integers(2, 9)), int(draw.integers(8, 90)), held_out, float(draw.uniform(0.1, 50))) for _ in range(draw.integers(1, 5))]
        size = choose(stages, 1e-5, held_out, limit, "forward passes")
        seconds = {rows: 1e-5 * sum(stage.evaluations * stage.tokens_of(rows) for stage in stages) for rows in range(8, 73, 8)}
        training = sum(stage.training_seconds for stage in stages)
        most = -(-held_out // 8) * 8
        assert size.rows % 8 == 0
        assert 8 <= size.rows <= most
        assert size.seconds == seconds[size.rows]
        assert size.share == size.seconds / training
        assert size.share <= limit or size.rows == 8
        assert size.rows == most or seconds[size.rows + 8] > limit * training
        chosen.append(size.rows)
    assert {8, 16, 24, 32, 40, 48, 56, 64} == set(chosen)


def test_what_was_chosen_goes_through_its_file(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    size = Size(16, 64, 7, 1.25, 60.5, "dry steps")
    assert Size.load(tmp_path) is None
    size.save(tmp_path)
    assert Size.load(tmp_path) == size


@pytest.mark.parametrize(
    ("stage", "passes"),
    [({"train": "full"}, 3), ({}, 2), ({"checkpointing": "full"}, 3), ({"train": "full", "checkpointing": {"every": 2}}, 3.5), ({"checkpointing": "auto"}, 2)],
)
def test_frozen_weights_take_no_gradient_and_recomputed_blocks_another_pass(stage: dict[str, Any], passes: float) -> None:
    plan = Plan.model_validate({"model": "m", "sources": {"s": {"path": "x"}}, "stages": [{"name": "a", "steps": 1, "batch": 1, "lr": 1, "resolution": 8, **stage}]})
    assert passes_of(plan.stages[0], 10**6, CPU) == passes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data", rows=330)
    tiny_flux(folder / "model", pixels=True)
    return folder


@pytest.fixture(scope="module")
def selections(world: Path) -> dict[str, Selection]:
    chosen = {}
    for name, path, task in (("photos", "photos", "text_to_image"), ("edits", "edits/rows.jsonl", "edit")):
        source = open_source(name, path=path, task=task, columns={}, prompt=None, split="train", on_bad_row="stop", root=world / "data")
        chosen[name] = select(source, Choice(), 64)
    return chosen


def test_an_evaluation_takes_as_long_as_the_process_that_has_the_most(selections: dict[str, Selection]) -> None:
    dealt = partial(portions, selections)
    tokens = {name: dict.fromkeys(selection.held_out.tolist(), 3 if name == "photos" else 5) for name, selection in selections.items()}
    assert _busiest(dealt, tokens, 1)(16) == 16 * (3 + 5)
    assert _busiest(dealt, tokens, 1)(999) == 33 * (3 + 5)
    assert _busiest(dealt, tokens, 2)(16) == 16 * 5, "one has photos, one has edits"
    assert _busiest(dealt, tokens, 100)(64) == 16 * 5, "no portion is larger"
    shared = [_busiest(dealt, tokens, processes)(64) for processes in (1, 2, 3, 6)]
    assert shared == sorted(shared, reverse=True)
    assert len(portions(selections, 64)) == 6


def test_evaluations_and_tokens_of_a_stage_are_counted(selections: dict[str, Selection]) -> None:
    stage = {"steps": 10, "lr": 1, "batch": 4, "mix": {"photos": 1, "edits": 1}}
    plan = Plan.model_validate(
        {
            "model": "m",
            "sources": {"photos": {"path": "x"}, "edits": {"path": "y", "task": "edit"}},
            "stages": [{**stage, "name": "a", "resolution": 8}, {**stage, "name": "b", "resolution": 8, "steps": 20}, {**stage, "name": "c", "resolution": 4}],
            "evaluate": {"every": 5},
        }
    )
    costs = stage_costs(plan, selections, Sizes(2, 8), [1.0, 2.0, 0.5], 2, ["base-8", "base-8", "base-4"])
    assert [cost.evaluations for cost in costs] == [1 + 2 + 1, 2 + 3, 1 + 2 + 1]
    at_8, at_4 = 16 + 8, 4 + 8  # tokens of an image and its prompt
    assert [cost.training_seconds for cost in costs] == [40 / 2 * (at_8 + 16 / 2) * 1.0, 80 / 2 * (at_8 + 16 / 2) * 2.0, 40 / 2 * (at_4 + 4 / 2) * 0.5]
    assert costs[0].tokens_of(8) == 8 * (at_8 + 16)
    assert costs[2].tokens_of(8) == 8 * (at_4 + 4)


def test_rows_are_timed_a_token_and_the_forward_pass_is_part_of_it(world: Path, selections: dict[str, Selection]) -> None:
    family = open_family(str(world / "model"), CPU)
    transformer = family.load_transformer(torch.float32, None)
    way = Way(Shapes(8, 2), StagePrecision("fp32", CPU), 3)
    timed = time_rows(family, transformer, selections, way, Sizes(family.pixel_multiple, family.text_tokens), ALONE)
    assert 0 < timed.forward < timed.row < 0.01
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks


def test_time_taken_is_read_from_the_record(tmp_path: Path) -> None:
    lines = [
        {"event": "eval", "seconds": 2.0},
        {"event": "step", "stage": "a", "step": 1, "images": 8, "images_per_second": 4.0},
        {"event": "step", "stage": "a", "step": 5, "images": 8, "images_per_second": 16.0},
        {"event": "eval", "seconds": 0.5},
        {"event": "step", "stage": "b", "step": 3, "images": 2, "images_per_second": 1.0},
        {"event": "save"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert time_taken(tmp_path) == (2.5, 1 * 2 + 4 * 0.5 + 3 * 2)


# --- runs ------------------------------------------------------------------------------------------------------------------------------


def plan_with(world: Path, **evaluate: Any) -> dict[str, Any]:
    stage = {"steps": 4, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "fp32", "mix": {"photos": 1, "edits": 1}}
    return {**plan_of(world), "stages": [{**stage, "name": "one"}, {**stage, "name": "two"}], "evaluate": evaluate, "previews": {"rows": 0}}


def clock(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Have rows timed so that so many of each source just fit."""
    # Five evaluations of 24 + 40 tokens a row and source, beside 2 x 4 x 8 images of 32 tokens on the mean and two forward passes each, at 3 %.
    row = 0.03 * (2 * 4 * 8 * 32) * 2 / (5 * (rows + 0.5) * (24 + 40))
    monkeypatch.setattr(stages.untrained, "time_rows", lambda *given: Timed(row, 1.0))


def measured_rows(folder: Path) -> set[int]:
    return {entry["rows"] for event in events(folder, "eval") for entry in event["sources"].values()}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        clock(patched, 16)
        carry_out(folder, plan_with(world))
    return folder


def test_a_run_measures_what_fits_and_says_so_before_and_after(whole: Path) -> None:
    size, took = events(whole, "evaluation")
    assert (size["kind"], size["rows"], size["held_out"], size["evaluations"], size["limit"], size["timed"]) == ("size", 16, 33, 5, 0.03, "forward passes")
    assert 0.02 < size["share"] <= 0.03
    assert measured_rows(whole) == {16}
    assert len(events(whole, "eval")) == 5
    said = whole.with_suffix(".log").read_text()
    assert "measures 16 of 33 held-out rows of each source: 5 evaluations take about 2.9% of the time of training (at most 3.0%, evaluate.time)" in said
    assert took["kind"] == "took"
    assert took["seconds"] == pytest.approx(sum(event["seconds"] for event in events(whole, "eval")), abs=0.01)
    assert f"{took['share']:.1%}" in said
    assert json.loads((whole / "evaluations" / "size.json").read_text())["rows"] == 16


def test_a_run_that_is_gone_on_with_measures_the_same_rows_whatever_the_clock_says_then(world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        clock(patched, 16)
        carry_out(tmp_path / "run", plan_with(world), "--until", "one")
    clock(monkeypatch, 8)
    carry_out(tmp_path / "run", plan_with(world))
    assert measured_rows(tmp_path / "run") == {16}
    assert [event["sources"] for event in events(tmp_path / "run", "eval")] == [event["sources"] for event in events(whole, "eval")]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)


def test_a_run_of_a_former_version_is_gone_on_with_and_its_base_is_measured_anew(world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows stood at other noise levels, and it did not choose how many."""
    run = copy_run(whole, tmp_path / "run")
    (run / "evaluations" / "size.json").unlink()
    for file in (run / "evaluations").glob("*.json"):
        if "losses" in (saved := json.loads(file.read_text()) or {}):
            file.write_text(json.dumps({"losses": saved["losses"], "strata": {source: dict.fromkeys(rows, 0) for source, rows in saved["t"].items()}}))
    clock(monkeypatch, 16)
    plan = plan_with(world)
    plan["stages"] += [{**plan["stages"][1], "name": "three"}]
    carry_out(run, plan)
    start, end = [event["sources"] for event in events(run, "eval") if event["stage"] == "three"]
    assert {entry["rows"] for entry in end.values()} == {16}, "of all three stages as much as of two"
    assert start["photos"].keys() >= {"since_base", "since_base_error"}
    assert json.loads((run / "evaluations" / "base-8.json").read_text())["version"] == VERSION


def test_processes_whose_clocks_differ_measure_the_same_rows_and_learn_the_same(world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest decides. What is learnt depends neither on how many rows are measured nor on how many processes measure them."""
    times = [0.001, 0.0015]

    def timed(*given: Any) -> Timed:
        return Timed(times[int(os.environ["RANK"])], 1.0)

    monkeypatch.setattr(stages.untrained, "time_rows", timed)
    carry_out(tmp_path / "run", plan_with(world, time=0.05), processes=2)
    assert events(tmp_path / "run", "evaluation")[0]["seconds"] == pytest.approx(0.0015 * 5 * (16 * 24 + 17 * 40)), "of the process that has more"
    assert measured_rows(tmp_path / "run") == {33}
    adapters = [load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (whole, tmp_path / "run")]
    assert adapters[0].keys() == adapters[1].keys()
    assert max(float((adapters[0][name] - adapters[1][name]).abs().max()) for name in adapters[0]) < 1e-5


def test_a_number_of_rows_is_that_number_and_no_clock_is_asked(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.untrained, "time_rows", None)
    carry_out(tmp_path / "run", plan_with(world, rows=20))
    assert measured_rows(tmp_path / "run") == {20}
    assert [event["kind"] for event in events(tmp_path / "run", "evaluation")] == ["took"]


def test_where_shares_follow_evaluations_all_rows_are_measured(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn must not depend on a clock."""
    monkeypatch.setattr(stages.untrained, "time_rows", None)
    plan = plan_with(world, every=1)
    plan["stages"] = [{**plan["stages"][0], "steps": 5, "mix": {"adaptive": {"photos": 1, "edits": 1}, "lookback": 2}}]
    carry_out(tmp_path / "run", plan)
    assert measured_rows(tmp_path / "run") == {33}


def test_a_source_with_nothing_held_out_asks_no_clock_and_its_base_is_measured_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.untrained, "time_rows", None)
    plan = plan_with(world)
    plan["sources"] = {name: {**source, "take": {"count": 9}} for name, source in plan["sources"].items()}
    carry_out(tmp_path / "run", plan)
    assert measured_rows(tmp_path / "run") == set()
    assert not events(tmp_path / "run", "evaluation")
    base = (tmp_path / "run" / "evaluations" / "base-8.json").stat()
    assert base.st_mtime < events(tmp_path / "run", "step")[0]["time"], "before the first step, and not again"


def test_stages_that_are_too_short_are_told_of_in_one_line(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 2)
    said = carry_out(tmp_path / "run", plan_with(world), "--until", "one")
    assert measured_rows(tmp_path / "run") == {8}
    [warning] = [event["message"] for event in events(tmp_path / "run", "warning")]
    assert warning == "even with 8 held-out rows of each source 5 evaluations take about 9.6% of the time of training, more than evaluate.time (3.0%), for the stages are short"
    assert said.count("evaluate.time") == 1


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"rows": 16, "time": 0.1}, "evaluate.time: rows is a number, and all of them are measured, whatever time it takes; remove it"),
        ({"samples": 4}, "evaluate.samples: only `metrics` looks at these samples; remove it, or name metrics"),
        ({"rows": 0, "metrics": ["clip_score"]}, "evaluate.metrics: with evaluate.rows: 0 there are no held-out rows to sample; remove it, or hold rows out"),
        ({"time": 0}, "evaluate.time: 0 is not a number above 0, at most 1"),
    ],
)
def test_what_would_have_no_effect_is_refused(world: Path, tmp_path: Path, evaluate: Mapping[str, Any], message: str) -> None:
    file = write_plan(tmp_path / "plan.yaml", {**plan_of(world), "evaluate": evaluate})
    with pytest.raises(ValueError, match="evaluate") as refused:
        raise ValueError("\n".join(map(str, check_plan(read_plan(file), world))))
    assert message in str(refused.value)

"""What a plan asks of the mixture is what a run measures: buckets, resolutions, budgets of tokens, ramps, chosen rows, captions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import tiny_flux
from runs import events, launch, plan_of, write_plan

SIZES = [(24, 24), (36, 24), (24, 36), (32, 24), (48, 24), (16, 16)]  # width, height


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of many shapes with a style each, and edits with one to three references."""
    folder = tmp_path_factory.mktemp("world")
    tiny_flux(folder / "model", pixels=True)
    draw = np.random.default_rng(1)
    photos, edits = folder / "data" / "photos", folder / "data" / "edits"
    photos.mkdir(parents=True)
    edits.mkdir()
    rows, lines = [], []
    for number in range(60):
        width, height = SIZES[number % len(SIZES)]
        image = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        image.save(photos / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": [f"a red square, number {number}", f"a green disc, number {number}"], "style": ["photo", "film", "photo"][number % 3]})
        image.save(edits / f"{number:02d}.png")
        references = [f"{number:02d}.png"] * (1 + number % 3)
        placed = "".join(f"<img><|image_{place}|></img>" for place in range(1, len(references) + 1))
        lines.append({"instruction": f"make it blue {placed}", "input_images": references, "output_image": f"{number:02d}.png"})
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (edits / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def carried_out(world: Path, folder: Path, stage: dict[str, Any], sources: dict[str, dict[str, Any]] | None = None, processes: int = 1) -> dict[str, Any]:
    """Train one stage; the ledger's page."""
    plan = plan_of(world)
    photos, edits = {"path": str(world / "data" / "photos")}, {"path": str(world / "data" / "edits" / "rows.jsonl"), "task": "edit"}
    named = {"photos": {**photos, **(sources or {}).get("photos", {})}, "edits": {**edits, **(sources or {}).get("edits", {})}}
    plan |= {"sources": named, "stages": [{"name": "only", "lr": 0.001, "precision": "fp32", "steps": 12, **stage}], "log_every": 1, "evaluate": {"rows": 3}}
    output = folder.with_suffix(".log")
    codes = launch([str(write_plan(folder.with_suffix(".yaml"), plan)), "--out", str(folder), "--trace"], processes=processes, output=output)
    assert codes == [0] * processes, output.read_text()
    page: dict[str, Any] = json.loads((folder / "ledger.json").read_text())["stages"][0]
    return page


def trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [1, 3])
def test_steps_hold_the_tokens_that_were_asked_for_over_buckets_resolutions_and_references(world: Path, tmp_path: Path, processes: int) -> None:
    levels = [{"pixels": 8, "share": 25}, {"pixels": 16, "share": 50}, {"pixels": 24, "share": 25}]
    stage = {"resolution": levels, "batch": {"tokens": 8000, "micro": {"tokens": 900}}, "mix": {"photos": 60, "edits": 40}, "steps": 24}
    page = carried_out(world, tmp_path / "run", stage, processes=processes)
    steps = events(tmp_path / "run", "step")
    assert len(steps) == 24
    assert all(abs(step["tokens"] / 8000 - 1) <= 0.05 for step in steps)
    assert [level["pixels"] for level in page["levels"]] == [8, 16, 24]
    assert [level["drawn"] for level in page["levels"]] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert sum(level["images"] for level in page["levels"]) == page["images"] == len(trace(tmp_path / "run"))
    assert page["sources"]["photos"]["drawn"] == pytest.approx(0.6, abs=0.02)
    assert sum(source["tokens"] for source in page["sources"].values()) + 8 * page["images"] == pytest.approx(sum(step["tokens"] for step in steps))


def test_the_rows_of_a_step_are_the_same_for_any_number_of_processes(world: Path, tmp_path: Path) -> None:
    stage = {"resolution": 16, "batch": {"tokens": 3000}, "mix": {"from": {"photos": 1}, "to": {"edits": 1}}}
    for processes in (1, 2, 3):
        carried_out(world, tmp_path / str(processes), stage, processes=processes)
    one, *others = ((tmp_path / str(processes) / "trace.jsonl").read_bytes() for processes in (1, 2, 3))
    assert all(other == one for other in others)


def test_a_ramp_of_shares_and_of_the_batch_changes_what_steps_hold(world: Path, tmp_path: Path) -> None:
    stage = {"resolution": 8, "batch": {"images": {"from": 4, "to": 26}}, "mix": {"from": {"photos": 1}, "to": {"photos": 1, "edits": 3}}}
    page = carried_out(world, tmp_path / "run", stage)
    rows = Counter((row["step"], row["source"]) for row in trace(tmp_path / "run"))
    assert [rows[step, "photos"] + rows[step, "edits"] for step in range(12)] == list(range(4, 27, 2))
    assert rows[0, "edits"] == rows[1, "edits"] == 0
    assert rows[11, "edits"] >= 16
    for source in page["sources"].values():
        assert abs(source["drawn"] - source["asked"]) * page["images"] <= 6


def test_rows_that_where_and_take_leave_are_the_only_ones_drawn_and_the_ledger_says_how_they_were_chosen(world: Path, tmp_path: Path) -> None:
    chosen = {"where": "width > height or style == 'film'", "take": {"fraction": 0.5, "by": "stratified", "column": "style", "seed": 4}}
    stage = {"resolution": 8, "batch": 8, "mix": {"photos": 1}}
    page = carried_out(world, tmp_path / "run", stage, {"photos": chosen})
    drawn = {row["key"] for row in trace(tmp_path / "run")}
    fulfil = [number for number in range(60) if SIZES[number % 6][0] > SIZES[number % 6][1] or number % 3 == 1]
    assert drawn <= {f"{number:02d}.png" for number in fulfil}
    record = page["sources"]["photos"]["selection"]
    assert record | {"sha256": ""} == {
        "method": "stratified (style)", "seed": 4, "where": "width > height or style == 'film'", "asked": 0.5, "rows": 15, "of": 30, "source_rows": 60, "sha256": "",
    }  # fmt: skip
    assert len(record["sha256"]) == 64
    assert len(drawn) == 14, "one of the 15 is held out"
    films = sum(int(key[:2]) % 3 == 1 for key in drawn)
    of_films = sum(number % 3 == 1 for number in fulfil)
    assert abs(films - of_films / 2) <= 1


def test_repeat_counts_a_small_source_several_times_in_a_mix_by_size(world: Path, tmp_path: Path) -> None:
    page = carried_out(world, tmp_path / "run", {"resolution": 8, "batch": 12, "mix": "natural"}, {"photos": {"repeat": 3}})
    assert page["sources"]["photos"]["asked"] == pytest.approx(0.75)
    assert page["sources"]["photos"]["images"] == pytest.approx(0.75 * 144, abs=4)


def test_more_asked_than_a_source_has_is_refused_with_both_numbers(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan |= {"sources": {"photos": {"path": str(world / "data" / "photos"), "where": "width > 40", "take": {"count": 30}}}, "stages": [{"name": "only", "lr": 0.1, "precision": "fp32", "steps": 1, "resolution": 8, "batch": 4}]}
    output = tmp_path / "log"
    assert launch([str(write_plan(tmp_path / "plan.yaml", plan)), "--out", str(tmp_path / "run")], output=output) == [2]
    assert "sources.photos.take: 30 rows asked, the source has 10 that can be read and that `where` leaves" in output.read_text()


def test_an_image_longer_than_a_micro_batch_is_refused_with_its_tokens(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["sources"] = {"photos": {"path": str(world / "data" / "photos")}}
    plan["stages"] = [{"name": "only", "lr": 0.1, "precision": "fp32", "steps": 1, "resolution": 16, "batch": {"tokens": 4000, "micro": {"tokens": 64}}}]
    output = tmp_path / "log"
    assert launch([str(write_plan(tmp_path / "plan.yaml", plan)), "--out", str(tmp_path / "run")], output=output) == [2]
    printed = output.read_text()
    assert "has 72 tokens, and a micro-batch at most 64; raise batch.micro.tokens to that, or lower the resolution" in printed
    assert "Traceback" not in printed


def test_a_task_that_the_family_cannot_train_is_refused_also_where_the_model_was_not_looked_at_before(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.run.tasks_of", lambda pipeline: ("text_to_image", "subject"))  # a model on the Hub is not asked by --check
    output = tmp_path / "log"
    assert launch([str(write_plan(tmp_path / "plan.yaml", plan_of(world))), "--out", str(tmp_path / "run")], output=output) == [2]
    assert "sources.edits.task: flux cannot train task 'edit' (it can: text_to_image, subject); remove source 'edits'" in output.read_text()

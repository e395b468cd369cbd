"""The picture of an order is of the order that a run draws."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import carry_out, make_world, plan_of, traced, write_plan
from stages.mix_picture import Picture, counted, mix_picture, stage_mixtures
from stages.problems import PlanError
from stages.reader import read_plan

STAGE = {"resolution": 8, "batch": {"images": 6, "micro": 2}, "lr": 0.01, "precision": "fp32"}
STAGES = [{**STAGE, "name": "open", "steps": 4, "mix": "natural"}, {**STAGE, "name": "fixed", "steps": 5, "mix": {"photos": 2, "edits": 1}}]


@pytest.mark.launch
def test_what_is_drawn_in_the_picture_is_what_a_run_draws(tmp_path: Path) -> None:
    make_world(tmp_path)
    plan = plan_of(tmp_path, stages=STAGES, previews={"rows": 0}, evaluate={"rows": 0})
    carry_out(tmp_path / "run", plan, "--trace")
    drawn = traced(tmp_path / "run")
    mixtures = stage_mixtures(read_plan(write_plan(tmp_path / "again.yaml", plan)).plan)
    for stage, mixture in zip(STAGES, mixtures, strict=True):
        for name, counts in counted(mixture, np.arange(int(str(stage["steps"])) + 1)).items():
            found = [sum(row["stage"] == stage["name"] and row["source"] == name and row["step"] < step for row in drawn) for step in range(len(counts))]
            assert counts.tolist() == found


def test_a_plan_has_one_picture_with_all_its_stages(tmp_path: Path) -> None:
    make_world(tmp_path)
    plan = read_plan(write_plan(tmp_path / "plan.yaml", plan_of(tmp_path, stages=STAGES))).plan
    picture = mix_picture(plan, images=40)
    assert isinstance(picture, Picture)
    pixels = np.asarray(Image.open(io.BytesIO(picture._repr_png_())).convert("RGB"))
    assert pixels.shape[0] > 600
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both sources are drawn in their own
        assert (pixels == colour).all(axis=2).sum() > 100
    assert picture.save(tmp_path / "order.png").read_bytes() == picture.png
    assert mix_picture(plan, images=40).png == picture.png
    of_one = Image.open(io.BytesIO(mix_picture(plan, stages=["fixed"]).png))
    assert of_one.height < pixels.shape[0] / 1.5
    with pytest.raises(PlanError, match="no stage 'fixd' \\(stages: fixed, open\\)"):
        mix_picture(plan, stages=["fixd"])


def test_a_mix_that_draws_nothing_is_refused_in_words(tmp_path: Path) -> None:
    make_world(tmp_path)
    empty = plan_of(tmp_path, stages=[{**STAGES[0], "mix": {"photos": 0, "edits": 0}}])
    with pytest.raises(PlanError, match="draw"):
        stage_mixtures(read_plan(write_plan(tmp_path / "plan.yaml", empty)).plan)

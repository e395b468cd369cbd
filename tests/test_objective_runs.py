"""Runs with everything that a stage can ask of the transformer: levels of a pyramid, regions, dropout, weighted losses, images that the model made itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from runs import adapter_bytes, carry_out, events, make_world, plan_of, traced
from stages.objectives import windows

pytestmark = pytest.mark.launch

STAGES = [
    {"name": "pyramid", "pyramid": {"levels": 2, "shares": {"from": [1, 1], "to": [1, 3]}}, "resolution": 8, "batch": {"images": 8, "micro": 4}, "mix": {"photos": 1, "prior": 1}, "loss": {"sources": {"prior": 0.5}}},
    {
        "name": "regions", "resolution": 8, "batch": {"images": 8, "micro": 4}, "mix": {"photos": 1, "edits": 2, "entities": 2}, "dropout": {"mode": "nested", "prompt": 0.5, "references": 0.7},
        "loss": {"weighting": "bell", "changed": {}}, "timesteps": {"density": "uniform", "shift": 3.0, "stratified": True, "range": [0.1, 0.95]},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    place = folder / "data" / "entities"
    place.mkdir()
    lines = []
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        mask = np.zeros((12, 12), dtype=np.uint8)
        mask[: 4 + number % 4] = 255
        Image.fromarray(mask).save(place / f"{number}-mask.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": "a red disc", "eligen_entity_prompts": ["a red square"], "eligen_entity_masks": [f"{number}-mask.png"]}))
    (place / "rows.jsonl").write_text("\n".join(lines))
    return folder


def plan_with(world: Path, **changes: Any) -> dict[str, Any]:
    sources = plan_of(world)["sources"] | {
        "entities": {"path": str(world / "data" / "entities" / "rows.jsonl"), "task": "entity"},
        "prior": {"prior": {"prompts": ["a red square", "a blue disc", "a green square"], "count": 20, "steps": 2}},
    }
    stages = [{"steps": 6, "lr": 0.01, "precision": "fp32", **stage} for stage in STAGES]
    return plan_of(world, sources=sources, stages=stages, log_every=1, **changes)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    carry_out(folder, plan_with(world), "--trace")
    return folder


def losses(folder: Path) -> list[Any]:
    return [[line[name] for name in ("stage", "step", "loss", "grad_norm", "losses", "loss_by_noise")] for line in events(folder, "step")]


def test_a_run_killed_inside_each_stage_ends_in_the_same_bytes(finished: Path, world: Path, tmp_path: Path) -> None:
    record = tmp_path / "count"
    carry_out(tmp_path / "counted", plan_with(world), record=record)
    total = int(record.read_text())
    for at in (total // 3, total // 2):
        carry_out(tmp_path / "killed", plan_with(world), "--trace", kill_at=at)
    carry_out(tmp_path / "killed", plan_with(world), "--trace")
    assert losses(tmp_path / "killed") == losses(finished)
    assert traced(tmp_path / "killed") == traced(finished)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(finished)


def test_two_processes_take_the_steps_that_one_takes(world: Path, tmp_path: Path) -> None:
    """To rounding: AdamW with a large eps, as the sums of a step are made in another order."""
    plan = plan_with(world)
    for stage in plan["stages"]:
        stage["optimizer"] = {"eps": 0.01}
    for name, processes in (("one", 1), ("two", 2)):
        carry_out(tmp_path / name, plan, "--trace", processes=processes)
    assert traced(tmp_path / "one") == traced(tmp_path / "two")
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one[2] == pytest.approx(two[2], rel=1e-4)
        assert one[3] == pytest.approx(two[3], rel=1e-3)


def test_a_sources_factor_and_the_levels_weights_are_in_the_loss_and_not_in_the_sources_own(finished: Path) -> None:
    for line in events(finished, "step"):
        of_sources = sum(line["losses"].values()) / len(line["losses"])
        if line["stage"] == "pyramid":
            assert line["loss"] < of_sources, "a level counts (s - e)^2 < 1, and a prior image half of that"


def test_the_loss_is_logged_by_tenth_of_the_noise_level(finished: Path) -> None:
    for line in events(finished, "step"):
        assert len(line["loss_by_noise"]) == 10
        if line["stage"] == "regions":
            assert line["loss_by_noise"][0] is None, "the range begins at 0.1"


def test_the_models_own_images_are_made_once_and_do_not_depend_on_the_processes(finished: Path, world: Path, tmp_path: Path) -> None:
    (folder,) = (world / "cache" / "prior").glob("prior-*")
    made = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(made) == 20
    assert (folder / "000004.txt").read_text() == "a blue disc"
    assert len(set(made.values())) == 20
    other = plan_with(world, cache={"folder": str(tmp_path / "cache")})
    printed = carry_out(tmp_path / "two", other, "--until", "pyramid", processes=2)
    assert "the model makes its 20 images of 8 x 8 pixels first" in " ".join(printed.split())
    (again,) = (tmp_path / "cache" / "prior").glob("prior-*")
    assert {path.name: path.read_bytes() for path in again.glob("*.png")} == made
    assert "makes its" not in carry_out(tmp_path / "more", plan_with(world), "--until", "pyramid")


def test_levels_and_shares_of_a_ramp_are_seen_in_the_ledger_and_the_metrics(finished: Path) -> None:
    (stage,) = [page for page in json.loads((finished / "ledger.json").read_text())["stages"] if page["stage"] == "pyramid"]
    assert abs(stage["sources"]["prior"]["drawn"] - 0.5) < 0.05


def test_an_adapter_of_a_pyramid_says_so_in_its_header(world: Path, tmp_path: Path) -> None:
    plan = plan_with(world)
    plan["stages"] = plan["stages"][:1]
    del plan["sources"]["edits"], plan["sources"]["entities"]
    carry_out(tmp_path / "run", plan)
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    assert windows.of_file(file) == windows.Windows(2)
    with safe_open(file, framework="pt") as header:
        assert torch.isfinite(header.get_tensor(next(iter(header.keys())))).all()


def test_the_tokens_of_a_step_stay_the_same_while_the_levels_shares_change(world: Path, tmp_path: Path) -> None:
    """Of 8 x 8 pixels 16 tokens, of the coarse level 4, and 8 of a prompt: 18 on the mean at 1:1, 21 at 1:3. Steps of so many tokens hold fewer images in the end."""
    plan = plan_with(world)
    del plan["sources"]["edits"], plan["sources"]["entities"], plan["sources"]["prior"]
    ramp = {"pyramid": {"levels": 2, "shares": {"from": [1, 1], "to": [1, 3]}}, "mix": {"photos": 1}, "loss": {}}
    plan["stages"] = [{**plan["stages"][0], **ramp, "steps": 30, "batch": {"tokens": 720, "micro": 8}}]
    carry_out(tmp_path / "run", plan)
    steps = events(tmp_path / "run", "step")
    assert all(abs(line["tokens"] / 720 - 1) < 0.05 for line in steps), [line["tokens"] for line in steps]
    assert steps[0]["images"] == pytest.approx(40, abs=1)
    assert steps[-1]["images"] == pytest.approx(34, abs=1)
    (event,) = [line for line in events(tmp_path / "run", "stage") if line["state"] == "end"]
    assert event["asks"] == "a pyramid of 2 levels, 1 : 1 to 1 : 3"

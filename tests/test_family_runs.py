"""Whole runs of every pipeline on its tiny model: train in bf16 and in fp32 on all that it can be trained for, evaluate, sample, publish."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load_file

from runs import carry_out, events
from stages.families.facts import FAMILIES, PIPELINES, tasks_of
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image

pytestmark = pytest.mark.launch

MODELS: Mapping[str, Callable[[Path, str], Path]] = {
    "flux": lambda folder, pipeline: flux.build(folder, guidance=True, pipeline=pipeline),
    "flux2": lambda folder, pipeline: flux2.build(folder, klein=pipeline == "Flux2KleinPipeline"),
    "lumina2": lambda folder, pipeline: lumina2.build(folder),
    "omnigen": lambda folder, pipeline: omnigen.build(folder),
    "pixart": lambda folder, pipeline: pixart.build(folder, alpha=pipeline == "PixArtAlphaPipeline"),
    "qwen_image": lambda folder, pipeline: qwen_image.build(folder, pipeline=pipeline),
    "sana": lambda folder, pipeline: sana.build(folder),
    "sd3": lambda folder, pipeline: sd3.build(folder),
    "wan": lambda folder, pipeline: wan.build(folder, experts=True),
    "z_image": lambda folder, pipeline: z_image.build(folder),
}
CASES = [pytest.param(family, pipeline, id=f"{family}-{pipeline}") for pipeline, family in PIPELINES.items()]
SIDE = 32  # of the images on disk
ROWS = 20  # of each source: one in ten may be held out
PUBLISHED: Mapping[str, set[str]] = {
    "flux2": {"pytorch_lora_weights.safetensors", "comfyui.safetensors"},
    "lumina2": {"pytorch_lora_weights.safetensors", "comfyui.safetensors"},
    "omnigen": {"adapter_model.safetensors", "adapter_config.json"},
    "pixart": {"adapter_model.safetensors", "adapter_config.json"},
    "wan": {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors", "comfyui.safetensors", "comfyui_2.safetensors"},
}
"""What else than the file that `load_lora_weights` reads, or in its place."""
UNREAD: Mapping[str, int] = {"qwen_image": 9408}
"""Numbers of the tiny transformer that nothing reads: what the last block of QwenImageTransformer2DModel makes of the text (diffusers 0.42.1)."""
ONE_REFERENCE = "QwenImageEditPipeline"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sources: photos, edits with one reference, subjects with two, entities with a region."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"photos": [], "edits": [], "subjects": [], "entities": []}
    for number in range(ROWS):
        for name in ("target", "first", "second"):
            Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{number}-{name}.png")
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask[: SIDE // 2 + number % 8] = 255
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        target, first, second = (f"{number}-{name}.png" for name in ("target", "first", "second"))
        rows["photos"].append({"image": target, "prompt": "a red square"})
        rows["edits"].append({"target": target, "reference": first, "prompt": "make it blue"})
        rows["subjects"].append({"target": target, "references": [first, second], "prompt": "the same disc"})
        rows["entities"].append({"image": target, "prompt": "a green disc", "eligen_entity_prompts": ["a red square"], "eligen_entity_masks": [f"{number}-mask.png"]})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def scaled_down() -> Any:
    """The Edit pipelines scale references to 1024 x 1024 pixels in area, or 384 x 384, for the text encoder; here, and in what is forked, it is 64 x 64."""
    whole = pipeline_qwenimage_edit.calculate_dimensions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: whole(64 * 64, ratio))
        patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
        yield


def sources_of(pipeline: str, data: Path) -> dict[str, dict[str, Any]]:
    """A source for each kind of row that the pipeline can be trained on."""
    kinds = {"photos": "text_to_image", "edits": "edit", "subjects": "subject", "entities": "entity"}
    taken = {name: task for name, task in kinds.items() if task in tasks_of(pipeline) and not (name == "subjects" and pipeline == ONE_REFERENCE)}
    return {name: {"path": str(data / f"{name}.jsonl"), "task": task} for name, task in taken.items()}


def plan_for(family: str, pipeline: str, folder: Path, data: Path) -> dict[str, Any]:
    """Two stages: bf16, then fp32; in the second all that is the family's own."""
    facts, sources = FAMILIES[family], sources_of(pipeline, data)
    model = MODELS[family](folder / "model", pipeline)
    sizes = facts.sizes(lambda name, otherwise: json.loads((model / name).read_text()))
    first: dict[str, Any] = {"name": "first", "precision": "bf16", "dropout": {"prompt": 0.2}}
    second: dict[str, Any] = {"name": "second", "precision": "fp32"}
    changes: dict[str, Any] = {"adapter": {"rank": 2, "targets": "linear"}}
    if facts.takes_scaled_positions:
        second |= {"pyramid": {"levels": 2}}
    if facts.objective == "epsilon":
        second |= {"loss": {"weighting": "min_snr"}}
    if facts.experts:
        first |= {"expert": "high", "train": ["high"], "timesteps": {"density": "uniform", "range": [0.875, 1], "shift": 5}}
        second |= {"expert": "low", "train": ["low"], "timesteps": {"range": [0, 0.875], "shift": 5}}
        changes = {"adapters": {"high": {"rank": 2, "targets": "linear"}, "low": {"rank": 2, "targets": "linear"}}}
    side = 2 * sizes.pixel_multiple if sizes.pixel_multiple >= 8 else 16
    common = {"steps": 2, "resolution": side, "batch": {"images": 2 * len(sources) + 2, "micro": 2}, "lr": 0.01, "mix": dict.fromkeys(sources, 1)}
    return {
        "name": pipeline,
        "seed": 3,
        "model": str(model),
        **changes,
        "sources": sources,
        "stages": [{**common, **first}, {**common, **second}],
        "evaluate": {"rows": 2},
        "previews": {"rows": 1, "steps": 2},
        "save_every": 2,
        "log_every": 1,
        "workers": 0,
        "track": "none",
        "cache": {"folder": str(folder / "cache")},
    }


@pytest.mark.parametrize(("family", "pipeline"), CASES)
def test_a_whole_run_trains_on_all_that_the_pipeline_can_evaluates_samples_and_publishes(family: str, pipeline: str, data: Path, tmp_path: Path) -> None:
    plan = plan_for(family, pipeline, tmp_path, data)
    run = tmp_path / "run"
    printed = carry_out(run, plan)
    steps = events(run, "step")
    assert [(line["stage"], line["step"]) for line in steps] == [(stage, step) for stage in ("first", "second") for step in (1, 2)], printed
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert {line["stage"]: line["multiplied_in"] for line in steps} == {"first": "bf16", "second": "fp32"}
    for stage in json.loads((run / "ledger.json").read_text())["stages"]:
        assert {name: entry["images"] > 0 for name, entry in stage["sources"].items()} == dict.fromkeys(plan["sources"], True)
    measured = events(run, "eval")
    assert {line["stage"] for line in measured} >= {"first", "second"}
    for line in measured:
        assert set(line["sources"]) == set(plan["sources"])
        assert all(math.isfinite(entry["loss"]) for entry in line["sources"].values())
    assert len(list((run / "previews").glob("*.png"))) == 2
    published = events(run, "publish")
    assert len(published) == 1, printed
    assert published[0]["max_difference"] <= 1e-4
    files = {path.name for path in (run / "adapter").iterdir()} - {"README.md", "images", "previews.png", ".medley.json"}
    assert files == PUBLISHED.get(family, {"pytorch_lora_weights.safetensors"})
    for name in files - {"adapter_config.json"}:
        up = {key: value for key, value in load_file(run / "adapter" / name).items() if ".lora_B." in key}
        assert up, name
        assert [key for key, value in up.items() if not value.any()] == [], "a pair that has not moved"


def full_plan(family: str, pipeline: str, folder: Path, data: Path) -> dict[str, Any]:
    """One step of the transformer's own weights; of Wan 2.1, for of two transformers `--check` lets none be trained whole."""
    plan = plan_for(family, pipeline, folder, data)
    for name in ("adapter", "adapters"):
        plan.pop(name, None)
    if FAMILIES[family].experts:
        plan["model"] = str(wan.build(folder / "one"))
    stage = {name: plan["stages"][0][name] for name in ("resolution", "batch", "mix")}
    return plan | {"stages": [{**stage, "name": "found", "steps": 1, "train": "full", "precision": "fp32", "lr": 1e-4}], "previews": {"rows": 0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_transformer_takes_a_step_in_which_every_weight_that_is_read_has_a_gradient(family: str, data: Path, tmp_path: Path) -> None:
    """A stage in which a weight has none ends with an error, but for those that nothing reads, whose number stands in UNREAD."""
    printed = carry_out(tmp_path / "run", full_plan(family, next(iter(FAMILIES[family].pipelines)), tmp_path, data))
    (step,) = events(tmp_path / "run", "step")
    assert math.isfinite(step["loss"]), printed
    assert step["grad_norm"] > 0
    stage = events(tmp_path / "run", "stage")[0]
    assert stage["parameters"] - stage["trainable"] == UNREAD.get(family, 0)
    assert (tmp_path / "run" / "model" / "model_index.json").is_file(), printed


def test_two_references_for_a_pipeline_of_one_are_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    plan = plan_for("qwen_image", ONE_REFERENCE, tmp_path, data)
    plan["sources"]["subjects"] = {"path": str(data / "subjects.jsonl"), "task": "subject"}
    printed = carry_out(tmp_path / "run", plan, expect=2)
    assert "sources.subjects: rows have several references, and QwenImageEditPipeline takes one; write `where: references == 1`" in " ".join(printed.split())

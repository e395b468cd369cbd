"""Quality: metrics see what their models see, every mean stands between its two ends, differences are paired, and a model of the wrong kind is refused before anything trains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import stages.quality
from mixing.buckets import Shapes
from mixing.images import fit
from mixing.selected import Choice, Selection, select
from mixing.source import open_source
from models import tiny_clip, tiny_dino, tiny_flux
from runs import carry_out, events, make_data, plan_of, write_plan
from stages.check import check_plan
from stages.evaluate import in_order
from stages.families.family import Family
from stages.families.open import open_family
from stages.metrics import ClipScore, DinoSimilarity, Metric, Sampled, open_metrics
from stages.plan import MetricName, Plan
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.quality import Quality, quality
from stages.reader import read_plan
from stages.sampler import Sampler

CPU = torch.device("cpu")
HOW = {"models": {}, "samples": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data", rows=80)
    tiny_flux(folder / "model", pixels=True)
    tiny_clip(folder / "clip")
    tiny_dino(folder / "dino")
    return folder


def asking(world: Path) -> dict[str, Any]:
    return {"metrics": {"clip_score": {"model": str(world / "clip")}, "dino_similarity": {"model": str(world / "dino")}}}


@pytest.fixture(scope="module")
def metrics(world: Path) -> dict[MetricName, Metric]:
    return open_metrics(Plan.model_validate({**plan_of(world), "evaluate": asking(world)}), Path("/"))


@pytest.fixture(scope="module")
def family(world: Path) -> Family:
    return open_family(str(world / "model"), CPU)


@pytest.fixture(scope="module")
def selections(world: Path) -> dict[str, Selection]:
    chosen = {}
    for name, path, task in (("photos", "photos", "text_to_image"), ("edits", "edits/rows.jsonl", "edit"), ("people", "edits/rows.jsonl", "subject")):
        source = open_source(name, path=path, task=task, columns={}, prompt=None, split="train", on_bad_row="stop", root=world / "data")
        chosen[name] = select(source, Choice(), 8)
    return chosen


def found(family: Family, selections: Mapping[str, Selection], metrics: Mapping[MetricName, Metric], *, samples: int = 5, accelerator: Any = None, steps: int = 1) -> Quality:
    return quality(
        family,
        family.load_transformer(torch.float32, None).eval(),
        selections,
        metrics,
        HOW,
        samples=samples,
        shapes=Shapes(8, 2),
        sampler=Sampler(steps, StagePrecision("fp32", CPU)),
        seed=7,
        accelerator=accelerator or SimpleNamespace(process_index=0, num_processes=1),
    )


def pictures(number: int, seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 255, (12, 9, 3), dtype=np.uint8)) for _ in range(number)]


# --- what a metric sees -----------------------------------------------------------------------------------------------------------------


def test_clip_score_is_a_hundred_cosines_of_the_models_own_embeddings(world: Path, metrics: dict[MetricName, Metric]) -> None:
    clip, images, prompts = metrics["clip_score"], pictures(4), ["a red square", "make it green", "a blue disc", "the same square"]
    assert isinstance(clip, ClipScore)
    seen = clip.look(Sampled(prompts, images, images[::-1], images, None))
    texts = clip.tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=clip.processor(images=images, return_tensors="pt")["pixel_values"])
    cosines = whole.logits_per_image / clip.model.logit_scale.exp()
    assert clip.score(seen.of_sample, seen.of_other).tolist() == pytest.approx((100 * cosines.diagonal().clamp(min=0)).tolist(), abs=1e-3)
    assert clip.score(seen.of_real, seen.of_other).tolist() == pytest.approx((100 * cosines.flip(0).diagonal().clamp(min=0)).tolist(), abs=1e-3)
    assert float(cosines.diagonal().max()) > 0.01


def test_a_caption_that_is_too_long_for_the_model_is_cut(metrics: dict[MetricName, Metric]) -> None:
    seen = metrics["clip_score"].look(Sampled(["a red square " * 40], pictures(1), pictures(1), pictures(1), None))
    assert seen.of_other.isfinite().all()


def test_dino_similarity_is_one_of_the_same_image_and_less_of_another(metrics: dict[MetricName, Metric]) -> None:
    dino, images = metrics["dino_similarity"], pictures(4)
    assert isinstance(dino, DinoSimilarity)
    same, other = dino.look(Sampled([""] * 4, images, images, images, None)), dino.look(Sampled([""] * 4, images, pictures(4, seed=1), images, None))
    assert dino.score(same.of_sample, same.of_other).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert float(dino.score(other.of_sample, other.of_other).max()) < 0.999
    with torch.no_grad():
        classes = dino.model(pixel_values=dino.processor(images=images, return_tensors="pt")["pixel_values"]).last_hidden_state[:, 0]
    assert torch.allclose(same.of_sample, torch.nn.functional.normalize(classes, dim=-1), atol=1e-5)


def test_a_subject_is_compared_with_its_reference_and_real_is_its_target(metrics: dict[MetricName, Metric]) -> None:
    targets, references = pictures(3), pictures(3, seed=2)
    seen = metrics["dino_similarity"].look(Sampled([""] * 3, pictures(3, seed=1), targets, targets, references))
    of_targets = metrics["dino_similarity"].look(Sampled([""] * 3, references, targets, targets, None))
    assert torch.allclose(seen.of_real, of_targets.of_other)
    assert torch.allclose(seen.of_other, of_targets.of_sample)


# --- what is said of a source ------------------------------------------------------------------------------------------------------------


def test_the_first_held_out_rows_of_every_source_are_sampled(family: Family, selections: dict[str, Selection], metrics: dict[MetricName, Metric]) -> None:
    made = found(family, selections, metrics)
    for of_source in made.scores.values():
        assert {name: set(rows) for name, rows in of_source.items()} == {
            name: {selection.source.key(row) for row in in_order(selection)[:5]} for name, selection in selections.items()
        }
    assert made == found(family, selections, metrics), "from the same noise each time"


def test_every_mean_has_a_ceiling_of_real_images_and_a_floor_of_another_rows(family: Family, selections: dict[str, Selection], metrics: dict[MetricName, Metric]) -> None:
    made = found(family, selections, metrics)
    dino, clip = metrics["dino_similarity"], metrics["clip_score"]
    assert made.ceiling["dino_similarity"]["photos"] == pytest.approx(1, abs=1e-5), "without a VAE nothing is lost"
    rows = [selections["people"].source.example(row) for row in in_order(selections["people"])[:5]]
    targets, references = [fit(row.target, 8, 8) for row in rows], [fit(row.references[0], 8, 8) for row in rows]
    seen = dino.look(Sampled([""] * 5, targets, targets, targets, references))
    assert made.ceiling["dino_similarity"]["people"] == pytest.approx(float(dino.score(seen.of_real, seen.of_other).mean()), abs=1e-4)
    photos = [selections["photos"].source.example(row) for row in in_order(selections["photos"])[:5]]
    seen = clip.look(Sampled([row.prompt for row in photos], targets, [fit(row.target, 8, 8) for row in photos], targets, None))
    assert made.ceiling["clip_score"]["photos"] == pytest.approx(float(clip.score(seen.of_real, seen.of_other).mean()), abs=1e-2)
    assert made.floor["dino_similarity"].keys() == selections.keys()
    assert all(math.isfinite(floor) for of_source in made.floor.values() for floor in of_source.values())


@pytest.mark.parametrize("number", [2, 3, 8, 33])
def test_the_floor_compares_no_row_with_itself_and_every_row_once(number: int) -> None:
    orders = set()
    for seed in range(5):
        moved = stages.quality._moved_on([f"{row}.png" for row in range(number)], "photos", seed).tolist()
        assert all(place != other for place, other in enumerate(moved))
        assert sorted(moved) == list(range(number))
        orders.add(tuple(moved))
    assert number < 8 or len(orders) == 5


def test_the_numbers_do_not_depend_on_the_number_of_processes(
    family: Family, selections: dict[str, Selection], metrics: dict[MetricName, Metric], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, parts = found(family, selections, metrics), []
    monkeypatch.setattr(stages.quality, "gather_object", lambda seen: [parts.append(seen), seen][1])
    for index in range(2):
        found(family, selections, metrics, accelerator=SimpleNamespace(process_index=index, num_processes=2))
    assert all(parts)
    monkeypatch.setattr(stages.quality, "gather_object", lambda seen: [row for part in parts for row in part])
    together = found(family, selections, metrics, accelerator=SimpleNamespace(process_index=1, num_processes=2))
    for metric, of_source in alone.scores.items():
        for source, rows in of_source.items():
            assert together.scores[metric][source] == pytest.approx(rows, abs=1e-3)


def test_one_row_has_neither_a_floor_nor_an_error(family: Family, selections: dict[str, Selection], metrics: dict[MetricName, Metric]) -> None:
    entry = found(family, {"photos": selections["photos"]}, metrics, samples=1).summary(None, None)["photos"]["clip_score"]
    assert entry["rows"] == 1
    assert entry["error"] is None
    assert entry["floor"] is None
    assert entry["ceiling"] is not None


def made_up(number: int, how: Mapping[str, Any] = HOW) -> Quality:
    scores = np.random.default_rng(number).random(20)
    return Quality({"clip_score": {"photos": {f"{row}.png": float(score) for row, score in enumerate(scores)}}}, {"clip_score": {"photos": 0.9}}, {"clip_score": {"photos": 0.1}}, how)


def test_changes_are_paired_over_rows_and_carry_their_error() -> None:
    now, base, last = made_up(1), made_up(2), made_up(3)
    values = {name: np.array(list(each.scores["clip_score"]["photos"].values())) for name, each in (("now", now), ("base", base), ("last", last))}
    entry = now.summary(base, last)["photos"]["clip_score"]
    assert set(entry) == {"mean", "error", "rows", "ceiling", "floor", "since_base", "since_base_error", "since_last", "since_last_error"}
    assert (entry["mean"], entry["error"]) == pytest.approx((values["now"].mean(), stats.sem(values["now"])))
    assert (entry["since_base"], entry["since_base_error"]) == pytest.approx(((values["now"] - values["base"]).mean(), stats.sem(values["now"] - values["base"])))
    assert (entry["since_last"], entry["since_last_error"]) == pytest.approx(((values["now"] - values["last"]).mean(), stats.sem(values["now"] - values["last"])))
    json.dumps(entry, allow_nan=False)


def test_samples_that_were_made_otherwise_are_not_paired(tmp_path: Path) -> None:
    entry = made_up(1).summary(made_up(2, {**HOW, "samples": 9}), None)["photos"]["clip_score"]
    assert "since_base" not in entry
    made_up(1).save(tmp_path / "evaluations" / "1-a-quality.json")
    assert Quality.load(tmp_path / "evaluations" / "1-a-quality.json") == made_up(1)
    assert Quality.load(tmp_path / "evaluations" / "none.json") is None


# --- what is refused, and when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"clip_score": {"model": "dino"}}, "'dino' is of kind 'dinov2', and clip_score looks with clip"),
        ({"dino_similarity": {"model": "clip"}}, "'clip' is of kind 'clip', and dino_similarity looks with dinov2 or dinov2_with_registers"),
        ({"clip_score": {"model": "data"}}, "'data' has no config.json"),
        ({"clip_score": {"model": "clop"}}, "'clop' does not exist; did you mean 'clip'?"),
        ({"fid": {"model": "clip"}}, "'fid' is not one of clip_score, dino_similarity"),
        (["clip_scor"], "'clip_scor' is not one of clip_score, dino_similarity; did you mean 'clip_score'?"),
        (["clip_score", "clip_score"], "evaluate.metrics[1]: 'clip_score' stands there twice"),
    ],
)
def test_a_metric_that_cannot_be_measured_is_refused_before_anything_is_opened(world: Path, tmp_path: Path, asked: Any, message: str) -> None:
    file = write_plan(tmp_path / "plan.yaml", {**plan_of(world), "evaluate": {"rows": 2, "metrics": asked}})
    with pytest.raises(PlanError) as refused:
        raise PlanError(check_plan(read_plan(file), world))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{file}:")


def test_a_folder_without_weights_or_without_a_tokenizer_is_refused(world: Path, tmp_path: Path) -> None:
    for missing, said in (("model.safetensors", "has no model.safetensors or model.safetensors.index.json"), ("tokenizer.json", "has no tokenizer.json or vocab.json")):
        folder = tiny_clip(tmp_path / missing / "clip")
        (folder / missing).unlink()
        file = write_plan(tmp_path / "plan.yaml", {**plan_of(world), "evaluate": {"rows": 2, "metrics": {"clip_score": {"model": str(folder)}}}})
        assert said in str(check_plan(read_plan(file), world)[0])


def test_weights_that_cannot_be_read_end_the_run_before_its_first_step(world: Path, tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    said = carry_out(tmp_path / "run", {**plan_of(world), "evaluate": {"rows": 2, "metrics": {"clip_score": {"model": str(folder)}}}}, expect=2)
    assert "evaluate.metrics: clip_score cannot look with" in said
    assert not events(tmp_path / "run", "step")


def test_a_run_says_of_every_stage_and_of_the_untrained_model_what_its_samples_are_worth(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    stage = {"steps": 2, "resolution": 8, "batch": {"images": 4, "micro": 4}, "lr": 0.01, "precision": "fp32", "mix": {"photos": 1, "edits": 1}}
    plan |= {"stages": [{**stage, "name": "one"}, {**stage, "name": "two"}], "evaluate": {"rows": 4, "samples": 3, **asking(world)}, "previews": {"rows": 0, "steps": 2}}
    said = carry_out(tmp_path / "run", plan)
    base, one, two = events(tmp_path / "run", "quality")
    assert [(event["stage"], event["step"]) for event in (base, one, two)] == [("", 0), ("one", 2), ("two", 2)]
    for event in (base, one, two):
        assert {source: set(metrics) for source, metrics in event["sources"].items()} == {name: {"clip_score", "dino_similarity"} for name in ("photos", "edits")}
        assert all(entry["rows"] == 3 for metrics in event["sources"].values() for entry in metrics.values())
    assert "since_base" not in base["sources"]["photos"]["clip_score"]
    assert {"since_base", "since_base_error"} <= one["sources"]["photos"]["clip_score"].keys()
    assert "since_last" not in one["sources"]["photos"]["clip_score"]
    change = two["sources"]["edits"]["dino_similarity"]
    assert change["since_last"] == pytest.approx(change["mean"] - one["sources"]["edits"]["dino_similarity"]["mean"], abs=1e-6)
    assert "shuffled" in said
    assert "dino_similarity" in said
    assert all(len(line) <= 80 for line in said.splitlines() if "±" in line), "tables fit a narrow terminal"

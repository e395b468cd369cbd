"""What a plan may not ask of the transformer, or of this family's, is refused by --check with place, reason and what would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.check import check_plan, plan_notes
from stages.families.tiny import flux, omnigen, pixart, qwen_image, sana, sd3, wan
from stages.reader import PlanError, read_plan

GOOD = """\
model: MODEL
sources:
  t2i: {path: photos}
stages:
  - {name: only, steps: 10, resolution: 64, batch: 8, lr: 1e-4, FIELD}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    flux.build(folder / "flux")
    pixart.build(folder / "pixart")
    sd3.build(folder / "sd3")
    sana.build(folder / "sana")
    omnigen.build(folder / "omnigen")
    qwen_image.build(folder / "edit", pipeline="QwenImageEditPipeline")
    wan.build(folder / "experts", experts=True)
    wan.build(folder / "one")
    (folder / "photos").mkdir()
    for number in range(4):
        (folder / "photos" / f"{number}.png").touch()
        (folder / "photos" / f"{number}.txt").write_text("a red disc")
    (folder / "prompts.txt").write_text("a\\nb\\n")
    return folder


def said(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, field: str, source: str = "{path: photos}") -> list[str]:
    monkeypatch.chdir(world)
    file = tmp_path / "x.yaml"
    file.write_text(GOOD.replace("MODEL", model).replace("FIELD", field).replace("{path: photos}", source))
    try:
        found = check_plan(read_plan(file), world)
    except PlanError as error:
        return [line.split(": ", 1)[1] for line in str(error).splitlines()]
    return [str(problem).split(": ", 1)[1] for problem in found]


FINE = [
    ("flux", "pyramid: {levels: 2}"), ("flux", "pyramid: {shares: [1, 2, 1]}"), ("flux", "pyramid: {shares: {from: [1, 1, 1], to: [1, 2, 1]}}"), ("pixart", "timesteps: {shift: none}"),
    ("pixart", "loss: {weighting: min_snr, gamma: 3}"), ("flux", "loss: {weighting: bell, sources: {t2i: 0.5}}"), ("flux", "dropout: {mode: joint, prompt: 0.1}"), ("flux", "dropout: {mode: nested, prompt: 0.1, references: 0.5}"),
    ("flux", "timesteps: {density: mode, scale: 0.5, stratified: true, range: [0.2, 0.9]}"), ("experts", "expert: low"), ("one", "precision: bf16"), ("edit", "dropout: {prompt: 0.1}"), ("sana", "precision: bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "field"), FINE)
def test_what_a_family_can_do_is_sound(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, field: str) -> None:
    assert said(world, tmp_path, monkeypatch, model, field) == []


WRONG = {
    "pyramid of a family that knows no positions between": ("sd3", "pyramid: {levels: 2}", ["stages[0].pyramid: sd3 cannot be told where the tokens of a coarse level lie; these can be trained in levels: flux"]),
    "pyramid of noise": ("pixart", "pyramid: {levels: 2}", ["stages[0].pyramid: pixart predicts noise, and a pyramid is a straight flow; these can be trained in levels: flux"]),
    "levels that do not divide": ("flux", "pyramid: {levels: 4}, buckets: {max_aspect: 1}", []),
    "shares of other levels": ("flux", "pyramid: {levels: 2, shares: [1, 2, 1]}", ["stages[0].pyramid.shares: 3 shares for 2 levels; give one for each level, the coarsest first"]),
    "shares of nothing": ("flux", "pyramid: {levels: 2, shares: [0, 0]}", ["stages[0].pyramid.shares: every share is 0, so nothing would be trained"]),
    "timesteps of a pyramid": ("flux", "pyramid: {levels: 2}, timesteps: {shift: 3}", ["stages[0].timesteps: the levels of `pyramid` say which noise levels are trained; remove it, or `pyramid`"]),
    "shift of noise": ("pixart", "timesteps: {shift: 3}", ["stages[0].timesteps.shift: pixart predicts noise over its own table of levels, which no shift belongs to; write none, or leave it out"]),
    "bell of noise": ("pixart", "loss: {weighting: bell}", ["stages[0].loss.weighting: 'bell' weighs a straight flow, and pixart predicts noise; choose min_snr or none"]),
    "min-SNR of a flow": ("flux", "loss: {weighting: min_snr}", ["stages[0].loss.weighting: 'min_snr' is for models that predict noise, and flux predicts a velocity; choose bell or none"]),
    "gamma of nothing": ("flux", "loss: {gamma: 3}", ["stages[0].loss.gamma: only weighting: min_snr has a gamma; remove it"]),
    "factor of nothing": ("flux", "loss: {sources: {t2: 3}}", ["stages[0].loss.sources: no source 't2' (sources: t2i); did you mean 't2i'?"]),
    "edits of nothing": ("flux", "loss: {changed: {}}", ["stages[0].loss.changed: no source has task edit, control or other, so nothing is edited; remove it"]),
    "range upside down": ("flux", "timesteps: {range: [0.9, 0.1]}", ["stages[0].timesteps.range: [0.9, 0.1] holds nothing; write the lower noise level first"]),
    "mean of mode": ("flux", "timesteps: {density: mode, mean: 1}", ["stages[0].timesteps.mean: density: mode has no mean; remove it"]),
    "joint references": ("flux", "dropout: {mode: joint, prompt: 0.1, references: 0.1}", ["stages[0].dropout.references: with mode: joint the references go with the prompt; remove it, or choose nested or independent"]),
    "nested in nothing": ("flux", "dropout: {mode: nested, references: 0.1}", ["stages[0].dropout.references: with mode: nested the references go only where the prompt went, and no prompt goes; give dropout.prompt"]),
    "mode of no dropout": ("flux", "dropout: {mode: joint}", ["stages[0].dropout.mode: nothing is left out; give dropout.prompt, or remove it"]),
    "expert of a model with one transformer": ("one", "expert: high", ["stages[0].expert: this model (wan) has one transformer for all noise levels; remove it"]),
    "expert of a family without": ("flux", "expert: low", ["stages[0].expert: this model (flux) has one transformer for all noise levels; remove it"]),
    "no expert": ("experts", "precision: bf16", ["stages[0].name: the model has 2 transformers; say which one this stage trains, expert: high or low"]),
    "fp16 of sana": ("sana", "precision: fp16", ["stages[0].precision: sana cannot be trained in fp16: its linear attention leaves the range of fp16 under autocast, without a warning; choose bf16 or fp32"]),
    "references that prompts see": ("edit", "dropout: {references: 0.1}", [
        "stages[0].dropout: the text encoder of QwenImageEditPipeline looks at the references, so they cannot be left out by themselves; give dropout.prompt with mode: independent",
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_is_refused_with_what_can(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, field, wanted = WRONG[name]
    found = said(world, tmp_path, monkeypatch, model, field)
    assert [line.split(": ", 1)[1] if line[0].isdigit() else line for line in found] == wanted


def test_a_resolution_that_the_levels_cannot_halve_is_refused_with_those_that_they_can(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    file = tmp_path / "x.yaml"
    file.write_text(GOOD.replace("MODEL", "flux").replace("FIELD", "pyramid: {levels: 3}").replace("resolution: 64", "resolution: 60"))
    (problem,) = check_plan(read_plan(file), world)
    assert "60 cannot be halved 2 times into multiples of 4, as the 3 levels of `pyramid` need; try 48 or 64" in str(problem)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{task: text_to_image}", "sources.t2i: says nothing of where its rows are; give `path`, or `prior` for images that the model makes itself"),
        ("{path: photos, prior: {prompts: [a], count: 3}}", "sources.t2i.path: the model makes the rows of `prior` itself, and a path is given too; remove one of the two"),
        ("{prior: {prompts: [a], count: 3}, task: edit}", "sources.t2i.task: 'edit', but what the model makes from prompts alone is text_to_image; remove it"),
        ("{prior: {prompts: lines.txt, count: 3}}", "sources.t2i.prior.prompts: 'lines.txt' does not exist"),
        ("{prior: {prompts: [a], count: 3}, take: {count: 9}}", "sources.t2i.take.count: 9 rows are asked for, and there are 3"),
    ],
)
def test_a_source_of_the_models_own_images_is_told_what_does_not_fit_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, wanted: str) -> None:
    found = said(world, tmp_path, monkeypatch, "flux", "precision: bf16", source)
    assert any(wanted in line for line in found), found


def test_fp16_is_warned_of_where_it_has_gone_wrong(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    file = tmp_path / "x.yaml"
    file.write_text(GOOD.replace("MODEL", "flux").replace("FIELD", "precision: fp16"))
    assert any("flux in fp16: its blocks cut activations off at 65504, and nothing is learnt through those; bf16 has its range" in str(note) for note in plan_notes(read_plan(file), world))


@pytest.mark.parametrize(("model", "task"), [("sd3", "entity"), ("sana", "edit"), ("omnigen", "entity"), ("one", "subject")])
def test_a_task_that_a_family_would_ignore_is_refused_with_those_that_it_can(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, task: str) -> None:
    found = said(world, tmp_path, monkeypatch, model, "precision: bf16", f"{{path: photos, task: {task}}}")
    assert any(f"cannot train task '{task}' (it can: text_to_image" in line for line in found), found


def plan_text(world: Path, tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return [str(problem) for problem in check_plan(read_plan(file), world)]


def test_full_weights_of_one_expert_are_trained_where_no_stage_trains_the_other(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    alone = GOOD.replace("MODEL", "experts").replace("FIELD", "expert: high, train: full, precision: fp32")
    assert plan_text(world, tmp_path, alone) == []
    both = alone + "  - {name: other, steps: 10, resolution: 64, batch: 8, lr: 1e-4, expert: low}\n"
    assert any("'full' of one of two transformers is not handed on to a stage of the other; train an adapter" in line for line in plan_text(world, tmp_path, both))


def test_a_model_of_the_hub_that_is_known_by_its_name_is_held_to_what_its_family_can_do(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    text = GOOD.replace("MODEL", "stabilityai/stable-diffusion-3.5-medium").replace("FIELD", "pyramid: {levels: 2}")
    assert any("sd3 cannot be told where the tokens of a coarse level lie" in line for line in plan_text(world, tmp_path, text))
    file = tmp_path / "turbo.yaml"
    file.write_text(GOOD.replace("MODEL", "Tongyi-MAI/Z-Image-Turbo").replace("FIELD", "precision: fp16"))
    notes = [str(note) for note in plan_notes(read_plan(file), world)]
    assert any("'Tongyi-MAI/Z-Image-Turbo' is distilled to sample in few steps, and training takes that from it" in note for note in notes)
    assert any("z_image in fp16" in note for note in notes)

"""Samples: the sampler follows a velocity to its end, the sheet holds any caption, and the judge says what it was taught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor, nn

import stages.sampling
from mixing.buckets import Shapes
from mixing.images import to_tensor
from mixing.selected import Choice, Selection, select
from mixing.source import open_source
from models import tiny_flux
from runs import COLOURS, make_data
from stages.families.base import Text
from stages.families.family import Family
from stages.families.flux import Flux
from stages.objectives.flow import noise
from stages.precision import StagePrecision
from stages.sampler import Sampler, sample
from stages.sampling import Judge, Preview, accuracy, fit_judge, previews, sheet
from stages.shown import Shown

CPU = torch.device("cpu")
FP32 = StagePrecision("fp32", CPU)
SHOWN = Shown(torch.zeros(2, 4, 8, 8), Text(torch.zeros(2, 1, 4), torch.zeros(2, 4)), (), None)


class Oracle(Family):
    """Pixel-space Flux whose velocity leads straight to what the prompt's pooled embedding says: a plain colour."""

    wrong = False

    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] = ()) -> Text:
        colours = [next((colour for name, colour in COLOURS.items() if name in prompt), (0, 0, 0)) for prompt in prompts]
        if self.wrong:
            colours = [COLOURS["red"]] * len(prompts)
        return Text(torch.zeros(len(prompts), 1, 4), torch.tensor(colours) / 127.5 - 1)

    def predict(self, transformer: nn.Module, noised: Tensor, t: Tensor, text: Text, references: Sequence[Tensor] = (), **rest: object) -> Tensor:
        return (noised - text.pooled[:, :, None, None]) / t.view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data", rows=60)
    tiny_flux(folder / "model", pixels=True)
    tiny_flux(folder / "shifting", pixels=False)
    draw = np.random.default_rng(1)
    (folder / "labelled").mkdir()
    with (folder / "labelled" / "metadata.jsonl").open("w") as lines:
        for number in range(36):
            name, colour = list(COLOURS.items())[number % 3]
            pixels = np.full((12, 12, 3), colour, dtype=np.uint8)
            pixels[3:9, 3:9] = draw.integers(0, 255, (6, 6, 3))
            Image.fromarray(pixels).save(folder / "labelled" / f"{number}.png")
            lines.write(json.dumps({"file_name": f"{number}.png", "label": name}) + "\n")
    return folder


@pytest.fixture(scope="module")
def selections(world: Path) -> dict[str, Selection]:
    chosen = {}
    for name, path, task in (("photos", "photos", "text_to_image"), ("edits", "edits/rows.jsonl", "edit")):
        source = open_source(name, path=path, task=task, columns={}, prompt=None, split="train", on_bad_row="stop", root=world / "data")
        chosen[name] = select(source, Choice(), 6)
    return chosen


def process(index: int = 0, of: int = 1) -> Any:
    return SimpleNamespace(process_index=index, num_processes=of, device=CPU)


# --- the sampler ------------------------------------------------------------------------------------------------------------------------


class Straight(Family):
    """The velocity e - x0 of known ends, wherever it is asked; notes where."""

    e: Tensor
    x0: Tensor
    asked: list[tuple[Tensor, Tensor]]

    def predict(self, transformer: nn.Module, noised: Tensor, t: Tensor, text: Text, references: Sequence[Tensor] = (), **rest: object) -> Tensor:
        self.asked.append((noised, t))
        return self.e - self.x0


@pytest.mark.parametrize("model", ["model", "shifting"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_sampling_along_the_true_velocity_ends_at_the_image(world: Path, model: str, steps: int) -> None:
    family = Straight(Flux(), str(world / model), None, None, CPU)
    family.x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    family.asked = []
    keys = [1, 2]
    family.e = noise((4, 8, 8), keys)
    found = sample(family, nn.Identity(), (4, 8, 8), keys, SHOWN, Sampler(steps, FP32))
    assert torch.allclose(found, family.x0, atol=1e-5)
    assert len(family.asked) == steps
    assert torch.equal(family.asked[0][0], family.e)
    for noised, t in family.asked:
        assert t.shape == (2,)
        weight = t.view(-1, 1, 1, 1)
        assert torch.allclose(noised, (1 - weight) * family.x0 + weight * family.e, atol=1e-5), "the model is told the noise that it is shown"


def test_sampling_visits_the_noise_levels_of_the_models_own_sampler(world: Path) -> None:
    family = Straight(Flux(), str(world / "shifting"), None, None, CPU)
    family.e = family.x0 = torch.zeros(2, 4, 8, 8)
    family.asked = []
    sample(family, nn.Identity(), (4, 8, 8), [1, 2], SHOWN, Sampler(5, FP32))
    levels = torch.stack([t[0] for _, t in family.asked])
    height = width = 8 * family.factor
    assert torch.equal(levels, family.sigmas(5, family.tokens(height, width))[:-1])
    assert levels[0] == 1
    assert bool((levels.diff() < 0).all())


def test_previews_are_the_first_held_out_rows_with_their_references_the_same_each_time(world: Path, selections: dict[str, Selection]) -> None:
    family = Oracle(Flux(), str(world / "model"), None, None, CPU)
    state = torch.get_rng_state()
    shown, again = (previews(family, nn.Identity(), selections, rows=2, shapes=Shapes(8, 2), sampler=Sampler(3, FP32), seed=1, accelerator=process()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [preview.source for preview in shown] == ["photos"] * 2 + ["edits"] * 2
    for preview, other in zip(shown, again, strict=True):
        assert preview.output.tobytes() == other.output.tobytes()
        source = selections[preview.source].source
        place = shown.index(preview) % 2
        example = source.example(int(selections[preview.source].held_out[place]))
        assert preview.prompt == example.prompt
        assert len(preview.references) == len(example.references)
        colour = next(colour for name, colour in COLOURS.items() if name in preview.prompt)
        assert (to_tensor(preview.output) - torch.tensor(colour).view(3, 1, 1) / 127.5 + 1).abs().max() < 0.01
        assert preview.target.size == preview.output.size == (8, 8)


def test_two_processes_make_the_previews_that_one_makes(world: Path, selections: dict[str, Selection], monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(Flux(), str(world / "model"), None, None, CPU)
    model = family.load_transformer(torch.float32, None)

    def made(accelerator: Any) -> list[Preview]:
        return previews(family, model, selections, rows=2, shapes=Shapes(8, 2), sampler=Sampler(2, FP32), seed=1, accelerator=accelerator)

    alone, parts = made(process()), []  # type: ignore[var-annotated]
    monkeypatch.setattr(stages.sampling, "gather_object", lambda found: parts.append(found) or found)
    for index in range(2):
        assert len(made(process(index, 2))) == 2
    monkeypatch.setattr(stages.sampling, "gather_object", lambda found: parts[1] + parts[0])
    together = made(process(0, 2))
    assert [(preview.source, preview.prompt, preview.output.tobytes()) for preview in together] == [(preview.source, preview.prompt, preview.output.tobytes()) for preview in alone]


# --- the sheet --------------------------------------------------------------------------------------------------------------------------


def preview_of(source: str, prompt: str, references: int = 0) -> Preview:
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    return Preview(source, prompt, (image,) * references, image, image)


@pytest.mark.parametrize(
    "prompt", ["", "word " * 1000, "x" * 5000, "字" * 5000, "a\nb\tc\u2028d\x00", "🙂 é ﷺ"], ids=["empty", "words", "one word", "without spaces", "control", "emoji"]
)
def test_a_sheet_holds_any_caption_at_the_size_that_its_rows_ask_for(prompt: str) -> None:
    plain = sheet([preview_of("photos", "a square"), preview_of("photos", "a square"), preview_of("edits", "a square", 2)])
    picture = sheet([preview_of("photos", prompt), preview_of("photos", prompt), preview_of("edits", prompt, 2)])
    assert picture.size == plain.size
    assert picture.mode == "RGB"


def test_a_sheet_grows_with_sources_rows_and_references() -> None:
    one = sheet([preview_of("photos", "a")])
    wider, taller = sheet([preview_of("photos", "a"), preview_of("photos", "a")]), sheet([preview_of("photos", "a"), preview_of("edits", "a")])
    with_reference = sheet([preview_of("edits", "a", 1)])
    assert wider.width - stages.sampling._GAP == 2 * (one.width - stages.sampling._GAP)
    assert taller.height - stages.sampling._GAP == 2 * (one.height - stages.sampling._GAP)
    assert with_reference.width > one.width
    assert (wider.height, taller.width, with_reference.height) == (one.height, one.width, one.height)


def test_a_sheet_shows_reference_output_and_target() -> None:
    colours = {"reference": (255, 0, 0), "output": (0, 255, 0), "target": (0, 0, 255)}
    red, green, blue = (Image.new("RGB", (8, 8), colour) for colour in colours.values())
    picture = sheet([Preview("edits", "a", (red,), green, blue)])
    counts = {colour: number for number, colour in picture.getcolors(2**20)}
    cell = stages.sampling._CELL**2
    for colour in colours.values():
        assert cell - 4 * stages.sampling._CELL <= counts[colour] <= cell


@pytest.mark.parametrize("prompt", ["word " * 1000, "x" * 5000, "字" * 5000], ids=["words", "one word", "without spaces"])
def test_a_long_caption_stays_beneath_its_own_images(prompt: str) -> None:
    """The second preview's part of the sheet, and the next source's, look the same whatever the first one's caption is."""
    second, third = preview_of("photos", ""), preview_of("edits", "")
    with_caption, without = sheet([preview_of("photos", prompt), second, third]), sheet([preview_of("photos", ""), second, third])
    changed = ImageChops.difference(with_caption, without).getbbox()
    assert changed is not None
    half = (with_caption.width - stages.sampling._GAP) // 2 + stages.sampling._GAP
    band = (with_caption.height - stages.sampling._GAP) // 2 + stages.sampling._GAP
    assert changed[2] <= half
    assert changed[3] <= band


# --- the judge --------------------------------------------------------------------------------------------------------------------------


def judge_of(*labels: str) -> Judge:
    return Judge(labels, None, 8)


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a handwritten seven", "seven"),
        ("Seven", "seven"),
        ("  a   SEVEN \n here", "seven"),
        ("seventeen", None),
        ("a seven and a two", None),
        ("seven seven", "seven"),
        ("", None),
        ("a red square", "red square"),
        ("a red  square", "red square"),
        ("a red round square", None),
        ("a handwritten seven.", "seven"),
        ("seven, by hand", "seven"),
        ('the digit "two"', "two"),
    ],
)
def test_label_of_a_caption_is_the_one_label_whose_words_stand_in_it(caption: str, label: str | None) -> None:
    assert judge_of("red square", "seven", "two").label_of(caption) == label


def test_a_judge_is_right_about_images_like_those_it_was_fitted_on(world: Path) -> None:
    judge = fit_judge(world / "labelled", 8)
    assert judge.labels == ("blue", "green", "red")
    assert judge.resolution == 8
    plain = [Image.new("RGB", (20, 10), colour) for colour in COLOURS.values()]
    assert judge.predict(plain) == list(COLOURS)


LABEL_FAULTS = {
    "no label": ('{"file_name": "0.png", "label": "red"}\n{"file_name": "0.png"}\n', "metadata.jsonl:2"),
    "no file": ('{"label": "red"}\n', "metadata.jsonl:1"),
    "not an object": ('["0.png", "red"]\n', "metadata.jsonl:1"),
    "not JSON": ('{"file_name": "0.png", "label": "red"}\n{file_name: 0.png}\n', "metadata.jsonl:2"),
    "leaves the folder": ('{"file_name": "../data/photos/000.png", "label": "red"}\n', "metadata.jsonl:1"),
    "missing image": ('{"file_name": "0.png", "label": "red"}\n{"file_name": "none.png", "label": "red"}\n', "metadata.jsonl:2"),
    "not an image": ('{"file_name": "0.png", "label": "red"}\n{"file_name": "metadata.jsonl", "label": "blue"}\n', "metadata.jsonl:2"),
    "one label": ('{"file_name": "0.png", "label": "red"}\n{"file_name": "3.png", "label": "red"}\n', "metadata.jsonl"),
    "empty": ("", "metadata.jsonl"),
}


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_a_folder_that_no_judge_can_be_fitted_on_is_named_with_the_line(world: Path, tmp_path: Path, fault: str) -> None:
    for name in ("0.png", "3.png"):
        (tmp_path / name).write_bytes((world / "labelled" / name).read_bytes())
    text, said = LABEL_FAULTS[fault]
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        fit_judge(tmp_path, 8)


def test_blank_lines_and_line_separators_in_labels_are_read(world: Path, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((world / "labelled" / name).read_bytes())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "red"}\n\n{"file_name": "1.png", "label": "dark\u2028green"}\n', encoding="utf-8")
    assert fit_judge(tmp_path, 8).labels == ("dark\u2028green", "red")


# --- accuracy ---------------------------------------------------------------------------------------------------------------------------


def test_accuracy_is_1_of_perfect_samples_and_a_third_against_shuffled_captions(world: Path, selections: dict[str, Selection]) -> None:
    family, judge = Oracle(Flux(), str(world / "model"), None, None, CPU), fit_judge(world / "labelled", 8)
    state = torch.get_rng_state()
    found = accuracy(family, nn.Identity(), selections["photos"], judge, samples=100, sampler=Sampler(2, FP32), seed=0, accelerator=process())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(found) == {"accuracy", "shuffled_captions", "judge_on_real"}
    assert found["accuracy"] == 1
    assert found["judge_on_real"] == 1
    captions = [selections["photos"].source.example(int(row)).prompt for row in selections["photos"].held_out]
    expected = sum((sum(name in caption for caption in captions) / len(captions)) ** 2 for name in COLOURS)
    assert abs(found["shuffled_captions"] - expected) < 0.2


def test_accuracy_of_samples_that_are_always_red_is_the_share_of_red_captions(world: Path, selections: dict[str, Selection]) -> None:
    family, judge = Oracle(Flux(), str(world / "model"), None, None, CPU), fit_judge(world / "labelled", 8)
    family.wrong = True
    found = accuracy(family, nn.Identity(), selections["photos"], judge, samples=60, sampler=Sampler(1, FP32), seed=0, accelerator=process())
    captions = [selections["photos"].source.example(int(row)).prompt for row in selections["photos"].held_out]
    assert found["accuracy"] == pytest.approx(sum("red" in caption for caption in captions) / len(captions))
    assert found["shuffled_captions"] == pytest.approx(found["accuracy"])


def test_accuracy_does_not_depend_on_the_number_of_processes(world: Path, selections: dict[str, Selection], monkeypatch: pytest.MonkeyPatch) -> None:
    family, judge = Family(Flux(), str(world / "model"), None, None, CPU), fit_judge(world / "labelled", 8)
    model = family.load_transformer(torch.float32, None)

    def found(accelerator: Any) -> dict[str, float]:
        return accuracy(family, model, selections["photos"], judge, samples=70, sampler=Sampler(1, FP32), seed=0, accelerator=accelerator)

    alone, parts = found(process()), []  # type: ignore[var-annotated]
    monkeypatch.setattr(stages.sampling, "gather_object", lambda correct: parts.append(correct) or correct)
    for index in range(2):
        found(process(index, 2))
    assert [len(part) for part in parts] == [32 + 6, 32]
    monkeypatch.setattr(stages.sampling, "gather_object", lambda correct: parts[1] + parts[0])
    assert found(process(1, 2)) == alone


def test_accuracy_of_captions_that_name_no_label_is_refused(world: Path, selections: dict[str, Selection]) -> None:
    family = Oracle(Flux(), str(world / "model"), None, None, CPU)
    with pytest.raises(ValueError, match=r"no held-out caption of source 'photos' holds exactly one of the labels seven, two"):
        accuracy(family, nn.Identity(), selections["photos"], judge_of("seven", "two"), samples=4, sampler=Sampler(1, FP32), seed=0, accelerator=process())

"""What --explain says is what the order, the schedule and the model will do."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mixing.bad_rows import BadRow
from mixing.buckets import RowClass, class_of
from mixing.selected import Selection
from mixing.source import Source
from models import tiny_flux
from stages.adapter import add_adapter, choose_trainable
from stages.explain import Explanation, ModelFacts, explain, show
from stages.families.family import Family
from stages.families.flux import Flux
from stages.feed import Sizes
from stages.model_facts import model_facts
from stages.plan import Plan, Stage
from stages.resolved import objective_words
from stages.storage import left_plain, stored_bytes

SIZES = {"t2i": 1000, "edit": 50, "a-source-with-a-name-of-64-characters-that-goes-on-and-on-and-on": 3, "never": 7}
LONG = list(SIZES)[2]
PLAN = Plan.model_validate(
    {
        "name": "two",
        "seed": 3,
        "model": "models/tiny",
        "sources": {name: {"path": f"hub/a/{number}", "task": "edit" if name == "edit" else "text_to_image"} for number, name in enumerate(SIZES)},
        "stages": [
            {"name": "first", "steps": 1000, "resolution": 64, "batch": 8, "lr": 1e-4, "mix": {"t2i": 3, "edit": 1}, "train": "full", "precision": "fp32"},
            {
                "name": "second", "steps": 100, "resolution": 32, "batch": {"images": 6}, "ema": 0.99, "train": ["a[0-9]\\.[qk]"],
                "lr": {"peak": 2.5e-3, "warmup": 10, "warmup_from": 1e-6, "schedule": "cosine"}, "mix": {"t2i": 1, LONG: 0.5},
            },
            {"name": "third", "steps": 1, "resolution": 32, "batch": 1, "lr": {"peak": 1e-4, "warmup": 0}, "mix": {"t2i": 1, "edit": 0}},
        ],
    }
)  # fmt: skip
FACTS = ModelFacts("flux", 2_000_000_000, {"fp32": 8_000_000_000, "bf16": 4_000_000_000, "nf4": 1_300_000_000, "int8": 2_200_000_000}, (2_000_000_000, 1_000_000, 4_000_000), Sizes(16, 8), 100_000_000)
SQUARE, SQUARE_PAIR = class_of((2048, 2048), []), class_of((2048, 2048), [(2048, 2048)])


class NoRows:
    """Nothing is read."""


def selection(name: str, classes: dict[RowClass, int], bad: tuple[BadRow, ...] = (), repeat: int = 1) -> Selection:
    none = np.empty(0, dtype=np.int32)
    source = Source(name, "edit", none.astype(np.uint8), np.empty((0, 2), dtype=np.uint32), bad, "", NoRows())  # type: ignore[arg-type]
    return Selection(source, {each: np.arange(rows, dtype=np.int32) for each, rows in classes.items()}, none, repeat=repeat)


def selections_of(sizes: dict[str, int]) -> dict[str, Selection]:
    return {name: selection(name, {SQUARE_PAIR if name == "edit" else SQUARE: rows} if rows else {}) for name, rows in sizes.items()}


def explained(plan: Plan, model: ModelFacts | None, width: int = 100, selections: dict[str, Selection] | None = None) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(explain(plan, selections or selections_of(SIZES), model), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_are_explained_in_numbers() -> None:
    said = " ".join(explained(PLAN, FACTS).split())
    for part in (
        "two: models/tiny (flux, 2 B parameters), 3 stages, seed 3",
        "1,000, each of 8 images in micro-batches of 4: 8,000 images",
        "at 64 pixels, 24 to 40 tokens each with references and prompt: 224 k tokens",  # 6,000 x (16 + 8) + 2,000 x (16 + 16 + 8)
        "the transformer's own weights, 2 B parameters",
        "in fp32, weights stored in fp32",
        "0 at step 0, 1e-4 from step 50 to the last",
        "29.8 GiB: weights, gradients and optimizer; activations come on top",  # 2e9 x 16 bytes
        "t2i 75.00% 6,000 1,000 6.00",
        "edit 25.00% 2,000 50 40",
        "the adapter where a[0-9]\\.[qk] matches, 1 M parameters, with a moving average (decay 0.99)",
        "in bf16, base stored in bf16",
        "1e-6 at step 0, 2.5e-3 from step 10, then by a cosine to 0 at step 99",
        "3.74 GiB: weights, gradients and optimizer",  # 2e9 x 2 + 1e6 x 20 bytes
        "1, each of 1 image in micro-batches of 1: 1 image images at 32 pixels, 12 tokens each",
        "every image is 32x32 pixels",
        "64x64 24 1,000 64x64 + 64x64 40 50",
        "1e-4 from the first step to the last",
        "t2i text_to_image 6,401 1,000 6.40",
        "sum, 231 k tokens 1,101 steps 8,601",
        "no row of source 't2i' is refused",
    ):
        assert part in said, part


def test_sources_seen_too_often_or_never_are_named() -> None:
    said = " ".join(explained(PLAN, None).split())
    assert "each row of source 'edit' will be seen 40 times" in said
    assert f"each row of source '{LONG}' will be seen 67 times" in said
    assert "no stage draws from source 'never'" in said
    assert "source 't2i' will" not in said


@pytest.mark.parametrize("width", [80, 100, 200])
def test_lines_fit_the_console_and_a_reader(width: int) -> None:
    for model in (FACTS, None):
        lines = explained(PLAN, model, width).splitlines()
        assert max(map(len, lines)) <= min(width, 100)
        assert LONG in "".join(line.split()[0] for line in lines if line.startswith("   ") and line.split())


def test_without_a_model_tokens_and_memory_are_left_out() -> None:
    said = explained(PLAN, None)
    assert "tokens" not in said
    assert "memory" not in said


def test_stage_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="source 'edit' has no rows to train on"):
        list(explain(PLAN, selections_of({**SIZES, "edit": 0}), None))


def test_buckets_of_every_source_are_listed_with_their_counts_and_refused_rows_with_their_reason() -> None:
    wide, tall = class_of((1000, 1500), []), class_of((1500, 1000), [])
    bad = tuple(BadRow("a", f"{number}.jpg", "the file is empty") for number in range(12))
    selections = {"a": selection("a", {SQUARE: 10, wide: 20, tall: 5}, bad), "b": selection("b", {wide: 7})}
    stage = {"name": "only", "steps": 100, "resolution": 512, "batch": 4, "lr": 1e-4}
    plan = Plan.model_validate({"model": "m", "sources": {"a": {"path": "a"}, "b": {"path": "b"}}, "stages": [stage]})
    said = " ".join(explained(plan, FACTS, selections=selections).split())
    assert "bucket tokens a b 624x416 1,022 20 7 512x512 1,032 10 416x624 1,022 5" in said
    assert "12 rows of source 'a' are refused: 0.jpg: the file is empty 1.jpg: the file is empty" in said
    assert "and 2 more" in said
    assert "no row of source 'b' is refused" in said


def test_of_many_sources_a_bucket_tells_its_rows_and_how_many_sources_have_them() -> None:
    wide = class_of((1000, 1500), [])
    selections = {f"a-rather-long-name-{number}": selection(str(number), {SQUARE: 1_000_000, **({wide: 5} if number < 3 else {})}) for number in range(9)}
    plan = Plan.model_validate({"model": "m", "sources": {name: {"path": name} for name in selections}, "stages": [{"name": "only", "steps": 9, "resolution": 512, "batch": 4, "lr": 1e-4}]})
    lines = explained(plan, FACTS, width=80, selections=selections).splitlines()
    said = " ".join(" ".join(lines).split())
    assert "bucket tokens rows sources 512x512 1,032 9,000,000 9 624x416 1,022 15 3" in said
    assert max(map(len, lines)) <= 80


def test_resolutions_ramps_and_budgets_of_tokens_are_explained() -> None:
    levels = [{"pixels": 256, "share": 25}, {"pixels": 512, "share": 50}, {"pixels": 768, "share": 25}]
    mix = {"from": {"t2i": 1}, "to": {"t2i": 1, "edit": 1}}
    stage = {"name": "only", "steps": 100, "resolution": levels, "batch": {"tokens": {"from": 32_000, "to": 64_000}}, "mix": mix, "lr": 1e-4}
    plan = PLAN.model_copy(update={"stages": Plan.model_validate({**PLAN.model_dump(), "stages": [stage]}).stages})
    said = " ".join(explained(plan, FACTS).split())
    assert "100, each of 32,000 to 64,000 tokens in micro-batches of" in said
    assert "at 256, 512 and 768 pixels, 264 to 4,616 tokens each" in said
    assert "mix (changing over the stage) first step last step asked images rows epochs" in said
    assert "t2i 100.00% 50.00% 73.81%" in said
    assert "an image has up to 4,616 tokens, 14% of a step" in said
    assert "92,320 tokens a step would be enough" in said


@pytest.mark.parametrize("pixels", [True, False])
def test_facts_of_a_model_are_those_of_the_model_that_is_loaded(tmp_path: Path, pixels: bool) -> None:
    folder = tiny_flux(tmp_path / "model", pixels=pixels)
    stages = [stage.model_copy(update={"train": train}) for stage, train in zip(PLAN.stages, ("full", ["transformer_blocks.*"], "adapter"), strict=True)]
    plan = PLAN.model_copy(update={"model": str(folder), "stages": stages})
    facts = model_facts(plan)
    assert facts is not None
    family = Family(Flux(), str(folder), None, None, torch.device("cpu"))
    base = family.load_transformer(torch.float32, None)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    add_adapter(base, plan.adapter, family.target_patterns, 0)
    trainable = tuple(sum(value.numel() for value in choose_trainable(base, stage.train, "").values()) for stage in stages)
    model = family.load_transformer(torch.float32, None)
    assert facts == ModelFacts("flux", parameters, stored_bytes(model), trainable, Sizes(family.pixel_multiple, family.text_tokens), left_plain(model))
    assert (facts.base_bytes["fp32"], facts.base_bytes["bf16"]) == (4 * parameters, 2 * parameters)


def test_pattern_that_matches_nothing_is_an_error_of_the_facts(tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"model": str(tiny_flux(tmp_path / "model", pixels=True))})
    with pytest.raises(ValueError, match=r"stages\[1\]\.train: pattern"):
        model_facts(plan)


def test_what_a_stage_asks_beside_the_usual_is_said() -> None:
    stage = PLAN.stages[0].model_dump(by_alias=True) | {
        "pyramid": {"levels": 3, "shares": {"from": [1, 1, 1], "to": [1, 2, 1]}},
        "loss": {"per": "token", "sources": {"t2i": 0.5}},
        "dropout": {"mode": "nested", "prompt": 0.1, "references": 0.5},
    }
    assert objective_words(Stage.model_validate(stage)) == (
        "a pyramid of 3 levels, 1 : 1 : 1 to 1 : 2 : 1; the loss per token; t2i counts 0.5; without prompt 0.1 of the time; without references 0.5 of the time, where the prompt went"
    )
    stage |= {"pyramid": None, "loss": {"weighting": "bell"}, "dropout": {"mode": "joint", "prompt": 0.1}, "timesteps": {"density": "uniform", "shift": 3.0, "range": [0.1, 0.9], "stratified": True}, "expert": "high"}
    assert objective_words(Stage.model_validate(stage)) == (
        "the expert for high noise; noise levels uniform, shift 3, 0.1 to 0.9, stratified; bell weighting; without prompt and references 0.1 of the time"
    )
    assert objective_words(PLAN.stages[0]) == ""


def test_an_explanation_is_shown_in_a_notebook_as_tables_with_the_same_numbers() -> None:
    explanation = Explanation(tuple(explain(PLAN, selections_of(SIZES), FACTS)))
    html = explanation._repr_html_()
    assert html.count("<table") == html.count("</table>") >= 2 * len(PLAN.stages) + 1
    for part in ("1,000, each of 8 images in micro-batches of 4: 8,000 images", "0 at step 0, 1e-4 from step 50 to the last"):
        assert part in html
        assert part in str(explanation)

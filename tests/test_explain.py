"""What --explain says is what the order, the schedule and the model will do."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from models import tiny_flux
from stages.adapter import add_adapter, choose_trainable
from stages.explain import ModelFacts, explain
from stages.families.flux import Flux
from stages.model_facts import model_facts
from stages.plan import Plan

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
FACTS = ModelFacts("flux", 2_000_000_000, {"fp32": 8_000_000_000, "bf16": 4_000_000_000}, (2_000_000_000, 1_000_000, 4_000_000), (16, 4, 4))


def explained(plan: Plan, model: ModelFacts | None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    explain(plan, SIZES, model, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_are_explained_in_numbers() -> None:
    said = " ".join(explained(PLAN, FACTS).split())
    for part in (
        "two: models/tiny (flux, 2 B parameters), 3 stages, seed 3",
        "1,000, each of 8 images in 2 micro-batches of 4: 8,000 images",
        "64 x 64 pixels, 16 tokens each: 128 k target tokens",
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
        "1, each of 1 image in one micro-batch of 1: 1 image images 32 x 32 pixels",
        "1e-4 from the first step to the last",
        "t2i text_to_image 6,401 1,000 6.40",
        "sum, 130 k target tokens 1,101 steps 8,601",
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
        explain(PLAN, {**SIZES, "edit": 0}, None, Console(file=io.StringIO()))


@pytest.mark.parametrize("pixels", [True, False])
def test_facts_of_a_model_are_those_of_the_model_that_is_loaded(tmp_path: Path, pixels: bool) -> None:
    folder = tiny_flux(tmp_path / "model", pixels=pixels)
    stages = [stage.model_copy(update={"train": train}) for stage, train in zip(PLAN.stages, ("full", ["transformer_blocks.*"], "adapter"), strict=True)]
    plan = PLAN.model_copy(update={"model": str(folder), "stages": stages})
    facts = model_facts(plan)
    assert facts is not None
    family = Flux(str(folder), None, None, torch.device("cpu"))
    base = family.load_transformer(torch.float32, None)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    add_adapter(base, plan.adapter, family.target_patterns, 0)
    trainable = tuple(sum(value.numel() for value in choose_trainable(base, stage.train, "").values()) for stage in stages)
    assert facts == ModelFacts("flux", parameters, {"fp32": 4 * parameters, "bf16": 2 * parameters}, trainable, tuple(family.tokens(s.resolution, s.resolution) for s in stages))


def test_pattern_that_matches_nothing_is_an_error_of_the_facts(tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"model": str(tiny_flux(tmp_path / "model", pixels=True))})
    with pytest.raises(ValueError, match=r"stages\[1\]\.train: pattern"):
        model_facts(plan)

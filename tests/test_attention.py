"""Attention by name: the named kernel is the one that is called, gives the same within rounding, and is refused where it cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from runs import carry_out, events, make_world, plan_of, write_plan
from stages.attention import NoSuchAttention, check_attention, name_attention, usable_attention
from stages.check import check_plan
from stages.families.facts import FAMILIES
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image
from stages.handoff import cause_of_change
from stages.plan import Plan
from stages.problems import PlanError
from stages.reader import read_plan

CPU = torch.device("cpu")
TINY = (flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image)
STAGE = {"name": "only", "steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01}


def predict(family: Family, model: nn.Module, prompts: list[str]) -> Tensor:
    side = max(2 * family.pixel_multiple, 16)
    shape = family.encode_images(torch.zeros(2, 3, side, side)).shape
    return family.predict(model, torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6, 0.2]), family.encode_prompts(prompts))


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Grows by one for each call of a kernel: whether it was given a mask."""
    calls: list[bool] = []
    registry, word = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName(name)
    kernel = registry._backends[word]

    def spy(**given: Any) -> Tensor:
        calls.append(given.get("attn_mask") is not None)
        result: Tensor = kernel(**given)
        return result

    monkeypatch.setitem(registry._backends, word, spy)
    return calls


@pytest.mark.parametrize("tiny", TINY, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_named_kernel_is_called_and_gives_the_same_in_every_family_that_takes_one(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = open_family(str(tiny.build(tmp_path / "model")), CPU)
    model = family.load_transformer(torch.float32, None)
    assert name_attention(model, "auto") == 0
    if not FAMILIES[family.name].names_attention:
        with pytest.raises(NoSuchAttention, match="torch's own function"):
            name_attention(model, "_native_math")
        return
    calls, prompts = spied(monkeypatch, "_native_math"), ["a red disc", "a very much longer prompt than the other one is, of discs and squares"]
    with torch.no_grad():
        plain = predict(family, model, prompts)
        assert not calls
        named = name_attention(model, "_native_math")
        output = predict(family, model, prompts)
        others = family.load_transformer(torch.float32, None)
        number = len(calls)
        predict(family, others, prompts)
    assert 0 < named <= number
    assert len(calls) == number, "no other model of the process is told"
    assert any(calls) is FAMILIES[family.name].masks_prompts
    assert torch.allclose(output, plain, atol=1e-5)


def test_kernels_are_tried_on_the_device_before_anything_is_loaded(tmp_path: Path) -> None:
    usable = usable_attention(CPU, torch.float32)
    assert usable[0] == "auto"
    assert {"native", "_native_math"} <= set(usable)
    assert not {"_native_cudnn", "flash"} & set(usable)
    make_world(tmp_path)
    plan = plan_of(tmp_path, stages=[{**STAGE, "precision": "bf16", "attention": "_native_cudnn"}])
    choices = r"\(here: auto, native, _native_math"
    with pytest.raises(PlanError, match=rf"stages\[0\].attention: '_native_cudnn' does not work on this cpu in bf16: .*{choices}"):
        check_attention(Plan.model_validate(plan), CPU)
    said = carry_out(tmp_path / "run", plan, expect=2)
    assert "'_native_cudnn' does not work on this cpu" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"precision": "fp32", "attention": "_native_cudnn"}, {}, "'_native_cudnn' computes in 16 bits, and the stage in fp32; choose native, or precision bf16"),
        ({"attention": "_native_flash"}, {"task": "entity"}, "'_native_flash' takes no mask, and rows of task entity come with one; choose native, or leave it out"),
    ],
)
def test_what_a_kernel_cannot_do_is_found_by_the_check(tmp_path: Path, changes: dict[str, str], source: dict[str, str], message: str) -> None:
    make_world(tmp_path)
    plan = plan_of(tmp_path, stages=[{**STAGE, **changes}], sources={"photos": {"path": str(tmp_path / "data" / "photos"), **source}})
    problems = check_plan(read_plan(write_plan(tmp_path / "plan.yaml", plan)), tmp_path)
    assert message in [problem.message for problem in problems if problem.where == "stages[0].attention"]


def test_a_family_that_takes_no_name_and_one_that_masks_prompts_are_found_by_the_check(tmp_path: Path) -> None:
    make_world(tmp_path)
    for tiny, name, message in (
        (sana, "native", "sana's transformer calls torch's attention and no other (diffusers 0.42.1); remove it. These can be told: flux, flux2, qwen_image, z_image, wan"),
        (qwen_image, "_native_flash", "'_native_flash' takes no mask, and qwen_image masks prompts of different length in one micro-batch; choose native, or leave it out"),
    ):
        folder = tiny.build(tmp_path / name)
        plan = plan_of(tmp_path, model=str(folder), stages=[{**STAGE, "attention": name, "resolution": 64}], sources={"photos": {"path": str(tmp_path / "data" / "photos")}})
        problems = check_plan(read_plan(write_plan(tmp_path / "plan.yaml", plan)), tmp_path)
        assert message in [problem.message for problem in problems if problem.where == "stages[0].attention"]


def test_a_run_by_a_named_kernel_says_so_and_a_change_is_named_at_the_handoff(tmp_path: Path) -> None:
    make_world(tmp_path)
    first, then = {**STAGE, "precision": "fp32", "attention": "native"}, {**STAGE, "name": "then", "precision": "fp32", "attention": "_native_math"}
    plan = plan_of(tmp_path, stages=[first, then], sources={"photos": {"path": str(tmp_path / "data" / "photos")}})
    carry_out(tmp_path / "run", plan)
    assert [line["attention"] for line in events(tmp_path / "run", "stage") if line["state"] == "start"] == ["native", "_native_math"]
    (line,) = events(tmp_path / "run", "handoff")
    assert line["cause"] == "attention by native -> _native_math"
    assert max(line["delta"].values()) < 1e-2
    stages = Plan.model_validate(plan).stages
    assert cause_of_change(stages[0], stages[0]) is None

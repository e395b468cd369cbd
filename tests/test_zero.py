"""ZeRO-2 and ZeRO-3 by DeepSpeed over gloo on the CPU: the same training as by one process. Runs are skipped where DeepSpeed is not installed (requirements-deepspeed.txt)."""

from __future__ import annotations

import gc
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runs import carry_out, events, make_world, plan_of, traced
from stages import open_leg, zero
from stages.launched import launched, read_launched
from stages.plan import Plan
from stages.problems import LaunchError
from stages.resolved import resolved_plan

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def told(stage: int) -> dict[str, str]:
    """What `accelerate launch` with accelerate_configs/deepspeed_zero2.yaml, or zero3, tells the processes."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 parts the tiny model's weights too, which it would keep whole."""
    monkeypatch.setattr(zero, "_UNPARTED", 0)


def short(world: Path) -> dict[str, Any]:
    """Every weight, the adapter over nf4 with activations computed again, and the adapter with an average and references left out of some images: in float32, with an
    epsilon under which rounding stays rounding.

    With three sources the first process of two has more to evaluate and to sample, and where references are left out a micro-batch has one part or two.
    """
    plan = plan_of(world, save_every=1)
    plan["sources"]["others"] = {"path": str(world / "data" / "photos")}
    shared = {"steps": 3, "optimizer": {"eps": 1e-2}, "precision": "fp32", "resolution": 8, "batch": {"images": 8, "micro": 2}, "lr": 0.01}
    plan["stages"] = [
        {**shared, "name": "found", "train": "full", "mix": {"photos": 1}},
        {**shared, "name": "expose", "base": "nf4", "mix": {"photos": 2, "edits": 1, "others": 1}, "checkpointing": "full"},
        {**shared, "name": "refine", "ema": 0.9, "mix": {"photos": 1, "edits": 3}, "dropout": {"references": 0.5, "prompt": 0.2}, "handoff": {"optimizer": "keep"}, "clip": 0.2},
    ]
    return plan


def apart(one: Path, other: Path) -> float:
    """Largest difference of two runs' published adapters."""
    first, second = (load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def moments(folder: Path) -> dict[str, Any]:
    """The optimizer's numbers in the last checkpoint of the stage `refine`."""
    return load_file(next((folder / "stages" / "3-refine").glob("step-*/optimizer.safetensors")))


@pytest.fixture(scope="module")
def by_one(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    carry_out(folder, short(world), "--trace")
    return folder


@needs_deepspeed
@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize(("stage", "share"), [(2, 100), (3, 50)])
def test_run_by_zero_through_all_stages_ends_as_that_of_one_process(stage: int, share: float, world: Path, by_one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = carry_out(folder, short(world), "--trace", processes=2, told=told(stage))
    assert f"2 processes by ZeRO-{stage}" in said
    assert traced(by_one) == traced(folder)
    assert apart(by_one, folder) < 1e-6
    for mine, other in zip(events(by_one, "step"), events(folder, "step"), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)
    for mine, other in zip(events(by_one, "eval"), events(folder, "eval"), strict=True):
        rows = {name: (entry["rows"], entry["loss"]) for name, entry in mine["sources"].items()}
        assert rows == {name: (entry["rows"], pytest.approx(entry["loss"], rel=1e-5)) for name, entry in other["sources"].items()}
    mine, other = moments(by_one), moments(folder)
    assert mine.keys() == other.keys()
    assert all(mine[name].flatten().tolist() == pytest.approx(other[name].flatten().tolist(), rel=1e-3, abs=1e-6) for name in mine)
    held = [float(found) for found in re.findall(r"holds (\d+\.\d)% of the model's numbers", said)]
    assert held == (pytest.approx([share] * 3, abs=1) if share < 100 else []), "where weights stay whole nothing is said of them"


@needs_deepspeed
@pytest.mark.usefixtures("parted")
def test_run_goes_on_under_other_engines_and_numbers_of_processes(world: Path, by_one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    carry_out(folder, short(world), processes=2, told=told(2), kill_at=28)  # in the first stage
    assert "going on with stage 'found' after step" in carry_out(folder, short(world), "--until", "found")
    carry_out(folder, short(world), processes=2, kill_at=28)  # in the second
    assert "going on with stage 'expose' after step" in carry_out(folder, short(world), "--until", "expose", processes=2, told=told(3))
    carry_out(folder, short(world), processes=2, told=told(3), kill_at=28)  # in the third
    assert "going on with stage 'refine' after step" in carry_out(folder, short(world), processes=2, told=told(2))
    assert {run["engine"] for run in events(folder, "run")} == {"", "DDP", "ZeRO-2", "ZeRO-3"}
    assert apart(by_one, folder) < 1e-6


@needs_deepspeed
@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_stages_multiply_in_bf16_and_lose_as_by_ddp(stage: int, world: Path, tmp_path: Path) -> None:
    plan = short(world)
    plan["dry_step"] = True
    plan["stages"] = [{**plan["stages"][0], "precision": "bf16", "base": "fp32"}, {**plan["stages"][1], "precision": "bf16", "base": "bf16"}]
    carry_out(tmp_path / "ddp", plan, processes=2)
    carry_out(tmp_path / "zero", plan, processes=2, told=told(stage))
    for mine, other in zip(events(tmp_path / "ddp", "step"), events(tmp_path / "zero", "step"), strict=True):
        assert other["multiplied_in"] == "bf16"
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-3)


@needs_deepspeed
@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize("stage", [2, 3])
def test_numbers_of_earlier_stages_do_not_stay_in_memory(stage: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, log = open_leg.let_go, tmp_path / "alive"

    def counted(device: torch.device) -> int:
        held = let_go(device)
        gc.collect()  # an engine is let go of at one collection, and what it held at the next
        with log.open("a") as file:
            file.write(f"{sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor))}\n")
        return held

    monkeypatch.setattr(open_leg, "let_go", counted)
    plan = short(world)
    plan["stages"] = [{**plan["stages"][1], "name": name, "steps": 1} for name in ("one", "two", "three", "four")]
    carry_out(tmp_path / "run", plan, processes=2, told=told(stage))
    numbers = [int(line) for line in log.read_text().split()]
    after_one, after_three = numbers[2:4], numbers[6:8]  # of both processes
    assert max(after_three) <= max(after_one) + 100, "an adapter has 1,696, the model 19,788"


@needs_deepspeed
def test_moments_of_some_weights_only_are_not_kept(world: Path, tmp_path: Path) -> None:
    plan = short(world)
    part = {**plan["stages"][1], "name": "part", "steps": 1, "train": ["transformer_blocks.*"]}
    plan["stages"] = [part, {**plan["stages"][2], "steps": 1}]
    said = carry_out(tmp_path / "run", plan, processes=2, told=told(2), expect=2)
    assert re.search(r"handoff.optimizer: finds the moments of \d+ of \d+ weights, and ZeRO counts the steps of all together; write reset", said)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage: 1; write 2 or 3"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping: 1.0, which is not heeded; write clip into the plan's stages"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: 4, which is not heeded; write batch"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device: cpu, which is not heeded"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device: nvme, which is not heeded; write offload: true"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag: true, which is not heeded"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16, which is not heeded; write precision into the plan's stages"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file: ds.json, which is not heeded"),
    ],
)
def test_what_the_launcher_is_told_and_medley_does_not_heed_is_refused_by_name(changed: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)):
        read_launched({**told(2), **changed})


@pytest.mark.parametrize(("stage", "engine"), [(2, "zero2"), (3, "zero3")])
def test_while_a_run_goes_on_libraries_do_not_see_deepspeed(stage: int, engine: str) -> None:
    environment = {**told(stage), "PATH": "x", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    with launched(environment) as read:
        assert read.engine == engine
        assert environment.keys() == {"PATH", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"}
    assert environment.keys() >= told(stage).keys()


def test_what_zero_cannot_do_is_refused_with_a_cure() -> None:
    stage = {"name": "one", "steps": 3, "resolution": 8, "batch": 2, "lr": 0.1}
    stages = [
        {**stage, "precision": "fp16"},
        {**stage, "name": "two", "optimizer": {"name": "adamw8bit"}, "precision": "fp32"},
        {**stage, "name": "three", "train": "full", "ema": 0.9, "precision": "fp32"},
    ]
    plan = resolved_plan(Plan.model_validate({"name": "x", "model": "m", "sources": {"photos": {"path": "p"}}, "stages": stages}))
    found = {words: [f"{problem.place}: {problem.message}" for each in plan.stages for problem in zero.refused(each.name, each, words)] for words in ("ZeRO-2", "ZeRO-3")}
    assert [line.split(":")[0] for line in found["ZeRO-2"]] == ["one.precision", "two.optimizer"]
    assert [line.split(":")[0] for line in found["ZeRO-3"]] == ["one.precision", "two.optimizer", "three.ema"]
    assert "write bf16, or launch with accelerate_configs/ddp.yaml" in found["ZeRO-2"][0]
    assert "write adamw" in found["ZeRO-2"][1]


def test_missing_deepspeed_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(LaunchError, match=re.escape("pip install -r requirements-deepspeed.txt")):
        zero.deepspeed("cpu")

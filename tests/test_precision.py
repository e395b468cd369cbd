"""Precision: what a stage asks for is what it multiplies in, in the base and in the pairs; fp16 scales its loss; a wrong launch is refused."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from models import tiny_flux
from runs import carry_out, events, make_world, plan_of
from stages.adapter import add_adapter, choose_trainable, without_input_casts
from stages.check import check_plan
from stages.families.family import Family
from stages.families.flux import Flux
from stages.memory import lasting, let_go
from stages.plan import Adapter
from stages.precision import DTYPES, Multiplied, StagePrecision, start_accelerator
from stages.problems import LaunchError
from stages.reader import read_plan
from stages.resolved import resolved_storage

CPU = torch.device("cpu")
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
STORED = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "bf16")]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


def predict(family: Family, model: nn.Module) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return family.predict(model, x, torch.tensor([0.3, 0.8]), family.encode_prompts(["a red disc", "a blue square"]), (0.5 * x,))


# --- what is multiplied in what ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "storage"), STORED)
@pytest.mark.parametrize("casts", [True, False])
def test_every_product_of_a_forward_pass_is_made_in_the_stages_precision(family: Family, mode: str, storage: str, casts: bool) -> None:
    model = family.load_transformer(DTYPES[storage], None)
    add_adapter(model, Adapter(rank=2, targets="linear"), family.target_patterns, 0)
    if not casts:
        without_input_casts(model)
    precision = StagePrecision(mode, CPU)
    with Multiplied() as watch, precision.autocast():
        predict(family, model)
    assert set(watch.dtypes) == {NAMES[mode]}
    assert watch.verdict() == mode
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert watch.dtypes[NAMES[mode]] >= linears, "each linear layer, those of the pairs too, is one product or more"


@pytest.mark.parametrize(("mode", "storage"), STORED)
def test_the_three_products_of_an_adapted_layer_are_made_in_the_stages_precision(mode: str, storage: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(DTYPES[storage])
    add_adapter(model, Adapter(rank=2, targets=["0"]), {}, 0)
    precision = StagePrecision(mode, CPU)
    with Multiplied() as watch, precision.autocast():
        model(torch.randn(4, 8, dtype=DTYPES[mode]))
    assert watch.dtypes == {NAMES[mode]: 3}


@pytest.mark.parametrize("train", ["adapter", "full"])
def test_fp32_over_a_base_in_bf16_is_refused_or_multiplies_in_fp32(tmp_path: Path, train: str) -> None:
    """`precision: fp32` with `base: bf16`: whatever the plan language lets pass must run."""
    family = Family(Flux(), str(tiny_flux(tmp_path / "model", pixels=True)), None, None, CPU)
    (tmp_path / "photos").mkdir()
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"model: {tmp_path / 'model'}\n"
        f"sources: {{hub: {{path: hub/user/photos}}}}\n"
        f"stages: [{{name: only, steps: 1, resolution: 8, batch: 1, lr: 0.1, train: {train}, precision: fp32, base: bf16}}]\n"
    )
    read = read_plan(plan, ())
    if any(problem.where == "stages[0].base" for problem in check_plan(read, tmp_path)):
        return
    model = family.load_transformer(DTYPES[resolved_storage(read.plan.stages[0])], None)
    with Multiplied() as watch, StagePrecision("fp32", CPU).autocast():
        predict(family, model)
    assert set(watch.dtypes) == {"float32"}


def test_products_are_counted_by_the_dtype_of_their_operands() -> None:
    a, x = torch.randn(4, 4), torch.randn(2, 3, 4, 4)
    with Multiplied() as watch:
        assert watch.verdict() == "none"
        a + a
        a @ a
        a.bfloat16() @ a.bfloat16()
        torch.nn.functional.linear(a.half(), a.half(), a[0].half())
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert watch.dtypes["bfloat16"] == 1
    assert watch.dtypes["float16"] == 1
    assert watch.dtypes["float32"] >= 2


def test_pairs_that_multiply_in_another_dtype_than_their_base_are_told() -> None:
    """Without autocast a bf16 base's pairs multiply in float32. Were only most of the products looked at, few pairs would hide among many layers."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    add_adapter(model, Adapter(rank=2, targets=["1"]), {}, 0)
    with Multiplied() as watch:
        model(torch.randn(4, 8, dtype=torch.bfloat16))
    assert watch.dtypes == {"bfloat16": 3, "float32": 2}
    assert watch.verdict() not in DTYPES


def test_watching_changes_no_bit(family: Family) -> None:
    model, precision = family.load_transformer(torch.float32, None), StagePrecision("bf16", CPU)
    with torch.no_grad():
        with precision.autocast():
            plain = predict(family, model)
        with Multiplied(), precision.autocast():
            watched = predict(family, model)
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_gradients_and_weights_of_the_pairs_stay_float32(family: Family, mode: str) -> None:
    model = family.load_transformer(torch.bfloat16, None)
    add_adapter(model, Adapter(rank=2), family.target_patterns, 0)
    trainable = choose_trainable(model, "adapter", "test")
    precision = StagePrecision(mode, CPU)
    with precision.autocast():
        loss = predict(family, model).square().mean()
    precision.scaler.scale(loss).backward()
    assert loss.dtype == torch.float32
    for parameter in trainable.values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype == torch.float32


# --- loss scaling -----------------------------------------------------------------------------------------------------------------------


def test_only_fp16_scales_its_loss() -> None:
    loss = torch.tensor(3.0)
    assert torch.equal(StagePrecision("fp32", CPU).scaler.scale(loss), loss)
    assert torch.equal(StagePrecision("bf16", CPU).scaler.scale(loss), loss)
    assert torch.equal(StagePrecision("fp16", CPU).scaler.scale(loss), loss * 65536)


def test_fp16_skips_a_step_whose_gradient_is_infinite_and_halves_its_scale() -> None:
    precision, weight = StagePrecision("fp16", CPU), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for gradient, moved in ((1.0, True), (float("inf"), False), (float("nan"), False), (1.0, True)):
        before, scale = weight.detach().clone(), precision.scaler.get_scale()
        precision.scaler.scale((weight * gradient).sum()).backward()
        precision.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(weight, before) is not moved
        assert bool(weight.isfinite().all())
        assert precision.scaler.get_scale() == (scale if moved else scale / 2)
    assert float(optimizer.state[weight]["step"]) == 2


def test_fp16_keeps_gradients_that_would_be_rounded_to_zero_without_scaling() -> None:
    """1e-9 is below what fp16 can say (6e-8)."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    x = torch.ones(2, 4)
    found = {}
    for mode in ("fp32", "fp16"):
        precision = StagePrecision(mode, CPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with precision.autocast():
            output = model(x)
        precision.scaler.scale(output.float().sum() * 1e-9).backward()
        precision.scaler.unscale_(optimizer)
        (weight,) = model.parameters()
        assert weight.grad is not None
        found[mode] = weight.grad.clone()
        weight.grad = None
    assert torch.allclose(found["fp16"], found["fp32"], rtol=1e-2)
    assert bool((found["fp16"] != 0).all())


def test_state_of_the_scaler_goes_through_json() -> None:
    one, other = StagePrecision("fp16", CPU), StagePrecision("fp16", CPU)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    one.scaler.scale((weight * float("inf")).sum()).backward()
    one.scaler.step(optimizer)
    one.scaler.update()
    saved = json.loads(json.dumps(one.scaler.state_dict()))
    other.scaler.load_state_dict(saved)
    assert other.scaler.get_scale() == one.scaler.get_scale() == 32768
    assert other.scaler.state_dict() == one.scaler.state_dict()


# --- launching --------------------------------------------------------------------------------------------------------------------------


def test_processes_that_do_not_see_each_other_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU host without LOCAL_RANK: the launcher started two, and accelerate, which is played here, sees one."""
    monkeypatch.setattr("stages.precision.Accelerator", lambda **settings: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start_accelerator().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"started 2 processes and accelerate sees 1; .*accelerate_configs/cpu_2_processes\.yaml"):
        start_accelerator()


@pytest.mark.launch
def test_two_cpu_processes_asked_for_and_one_started_is_refused_with_the_cure(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing (accelerate 1.15)."""
    script = tmp_path / "script.py"
    script.write_text(
        "from stages.precision import start_accelerator\nfrom stages.problems import LaunchError\ntry:\n    start_accelerator()\nexcept LaunchError as error:\n    print('refused:', error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert "cpu_2_processes.yaml" in done.stdout


def test_a_product_over_one_number_is_not_counted() -> None:
    """OmniGen multiplies positions by frequencies in float32 whatever it computes in, as bmm over an inner dimension of 1."""
    with Multiplied() as watch:
        torch.bmm(torch.rand(2, 3, 1), torch.rand(2, 1, 5))
        torch.rand(3, 1) @ torch.rand(1, 4)
        torch.rand(3, 2, dtype=torch.bfloat16) @ torch.rand(2, 4, dtype=torch.bfloat16)
    assert watch.verdict() == "bf16"


# --- switching --------------------------------------------------------------------------------------------------------------------------

SWITCHES = [("fp32", None), ("bf16", None), ("fp16", None), ("fp32", None), ("bf16", "nf4"), ("bf16", "int8"), ("fp32", None), ("bf16", None)]


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_stages_of_all_precisions_and_storages_follow_one_another_and_leave_nothing_behind(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven switches in one launch: what is held at the end of the stage that the sixth led to, against that of the first, which has seen the kernels of both lengths."""
    world, counts = make_world(tmp_path / "world"), tmp_path / "counts"

    def counted(device: torch.device) -> int:
        held = let_go(device)
        alive = [each for each in gc.get_objects() if isinstance(each, FluxTransformer2DModel | torch.Tensor)]
        with (counts.with_suffix(f".{os.environ.get('RANK', '0')}")).open("a") as file:
            file.write(json.dumps([sum(isinstance(each, FluxTransformer2DModel) for each in alive), len(alive)]) + "\n")
        return held

    monkeypatch.setattr("stages.open_leg.let_go", counted)
    stage = {"steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01}
    stages = [{**stage, "name": f"s{number}", "precision": mode, **({"base": base} if base else {})} for number, (mode, base) in enumerate(SWITCHES)]
    carry_out(tmp_path / "run", plan_of(world, stages=stages), processes=processes)
    said = {line["stage"]: line["multiplied_in"] for line in events(tmp_path / "run", "step")}
    assert said == {f"s{number}": mode for number, (mode, _) in enumerate(SWITCHES)}
    held = [line["bytes"] for line in events(tmp_path / "run", "memory") if line["kind"] == "between"]
    assert len(held) == len(SWITCHES) - 1
    assert held[6] < 1.05 * held[1]
    for rank in range(processes):
        models, objects = zip(*map(json.loads, counts.with_suffix(f".{rank}").read_text().splitlines()), strict=True)
        assert set(models) == {0}, "no model of a former stage is alive"
        assert objects[7] <= objects[2] + 20, objects


def test_the_collector_passes_over_what_is_there_and_finds_what_comes() -> None:
    class Ring:
        def __init__(self) -> None:
            self.own = self

    gc.disable()
    try:
        with lasting():
            assert gc.get_freeze_count() > 100_000
            ring = Ring()
            del ring
            assert sum(isinstance(each, Ring) for each in gc.get_objects()) == 1
            assert let_go(CPU) > 0
            assert not any(isinstance(each, Ring) for each in gc.get_objects())
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpus_memory_is_handed_back_at_a_switch(tmp_path: Path) -> None:
    world, stage = make_world(tmp_path / "world"), {"steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01}
    stages = [{**stage, "name": f"s{number}", "precision": mode, **({"base": base} if base else {})} for number, (mode, base) in enumerate(SWITCHES)]
    carry_out(tmp_path / "run", plan_of(world, stages=stages))
    held = [line["bytes"] for line in events(tmp_path / "run", "memory") if line["kind"] == "between"]
    assert held[6] <= 1.05 * held[1]

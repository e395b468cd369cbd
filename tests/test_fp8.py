"""Products in fp8: the layer against an emulation in float64, what it keeps and weighs, the gradient, and that a run asks for a device that is made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runs import carry_out, make_world, plan_of, write_plan
from stages.adapter import add_adapter, choose_trainable, without_input_casts
from stages.check import check_plan
from stages.families.open import open_family
from stages.families.tiny import flux, sd3
from stages.plan import Adapter, Plan, Stage
from stages.precision import Multiplied, StagePrecision, check_fp8
from stages.problems import PlanError
from stages.reader import read_plan
from stages.resolved import plain_storage, quantised, resolved_storage
from stages.storage import QuantisedLinear, Stored, block_layers, load_stored, stored, stored_bytes

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(inputs: int = 96, outputs: int = 48) -> tuple[nn.Linear, QuantisedLinear]:
    """A plain layer, rows of very different sizes among its own, and the one in fp8 that is made from it."""
    plain = nn.Linear(inputs, outputs)
    with torch.no_grad():
        plain.weight.copy_(random(outputs, inputs) * torch.logspace(-6, 3, outputs)[:, None])
        plain.bias.copy_(random(outputs, seed=1))
    return plain, QuantisedLinear(plain, "fp8", CPU)


def nearest(x: Tensor) -> Tensor:
    """e4m3 by its definition, in float64: four bits of a number with its leading one, exponents down to -6, steps of 2^-9 below. x: at most 448 in size."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)
    return (x / step).round() * step


def test_weights_are_the_nearest_that_e4m3_has_under_a_scale_of_each_row() -> None:
    plain, layer = layer_of()
    weight, scale = plain.weight.detach().double(), layer.scale.double()
    assert torch.equal(scale.log2(), scale.log2().round()), "a power of two"
    largest = (weight / scale).abs().amax(dim=1)
    assert bool(((largest <= 448) & (largest > 223)).all())
    assert torch.equal(layer.whole(torch.float64), nearest(weight / scale) * scale)
    assert torch.equal(layer.whole(torch.bfloat16).double(), layer.whole(torch.float64)), "made anew in bf16 it is not rounded again"
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.nbytes == weight.numel()


def test_rows_of_zeros_and_inputs_of_zeros_give_the_bias() -> None:
    plain = nn.Linear(32, 16)
    nn.init.zeros_(plain.weight)
    layer = QuantisedLinear(plain, "fp8", CPU)
    for x in (random(3, 32), torch.zeros(3, 32)):
        assert torch.equal(layer(x.bfloat16()), plain.bias.detach().bfloat16().expand(3, 16))


def test_the_product_is_that_of_inputs_and_weights_rounded_to_e4m3() -> None:
    """Against float64: what is left of a difference is the accumulation's and one rounding to bf16."""
    plain, layer = layer_of()
    x = (random(4, 7, 96, seed=3) * torch.logspace(-5, 4, 7)[:, None]).bfloat16()
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / 448).double()
    exact = (nearest(x.double() / scale).clamp(-448, 448) * scale) @ layer.whole(torch.float64).T + layer.bias.bfloat16().double()
    size = (x.double().abs() @ layer.whole(torch.float64).abs().T) + layer.bias.double().abs()
    with torch.no_grad():
        output = layer(x)
    assert output.dtype == torch.bfloat16
    # A quotient that falls on the border of two numbers in float32 may fall on the other side in float64: 1/16 of one of 96 addends.
    assert bool(((output.double() - exact).abs() <= exact.abs() * 2**-8 + size * 2e-3).all())
    whole = x.double() @ plain.weight.detach().double().T + plain.bias.detach().double()
    assert float((output.double() - whole).norm() / whole.norm()) < 0.08, "and it is near the product itself: each factor is off by a sixteenth at most, and by a fortieth on average"


def test_the_gradient_is_that_of_the_weight_in_bf16_and_knows_no_fp8() -> None:
    _, layer = layer_of()
    x, back = random(5, 96, seed=3).bfloat16().requires_grad_(), random(5, 48, seed=4).bfloat16() * 1e-6
    with Multiplied() as forwards:
        output = layer(x)
    with Multiplied() as backwards:
        output.backward(back)
    assert forwards.dtypes == {"float8_e4m3fn": 1}
    assert backwards.dtypes == {"bfloat16": 1}
    assert x.grad is not None
    assert torch.equal(x.grad, back @ layer.whole(torch.bfloat16))


@pytest.mark.parametrize("tiny", [flux, sd3], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_transformer_learns_over_blocks_in_fp8_and_all_else_is_bf16(tiny: Any, tmp_path: Path) -> None:
    family = open_family(str(tiny.build(tmp_path / "model")), CPU)
    precision = StagePrecision("fp8", CPU)
    assert not precision.scaler.is_enabled()
    side = max(2 * family.pixel_multiple, 16)
    x, text = random(*family.encode_images(torch.zeros(1, 3, side, side)).shape), family.encode_prompts(["a red disc"])
    outputs = {}
    for blocks in (None, "fp8"):
        model = load_stored(family, Stored(torch.bfloat16, blocks), None)  # type: ignore[arg-type]
        with precision.autocast(), torch.no_grad():
            outputs[blocks] = family.predict(model, x, torch.tensor([0.6]), text)
    add_adapter(model, Adapter(rank=2), family.target_patterns, 0)
    without_input_casts(model)
    trainable = choose_trainable(model, "adapter", "test")
    with Multiplied() as watch, precision.autocast():
        output = family.predict(model.train(), x, torch.tensor([0.6]), text)
    output.float().square().mean().backward()
    assert torch.equal(output.detach(), outputs["fp8"])
    assert watch.dtypes["float8_e4m3fn"] == len(block_layers(model))
    assert watch.verdict() == "fp8"
    assert sum(parameter.grad is not None and bool(parameter.grad.abs().max() > 0) for parameter in trainable.values()) >= len(trainable) // 2 - 8
    off = float((outputs["fp8"].float() - outputs[None].float()).norm() / outputs[None].float().norm())
    assert 0 < off < 0.15, off
    held = sum(parameter.numel() * parameter.element_size() for name, parameter in model.named_parameters() if ".lora_" not in name)
    assert held == stored_bytes(load_stored(family, Stored(torch.bfloat16, None), None))["fp8"]


def test_products_in_fp8_beside_others_than_bf16_are_told() -> None:
    _, layer = layer_of()
    x = random(5, 96)
    with Multiplied() as watch:
        layer(x.bfloat16())
        x @ x.T
    assert watch.verdict() == "1 in fp8 and 1 in fp32"


def stage_of(**fields: object) -> Stage:
    return Stage.model_validate({"name": "a", "steps": 100, "resolution": 16, "batch": 4, "lr": 1e-4, **fields})


def test_a_stage_in_fp8_stores_its_blocks_in_fp8_and_the_rest_in_bf16() -> None:
    for stage in (stage_of(precision="fp8"), stage_of(precision="fp8", base="fp8")):
        assert (resolved_storage(stage), quantised(stage), plain_storage(stage)) == ("fp8", "fp8", "bf16")
        assert stored(stage) == Stored(torch.bfloat16, "fp8")


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"precision": "fp8", "train": "full"}, "precision", "'fp8' is for weights that stay as they are, and train: full changes them; choose bf16, or train the adapter"),
        ({"precision": "fp8", "base": "nf4"}, "base", "'nf4', and precision fp8 multiplies weights that are stored in fp8; leave it out, or choose precision bf16"),
        ({"precision": "bf16", "base": "fp8"}, "base", "'fp8' is for products in fp8, and the stage computes in bf16; choose precision fp8, or base int8"),
        ({"precision": "fp8", "offload": True}, "offload", "weights that come to the device for each product are not multiplied in fp8; remove it, or choose precision bf16"),
    ],
)
def test_what_fp8_does_not_go_with_is_found_by_the_check(tmp_path: Path, changes: dict[str, object], where: str, message: str) -> None:
    make_world(tmp_path)
    plan = plan_of(tmp_path, stages=[{"name": "only", "steps": 2, "resolution": 8, "batch": 4, "lr": 0.01, **changes}])
    problems = check_plan(read_plan(write_plan(tmp_path / "plan.yaml", plan)), tmp_path)
    assert message in [problem.message for problem in problems if problem.where == f"stages[0].{where}"]


def test_a_run_in_fp8_on_a_device_that_is_not_made_for_it_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world(tmp_path)
    plan = plan_of(tmp_path, stages=[{"name": "only", "steps": 2, "resolution": 8, "batch": 4, "lr": 0.01, "precision": "fp8"}])
    said = carry_out(tmp_path / "run", plan, expect=2)
    assert said.strip() == "stages[0].precision: 'fp8' needs a GPU of compute capability 8.9 or later, and this device is a CPU; choose bf16"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "an A100")
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        if refused:
            with pytest.raises(PlanError, match=r"and an A100 has 8\.0; choose bf16"):
                check_fp8(Plan.model_validate(plan), torch.device("cuda"))
        else:
            check_fp8(Plan.model_validate(plan), torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_makes_the_same_products_as_the_cpu_in_fp8() -> None:
    device = torch.device("cuda")
    plain, layer = layer_of()
    there, x = QuantisedLinear(plain, "fp8", device), random(5, 96, seed=3).bfloat16()
    with torch.no_grad():
        assert torch.allclose(there(x.to(device)).cpu().float(), layer(x).float(), rtol=2**-6, atol=1e-2)

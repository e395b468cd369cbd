"""Optimizer, learning rate and average: closed forms, torch's and diffusers' own, and state that outlives a restart bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.optim import Average, load_optimizer_state, make_optimizer, optimizer_state, rate_at
from stages.plan import LearningRate, Optimizer, Stage
from stages.resolved import resolved_rate

SETTINGS = Optimizer(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def some_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (4, 6), "up": (6, 4), "bias": (6,)}
    return {name: nn.Parameter(torch.randn(*shape, generator=generator)) for name, shape in shapes.items()}


def take_steps(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], first: int, last: int) -> None:
    """Steps first ... last - 1 with gradients that depend on the step alone."""
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
        optimizer.step()


# --- learning rate ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (7, 2), (1000, 0), (3, 1)])
def test_rate_begins_at_warmup_from_reaches_its_peak_after_the_warmup_and_ends_at_its_floor(schedule: str, steps: int, warmup: int) -> None:
    floor = None if schedule == "constant" else 4e-6
    rate = LearningRate(peak=1e-3, warmup=warmup, warmup_from=2e-6, schedule=schedule, floor=floor)
    rates = [rate_at(step, steps, rate) for step in range(steps)]
    assert rates[0] == (2e-6 if warmup else 1e-3)
    assert rates[warmup] == 1e-3
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 4e-6, rel=1e-12)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rate_is_that_of_torchs_schedulers(schedule: str) -> None:
    steps, warmup, peak, start, floor = 200, 30, 1e-3, 4e-6, 1e-5
    rate = LearningRate(peak=peak, warmup=warmup, warmup_from=start, schedule=schedule, floor=None if schedule == "constant" else floor)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start / peak, 1.0, warmup)
    left = steps - 1 - warmup
    falling: torch.optim.lr_scheduler.LRScheduler
    if schedule == "cosine":
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, left, floor)
    else:
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 if schedule == "constant" else floor / peak, left)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], [warmup])
    for step in range(steps):
        assert rate_at(step, steps, rate) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_cosine_is_half_way_down_in_the_middle() -> None:
    rate = LearningRate(peak=1.0, warmup=0, schedule="cosine", floor=0.2)
    assert rate_at(50, 101, rate) == pytest.approx(0.6)
    assert rate_at(25, 101, rate) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 21, 2000, 5000])
def test_a_bare_rate_is_reached_and_a_floor_is_the_last_steps_rate_however_short_the_stage(steps: int) -> None:
    """With the warm-up left out."""
    stage = Stage(name="a", steps=steps, lr=0.1, batch=1, resolution=8)
    assert max(rate_at(step, steps, resolved_rate(stage)) for step in range(steps)) == 0.1
    falling = Stage(name="a", steps=steps, lr=LearningRate(peak=0.1, schedule="cosine", floor=0.01), batch=1, resolution=8)
    rates = [rate_at(step, steps, resolved_rate(falling)) for step in range(steps)]
    assert max(rates) == 0.1
    assert steps == 1 or rates[-1] == pytest.approx(0.01)


# --- optimizer --------------------------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_adamw_in_float64() -> None:
    """Algorithm 2 of Loshchilov and Hutter 2019, written out."""
    parameters = some_parameters()
    reference = {name: parameter.detach().double() for name, parameter in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in reference.items()}
    second = {name: torch.zeros_like(value) for name, value in reference.items()}
    take_steps(make_optimizer(parameters, SETTINGS), parameters, 0, 20)
    for step in range(20):
        rate = 0.01 * (step + 1)
        for number, (name, value) in enumerate(reference.items()):
            gradient = torch.randn(value.shape, generator=torch.Generator().manual_seed(100 * step + number)).double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            corrected, scale = first[name] / (1 - 0.9 ** (step + 1)), (second[name] / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
            reference[name] = value - rate * 0.1 * value - rate * corrected / scale
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.detach().double(), reference[name], atol=1e-5), name


@pytest.mark.parametrize("after", [1, 3, 5])
def test_steps_with_a_save_and_load_between_are_bit_equal_to_steps_without(tmp_path: Path, after: int) -> None:
    whole = some_parameters()
    take_steps(make_optimizer(whole, SETTINGS), whole, 0, 6)

    before = some_parameters()
    optimizer = make_optimizer(before, SETTINGS)
    take_steps(optimizer, before, 0, after)
    save_file({name: parameter.detach() for name, parameter in before.items()}, tmp_path / "weights.safetensors")
    save_file(optimizer_state(optimizer, before), tmp_path / "optimizer.safetensors")

    resumed = {name: nn.Parameter(value) for name, value in load_file(tmp_path / "weights.safetensors").items()}
    resumed = {name: resumed[name] for name in whole}
    optimizer = make_optimizer(resumed, SETTINGS)
    assert load_optimizer_state(optimizer, resumed, load_file(tmp_path / "optimizer.safetensors")) == []
    take_steps(optimizer, resumed, after, 6)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_loaded_state_shares_no_memory_with_what_was_loaded() -> None:
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, SETTINGS)
    take_steps(optimizer, parameters, 0, 2)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, parameters).items()}
    kept = {name: value.clone() for name, value in saved.items()}
    other = make_optimizer(parameters, SETTINGS)
    load_optimizer_state(other, parameters, saved)
    take_steps(other, parameters, 2, 4)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_keep_v_keeps_the_second_moment_and_the_count_and_zeroes_the_first() -> None:
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, SETTINGS)
    take_steps(optimizer, parameters, 0, 3)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, parameters).items()}
    other = make_optimizer(parameters, SETTINGS)
    assert load_optimizer_state(other, parameters, saved, zero_first=True) == []
    kept = optimizer_state(other, parameters)
    for name in parameters:
        assert torch.equal(kept[f"{name}::exp_avg"], torch.zeros_like(saved[f"{name}::exp_avg"]))
        assert torch.equal(kept[f"{name}::exp_avg_sq"], saved[f"{name}::exp_avg_sq"])
        assert float(kept[f"{name}::step"]) == 3


def test_a_weight_of_another_shape_or_a_new_one_starts_afresh_and_the_others_do_not() -> None:
    old = some_parameters()
    optimizer = make_optimizer(old, SETTINGS)
    take_steps(optimizer, old, 0, 3)
    saved: dict[str, Tensor] = {name: value.clone() for name, value in optimizer_state(optimizer, old).items()}
    new = some_parameters()
    new["down"] = nn.Parameter(torch.zeros(8, 6))
    new["more"] = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(new, SETTINGS)
    assert load_optimizer_state(optimizer, new, saved) == ["down", "more"]
    state = optimizer_state(optimizer, new)
    assert {name.split("::")[0] for name in state} == {"up", "bias"}
    assert all(torch.equal(state[name], saved[name]) for name in state)
    take_steps(optimizer, new, 3, 4)
    state = optimizer_state(optimizer, new)
    assert {name: float(state[f"{name}::step"]) for name in new} == {"down": 1, "up": 4, "bias": 4, "more": 1}


def test_moments_are_float32() -> None:
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, SETTINGS)
    take_steps(optimizer, parameters, 0, 1)
    assert {value.dtype for value in optimizer_state(optimizer, parameters).values()} == {torch.float32}


# --- average ----------------------------------------------------------------------------------------------------------------------------


def moved(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.999])
def test_average_is_diffusers_emamodel(decay: float) -> None:
    """EMAModel's first step copies the weights whatever the decay; a stage's first step, at its `warmup_from`, leaves them as they are."""
    parameters = some_parameters()
    average, theirs = Average(parameters, decay), EMAModel(parameters.values(), decay=decay)
    for step in range(60):
        if step:
            moved(parameters, step)
        average.update(parameters)
        theirs.step(parameters.values())
    for value, shadow in zip(average.values.values(), theirs.shadow_params, strict=True):
        assert torch.allclose(value, shadow, atol=1e-5)


def test_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    parameters = some_parameters()
    average = Average(parameters, 0.9)
    wanted = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    for update in range(40):
        moved(parameters, update)
        average.update(parameters)
        decay = min(0.9, (1 + update) / (10 + update))
        wanted = {name: decay * value + (1 - decay) * parameters[name].detach().double() for name, value in wanted.items()}
    assert average.updates == 40
    assert all(torch.allclose(average.values[name].double(), wanted[name], atol=1e-6) for name in wanted)


def test_average_goes_on_after_a_restart_as_if_there_had_been_none() -> None:
    parameters, again = some_parameters(), some_parameters()
    whole, first = Average(parameters, 0.9), Average(again, 0.9)
    for step in range(3):
        for average, weights in ((whole, parameters), (first, again)):
            moved(weights, step)
            average.update(weights)
    resumed = Average(again, 0.9)
    resumed.values, resumed.updates = {name: value.clone() for name, value in first.values.items()}, first.updates
    for step in range(3, 6):
        for average, weights in ((whole, parameters), (resumed, again)):
            moved(weights, step)
            average.update(weights)
    assert all(torch.equal(whole.values[name], resumed.values[name]) for name in whole.values)


def test_average_moves_by_less_than_bf16_can_say() -> None:
    parameters = {"weight": nn.Parameter(torch.ones(4))}
    average = Average(parameters, 0.9999)
    average.updates = 10**6
    with torch.no_grad():
        parameters["weight"] += 0.01
    for _ in range(100):
        average.update(parameters)
    assert average.values["weight"].dtype == torch.float32
    assert torch.allclose(average.values["weight"], torch.full((4,), 1 + 0.01 * (1 - 0.9999**100)), atol=1e-6)


def test_swapping_twice_gives_weights_and_average_back_bit_for_bit() -> None:
    parameters = some_parameters()
    average = Average(parameters, 0.9)
    for step in range(5):
        moved(parameters, step)
        average.update(parameters)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    values = {name: value.clone() for name, value in average.values.items()}
    average.swap(parameters)
    assert all(torch.equal(parameters[name], values[name]) and torch.equal(average.values[name], weights[name]) for name in weights)
    assert all(not torch.equal(parameters[name], weights[name]) for name in weights)
    average.swap(parameters)
    assert all(torch.equal(parameters[name], weights[name]) and torch.equal(average.values[name], values[name]) for name in weights)

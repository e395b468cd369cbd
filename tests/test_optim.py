"""Optimizers, learning rate and average: closed forms, torch's and diffusers' own, and state that outlives a restart bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.explain import BYTES_OF_TRAINED
from stages.optim import Average, found_step_size, load_optimizer_state, make_optimizer, optimizer_state, rate_at
from stages.plan import LearningRate, Optimizer, Stage
from stages.resolved import resolved_rate

SETTINGS = Optimizer(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
EIGHT_BITS, PRODIGY = SETTINGS.model_copy(update={"name": "adamw8bit"}), SETTINGS.model_copy(update={"name": "prodigy"})
EVERY = [SETTINGS, EIGHT_BITS, PRODIGY]
each_optimizer = pytest.mark.parametrize("settings", EVERY, ids=[settings.name for settings in EVERY])


def some_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (4, 6), "up": (6, 4), "bias": (6,), "large": (17, 256)}  # 4,352 numbers: moments in 8 bits, and a block that is not full
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


@each_optimizer
@pytest.mark.parametrize("after", [1, 3, 5])
def test_steps_with_a_save_and_load_between_are_bit_equal_to_steps_without(tmp_path: Path, after: int, settings: Optimizer) -> None:
    whole = some_parameters()
    whole_optimizer = make_optimizer(whole, settings)
    take_steps(whole_optimizer, whole, 0, 6)

    before = some_parameters()
    optimizer = make_optimizer(before, settings)
    take_steps(optimizer, before, 0, after)
    save_file({name: parameter.detach() for name, parameter in before.items()}, tmp_path / "weights.safetensors")
    save_file(optimizer_state(optimizer, before), tmp_path / "optimizer.safetensors")

    resumed = {name: nn.Parameter(value) for name, value in load_file(tmp_path / "weights.safetensors").items()}
    resumed = {name: resumed[name] for name in whole}
    optimizer = make_optimizer(resumed, settings)
    assert load_optimizer_state(optimizer, resumed, load_file(tmp_path / "optimizer.safetensors")) == []
    take_steps(optimizer, resumed, after, 6)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    ends = [optimizer_state(one, weights) for one, weights in ((whole_optimizer, whole), (optimizer, resumed))]
    assert ends[0].keys() == ends[1].keys()
    assert all(ends[0][name].dtype == ends[1][name].dtype and torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@each_optimizer
def test_loaded_state_shares_no_memory_with_what_was_loaded(settings: Optimizer) -> None:
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, settings)
    take_steps(optimizer, parameters, 0, 2)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, parameters).items()}
    kept = {name: value.clone() for name, value in saved.items()}
    other = make_optimizer(parameters, settings)
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
    assert {name.split("::")[0] for name in state} == {"up", "bias", "large"}
    assert all(torch.equal(state[name], saved[name]) for name in state)
    take_steps(optimizer, new, 3, 4)
    state = optimizer_state(optimizer, new)
    assert {name: float(state[f"{name}::step"]) for name in new} == {"down": 1, "up": 4, "bias": 4, "large": 4, "more": 1}


def test_moments_are_float32() -> None:
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, SETTINGS)
    take_steps(optimizer, parameters, 0, 1)
    assert {value.dtype for value in optimizer_state(optimizer, parameters).values()} == {torch.float32}


def test_adamw_is_fused_where_torch_has_that_and_the_kernels_differ_by_rounding() -> None:
    fused, plain = some_parameters(), some_parameters()
    one, other = make_optimizer(fused, SETTINGS), torch.optim.AdamW(plain.values(), lr=0.0, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=SETTINGS.weight_decay, foreach=False)
    assert one.param_groups[0]["fused"] is True
    for optimizer, parameters in ((one, fused), (other, plain)):
        take_steps(optimizer, parameters, 0, 20)
    assert all(torch.allclose(fused[name], plain[name], rtol=1e-5, atol=1e-6) for name in fused)
    nowhere = {"weight": nn.Parameter(torch.zeros(3, device="meta"))}
    optimizer = make_optimizer(nowhere, SETTINGS)
    assert not optimizer.param_groups[0]["fused"]
    nowhere["weight"].grad = torch.zeros(3, device="meta")
    optimizer.step()


def test_state_of_adamw_that_is_not_fused_is_loaded_as_it_was() -> None:
    whole, parts = some_parameters(), some_parameters()

    def plain(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters.values(), lr=0.0, foreach=True)

    take_steps(plain(whole), whole, 0, 4)
    first, second = plain(parts), plain(parts)
    take_steps(first, parts, 0, 2)
    assert load_optimizer_state(second, parts, optimizer_state(first, parts)) == []
    take_steps(second, parts, 2, 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# --- 8 bits -----------------------------------------------------------------------------------------------------------------------------


def moments_of(state: Mapping[str, Tensor], name: str, number: int) -> Tensor:
    """The first or second moment of a weight in numbers: blocks of 256 codes, looked up and multiplied by the block's largest."""
    codes = state[f"{name}::state{number}"]
    if codes.dtype == torch.float32:
        return codes
    largest = state[f"{name}::absmax{number}"].repeat_interleave(256)[: codes.numel()]
    return (state[f"{name}::qmap{number}"][codes.flatten().long()] * largest).view(codes.shape)


def test_moments_of_4096_numbers_and_more_are_kept_in_8_bits_and_smaller_ones_in_32() -> None:
    parameters = some_parameters() | {"least": nn.Parameter(torch.zeros(4096)), "most": nn.Parameter(torch.zeros(4095))}
    optimizer = make_optimizer(parameters, EIGHT_BITS)
    take_steps(optimizer, parameters, 0, 2)
    state = optimizer_state(optimizer, parameters)
    assert {name for name in parameters if state[f"{name}::state1"].dtype == torch.uint8} == {"large", "least"}
    assert {state[f"{name}::state2"].dtype for name in ("down", "up", "bias", "most")} == {torch.float32}
    assert {weight.dtype for weight in parameters.values()} == {torch.float32}


@each_optimizer
def test_explain_knows_what_an_optimizer_takes(settings: Optimizer) -> None:
    parameters = {"weight": nn.Parameter(torch.ones(64, 1024))}
    optimizer = make_optimizer(parameters, settings)
    take_steps(optimizer, parameters, 0, 1)
    state = sum(value.nbytes for value in optimizer_state(optimizer, parameters).values())
    assert (4 + 4) * 65536 + state == pytest.approx(BYTES_OF_TRAINED[settings.name] * 65536, rel=0.01)


def test_first_steps_in_8_bits_are_nearly_those_of_adamw() -> None:
    ends = []
    for settings in (SETTINGS, EIGHT_BITS):
        parameters = some_parameters()
        optimizer = make_optimizer(parameters, settings)
        take_steps(optimizer, parameters, 0, 5)
        ends.append(parameters)
    begun = some_parameters()
    for name, weight in ends[0].items():
        moved = float((weight - begun[name]).detach().norm())
        assert float((weight - ends[1][name]).detach().norm()) < (0.05 if name == "large" else 1e-4) * moved, name


def test_keep_v_in_8_bits_leaves_a_first_moment_of_zero_and_the_second_as_it_was() -> None:
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, EIGHT_BITS)
    take_steps(optimizer, parameters, 0, 3)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, parameters).items()}
    other = make_optimizer(parameters, EIGHT_BITS)
    assert load_optimizer_state(other, parameters, saved, zero_first=True) == []
    kept = optimizer_state(other, parameters)
    for name in parameters:
        assert bool(moments_of(saved, name, 1).any())
        assert not bool(moments_of(kept, name, 1).any())
        assert torch.equal(moments_of(kept, name, 2), moments_of(saved, name, 2))
        assert int(kept[f"{name}::step"]) == 3


def test_a_weight_of_another_shape_starts_afresh_in_8_bits() -> None:
    old = some_parameters()
    optimizer = make_optimizer(old, EIGHT_BITS)
    take_steps(optimizer, old, 0, 3)
    saved = optimizer_state(optimizer, old)
    new = some_parameters() | {"large": nn.Parameter(torch.zeros(256, 17))}
    optimizer = make_optimizer(new, EIGHT_BITS)
    assert load_optimizer_state(optimizer, new, saved) == ["large"]
    take_steps(optimizer, new, 3, 4)
    state = optimizer_state(optimizer, new)
    assert {name: int(state[f"{name}::step"]) for name in new} == {"down": 4, "up": 4, "bias": 4, "large": 1}


# --- Prodigy ----------------------------------------------------------------------------------------------------------------------------


def steady(shape: torch.Size, step: int, number: int) -> Tensor:
    """A gradient that keeps pointing one way, so that a step size has reason to grow."""
    way, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (number, 100 * step + 50 + number))
    return way + 0.1 * noise


def push(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """One step with steady gradients."""
    optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = steady(parameter.shape, step, number)
    optimizer.step()


def test_steps_are_those_of_prodigy_in_float64() -> None:
    """Algorithm 4 of Mishchenko and Defazio 2024 with Adam's bias correction, and s as its authors' safeguard for warm-ups has it: without the rate."""
    settings = PRODIGY.model_copy(update={"weight_decay": 0.0, "d0": 1e-3, "d_coef": 2.0})
    parameters = some_parameters()
    begun = {name: parameter.detach().double() for name, parameter in parameters.items()}
    value = dict(begun)
    zeros = {name: torch.zeros_like(start) for name, start in begun.items()}
    first, second, s = dict(zeros), dict(zeros), dict(zeros)
    d, numerator, beta3 = 1e-3, 0.0, math.sqrt(0.99)
    optimizer = make_optimizer(parameters, settings)
    for step in range(12):
        push(optimizer, parameters, step)
        rate = 0.1 * (step + 1) * math.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        gradients = {name: steady(start.shape, step, number).double() for number, (name, start) in enumerate(begun.items())}
        numerator = beta3 * numerator + sum(d / 1e-3 * d * rate * float((gradient * (begun[name] - value[name])).sum()) for name, gradient in gradients.items())
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * d * gradient
            second[name] = 0.99 * second[name] + 0.01 * (d * gradient) ** 2
            s[name] = beta3 * s[name] + d / 1e-3 * d * gradient
        used, estimate = d, 2.0 * numerator / sum(float(each.abs().sum()) for each in s.values())
        d = max(d, estimate)
        for name in value:
            value[name] = value[name] - used * rate * first[name] / (second[name].sqrt() + d * 1e-8)
        assert found_step_size(optimizer) == pytest.approx(d * 0.1 * (step + 1), rel=1e-4)
    assert d > 3e-3
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.detach().double(), value[name], rtol=1e-5, atol=1e-5), name


def descend(settings: Optimizer, rate: float, steps: int) -> tuple[float, torch.optim.Optimizer]:
    """How far from the least point of |w - 3|, summed, so many steps end; the first of them at a rate of 0, as a warm-up has it."""
    weight = nn.Parameter(torch.zeros(10))
    optimizer = make_optimizer({"weight": weight}, settings)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 10)
        weight.grad = (weight.detach() - 3).sign() * torch.linspace(0.1, 1, 10)
        optimizer.step()
    return float((weight.detach() - 3).abs().max()), optimizer


def test_prodigy_finds_its_step_size_from_a_millionth_at_a_rate_of_one() -> None:
    settings = Optimizer(name="prodigy")
    far, optimizer = descend(settings, 1.0, 300)
    size = found_step_size(optimizer)
    assert size is not None
    assert 0.01 < size < 3
    assert far < 0.5
    assert descend(Optimizer(), 1e-6, 300)[0] > 2.9, "AdamW with the rate that prodigy begins with"


def test_only_prodigy_finds_a_step_size() -> None:
    assert [found_step_size(make_optimizer(some_parameters(), settings)) is None for settings in EVERY] == [True, True, False]


def test_prodigy_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    make_optimizer(some_parameters(), PRODIGY)
    assert capfd.readouterr() == ("", "")


def test_prodigys_step_size_is_kept_with_all_of_its_weights_or_not_at_all() -> None:
    """It is a sum over all weights divided by another; with half of them begun anew it would be far too large."""
    old = some_parameters()
    settings = PRODIGY.model_copy(update={"d0": 1e-3})
    optimizer = make_optimizer(old, settings)
    for step in range(20):
        push(optimizer, old, step)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, old).items()}
    assert float(saved["::d"]) > 1e-3
    again = make_optimizer(old, settings)
    assert load_optimizer_state(again, old, saved, zero_first=True) == []
    kept = optimizer_state(again, old)
    assert {name for name in saved if not torch.equal(saved[name], kept[name])} == {f"{name}::exp_avg" for name in old}
    new = some_parameters() | {"more": nn.Parameter(torch.zeros(2))}
    fresh = make_optimizer(new, settings)
    assert load_optimizer_state(fresh, new, saved) == list(new)
    assert float(optimizer_state(fresh, new)["::d"]) == 1e-3
    assert not fresh.state


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

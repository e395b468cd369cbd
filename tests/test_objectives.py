"""The straight flow: densities are those of SD3 and diffusers, noise is normal and each image's own, and the algebra of velocities holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats

from stages.objectives.flow import Density, blend, noise, quantiles
from stages.objectives.parts import errors, whole
from stages.objectives.path import Straight


def losses(predicted: torch.Tensor, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The errors of the straight flow's velocity."""
    return errors(predicted, whole(Straight(), x, e, torch.full((len(x),), 0.5)))


EVENLY = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53  # of the quantiles that keys give


def test_logit_normal_is_the_distribution_that_diffusers_draws() -> None:
    """Two samples of 50,000, ours and that of diffusers.training_utils, are told apart by nothing that Kolmogorov and Smirnov see."""
    for mean, std in ((0.0, 1.0), (0.5, 0.7), (-1.0, 1.5)):
        ours = Density("logit_normal", mean, std, 1.0).t(quantiles(11, range(50_000))).numpy()
        theirs = compute_density_for_timestep_sampling("logit_normal", 50_000, mean, std, generator=torch.Generator().manual_seed(1)).numpy()
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
        assert abs(ours.mean() - theirs.mean()) < 0.01
        assert abs(ours.std() - theirs.std()) < 0.01


def test_quantiles_of_logit_normal_are_those_of_sd3s_formula() -> None:
    """dt/dq is the inverse of pi(t) = 1 / (s sqrt(2 pi)) 1 / (t (1 - t)) exp(-(logit t - m)^2 / (2 s^2)) (Esser et al. 2024, section 3.1)."""
    for mean, std in ((0.0, 1.0), (0.8, 0.6), (-0.5, 1.2)):
        t = Density("logit_normal", mean, std, 1.0).t(EVENLY).double().numpy()
        logit = np.log(t / (1 - t))
        density = np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * t * (1 - t))
        slope = np.gradient(t, EVENLY.numpy())
        inner = slice(50, -50)  # towards the ends a finite difference is not a slope
        assert np.allclose(slope[inner] * density[inner], 1, atol=2e-3)
        assert np.allclose(logit, stats.norm(mean, std).ppf(EVENLY.numpy()), atol=2e-5)


def test_uniform_density_is_uniform() -> None:
    assert torch.allclose(Density("uniform", 0.0, 1.0, 1.0).t(EVENLY).double(), EVENLY, atol=1e-7)
    assert stats.kstest(quantiles(3, range(50_000)).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_shift_adds_its_logarithm_to_the_logit(kind: str) -> None:
    plain = Density(kind, 0.0, 1.0, 1.0).t(EVENLY).double()  # type: ignore[arg-type]
    for shift in (0.5, 1.88, 3.16, 7.5):
        shifted = Density(kind, 0.0, 1.0, shift).t(EVENLY).double()  # type: ignore[arg-type]
        assert torch.allclose(torch.logit(shifted), torch.logit(plain) + math.log(shift), atol=2e-4)


def test_shift_is_that_of_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for mu in (0.5, 1.15):
        shifted = Density("uniform", 0.0, 1.0, math.exp(mu)).t(EVENLY)
        assert torch.allclose(shifted.double(), scheduler.time_shift(mu, 1.0, EVENLY), atol=1e-6)


@pytest.mark.parametrize(
    "density",
    [
        Density("uniform", 0.0, 1.0, 1.0),
        Density("uniform", 0.0, 1.0, 3.0),
        Density("logit_normal", 0.0, 1.0, 3.0),
        Density("logit_normal", 10.0, 1.0, 1.0),
        Density("logit_normal", 0.0, 20.0, 1.0),
        Density("logit_normal", -10.0, 1e6, 0.01),
    ],
)
def test_t_is_always_above_0_and_below_1(density: Density) -> None:
    """At the smallest and the largest quantile that a key can give, too, under every setting that a plan may ask for."""
    t = density.t(torch.cat([torch.tensor([SMALLEST], dtype=torch.float64), EVENLY, torch.tensor([LARGEST], dtype=torch.float64)]))
    assert t.dtype == torch.float32
    assert bool((t > 0).all())
    assert bool((t < 1).all())


def test_timesteps_do_not_depend_on_the_batch_or_its_order() -> None:
    together = quantiles(5, [7, 1, 900_000_000_000])
    alone = torch.cat([quantiles(5, [position]) for position in (7, 1, 900_000_000_000)])
    assert torch.equal(together, alone)
    assert len(quantiles(5, range(10_000)).unique()) == 10_000
    assert not torch.equal(quantiles(5, range(100)), quantiles(6, range(100)))


def test_noise_is_standard_normal_and_independent_between_images() -> None:
    e = noise((3, 16, 16), range(200))
    assert e.shape == (200, 3, 16, 16)
    assert e.dtype == torch.float32
    assert stats.kstest(e.flatten().numpy(), "norm").pvalue > 1e-3
    flat = e.flatten(1).double()
    correlation = torch.corrcoef(flat)[~torch.eye(200, dtype=torch.bool)] * math.sqrt(flat.shape[1])
    assert 0.98 < float(correlation.std()) < 1.02
    assert float(correlation.abs().max()) < 5.5


def test_noise_does_not_depend_on_the_batch_or_its_order() -> None:
    together = noise((3, 8, 8), [2**64 - 1, 4, 9])
    for place, key in enumerate((2**64 - 1, 4, 9)):
        assert torch.equal(noise((3, 8, 8), [key])[0], together[place])
    assert torch.equal(noise((3, 8, 8), [9, 4]), together[[2, 1]])


def test_noise_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    noise((3, 8, 8), [1, 2])
    quantiles(1, range(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_bit_of_an_images_key_counts() -> None:
    """Keys have 64 bits. If only 32 counted, a hundred pairs among a million images would share their noise."""
    for bit in (0, 31, 32, 47, 62):
        one, other = noise((3, 8, 8), [12345, 12345 ^ (1 << bit)])
        assert not torch.equal(one, other), f"bit {bit}"


def test_blend_goes_straight_from_the_image_to_noise() -> None:
    x, e = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blend(x, e, torch.zeros(4)), x)
    assert torch.equal(blend(x, e, torch.ones(4)), e)
    t = torch.tensor([0.1, 0.4, 0.5, 0.97])
    x_t = blend(x, e, t)
    weight = t.double().view(-1, 1, 1, 1)
    assert torch.allclose(x_t.double(), (1 - weight) * x.double() + weight * e.double(), atol=1e-6)
    v = e - x
    assert torch.allclose(x_t - t.view(-1, 1, 1, 1) * v, x, atol=1e-6)
    assert torch.allclose(x_t + (1 - t.view(-1, 1, 1, 1)) * v, e, atol=1e-6)


def test_blend_is_what_diffusers_scheduler_does_to_a_sample() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, e = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 4, 9])
    assert torch.allclose(blend(x, e, scheduler.sigmas[steps]), scheduler.scale_noise(x, scheduler.timesteps[steps], e), atol=1e-6)


def test_loss_is_each_images_mean_squared_error_of_the_velocity() -> None:
    x, e, predicted = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = losses(predicted, x, e)
    for place in range(4):
        assert torch.allclose(found[place], torch.nn.functional.mse_loss(predicted[place], e[place] - x[place]), rtol=1e-6)
    assert torch.equal(losses(e - x, x, e), torch.zeros(4))
    alone = torch.cat([losses(predicted[place : place + 1], x[place : place + 1], e[place : place + 1]) for place in range(4)])
    assert torch.allclose(alone, found, rtol=1e-6)


def test_loss_is_float32_whatever_the_prediction_is() -> None:
    x, e = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    predicted = (e - x).to(torch.bfloat16)
    found = losses(predicted, x, e)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), (predicted.double() - (e.double() - x.double())).square().flatten(1).mean(1), rtol=1e-5)


def test_loss_of_the_velocity_is_that_of_the_image_over_t_squared_and_that_of_noise_over_one_less_t_squared() -> None:
    generator = torch.Generator().manual_seed(0)
    x, e, wrong = torch.randn(3, 5, 3, 8, 8, generator=generator)
    t = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95])
    v, weight = e - x + 0.3 * wrong, t.view(-1, 1, 1, 1)
    x_t = blend(x, e, t)
    of_image = (x_t - weight * v - x).square().flatten(1).mean(1) / t**2
    of_noise = (x_t + (1 - weight) * v - e).square().flatten(1).mean(1) / (1 - t) ** 2
    assert torch.allclose(losses(v, x, e), of_image, rtol=1e-4)
    assert torch.allclose(losses(v, x, e), of_noise, rtol=1e-4)

"""The pyramid: its windows are Pyramid-Flow's, a jump keeps the law, one level is the straight flow, levels get their shares, and its pipeline samples so."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

from models import tiny_flux
from stages.objectives import flow, parts
from stages.objectives.levels import LevelShares, shuffled
from stages.objectives.path import Straight
from stages.objectives.pyramid import block_noise, ends, enlarge, jump, noise_at, sample_pyramid, sampling_noise, shrink, split, within
from stages.objectives.windows import METADATA_KEY, Windows, check_size, of_file, read, write
from stages.pyramid_pipeline import PyramidFluxPipeline, _positions

GAMMAS = (1 / 3, 0.25, 0.1, 0.01)
PYRAMIDS = [Windows(levels, gamma, shift) for levels in (2, 3, 4) for gamma in GAMMAS for shift in (1.0, 3.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# --- windows --------------------------------------------------------------------------------------------------------------------------


def test_windows_are_those_of_the_paper() -> None:
    for levels, expected in {
        1: [(1, 0)],
        2: [(1, 1 / 2), (2 / 3, 0)],
        3: [(1, 2 / 3), (4 / 5, 1 / 3), (1 / 2, 0)],
        4: [(1, 3 / 4), (6 / 7, 1 / 2), (2 / 3, 1 / 4), (2 / 5, 0)],
    }.items():
        windows = Windows(levels)
        assert np.allclose([(windows.start(level), windows.end(level)) for level in range(levels)], expected, atol=1e-15)


@pytest.mark.parametrize(
    ("levels", "gamma", "starts", "finishes", "jumps"),
    [
        (3, 1 / 3, (1.0, 0.80024, 0.50075), (0.667, 0.334, 0), ((0.59988, 0.69303), (0.74963, 0.43366))),
        (3, 1 / 4, (1.0, 0.81748, 0.52861), (0.667, 0.334, 0), ((0.54811, 0.73118), (0.70779, 0.47280))),
        (2, 1 / 3, (1.0, 0.66667), (0.5, 0), ((0.66667, 0.57735),)),
    ],
)
def test_windows_are_those_that_pyramid_flows_code_prints(
    levels: int, gamma: float, starts: tuple[float, ...], finishes: tuple[float, ...], jumps: tuple[tuple[float, float], ...]
) -> None:
    """But for its borders, which it takes from a grid of 1000 points: at most 1e-3 off."""
    windows = Windows(levels, gamma)
    assert np.allclose([windows.start(level) for level in range(levels)], starts, atol=1e-3)
    assert np.allclose([windows.end(level) for level in range(levels)], finishes, atol=1e-3)
    assert np.allclose([windows.jump(level) for level in range(1, levels)], jumps, atol=1e-3)


def test_shift_moves_the_borders_as_pyramid_flows_scheduler_does() -> None:
    """It shifts a grid of 1000 noise levels, reads the borders off it, and corrects those as ever."""
    for shift in (1.0, 2.0, 5.0):
        grid = np.arange(1000, 0, -1) / 1000
        grid = shift * grid / (1 + (shift - 1) * grid)
        windows = Windows(3, 1 / 3, shift)
        for level, place in ((1, 333), (2, 666)):
            clean = 1 - grid[place]
            assert abs(windows.end(level - 1) - grid[place]) < 2e-3
            assert abs(windows.start(level) - (1 - clean / (2 - clean))) < 2e-3


@pytest.mark.parametrize("windows", PYRAMIDS, ids=str)
def test_a_jump_keeps_mean_variance_and_covariance(windows: Windows) -> None:
    for level in range(1, windows.levels):
        (alpha, beta), before, start = windows.jump(level), windows.end(level - 1), windows.start(level)
        assert abs(alpha**2 * before**2 + beta**2 - start**2) < 1e-12
        assert abs(alpha**2 * before**2 - beta**2 * windows.gamma) < 1e-12
        assert abs(alpha * (1 - before) - (1 - start)) < 1e-12
        assert windows.end(level) < windows.start(level) < 1


def test_windows_out_of_range_are_refused() -> None:
    for asked, said in (
        ((0, 0.3), "levels: 0"),
        ((5, 0.3), "levels: 5"),
        ((2, 0.0), "gamma: 0.0"),
        ((2, 0.34), "gamma: 0.34"),
        ((2, math.nan), "gamma: nan"),
        ((2, 0.3, 0.0), "shift: 0.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Windows(*asked)


def test_sizes_that_cannot_be_halved_are_refused_with_those_that_would_do() -> None:
    check_size(64, 128, 3, 16)
    check_size(48, 80, 1, 16)
    with pytest.raises(ValueError, match="both sides must be multiples of 64, such as 64 x 128 or 128 x 128"):
        check_size(96, 128, 3, 16)
    with pytest.raises(ValueError, match=r"such as 8 x 8$"):
        check_size(4, 8, 3, 2)


def test_windows_are_read_back_from_the_header_of_an_adapter(tmp_path: Path) -> None:
    for windows in PYRAMIDS:
        assert read(write(windows)) == windows
    assert read('{"levels": 2, "gamma": 0.25}') == Windows(2, 0.25)
    file = tmp_path / "adapter.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={METADATA_KEY: write(Windows(3, 0.2, 2.0)), "format": "pt"})
    assert of_file(file) == Windows(3, 0.2, 2.0)
    save_file({"a": torch.zeros(1)}, file)
    assert of_file(file) is None
    for text in (
        "3",
        "{",
        '{"levels": 2}',
        '{"levels": 2, "gamma": 0.2, "wavelets": 1}',
        '{"levels": true, "gamma": 0.2}',
        '{"levels": 2, "gamma": "a"}',
        '{"levels": 2, "gamma": 0.5}',
    ):
        with pytest.raises(ValueError, match="pyramid"):
            read(text)
    save_file({"a": torch.zeros(1)}, file, metadata={METADATA_KEY: "{}"})
    with pytest.raises(ValueError, match=re.escape(str(file))):
        of_file(file)


# --- noise and jumps ------------------------------------------------------------------------------------------------------------------


def covariance(images: Tensor) -> Tensor:
    """Of what a linear map makes of standard normal noise, from the images of the basis, [basis, 1, h, w]."""
    rows = images.flatten(1)
    return rows.T @ rows


def basis(side: int) -> Tensor:
    return torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)


def test_noise_of_a_coarser_level_is_standard_normal_too() -> None:
    for halvings in (0, 1, 2):
        side = 8 >> halvings
        assert torch.allclose(covariance(noise_at(basis(8), halvings)), torch.eye(side * side, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_block_noise_is_correlated_inside_blocks_alone(gamma: float) -> None:
    """Diagonal 1, minus gamma inside a 2 x 2 block, 0 outside: exactly, since the noise is linear in z."""
    block = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(4)[None, :] // 2).flatten()
    same = block[:, None] == block[None, :]
    expected = (1 + gamma) * torch.eye(16, dtype=torch.float64) - gamma * same
    assert torch.allclose(covariance(block_noise(basis(4), gamma)), expected, atol=1e-12)


@pytest.mark.parametrize("windows", PYRAMIDS, ids=str)
def test_the_end_of_a_level_after_the_jump_has_the_law_of_the_next_ones_start(windows: Windows) -> None:
    """Mean and covariance, in float64, given the latents: both are normal."""
    side = 2**windows.levels
    x, none = normal(1, 1, side, side), torch.zeros(1, 1, side, side, dtype=torch.float64)
    for level in range(1, windows.levels):
        small, large = (shrink(none, windows.levels - 1 - each).shape[-1] for each in (level - 1, level))
        _, end = ends(x, none, level - 1, windows)
        start, _ = ends(x, none, level, windows)
        silent = torch.zeros(1, 1, large, large, dtype=torch.float64)
        assert torch.allclose(jump(end, silent, level, windows), start, atol=1e-12)  # means
        alone = torch.zeros(large * large, 1, small, small, dtype=torch.float64)
        carried = jump(windows.end(level - 1) * basis(small), torch.zeros(small * small, 1, large, large, dtype=torch.float64), level, windows)
        added = jump(alone, basis(large), level, windows)
        expected = windows.start(level) ** 2 * torch.eye(large * large, dtype=torch.float64)
        assert torch.allclose(covariance(carried) + covariance(added), expected, atol=1e-12)
        # And this is what `ends` makes the start of.
        noisy = ends(torch.zeros(side * side, 1, side, side, dtype=torch.float64), basis(side), level, windows)[0]
        assert torch.allclose(covariance(noisy), expected, atol=1e-12)


def test_both_ends_of_a_level_hold_the_same_noise() -> None:
    windows, x, e = Windows(3), normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    for level in range(3):
        start, end = ends(x, e, level, windows)
        n, own = noise_at(e, 2 - level), shrink(x, 2 - level)
        coarse = enlarge(shrink(own, 1)) if level else torch.zeros_like(own)
        assert torch.allclose((start - (1 - windows.start(level)) * coarse) / windows.start(level), n)
        assert torch.allclose(end - windows.end(level) * n, (1 - windows.end(level)) * own)


# --- parts ----------------------------------------------------------------------------------------------------------------------------


def batch(images: int = 4, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = normal(images, 3, side, side).float()
    return x, flow.noise(x.shape[1:], range(images)), within(5, range(images))


@pytest.mark.parametrize("loss", ["original", "plain"])
def test_one_level_is_the_straight_flow_bit_for_bit(loss: str) -> None:
    x, e, _ = batch(64)
    for kind in ("uniform", "logit_normal"):
        for seen in (lambda t: t, lambda t: (t.bfloat16() * 1000).float() / 1000):
            t = seen(flow.Density(kind, 0.0, 1.0, 1.88).t(flow.quantiles(3, range(64))))  # type: ignore[arg-type]
            r = flow.Density(kind, 0.0, 1.0, 1.88).t(flow.quantiles(3, range(64)))  # type: ignore[arg-type]
            (part,) = split(x, e, [0] * 64, r, Windows(1), patch=2, loss=loss, seen=seen)  # type: ignore[arg-type]
            whole = parts.whole(Straight(), x, e, t)
            for one, other in (
                (part.rows, whole.rows),
                (part.noised, flow.blend(x, e, t)),
                (part.t, t),
                (part.target, e - x),
                (part.weight, whole.weight),
                (part.noised, whole.noised),
            ):
                assert torch.equal(one, other)
            assert part.scale == whole.scale == 1.0
            wanted = (x - (e - x)).square().flatten(1).mean(dim=1)
            assert torch.equal(parts.losses(x, part), wanted)
            assert torch.equal(parts.losses(x, whole), wanted)


def test_parts_hold_each_image_once_at_its_own_level_size_and_noise() -> None:
    windows, (x, e, r) = Windows(3), batch(8, 16)
    levels = [1, 0, 2, 1, 1, 0, 2, 1]
    made = split(x, e, levels, r, windows, patch=2)
    assert [part.rows.tolist() for part in made] == [[1, 5], [0, 3, 4, 7], [2, 6]]
    assert [part.noised.shape[-1] for part in made] == [4, 8, 16]
    assert [part.scale for part in made] == [4.0, 2.0, 1.0]
    for level, part in enumerate(made):
        assert part.rows.dtype == torch.int64
        assert part.noised.dtype == part.t.dtype == part.target.dtype == part.weight.dtype == torch.float32
        assert ((part.t > windows.end(level)) & (part.t < windows.start(level))).all()
        for place, row in enumerate(part.rows.tolist()):
            (alone,) = split(x[row : row + 1], e[row : row + 1], [level], r[row : row + 1], windows, patch=2)
            assert torch.equal(alone.noised[0], part.noised[place])
            assert torch.equal(alone.target[0], part.target[place])


def test_target_is_the_bases_own_velocity_and_a_correction_of_the_detail() -> None:
    windows, (x, e, r) = Windows(3, 0.2), batch()
    for level in range(3):
        (part,) = split(x, e, [level] * 4, r, windows, patch=2)
        n, own = noise_at(e, 2 - level), shrink(x, 2 - level)
        detail = enlarge(shrink(own, 1)) - own if level else torch.zeros_like(own)
        assert torch.allclose(part.target, n - own + (1 - windows.start(level)) / windows.width(level) * detail, atol=1e-5)


def test_the_original_loss_is_that_of_pyramid_flow() -> None:
    """It asks the model for start - end, which is s_k - e_k times our target."""
    windows, (x, e, r) = Windows(3), batch()
    for level in range(3):
        (part,) = split(x, e, [level] * 4, r, windows, patch=2)
        (plain,) = split(x, e, [level] * 4, r, windows, patch=2, loss="plain")
        start, end = ends(x, e, level, windows)
        predicted = normal(*part.target.shape, seed=7).float()
        theirs = (windows.width(level) * predicted - (start - end)).square().flatten(1).mean(dim=1)
        assert torch.allclose(parts.losses(predicted, part), theirs, rtol=1e-4)
        assert torch.allclose(parts.losses(predicted, plain) * windows.width(level) ** 2, theirs, rtol=1e-4)


def test_images_are_noised_to_the_timestep_that_the_model_sees() -> None:
    windows, (x, e, r) = Windows(3), batch(16)
    for level in range(3):
        (part,) = split(x, e, [level] * 16, r, windows, patch=2, seen=lambda t: t.bfloat16().float())
        assert torch.equal(part.t, part.t.bfloat16().float())
        start, end = ends(x, e, level, windows)
        way = ((part.t.double() - windows.end(level)) / windows.width(level)).view(-1, 1, 1, 1)
        assert torch.allclose(part.noised.double(), way * start + (1 - way) * end, atol=1e-5)


def test_latents_that_a_level_cannot_hold_are_refused() -> None:
    x, e, r = batch(1, 12)
    with pytest.raises(ValueError, match="12 x 12 cannot be halved 2 times into patches of 2: both sides must be multiples of 8, such as 8 x 8"):
        split(x, e, [0], r, Windows(3), patch=2)


def test_places_inside_a_level_are_even() -> None:
    assert stats.kstest(within(3, range(20_000)).numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(within(3, [7, 8]), within(3, range(10))[7:9])


# --- sampling -------------------------------------------------------------------------------------------------------------------------


def test_steps_in_noise_levels_are_the_steps_of_pyramid_flow() -> None:
    """It steps r from 1 to 0 along a velocity that is s_k - e_k times ours."""
    windows, noise = Windows(3, 0.25), [normal(2, 3, side, side, seed=side) for side in (4, 8, 16)]

    def velocity(x: Tensor) -> Tensor:
        return torch.sin(3 * x) + 0.1 * x

    ours = sample_pyramid(lambda x, t, scale: velocity(x), noise, windows, [2, 5, 3])
    x = noise[0]
    for level, steps in enumerate([2, 5, 3]):
        if level:
            x = jump(x, noise[level], level, windows)
        for _ in range(steps):
            x = x + (-1 / steps) * windows.width(level) * velocity(x)
    assert torch.allclose(ours, x, atol=1e-13)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_exact_velocity_leads_back_to_the_latents(levels: int, steps: int) -> None:
    windows, x0 = Windows(levels, 0.3), normal(2, 3, 16, 16)
    seen: list[float] = []

    def exact(noised: Tensor, t: Tensor, scale: float) -> Tensor:
        level = levels - 1 - round(math.log2(scale))
        seen.append(float(t[0]))
        start, end = ends(x0, torch.zeros_like(x0), level, windows)  # what is not noise in them
        way = next(r for r in (1 - step / steps for step in range(steps)) if abs(windows.end(level) + r * windows.width(level) - seen[-1]) < 1e-6)
        sigma = windows.end(level) + way * windows.width(level)
        n = (noised - way * start - (1 - way) * end) / sigma
        return n + (start - end) / windows.width(level)

    noise = [normal(2, 3, 16 >> halvings, 16 >> halvings, seed=halvings) for halvings in range(levels - 1, -1, -1)]
    assert torch.allclose(sample_pyramid(exact, noise, windows, steps), x0, atol=1e-12)
    assert len(seen) == steps * levels


def test_a_shifted_course_is_a_straight_flows_own() -> None:
    asked = Windows(1).sigmas(0, 10, 3.16)
    even = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert np.allclose(asked, 3.16 * even / (1 + 2.16 * even), atol=1e-15)


def test_noise_for_samples_is_each_images_own_and_independent_between_levels() -> None:
    drawn = sampling_noise((4, 32, 32), range(8), Windows(3))
    assert [tuple(each.shape) for each in drawn] == [(8, 4, 8, 8), (8, 4, 16, 16), (8, 4, 32, 32)]
    assert torch.equal(drawn[0], noise_at(flow.noise((4, 32, 32), range(8)), 2))
    assert all(torch.equal(each[3:4], alone) for each, alone in zip(drawn, sampling_noise((4, 32, 32), [3], Windows(3)), strict=True))
    coarse = [shrink(each, level).flatten() * 2**level for level, each in enumerate(drawn)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((coarse[one] * coarse[other]).mean())) < 5 / math.sqrt(coarse[0].numel())
    assert torch.equal(sampling_noise((4, 8, 8), [3], Windows(1))[0], flow.noise((4, 8, 8), [3]))


def test_counts_for_another_number_of_levels_are_refused() -> None:
    noise = sampling_noise((1, 8, 8), [0], Windows(2))
    for given in ({"steps": [1]}, {"steps": 1, "shifts": [1.0]}, {"steps": 1, "noise": noise[:1]}):
        with pytest.raises(ValueError, match="1 given for 2 levels"):
            sample_pyramid(lambda x, t, scale: x, **{"noise": noise, "windows": Windows(2), **given})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level 0: 0 steps"):
        sample_pyramid(lambda x, t, scale: x, noise, Windows(2), 0)


# --- which level ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(1, 2, 1), (1, 1, 1), (1, 1), (25, 50, 25), (0.1, 0.3), (3, 0, 1), (1, 2, 3, 4)])
def test_constant_shares_are_exact_in_every_run_of_images_as_long_as_their_sum(shares: tuple[float, ...]) -> None:
    exact = [Fraction(str(share)) for share in shares]
    period = math.lcm(*((share / sum(exact)).denominator for share in exact))
    levels = np.asarray(LevelShares(shares).levels(range(5 * period)))
    for first in range(4 * period):
        counts = np.bincount(levels[first : first + period], minlength=len(shares))
        assert counts.tolist() == [share / sum(exact) * period for share in exact]


@pytest.mark.parametrize("seed", range(60))
def test_with_random_shares_and_ramps_every_count_stays_within_one_of_the_integral(seed: int) -> None:
    random = np.random.default_rng(seed)
    number, images = int(random.integers(1, 5)), int(random.integers(1, 300))

    def some() -> tuple[float, ...]:
        shares = random.integers(0, 6, number) if seed % 2 else np.round(random.random(number), 3)
        return tuple(float(share) for share in shares) if shares.sum() else (1.0,) * number

    first, last = some(), None if seed % 5 == 0 else some()
    shares = LevelShares(first, last, None if last is None else images)
    levels = np.asarray(shares.levels(range(images)))
    counts = np.cumsum(levels[:, None] == np.arange(number), axis=0)
    begins = np.asarray(first) / sum(first)
    finishes = begins if last is None else np.asarray(last) / sum(last)
    middle = (np.arange(images) + 0.5) / images  # the mean of a straight line over an image is its value in the middle
    asked = np.cumsum(begins + middle[:, None] * (finishes - begins), axis=0)
    assert np.abs(counts - asked).max() <= 1 + 1e-9


def test_shuffled_blocks_keep_their_counts_and_part_the_levels_from_what_takes_turns() -> None:
    """Two sources that take turns would each see two of the levels of 1:2:1 alone."""
    shares = LevelShares((1, 2, 1))
    assert shares.period() == 4
    assert set(shares.levels(range(0, 400, 2))) != {0, 1, 2}
    positions = shuffled(range(4000), 4, 9)
    levels = shares.levels(positions)
    assert sorted(positions) == list(range(4000))
    assert all(sorted(levels[first : first + 4]) == [0, 1, 1, 2] for first in range(0, 4000, 4))
    for turn in (0, 1):
        assert np.allclose(np.bincount(levels[turn::2], minlength=3) / 2000, [1 / 4, 1 / 2, 1 / 4], atol=0.05)
    assert shuffled([17, 5], 4, 9) == [positions[17], positions[5]]
    assert shuffled(range(4000), 4, 8) != positions


def test_a_long_ramp_is_exact_at_its_far_end_as_well() -> None:
    """The counts between two far positions follow from the levels there: no position is given twice or lost, with ten million images before it."""
    images = 10**7
    shares = LevelShares((1, 2, 1), (1, 1, 1), images)
    for first in (0, 4_999_000, images - 400):
        levels = shares.levels(range(first, first + 400))
        for level in range(3):
            due = float(shares.due(level, level + 1, first + 400) - shares.due(level, level + 1, first))
            assert abs(levels.count(level) - due) <= 2
    assert float(shares.due(0, 1, images)) == pytest.approx(images * (1 / 4 + 1 / 3) / 2)


def test_shares_that_are_none_are_refused() -> None:
    for asked, said in (
        (((0.0, 0.0),), "one of them above 0"),
        (((1.0, -1.0),), "at least 0"),
        (((1.0, math.nan),), "at least 0"),
        (((1.0,) * 5,), "1 to 4"),
        (((1.0, 1.0), (1.0,), 5), "one share for each level"),
    ):
        with pytest.raises(ValueError, match=said):
            LevelShares(*asked)  # type: ignore[arg-type]
    for images, last in ((None, (1.0, 1.0)), (5, None), (0, (1.0, 1.0))):
        with pytest.raises(ValueError, match="number of images"):
            LevelShares((1.0, 1.0), last, images)
    with pytest.raises(ValueError, match="position 5 is outside the stage's 5 images"):
        LevelShares((1.0, 1.0), (1.0, 2.0), 5).level(5)


# --- the pipeline ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"), pixels=False, guidance=True)


@pytest.fixture
def pipe(model: Path) -> PyramidFluxPipeline:
    pipe = PyramidFluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


ASKED = {"prompt": ["a red disc", "a blue square"], "height": 32, "width": 16, "max_sequence_length": 8, "output_type": "latent"}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_with_one_level_the_images_are_those_of_flux_pipeline(pipe: PyramidFluxPipeline, model: Path, output_type: str) -> None:
    stock = FluxPipeline.from_pretrained(model)
    stock.set_progress_bar_config(disable=True)
    asked = {**ASKED, "output_type": output_type, "num_images_per_prompt": 2, "num_inference_steps": 5}
    theirs = stock(**asked, generator=seeded()).images
    ours = pipe(**asked, generator=seeded(), levels=1, course="scheduler").images
    assert np.abs(np.asarray(theirs) - np.asarray(ours)).max() < 1e-5
    even = pipe(**asked, generator=seeded(), levels=1).images
    assert np.abs(np.asarray(theirs) - np.asarray(even)).max() > 1e-4


def test_with_one_level_given_latents_and_embeddings_are_used_as_flux_pipeline_does(pipe: PyramidFluxPipeline, model: Path) -> None:
    stock = FluxPipeline.from_pretrained(model)
    stock.set_progress_bar_config(disable=True)
    embeds, pooled, _ = stock.encode_prompt(ASKED["prompt"], None, max_sequence_length=8)
    asked = {**ASKED, "prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "num_inference_steps": 3, "latents": normal(2, 32, 16).float()}
    assert torch.allclose(stock(**asked).images, pipe(**asked, levels=1, course="scheduler").images, atol=1e-5)
    with pytest.raises(ValueError, match="latents"):
        pipe(**{**asked, "latents": normal(2, 8, 16).float()}, levels=2)


def test_in_bf16_the_transformer_is_told_the_timesteps_that_flux_pipeline_tells_it(model: Path) -> None:
    told: list[list[float]] = []
    for kind, own in ((FluxPipeline, {}), (PyramidFluxPipeline, {"levels": 1, "course": "scheduler"})):
        pipe, seen = kind.from_pretrained(model, dtype=torch.bfloat16), []
        pipe.transformer.time_text_embed.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0][0].item()))
        pipe(**ASKED, num_inference_steps=7, generator=seeded(), **own)
        told.append(seen)
    assert len(told[0]) == 7
    assert told[0] == told[1]


def test_two_levels_are_sampled_alike_from_one_seed_and_otherwise_than_one(pipe: PyramidFluxPipeline) -> None:
    first = pipe(**ASKED, num_inference_steps=[2, 3], levels=2, generator=seeded()).images
    assert torch.equal(first, pipe(**ASKED, num_inference_steps=[2, 3], levels=2, generator=seeded()).images)
    assert first.isfinite().all()
    for other in ({"levels": 1}, {"levels": 2, "gamma": 0.2}, {"levels": 2, "window_shift": 2.0}, {"levels": 2, "course": "scheduler"}, {"levels": 2, "generator": seeded(4)}):
        assert not torch.allclose(first, pipe(**{**ASKED, "generator": seeded(), "num_inference_steps": [2, 3] if other["levels"] == 2 else 5, **other}).images, atol=1e-4)
    images = pipe(**{**ASKED, "output_type": "pil"}, num_inference_steps=1, levels=2, generator=seeded()).images
    assert [image.size for image in images] == [(16, 32)] * 2


def test_the_pipeline_follows_sample_pyramid_with_ids_spread_over_the_full_grid(pipe: PyramidFluxPipeline) -> None:
    """The same way with the transformer called by hand, the noise drawn by hand."""
    windows, generator = Windows(2, 0.25), seeded()
    embeds, pooled, text_ids = pipe.encode_prompt(ASKED["prompt"], None, max_sequence_length=8)
    noise = [torch.randn(2, 4, 16, 8, generator=generator), torch.randn(2, 4, 16, 8, generator=generator)]

    @torch.no_grad()
    def predict(noised: Tensor, t: Tensor, scale: float) -> Tensor:
        rows, columns = noised.shape[2] // 2, noised.shape[3] // 2
        out = pipe.transformer(
            hidden_states=FluxPipeline._pack_latents(noised, *noised.shape),
            timestep=t,
            guidance=torch.full([2], 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=torch.tensor([[0.0, row * scale + (scale - 1) / 2, column * scale + (scale - 1) / 2] for row in range(rows) for column in range(columns)]),
        ).sample
        return FluxPipeline._unpack_latents(out, rows * 4, columns * 4, 2)

    expected = sample_pyramid(predict, [noise_at(noise[0], 1), noise[1]], windows, [2, 3])
    ours = pipe(**ASKED, num_inference_steps=[2, 3], levels=2, gamma=0.25, generator=seeded()).images
    assert torch.allclose(FluxPipeline._unpack_latents(ours, 32, 16, 2), expected, atol=1e-5)


def test_ids_of_a_coarse_token_are_the_middle_of_those_it_covers() -> None:
    full = _positions(8, 12, 1.0, "cpu").view(8, 12, 3).permute(2, 0, 1)
    for scale in (2, 4):
        assert torch.equal(_positions(8 // scale, 12 // scale, float(scale), "cpu"), torch.nn.functional.avg_pool2d(full, scale).flatten(1).T)
    assert torch.equal(_positions(8, 12, 1.0, "cpu"), FluxPipeline._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32))


def adapter(folder: Path, windows: Windows | None, seed: int = 0) -> Path:
    folder.mkdir()
    name = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{name}.lora_A.weight": normal(2, 16, seed=seed).float(), f"{name}.lora_B.weight": normal(16, 2, seed=seed + 1).float()}
    save_file(pair, folder / "adapter.safetensors", metadata={"format": "pt"} if windows is None else {METADATA_KEY: write(windows)})
    return folder


def test_the_pyramid_is_that_of_the_active_adapter(pipe: PyramidFluxPipeline, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no active adapter says how many"):
        pipe(**ASKED)
    windows = Windows(2, 0.25)
    pipe.load_lora_weights(adapter(tmp_path / "pyramid", windows))
    assert pipe.windows() == windows
    ours = pipe(**ASKED, num_inference_steps=2, generator=seeded()).images
    stock = PyramidFluxPipeline.from_pipe(FluxPipeline.from_pretrained(model))
    stock.set_progress_bar_config(disable=True)
    without = stock(**ASKED, num_inference_steps=2, generator=seeded(), levels=2, gamma=0.25).images
    assert not torch.allclose(ours, without, atol=1e-4)
    FluxPipeline.load_lora_weights(stock, tmp_path / "pyramid" / "adapter.safetensors")
    assert torch.equal(ours, stock(**ASKED, num_inference_steps=2, generator=seeded(), levels=2, gamma=0.25).images)
    with pytest.raises(ValueError, match=r"levels: 3 asked, but adapter 'default_0' was trained with 2"):
        pipe(**ASKED, levels=3)
    with pytest.raises(ValueError, match=r"gamma: 0\.1 asked"):
        pipe(**ASKED, gamma=0.1)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="no active adapter says how many"):
        pipe.windows()


def test_adapters_of_different_pyramids_are_not_sampled_together(pipe: PyramidFluxPipeline, tmp_path: Path) -> None:
    pipe.load_lora_weights(adapter(tmp_path / "two", Windows(2)), weight_name="adapter.safetensors", adapter_name="two")
    pipe.load_lora_weights(adapter(tmp_path / "three", Windows(3)), adapter_name="three")
    pipe.load_lora_weights(adapter(tmp_path / "style", None), adapter_name="style")
    pipe.set_adapters(["two", "style"])
    assert pipe.windows() == Windows(2)
    pipe.set_adapters(["two", "three"])
    with pytest.raises(ValueError, match="different pyramids"):
        pipe.windows()
    pipe.set_adapters("style")
    assert pipe.windows(levels=2, gamma=0.2) == Windows(2, 0.2)


def test_an_adapter_whose_pyramid_cannot_be_read_is_not_loaded(pipe: PyramidFluxPipeline, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "broken", None)
    save_file({"a": torch.zeros(1)}, folder / "adapter.safetensors", metadata={METADATA_KEY: '{"levels": 9, "gamma": 0.3}'})
    with pytest.raises(ValueError, match="levels: 9"):
        pipe.load_lora_weights(folder)
    assert pipe.get_active_adapters() == []


def test_sizes_and_courses_that_the_pipeline_cannot_sample_are_refused(pipe: PyramidFluxPipeline) -> None:
    with pytest.raises(ValueError, match="36 x 16 cannot be halved 1 times into patches of 4: both sides must be multiples of 8, such as 32 x 16 or 40 x 16"):
        pipe(**{**ASKED, "height": 36}, levels=2)
    with pytest.raises(ValueError, match="course: 'cosine' is not one of even, scheduler"):
        pipe(**ASKED, levels=2, course="cosine")
    with pytest.raises(ValueError, match="a list of 1 for 2 images"):
        pipe(**ASKED, levels=2, generator=[seeded()])
    with pytest.raises(ValueError, match="1 given for 2 levels"):
        pipe(**ASKED, levels=2, num_inference_steps=[2])

"""The pyramid: the way from noise to data in levels of resolution, each over its own window of noise levels. Source: Jin et al. 2024, arXiv:2410.05954.

With D the mean of 2 x 2 blocks and U enlargement to the nearest, level k holds the latents x_k, D applied to x until they are of its size, and noise n_k,
made so too and doubled each time, which keeps its variance at 1. Inside a level the way is straight:

    start = s_k n_k + (1 - s_k) U D x_k      end = e_k n_k + (1 - e_k) x_k      x_t = r start + (1 - r) end,  r in (0, 1)

The model is told the noise level of x_t, t = r s_k + (1 - r) e_k, and predicts (start - end) / (s_k - e_k): its own velocity n_k - x_k and a correction
of the detail, (1 - s_k) / (s_k - e_k) (U D x_k - x_k). Pyramid-Flow tells it a time of the whole way and asks for start - end; a base that has
learnt the straight flow would have to unlearn that. Steps in t and steps in r are the same steps. One level is the straight flow, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from mixing.keys import key
from stages.objectives import flow
from stages.objectives.parts import Part
from stages.objectives.windows import Windows, check_size
from stages.sent import sent

Loss = Literal["original", "plain"]
"""original: (s_k - e_k)^2 |v - target|^2, which is Pyramid-Flow's loss, and the default: over its level an error of the velocity moves the latents by
s_k - e_k times itself, so this is what it costs the sample. plain: without that factor, as the straight flow is weighed at every noise level."""

_SMALLEST = 2.0**-24


def shrink(x: Tensor, halvings: int) -> Tensor:
    """The means of blocks of 2^halvings x 2^halvings; x: [B, C, h, w], with sides that are multiples of that."""
    return x if halvings == 0 else avg_pool2d(x, 2**halvings)


def enlarge(x: Tensor) -> Tensor:
    """Twice the size, each value four times."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


def noise_at(e: Tensor, halvings: int) -> Tensor:
    """Standard normal noise of a coarser level from that of the full size; [B, C, h, w]."""
    return shrink(e, halvings) * 2.0**halvings


def block_noise(z: Tensor, gamma: float) -> Tensor:
    """Noise of variance 1 and covariance -gamma inside each 2 x 2 block, 0 outside, from standard normal z [B, C, h, w].

    A block's mean and what is left beside it are independent, so each is scaled by itself: no matrix is factored, and gamma = 1/3, where the matrix
    would be singular, is a case like the others.
    """
    means = enlarge(shrink(z, 1))
    return math.sqrt(1 + gamma) * (z - means) + math.sqrt(max(0.0, 1 - 3 * gamma)) * means


def ends(x: Tensor, e: Tensor, level: int, windows: Windows) -> tuple[Tensor, Tensor]:
    """Where the way through a level starts and ends, each [B, C, h, w] in the level's size. x, e: latents and noise of the full size."""
    halvings = windows.levels - 1 - level
    own, n = shrink(x, halvings), noise_at(e, halvings)
    s_k, e_k = windows.start(level), windows.end(level)
    start = n if level == 0 else s_k * n + (1 - s_k) * enlarge(shrink(own, 1))
    return start, e_k * n + (1 - e_k) * own


def split(
    x: Tensor, e: Tensor, levels: Sequence[int], r: Tensor, windows: Windows, *, patch: int, loss: Loss = "original", seen: Callable[[Tensor], Tensor] = lambda t: t
) -> list[Part]:
    """A micro-batch in parts, one for each level that is present, the coarsest first.

    x, e: latents and noise of the full size, float32 [B, C, h, w]. levels: of each image, from `LevelShares`. r: where inside its level each image
    is, float32 [B] in (0, 1), 1 at the noisy end; such as `within(key, positions)`. patch: side of a token in latents. seen: what a model makes of t in its
    precision (`Family.seen_timestep`); the image is noised to that. Raises ValueError if a side of x is not a multiple of 2^(levels - 1) x patch.
    """
    check_size(x.shape[2], x.shape[3], windows.levels, patch)
    assert len(levels) == len(r) == len(x)
    device, parts = x.device, []
    for level in sorted(set(levels)):
        rows = torch.tensor([row for row, its in enumerate(levels) if its == level])
        own = sent(rows, device)
        start, end = ends(x[own], e[sent(rows, e.device)], level, windows)
        last, width = windows.end(level), windows.width(level)
        asked = last + r[sent(rows, r.device)].double() * width
        t = seen(asked.clamp(_SMALLEST, 1 - _SMALLEST).float())
        # In float64 on the way: 1 - r must be what float32 makes of it, as in `flow.blend`.
        way = ((t.double() - last) / width).view(-1, 1, 1, 1)
        noised = sent(way.float(), device) * start + sent((1 - way).float(), device) * end
        weight = torch.full((len(rows),), width**2 if loss == "original" else 1.0, device=device)
        parts.append(Part(rows, noised, sent(t, device), (start - end) / width, weight, windows.scale(level)))
    return parts


def within(base: int, positions: Sequence[int]) -> Tensor:
    """Where inside its level each image of a stage is trained: evenly spread over (0, 1), float32 [B]. base: key of (seed, stage)."""
    return flow.Density("uniform", 0.0, 1.0, 1.0).t(flow.quantiles(base, positions))


def jump(x: Tensor, z: Tensor, level: int, windows: Windows) -> Tensor:
    """From the end of the level before to the start of this one. x: [B, C, h / 2, w / 2]; z: standard normal [B, C, h, w]."""
    alpha, beta = windows.jump(level)
    return alpha * enlarge(x) + beta * block_noise(z, windows.gamma)


def sampling_noise(shape: Sequence[int], image_keys: Sequence[int], windows: Windows) -> list[Tensor]:
    """Standard normal noise for `sample_pyramid`, one tensor for each level, each image's from its own key.

    shape: C, h, w at full size. The first is what `flow.noise` gives an image, made as small as the coarsest level.
    """
    channels, height, width = shape
    drawn = [noise_at(flow.noise(shape, image_keys), windows.levels - 1)]
    for level in range(1, windows.levels):
        side = int(windows.scale(level))
        drawn.append(flow.noise((channels, height // side, width // side), [key(image_key, "level", level) for image_key in image_keys]))
    return drawn


def sample_pyramid(
    predict: Callable[[Tensor, Tensor, float], Tensor], noise: Sequence[Tensor], windows: Windows, steps: int | Sequence[int], shifts: Sequence[float] | None = None
) -> Tensor:
    """Follow the pyramid from noise to latents by Euler steps, level after level; [B, C, h, w] in the full size.

    predict: the velocity of noised [B, C, h, w] at t [B], with position ids of step `scale`. noise: standard normal, one tensor in the size of each level: the
    first is where the way starts, the others are added at the jumps. steps: in each level, or one number for each. shifts: of each level's own
    course (`Windows.sigmas`); 1 where left out. Raises ValueError if steps, shifts or noise are not as many as the levels.
    """
    counts = [steps] * windows.levels if isinstance(steps, int) else list(steps)
    courses = [1.0] * windows.levels if shifts is None else list(shifts)
    for name, given in (("steps", counts), ("shifts", courses), ("noise", noise)):
        if len(given) != windows.levels:
            raise ValueError(f"{name}: {len(given)} given for {windows.levels} levels; give one for each level")
    x = noise[0]
    for level in range(windows.levels):
        if level > 0:
            x = jump(x, noise[level], level, windows)
        sigmas = windows.sigmas(level, counts[level], courses[level])
        for now, then in pairwise(sigmas):
            v = predict(x, torch.full((len(x),), now, dtype=torch.float32, device=x.device), windows.scale(level))
            x = x + (then - now) * v
    return x

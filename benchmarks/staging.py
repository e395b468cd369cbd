"""Do stages help? One stage, two phases, and low to high resolution, with the same images in all, and beside each staged arm one that differs from it by its order alone.

    python -m benchmarks.staging --seeds 5 --steps 400

On the shapes world, beginning with the model of benchmarks/adaptive.py, which knows text to image at 8, 12 and 16 pixels; every arm ends in the shares 50/20/10/10/10 at 16 pixels
and is measured there. `one stage` has them from the first step. `two phases` begins with a third of the steps by size of the sources, OmniGen's advice; `low to high` makes a quarter of the steps
at 8 pixels, a quarter at 12, the rest at 16. `two phases mixed` and `low to high mixed` have the same stages and rates, and in each of them what the other arm comes to in all: the order is all that they
lack. `two rates` and `three rates` have the same stages and rates too, and in each of them the shares and the size of `one stage`: then the rates are all that they have. `adaptive` is one stage that
follows held-out losses. Equal images are not equal time: small pictures are cheaper, so the seconds stand beside, and `three rates short` has no more tokens than `low to high`. An arm that is done is not carried out again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.adaptive import BEGINS, asked, compare, learns, rate
from benchmarks.arms import PLAN, Arm, Outcome, Outcomes, Scale, World, plan_of
from benchmarks.seeds import Figure
from benchmarks.shapes_model import TEXT_LENGTH

ARMS = ("one stage", "two phases", "two phases mixed", "two rates", "low to high", "low to high mixed", "three rates", "three rates short", "adaptive")
PAIRS = (
    *((arm, "one stage") for arm in ARMS[1:]),
    *(("two phases", other) for other in ("two phases mixed", "two rates")),
    *(("low to high", other) for other in ("low to high mixed", "three rates", "three rates short")),
)
"""Whose differences are shown."""
_COST = (Figure("processor", "processor seconds", digits=1),)
_NATURAL: Mapping[str, float] = {task: (2 if task == "t2i" else 1) / (len(PLAN) + 1) for task in PLAN}
"""The shares by size: of text to image there are twice as many rows."""


def stages_of(world: World, arm: str) -> list[dict[str, Any]]:
    """The stages of an arm, their steps adding up to the same but for `three rates short`; those of `mixed` and `rates` differ from one another in nothing but their rates."""
    steps, final = world.scale.steps, dict(PLAN)
    kept = {"handoff": {"optimizer": "keep"}}
    if arm.startswith("two"):
        early = steps // 3
        mixed = {task: round((early * _NATURAL[task] + (steps - early) * BEGINS[task]) / steps, 6) for task in PLAN}
        mixes: Mapping[str, list[Any]] = {"two phases": ["natural", final], "two phases mixed": [mixed, mixed], "two rates": [final, final]}
        return [
            {"name": "open", "steps": early, "resolution": 16, "mix": mixes[arm][0], "lr": rate(early, falls=False)},
            {"name": "final", "steps": steps - early, "resolution": 16, "mix": mixes[arm][1], "lr": rate(steps - early), **kept},
        ]
    if arm == "three rates short":
        steps = round(steps * (_tokens(8) + _tokens(12) + 2 * _tokens(16)) / (4 * _tokens(16)))
    quarter = steps // 4
    all_sizes = [{"pixels": 8, "share": 25}, {"pixels": 12, "share": 25}, {"pixels": 16, "share": 50}]
    sizes: Mapping[str, list[Any]] = {"low to high": [8, 12, 16], "low to high mixed": [all_sizes] * 3, "three rates": [16, 16, 16], "three rates short": [16, 16, 16]}
    return [
        {"name": "low", "steps": quarter, "resolution": sizes[arm][0], "mix": final, "lr": rate(quarter, falls=False)},
        {"name": "middle", "steps": quarter, "resolution": sizes[arm][1], "mix": final, "lr": rate(quarter, falls=False), **kept},
        {"name": "high", "steps": steps - 2 * quarter, "resolution": sizes[arm][2], "mix": final, "lr": rate(steps - 2 * quarter), **kept},
    ]


def _tokens(pixels: int) -> float:
    """Of an image of that side, the reference of every second one and the prompt."""
    return (pixels // 2) ** 2 * (1 + (1 - BEGINS["t2i"])) + TEXT_LENGTH


def plan_of_arm(world: World, arm: str, seed: int) -> dict[str, Any]:
    """The plan of an arm; that of one stage and the adaptive one are those of benchmarks/adaptive.py."""
    if arm in ("one stage", "adaptive"):
        return learns(world, "one", seed, dict(PLAN) if arm == "one stage" else {"adaptive": dict(PLAN)})
    return plan_of(world, arm.replace(" ", "-"), seed, stages_of(world, arm))


def compared(outcomes: Outcomes, seeds: int, arms: Sequence[str]) -> Iterator[tuple[str, int, Outcome]]:
    """Arm, seed and outcome, one after another, seed by seed."""
    for seed in range(seeds):
        for arm in arms:
            yield arm, seed, outcomes.of(Arm(arm, seed, plan_of_arm(outcomes.world, arm, seed)))


def main(arguments: Sequence[str] | None = None, scale: Scale = Scale()) -> int:  # noqa: B008  it is frozen
    """The command line. Returns the exit code."""
    compare(asked("staging", __doc__ or "", ARMS, arguments), scale, compared, PAIRS, [_COST])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

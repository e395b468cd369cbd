"""Do shares that follow held-out losses pay? Fixed, uniform and adaptive shares, and what an adaptive run would be without its information, at equal steps.

    python -m benchmarks.adaptive --seeds 5 --steps 400

On the shapes world (benchmarks/shapes.py): a small Flux that knows text to image already learns five tasks by an adapter, in Medley's own runs. What is weighed counts tasks by the
shares of the plan, 50/20/10/10/10. `adaptive` is the plan's language as it is, with its defaults. `placebo` is handed what an adaptive run of the same seed did, each change on another source;
`averaged` has the mean of that run's shares from the first step to the last; `balance` knows what each task comes to when it is alone; `uniform adaptive` begins with equal
shares and weighs tasks alike. An arm that is done is not carried out again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arms import PLAN, Arm, Outcome, Outcomes, Scale, World, floors, make_world, plan_of
from benchmarks.handed import of_other_sources
from benchmarks.seeds import Figure, Runs, markdown, plain, table_of_differences, table_of_means
from benchmarks.shapes import TASKS

Compared = Callable[[Outcomes, int, Sequence[str]], Iterator[tuple[str, int, Outcome]]]
"""Outcomes, number of seeds and arms, to arm, seed and outcome, one after another."""

ARMS = ("fixed", "uniform", "adaptive", "placebo", "averaged", "balance", "uniform adaptive")
PAIRS = (*((arm, "fixed") for arm in ARMS[1:]), ("adaptive", "placebo"), ("adaptive", "averaged"), ("uniform adaptive", "uniform"))
"""Whose differences are shown."""
FIGURES = (
    Figure("loss", "weighted loss"),
    Figure("mean loss", "mean loss"),
    Figure("worst loss", "worst loss"),
    Figure("right", "weighted right", percent=True),
    Figure("mean right", "mean right", percent=True),
    Figure("worst right", "worst right", percent=True),
    Figure("attributes", "attributes", percent=True),
)
_ALONE = 1000  # the seed of the runs that learn one task alone: none that is compared
BEGINS: Mapping[str, float] = {task: share / sum(PLAN.values()) for task, share in PLAN.items()}


def learns(world: World, name: str, seed: int, mix: Any) -> dict[str, Any]:
    """A plan of one stage with a mix."""
    steps = world.scale.steps
    stage = {"name": "learn", "steps": steps, "resolution": 16, "mix": mix, "lr": rate(steps)}
    return plan_of(world, name, seed, [stage])


def rate(steps: int, *, falls: bool = True) -> dict[str, Any]:
    """The learning rate of a stage of so many steps. falls: whether it goes down to 0 along a cosine, as it does in a last stage."""
    return {"peak": 6e-3, "warmup": max(1, steps // 20), **({"schedule": "cosine"} if falls else {})}


def numbers_of(outcome: Outcome) -> dict[str, float]:
    """What is compared: losses and what is right, weighed, as means of the tasks, and of the worst one; and the mean of all attributes, of which masks have their overlap."""
    losses, right = outcome.losses, outcome.right
    attributes = [sum(part for name, part in parts.items() if name != "right") / (len(parts) - 1) for parts in outcome.parts.values()]
    weighed = {name: sum(BEGINS[task] * values[task] for task in TASKS) for name, values in (("loss", losses), ("right", right))}
    means = {f"mean {name}": sum(values.values()) / len(values) for name, values in (("loss", losses), ("right", right))}
    return {
        **weighed, **means, "worst loss": max(losses.values()), "worst right": min(right.values()), "attributes": sum(attributes) / len(attributes), "processor": outcome.processor_seconds,
        **{f"right {task}": right[task] for task in TASKS}, **{f"loss {task}": losses[task] for task in TASKS}, **{f"images {task}": float(outcome.images[task]) for task in TASKS},
    }  # fmt: skip


def averaged(outcome: Outcome, steps: int) -> dict[str, float]:
    """The mean of a run's shares over its steps."""
    begun = [(0, dict(BEGINS)), *outcome.changes]
    ends = [step for step, _ in begun[1:]] + [steps]
    return {task: sum((end - step) * shares[task] for (step, shares), end in zip(begun, ends, strict=True)) / steps for task in TASKS}


def compared(outcomes: Outcomes, seeds: int, arms: Sequence[str]) -> Iterator[tuple[str, int, Outcome]]:
    """Arm, seed and outcome, one after another, seed by seed."""
    world, steps = outcomes.world, outcomes.world.scale.steps
    follows: dict[str, Any] = {"adaptive": dict(PLAN)}
    targets: dict[str, float] = {}
    if "balance" in arms:
        alone = {task: outcomes.of(Arm(f"{task} alone", _ALONE, learns(world, f"{task}-alone", _ALONE, {task: 1}))) for task in TASKS}
        targets = {task: outcome.held_out[task] for task, outcome in alone.items()}
    for seed in range(seeds):
        for name in arms:
            given = None
            match name:
                case "fixed":
                    mix: Any = dict(PLAN)
                case "uniform":
                    mix = dict.fromkeys(TASKS, 1)
                case "adaptive":
                    mix = follows
                case "uniform adaptive":
                    mix = {"adaptive": dict.fromkeys(TASKS, 1)}
                case "balance":
                    mix = {**follows, "follows": "balance", "targets": targets}
                case _:
                    adaptive = outcomes.of(Arm("adaptive", seed, learns(world, "adaptive", seed, follows)))
                    mix = follows if name == "placebo" else {task: round(share, 6) for task, share in averaged(adaptive, steps).items()}
                    given = of_other_sources(adaptive.changes, BEGINS, seed) if name == "placebo" else None
            yield name, seed, outcomes.of(Arm(name, seed, learns(world, name.replace(" ", "-"), seed, mix), given))


def tables(runs: Runs, pairs: Sequence[tuple[str, str]]) -> list[list[list[str]]]:
    """Means; differences of pairs of arms; of each task what is right, the loss, and the images drawn."""
    of_tasks = [tuple(Figure(f"{figure} {task}", f"{words}{task}", *rest) for task in TASKS) for figure, words, *rest in (("right", "", True), ("loss", "loss of "), ("images", "images of ", False, 0))]
    return [table_of_means(runs, FIGURES), table_of_differences(runs, FIGURES, pairs), *(table_of_means(runs, figures) for figures in of_tasks)]


def asked(module: str, doc: str, arms: Sequence[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a comparison."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=doc.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"of each arm ({Scale.steps})")
    parser.add_argument("--every", type=int, help=f"steps between evaluations ({Scale.every})")
    parser.add_argument("--arms", nargs="*", choices=arms, default=arms)
    parser.add_argument("--world", type=Path, default=Path("runs/benchmarks/shapes"), metavar="FOLDER", help="where rows, models and outcomes are kept")
    return parser.parse_args(arguments)


def compare(given: argparse.Namespace, scale: Scale, compared: Compared, pairs: Sequence[tuple[str, str]], further: Sequence[Sequence[Figure]] = ()) -> None:
    """Carry out what is not done yet, saying each outcome, and print the tables, to be read and to be pasted. further: figures for which there are tables too."""
    world = make_world(given.world, replace(scale, steps=given.steps or scale.steps, every=given.every or scale.every))
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for arm, seed, outcome in compared(Outcomes(world), given.seeds, given.arms):
        runs.setdefault(arm, {})[seed] = numbers = numbers_of(outcome)
        print(f"{arm:18} seed {seed}  weighted loss {numbers['loss']:.4f}  right {numbers['right']:.1%}, mean of tasks {numbers['mean right']:.1%}  {outcome.processor_seconds:.0f} s", flush=True)
    found = [floors(world), *tables(runs, pairs), *(table_of_means(runs, figures) for figures in further)]
    for written in (plain, markdown):
        for table in (table for table in found if len(table) > 1):  # there are no differences from an arm that was left out
            print(f"\n{written(table)}")


def main(arguments: Sequence[str] | None = None, scale: Scale = Scale()) -> int:  # noqa: B008  it is frozen
    """The command line. Returns the exit code."""
    compare(asked("adaptive", __doc__ or "", ARMS, arguments), scale, compared, PAIRS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

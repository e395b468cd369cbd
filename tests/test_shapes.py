"""The shapes world is what it says, and the comparisons on it run and count as they say."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import adaptive, shapes, staging
from benchmarks.arms import Arm, Outcome, Outcomes, Scale, World
from benchmarks.handed import of_other_sources
from benchmarks.seeds import Figure, differences, markdown, mean_of, plain, table_of_differences, table_of_means
from mixing.adaptive import Rule
from runs import write_plan
from stages.reader import read_plan

TINY = Scale(steps=6, images=8, base_steps=3, base_images=8, rows=40, held_out=2, every=1, tests=3, heads=1, blocks=1)


# --- the world ---------------------------------------------------------------------------------------------------------------------------


def test_rows_and_pictures_depend_on_seed_task_and_number_alone() -> None:
    first = [(row := shapes.row_of(1, task, 7), shapes.target_of(task, row)) for task in shapes.TASKS]
    np.random.seed(5)
    torch.manual_seed(5)
    again = [(row := shapes.row_of(1, task, 7), shapes.target_of(task, row)) for task in reversed(shapes.TASKS)]
    assert all(one[0] == other[0] and np.array_equal(one[1], other[1]) for one, other in zip(first, reversed(again), strict=True))
    assert len({shapes.row_of(seed, task, number) for seed in (1, 2) for task in ("t2i", "subject") for number in (7, 8)}) == 8


@pytest.fixture(scope="module")
def floors() -> dict[str, dict[str, float]]:
    return shapes.floors(3, 200)


def test_real_pictures_are_all_judged_right_and_those_of_other_rows_are_not(floors: dict[str, dict[str, float]]) -> None:
    assert [parts["real"] for parts in floors.values()] == [1.0] * 5
    assert all(parts["shuffled"] < 0.03 for parts in floors.values())


def test_a_reference_handed_back_is_no_answer(floors: dict[str, dict[str, float]]) -> None:
    assert "reference" not in floors["t2i"]
    assert floors["edit"]["reference"] == 0.0
    assert all(floors[task]["reference"] < 0.25 for task in ("subject", "control", "other"))


def test_each_wrong_attribute_is_seen_as_what_it_is() -> None:
    asked = shapes.Thing("circle", "red", "top", "small")
    rows = [shapes.Row("", asked, None)]
    for attribute, value in (("shape", "cross"), ("colour", "blue"), ("place", "left"), ("size", "large")):
        made = shapes.Thing(**{**vars(asked), attribute: value})
        found = shapes.score("t2i", shapes.picture(made)[None], rows)
        assert found == {"right": 0.0, **{name: float(name != attribute) for name in shapes.ATTRIBUTES}}


def test_a_mask_is_right_from_four_fifths_of_overlap() -> None:
    thing = shapes.Thing("square", "red", "middle", "large")
    half = shapes.mask(thing).copy()
    half[:8] = 0
    found = shapes.score("other", np.stack([shapes.mask(thing), half]), [shapes.Row("", thing, None)] * 2)
    assert found["right"] == 0.5
    assert found["overlap"] == pytest.approx(0.75)


def test_a_prompt_says_what_the_reference_does_not_show() -> None:
    for number in range(50):
        rows = {task: shapes.row_of(0, task, number) for task in shapes.TASKS}
        target, reference = rows["subject"].target, rows["subject"].reference
        assert reference is not None
        assert (reference.shape, reference.colour) == (target.shape, target.colour)
        assert all(word in rows["subject"].prompt for word in (target.size, target.place))
        assert rows["control"].target.colour in rows["control"].prompt
        assert rows["edit"].reference is not None
        assert rows["edit"].reference.colour != rows["edit"].target.colour
        assert rows["edit"].target.colour in rows["edit"].prompt
        assert all(set(re.findall(r"[a-z]+", row.prompt)) <= set(shapes.words()) for row in rows.values())


# --- numbers over seeds ------------------------------------------------------------------------------------------------------------------

RUNS = {"one": {0: {"loss": 1.0, "right": 0.5}, 1: {"loss": 2.0, "right": 0.5}, 2: {"loss": 3.0, "right": 0.5}}, "two": {0: {"loss": 0.5, "right": 0.6}, 1: {"loss": 2.5, "right": 0.7}, 2: {"loss": 2.0, "right": 0.5}}}


def test_mean_and_standard_error_are_those_of_the_formula() -> None:
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.mean, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(mean_of([1.0]).error)


def test_differences_are_of_the_same_seed() -> None:
    assert differences(RUNS, "two", "one", "loss") == [-0.5, 0.5, -1.0]
    found = mean_of(differences(RUNS, "two", "one", "loss"))
    assert (found.mean, found.error) == (pytest.approx(-1 / 3), pytest.approx(math.sqrt((1 / 36 + 25 / 36 + 16 / 36) / 2 / 3)))
    assert differences(RUNS, "two", "left out", "loss") == []
    assert differences({**RUNS, "two": {2: RUNS["two"][2], 9: RUNS["two"][0]}}, "two", "one", "loss") == [-1.0]


def test_tables_show_means_errors_and_how_often_an_arm_is_better() -> None:
    figures = (Figure("loss", "loss"), Figure("right", "right", percent=True))
    assert table_of_means(RUNS, figures) == [["arm", "loss", "right, %"], ["one", "2.0000 ± 0.5774", "50.0 ± 0.0"], ["two", "1.6667 ± 0.6009", "60.0 ± 5.8"]]
    found = table_of_differences(RUNS, figures, [("two", "one"), ("two", "left out"), ("left out", "two")])
    assert found == [["difference", "loss", "right, points"], ["two - one", "-0.3333 ± 0.4410 (2/3)", "+10.0 ± 5.8 (2/3)"]]
    assert markdown([["arm", "loss"], ["one", "2"]]) == "| arm | loss |\n| --- | ---: |\n| one | 2 |"
    assert plain([["arm", "loss"], ["one", "2"]]) == "arm  loss\none     2"


# --- arms --------------------------------------------------------------------------------------------------------------------------------


def test_placebo_moves_shares_as_much_and_none_by_its_own_source() -> None:
    begins = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    moved = {"a": 0.4 * 1.0, "b": 0.3 * 0.6, "c": 0.2 * 1.2, "d": 0.1 * 1.8}
    for seed in range(8):
        ((step, shares),) = of_other_sources([(50, moved)], begins, seed).items()
        assert step == 50
        assert sum(shares.values()) == 1
        assert all(low - 1e-4 <= shares[name] <= high + 1e-4 for name, (low, high) in Rule(begins).limits().items())
        order = sorted(begins, key=lambda name: shares[name] / begins[name])
        assert all(one != other for one, other in zip(order, sorted(begins, key=lambda name: moved[name] / begins[name]), strict=True))
    assert len({str(of_other_sources([(50, moved)], begins, seed)) for seed in range(8)}) > 2


def test_averaged_shares_weigh_each_by_the_steps_that_it_was_in_force() -> None:
    begun, later = dict(adaptive.BEGINS), {**adaptive.BEGINS, "t2i": 0.25, "other": 0.35}
    outcome = Outcome("", "", 0, {}, {}, {}, {}, {}, [(30, later)], 0.0, 0.0)
    assert adaptive.averaged(outcome, 40) == pytest.approx({**begun, "t2i": 0.75 * 0.5 + 0.25 * 0.25, "other": 0.75 * 0.1 + 0.25 * 0.35})


class _Recorded(Outcomes):
    """Outcomes that nobody had to wait for: every arm ends with the loss 0.1 on held-out rows, and adaptive shares moved once."""

    def of(self, arm: Arm) -> Outcome:
        self.asked.append(arm)
        return Outcome(arm.key, arm.name, arm.seed, {}, {}, {}, dict.fromkeys(shapes.TASKS, 0.1), {}, [(200, {**adaptive.BEGINS, "t2i": 0.4, "other": 0.2})], 0.0, 0.0)

    asked: list[Arm]


def test_each_arm_asks_for_its_own_mix(tmp_path: Path) -> None:
    outcomes = _Recorded(World(tmp_path, Scale(steps=400)))
    outcomes.asked = []
    list(adaptive.compared(outcomes, 2, adaptive.ARMS))
    mixes = {(arm.name, arm.seed): arm.plan["stages"][0]["mix"] for arm in outcomes.asked}
    assert {name for name, seed in mixes if seed == 1000} == {f"{task} alone" for task in shapes.TASKS}
    assert mixes["edit alone", 1000] == {"edit": 1}
    assert mixes["balance", 1] == {"adaptive": dict(adaptive.PLAN), "follows": "balance", "targets": dict.fromkeys(shapes.TASKS, 0.1)}
    assert mixes["averaged", 0] == pytest.approx({**adaptive.BEGINS, "t2i": 0.45, "other": 0.15})
    assert mixes["uniform", 0] == mixes["uniform adaptive", 0]["adaptive"] == dict.fromkeys(shapes.TASKS, 1)
    assert mixes["placebo", 0] == mixes["adaptive", 0] == {"adaptive": dict(adaptive.PLAN)}
    assert [arm.name for arm in outcomes.asked if arm.given] == ["placebo", "placebo"]
    for number, arm in enumerate(outcomes.asked):
        assert read_plan(write_plan(tmp_path / f"{number}.yaml", arm.plan), ()).plan.seed == arm.seed


def test_arms_of_one_comparison_make_as_many_images_and_a_short_one_as_many_tokens(tmp_path: Path) -> None:
    world = World(tmp_path, Scale(steps=400))
    for arm in staging.ARMS:
        plan = staging.plan_of_arm(world, arm, 0)
        assert sum(stage["steps"] for stage in plan["stages"]) == (292 if arm == "three rates short" else 400), arm
        assert {stage["batch"]["images"] for stage in plan["stages"]} == {16}, arm
        assert plan["stages"][-1]["lr"]["schedule"] == "cosine", arm


def test_mixed_arms_lack_the_order_alone_and_arms_of_rates_the_rest_too(tmp_path: Path) -> None:
    world = World(tmp_path, Scale(steps=300))
    for arm, *others in (("two phases", "two phases mixed", "two rates"), ("low to high", "low to high mixed", "three rates")):
        staged = staging.stages_of(world, arm)
        for other in others:
            assert [{**stage, "mix": 0, "resolution": 0} for stage in staged] == [{**stage, "mix": 0, "resolution": 0} for stage in staging.stages_of(world, other)]
    assert [(stage["mix"], stage["resolution"]) for stage in staging.stages_of(world, "two rates")] == [(dict(adaptive.PLAN), 16)] * 2
    assert [(stage["mix"], stage["resolution"]) for stage in staging.stages_of(world, "three rates")] == [(dict(adaptive.PLAN), 16)] * 3
    shares = [stage["mix"] for stage in staging.stages_of(world, "two phases mixed")]
    assert shares[0] == shares[1] == pytest.approx({"t2i": (1 / 3 + 2 * 0.5) / 3, "subject": (1 / 6 + 2 * 0.2) / 3, **dict.fromkeys(("control", "edit", "other"), (1 / 6 + 2 * 0.1) / 3)}, abs=1e-6)


def test_an_arm_is_known_by_its_plan_and_what_it_is_given(tmp_path: Path) -> None:
    worlds = [World(tmp_path / name, TINY) for name in ("one", "two")]
    plans = [adaptive.learns(world, name, 3, {"t2i": 1}) for world, name in zip(worlds, ("this", "that"), strict=True)]
    assert Arm("this", 3, plans[0]).key == Arm("that", 3, plans[1]).key
    others = [Arm("this", 4, adaptive.learns(worlds[0], "this", 4, {"t2i": 1})), Arm("this", 3, plans[0], {2: {"t2i": Fraction(1)}}), Arm("this", 3, adaptive.learns(worlds[0], "this", 3, {"edit": 1}))]
    assert len({Arm("this", 3, plans[0]).key, *(arm.key for arm in others)}) == 4


# --- whole comparisons -------------------------------------------------------------------------------------------------------------------


def _in_a_process(folder: Path, name: str, main: Callable[..., int], *options: str) -> str:
    """What a comparison prints in miniature, in a forked process, for accelerate's state is a process's own."""
    said = folder / f"{name}.txt"

    def run() -> None:
        with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main(["--seeds", "1", "--world", str(folder / "world"), *options], TINY)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Both comparisons on one world: its folder, and what they printed."""
    folder = tmp_path_factory.mktemp("shapes")
    first = _in_a_process(folder, "adaptive", adaptive.main, "--arms", "fixed", "adaptive", "placebo")
    return folder, first, _in_a_process(folder, "staging", staging.main, "--arms", "one stage", "low to high mixed", "adaptive")


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "world" / "outcomes.jsonl").read_text().splitlines()]


def test_comparisons_print_every_arm_in_every_table_twice(compared: tuple[Path, str, str]) -> None:
    for text, against, arms in ((compared[1], "fixed", ("adaptive", "placebo")), (compared[2], "one stage", ("low to high mixed", "adaptive"))):
        assert "| difference | weighted loss | mean loss | worst loss | weighted right, points |" in text
        assert all(len(re.findall(rf"^\| {arm}(?: - {against})? \|", text, re.MULTILINE)) >= 5 for arm in arms)
        assert text.count("real pictures") == 2


def test_an_arm_that_is_done_is_not_carried_out_again(compared: tuple[Path, str, str]) -> None:
    found = outcomes(compared[0])
    assert [outcome["arm"] for outcome in found] == ["fixed", "adaptive", "placebo", "low to high mixed"]  # 'one stage' is 'fixed'
    before = (compared[0] / "world" / "outcomes.jsonl").read_bytes()
    again = _in_a_process(compared[0], "again", staging.main, "--arms", "one stage", "low to high mixed", "adaptive")
    assert (compared[0] / "world" / "outcomes.jsonl").read_bytes() == before
    assert again == compared[2]


def test_placebo_draws_by_the_shares_that_it_is_given(compared: tuple[Path, str, str]) -> None:
    found = {outcome["arm"]: outcome for outcome in outcomes(compared[0])}
    given = of_other_sources([(step, shares) for step, shares in found["adaptive"]["changes"]], adaptive.BEGINS, 0)
    assert given
    assert [(step, shares) for step, shares in found["placebo"]["changes"]] == [(step, pytest.approx({name: float(share) for name, share in shares.items()})) for step, shares in given.items()]
    assert all(sum(outcome["images"].values()) == TINY.steps * TINY.images for outcome in found.values())


def test_a_world_of_another_size_is_refused(compared: tuple[Path, str, str]) -> None:
    with pytest.raises(SystemExit, match="holds a world of another size"):
        adaptive.main(["--world", str(compared[0] / "world")])
    assert Outcomes(World(compared[0] / "world", TINY)).known()

"""Shares that follow held-out losses: the rules, the order that they change, and whole runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixing import order as order_module
from mixing.adaptive import Decision, Following, Rule, Seen, exact, follow, projected
from mixing.order import Budget, Cell, Order
from runs import adapter_bytes, carry_out, copy_run, events, make_world, plan_of, traced, write_plan
from stages.check import check_plan
from stages.reader import read_plan

BEGINS = {"a": 0.5, "b": 0.2, "c": 0.1, "d": 0.2}


def seen(step: int, losses: Mapping[str, float], images: Mapping[str, int] | None = None, noise: float = 0.0) -> Seen:
    """An evaluation of eight rows a source. noise: what every other row is off by, another sign at each evaluation."""
    rows = {name: {f"{row}": loss + (noise if (row + step // 10) % 2 else -noise) for row in range(8)} for name, loss in losses.items()}
    return Seen(step, rows, images or {name: round(step * share * 10) for name, share in BEGINS.items()})


def led(rule: Rule, *losses: Mapping[str, float], noise: float = 0.0, epochs: Mapping[str, float] | None = None) -> list[Decision]:
    """The decisions after evaluations with these losses."""
    following, decisions = Following(dict(rule.begins)), []
    for number, each in enumerate(losses, 1):
        decision = follow(rule, following, seen(10 * number, each, noise=noise), warming=False, epochs=epochs or {})
        decisions.append(decision)
        following = decision.following
    return decisions


def test_what_gets_better_by_being_drawn_gets_more_and_stays_inside_its_band() -> None:
    falling = [{**dict.fromkeys(BEGINS, 0.5), "b": 0.5 - 0.05 * number} for number in range(12)]
    decisions = led(Rule(BEGINS), *falling)
    assert [decision.changed for decision in decisions[:3]] == [False] * 3, "there is nothing to look back to"
    assert decisions[3].changed
    shares = decisions[-1].following.shares
    assert shares["b"] == pytest.approx(0.4), "its ceiling: twice the plan's"
    assert "b" in decisions[-1].at_limit
    assert all(0.5 * share - 1e-9 <= shares[name] <= 2 * share + 1e-9 for name, share in BEGINS.items())


def test_no_share_moves_further_than_the_plan_lets_it_at_once() -> None:
    falling = [{**dict.fromkeys(BEGINS, 0.5), "c": 0.5 - 0.05 * number} for number in range(10)]
    decisions = led(Rule(BEGINS, change=1.1), *falling)
    for before, after in pairwise(decisions):
        assert all(1 / 1.1 - 1e-9 <= after.following.shares[name] / before.following.shares[name] <= 1.1 + 1e-9 for name in BEGINS)


def test_changes_within_twice_their_standard_error_move_nothing() -> None:
    decisions = led(Rule(BEGINS), *[{name: 0.5 - 0.001 * number for name in BEGINS} for number in range(6)], noise=0.1)
    assert not any(decision.changed for decision in decisions)
    assert decisions[-1].why == "no loss changed by twice its standard error"


def test_source_that_got_worse_by_less_than_the_tolerance_gets_no_more_and_by_more_it_does() -> None:
    def of(rise: float, **other: float) -> float:
        losses = [{**dict.fromkeys(BEGINS, 0.5), "a": 0.5 - 0.001 * number, "d": 0.5 + rise * number / 5} for number in range(6)]
        return led(Rule(BEGINS), *losses, epochs=other)[-1].following.shares["d"]

    assert of(0.045) < 0.2
    assert of(0.2) > 0.2
    assert of(0.2, d=11.0) < 0.2, "after ten epochs a loss that rises is overfitting"


def test_constant_added_to_one_loss_changes_nothing_and_names_do_not_matter() -> None:
    draw = random.Random(1)
    losses = [{name: 1.0 - 0.02 * number * (place + 1) + 0.001 * draw.random() for place, name in enumerate(BEGINS)} for number in range(8)]
    plain = led(Rule(BEGINS), *losses)[-1].following.shares
    higher = led(Rule(BEGINS), *[{**each, "c": each["c"] + 3} for each in losses])[-1].following.shares
    assert higher == pytest.approx(plain, abs=1e-9)
    turned = {"a": "d", "b": "c", "c": "b", "d": "a"}
    renamed = Rule({turned[name]: share for name, share in BEGINS.items()})
    following = Following(dict(renamed.begins))
    for number, each in enumerate(losses, 1):
        images = {turned[name]: round(10 * number * share * 10) for name, share in BEGINS.items()}
        following = follow(renamed, following, seen(10 * number, {turned[name]: loss for name, loss in each.items()}, images), warming=False, epochs={}).following
    assert {turned[name]: share for name, share in following.shares.items()} == pytest.approx(plain, abs=1e-9)


def test_while_the_rate_rises_nothing_is_looked_at() -> None:
    rule, following = Rule(BEGINS, lookback=1), Following(dict(BEGINS))
    decision = follow(rule, following, seen(10, dict.fromkeys(BEGINS, 9.0)), warming=True, epochs={})
    assert (decision.changed, decision.following.seen) == (False, ())


def test_balance_gives_more_to_what_is_further_above_its_target() -> None:
    rule = Rule(BEGINS, follows="balance", targets=dict.fromkeys(BEGINS, 0.4))
    shares = led(rule, *[{**dict.fromkeys(BEGINS, 0.4), "c": 0.8}] * 30)[-1].following.shares
    assert shares["c"] == pytest.approx(0.2)
    assert sum(shares.values()) == pytest.approx(1)
    same = led(rule, *[dict.fromkeys(BEGINS, 0.3)] * 3)[-1]
    assert not same.changed


def test_what_is_remembered_goes_through_json_to_the_bit() -> None:
    draw = random.Random(2)
    losses = [{name: draw.random() - 0.1 * number for name in BEGINS} for number in range(6)]
    following = led(Rule(BEGINS), *losses)[-1].following
    again = Following.of_state(json.loads(json.dumps(following.state())))
    assert again.state() == following.state()
    late = seen(99, dict.fromkeys(BEGINS, -1.0))
    assert follow(Rule(BEGINS), again, late, warming=False, epochs={}) == follow(Rule(BEGINS), following, late, warming=False, epochs={})


def test_shares_are_whole_ten_thousandths_and_projections_stay_inside_their_limits() -> None:
    draw = random.Random(3)
    for _ in range(300):
        names = [str(number) for number in range(draw.randint(2, 40))]
        begins = {name: draw.random() + 1e-6 for name in names}
        begins = {name: share / sum(begins.values()) for name, share in begins.items()}
        limits = Rule(begins, band=draw.choice([1.2, 2, 5])).limits()
        shares = projected({name: share * math.exp(draw.uniform(-5, 5)) for name, share in begins.items()}, limits)
        assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
        assert all(low - 1e-9 <= shares[name] <= high + 1e-9 for name, (low, high) in limits.items())
        whole = exact(shares)
        assert sum(whole.values()) == 1
        assert all(share > 0 and (share * 10_000).denominator == 1 for share in whole.values())
        assert all(abs(whole[name] - shares[name]) <= Fraction(2, 10_000) for name in names)


def test_change_of_shares_moves_nothing_that_was_drawn_before_and_keeps_what_is_asked() -> None:
    draw = random.Random(4)
    for trial in range(12):
        names = [f"s{number}" for number in range(draw.randint(2, 5))]
        micro, steps, every = draw.choice([1, 2, 4]), 60, 10
        begins = {name: draw.uniform(0.1, 1) for name in names}
        signatures = {name: draw.randrange(3) for name in names}

        def weights(shares: Mapping[str, float], names: list[str] = names) -> list[Fraction]:
            return list(exact({name: shares[name] / math.fsum(shares.values()) for name in names}).values())

        cells = [Cell(name, "rows", f"{signatures[name]}", 50, weight, micro, 16 * (signatures[name] + 1)) for name, weight in zip(names, weights(begins), strict=True)]
        budget = Budget("images", 4 * micro, 4 * micro, steps) if trial % 2 else Budget("tokens", 256 * micro, 256 * micro, steps)
        segments = [(step, weights(begins)) for step in range(0, steps, every)]
        shares = dict(begins)
        for border in range(every, steps, every):
            before = Order(1, "stage", cells, budget, segments, grows=True)
            shares = {name: min(2 * begins[name], max(begins[name] / 2, share * draw.uniform(0.8, 1.25))) for name, share in shares.items()}
            segments = [(step, own if step < border else weights(shares)) for step, own in segments]
            after = Order(1, "stage", cells, budget, segments, grows=True)
            old, new = before.steps(0, border), after.steps(0, border)
            assert all(np.array_equal(getattr(old, part), getattr(new, part)) for part in ("starts", "micro", "cell", "draw"))
            whole, changed = after.steps(0, steps), before.changed(border, weights(shares)).steps(0, steps)
            assert all(np.array_equal(getattr(whole, part), getattr(changed, part)) for part in ("starts", "micro", "cell", "draw"))
        counts = after.counts(np.arange(steps + 1))
        for step in range(1, steps + 1):
            asked, total = after.asked(step), counts[step].sum()
            assert all(abs(counts[step][place] - asked[name] * total) <= after.off[name] for place, name in enumerate(names))


def test_change_of_shares_lays_out_what_comes_next_and_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = []
    quotas = order_module._Trees.quotas
    monkeypatch.setattr(order_module._Trees, "quotas", lambda trees, weights: laid_out.append(weights) or quotas(trees, weights))
    cells = [Cell(name, "rows", "0", 50, Fraction(1, 2), 2, 16) for name in ("a", "b")]
    order = Order(1, "stage", cells, Budget("images", 8, 8, 10_000), [(step, [Fraction(1), Fraction(1)]) for step in range(0, 10_000, 2)], grows=True)
    for step in range(2, 200, 2):
        order.steps(step - 2, 2)
        order = order.changed(step, [Fraction(step), Fraction(1)])
        order.asked(step + 2)
    assert len(laid_out) == 100


# --- whole runs --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def adaptive(world: Path, **mix: Any) -> dict[str, Any]:
    """One stage that follows evaluations after each second step, and one after it."""
    plan = plan_of(world)
    stage = {**plan["stages"][2], "mix": {"adaptive": {"photos": 3, "edits": 1}, "lookback": 1, **mix}, "steps": 9, "ema": None, "lr": 0.05, "name": "follow"}
    del stage["ema"]
    plan["stages"] = [stage, {**stage, "name": "after", "mix": "natural", "steps": 2}]
    plan["evaluate"] = {"rows": 4, "every": 2}
    return {**plan, "save_every": 3}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    carry_out(folder, adaptive(world), "--trace")
    return folder


def test_run_draws_by_the_shares_that_its_evaluations_led_to(whole: Path) -> None:
    decisions = events(whole, "shares")
    assert [each["step"] for each in decisions] == [2, 4, 6, 8]
    changed = [each for each in decisions if each["changed"]]
    assert changed, "a rate of 0.05 moves these losses by more than their errors"
    assert "shares from here on: " in whole.with_suffix(".log").read_text()
    page = json.loads((whole / "ledger.json").read_text())["stages"][0]
    drawn = [row["source"] for row in traced(whole) if row["stage"] == "follow"]
    borders = [0, *(each["step"] for each in changed), 9]
    shares = [0.75, *(each["shares"]["photos"] for each in changed)]
    asked = sum(share * (end - begin) for share, (begin, end) in zip(shares, pairwise(borders), strict=True)) / 9
    assert page["sources"]["photos"]["asked"] == pytest.approx(asked, abs=2e-4)
    assert abs(drawn.count("photos") - asked * len(drawn)) <= 3
    assert asked != pytest.approx(0.75, abs=1e-3)
    report = (whole / "report.html").read_text()
    assert f"moved at {len(changed)} of 4 evaluations" in report
    assert "photos: 75.0 % to " in report


def test_run_killed_between_changes_of_shares_ends_byte_for_byte_as_the_uninterrupted_one(world: Path, whole: Path, tmp_path: Path) -> None:
    record = tmp_path / "events"
    carry_out(tmp_path / "counted", adaptive(world), "--trace", record=record)
    number = int(record.read_text())
    for place in (0.4, 0.6):
        folder = tmp_path / f"killed-{place}"
        carry_out(folder, adaptive(world), "--trace", kill_at=int(place * number))
        carry_out(folder, adaptive(world), "--trace")
        assert traced(folder) == traced(whole)
        assert adapter_bytes(folder) == adapter_bytes(whole)


def test_two_processes_draw_the_same_rows(world: Path, whole: Path, tmp_path: Path) -> None:
    carry_out(tmp_path / "two", adaptive(world), "--trace", processes=2)
    assert traced(tmp_path / "two") == traced(whole)


def test_run_is_not_gone_on_with_after_another_rhythm_of_evaluations(world: Path, whole: Path, tmp_path: Path) -> None:
    folder = copy_run(whole, tmp_path / "run")
    plan = adaptive(world)
    plan["evaluate"]["every"] = 3
    assert "evaluate.every" in carry_out(folder, plan, expect=2)


@pytest.mark.parametrize(
    ("mix", "evaluate", "message"),
    [
        ({}, {"rows": 4}, "evaluate.every is not given; set it"),
        ({}, {"rows": 4, "every": 9}, "evaluate.every is 9, and the stage has 9 steps"),
        ({"lookback": 4}, {"rows": 4, "every": 2}, "4 evaluations stand inside the stage, and `lookback: 4` needs 5"),
        ({}, {"rows": 0, "every": 2}, "evaluate.rows is 0; hold rows out"),
        ({"band": 1}, {"rows": 4, "every": 2}, "band: 1 lets no share move"),
        ({"follows": "balance"}, {"rows": 4, "every": 2}, "targets has none for edits, photos"),
        ({"follows": "balance", "targets": {"photos": 0.1, "edits": 0.1, "more": 0.1}}, {"rows": 4, "every": 2}, "this mix draws no source 'more'"),
        ({"targets": {"photos": 0.1}}, {"rows": 4, "every": 2}, "only `follows: balance` compares with targets"),
        ({"adaptive": {"photos": 1, "edit": 1}}, {"rows": 4, "every": 2}, "no source 'edit' (sources: edits, photos); did you mean 'edits'?"),
    ],
)
def test_adaptive_mix_that_could_not_follow_is_refused(world: Path, tmp_path: Path, mix: dict[str, Any], evaluate: dict[str, int], message: str) -> None:
    plan = adaptive(world, **mix)
    plan["evaluate"] = evaluate
    problems = check_plan(read_plan(write_plan(tmp_path / "plan.yaml", plan)), tmp_path)
    assert any(message in str(problem) for problem in problems), problems

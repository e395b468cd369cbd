"""Plans that nobody would write: read or refused in words, quickly and in little memory. `python -m faults.plans --whole` does ten thousand of them."""

from __future__ import annotations

import os
import random as randomness
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults.plan_cases import Drawing, mended
from faults.plan_tricks import BASE
from faults.plans import SOUND, Checked, check_all, explained, make_world, typed
from stages.check import check_plan
from stages.placed import placed_adapters
from stages.problems import PlanError
from stages.reader import read_plan, to_yaml
from stages.resolved import resolved_plan
from stages.yaml_text import to_text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def there(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def lost(checked: Sequence[Checked]) -> list[str]:
    return [f"case {each.number}: {each.lost}" for each in checked if each.lost]


def problems_of(text: str | bytes, *flags: str) -> list[str]:
    """What reading and checking say, without places."""
    plan = Path("plan.yaml")
    plan.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        found = check_plan(read_plan(plan, flags), Path.cwd())
    except PlanError as error:
        found = list(error.problems)
    return [": ".join(filter(None, (problem.where, problem.message))) for problem in found]


def test_broken_plans_end_with_0_or_2_in_two_seconds_and_a_gigabyte(world: Path) -> None:
    assert lost(check_all(range(100), world)) == []


def test_sound_plans_with_many_fields_are_written_out_read_back_and_put_into_words(world: Path) -> None:
    checked = check_all(range(SOUND, SOUND + 30), world)
    assert lost(checked) == []
    assert sum(each.exit_code == 0 for each in checked) > 15


def test_what_check_calls_sound_explain_can_tell(world: Path) -> None:
    told = explained(range(SOUND, SOUND + 8), world)
    assert lost(told) == []
    assert len(told) >= 4


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.sampled_from((0.0, 0.05)), st.sampled_from((0.02, 0.2)))
def test_nothing_made_from_the_schema_makes_reading_or_checking_raise_anything_but_a_plan_error(world: Path, random: randomness.Random, odd: float, optional: float) -> None:
    plan = Drawing(random, odd, optional).plan()
    before = Path.cwd()
    os.chdir(world)
    try:
        problems_of(to_text(plan) if isinstance(plan, dict) else repr(plan))
    finally:
        os.chdir(before)


@pytest.mark.launch
def test_the_command_as_it_is_typed_ends_with_0_or_2(world: Path) -> None:
    assert lost([typed(number, world) for number in (0, 2, 25, 106)]) == []


# --- what the cases found ---------------------------------------------------------------------------------------------------------------


def test_a_plan_has_at_most_200_stages_and_500_sources(there: Path) -> None:
    stage = "  - {{name: s{0}, steps: 10, resolution: 16, batch: 4, lr: 1e-4}}\n"
    many = BASE.partition("  - {")[0] + "".join(stage.format(number) for number in range(201))
    assert problems_of(many) == ["stages: 201 values are given; at most 200"]
    sources = "".join(f"  s{number}: {{path: data/photos}}\n" for number in range(501))
    assert problems_of(BASE.replace("  photos: {path: data/photos}\n", sources)) == ["sources: 501 names are given; at most 500"]


def test_the_largest_plan_is_sound_and_what_is_written_of_it_is_read_back(there: Path) -> None:
    """Every default written out it is larger than what a person may write."""
    stage = "  - {{name: s{0}, steps: 10, resolution: 16, batch: 4, lr: 1e-4, mix: {{{1}}}}}\n"
    sources = "".join(f"  s{number}: {{path: data/photos}}\n" for number in range(60))
    mix = ", ".join(f"s{number}: 1" for number in range(60))
    text = BASE.replace("  photos: {path: data/photos}\n", sources).partition("  - {")[0] + "".join(stage.format(number, mix) for number in range(200))
    assert problems_of(text) == []
    plan = resolved_plan(read_plan(Path("plan.yaml")).plan)
    written = there / "written.yaml"
    written.write_text(to_yaml(plan))
    with pytest.raises(PlanError, match=r"is larger than 128 KiB"):
        read_plan(written)
    assert read_plan(written, written_out=True).plan == plan


def test_two_hundred_adapters_in_a_stack_are_counted_quickly(there: Path) -> None:
    stages = "".join(f"  - {{name: s{number}, steps: 10, resolution: 16, batch: 4, lr: 1e-4{', handoff: {adapter: stack}' if number else ''}}}\n" for number in range(200))
    assert problems_of(BASE.partition("  - {")[0] + stages) == []
    placed = placed_adapters(read_plan(Path("plan.yaml")).plan, 199)
    assert len(placed) == 200
    assert [each.frozen for each in placed.values()] == [True] * 199 + [False]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("data/pipe.jsonl", "'data/pipe.jsonl' is neither a file nor a folder"),
        ("/dev/zero", "'/dev/zero' is neither a file nor a folder"),
        ("{,}" * 30 + "data/rows.parquet", "'" + "{,}" * 25 + "{,...': its braces name 1,073,741,824 files; at most 1,000,000 are read"),
        ("data/{0..999999}{0..1}.tar", "'data/{0..999999}{0..1}.tar': its braces name 2,000,000 files; at most 1,000,000 are read"),
        ("data/{3..1}.tar", "{3..1}: a range rises, over at most 1,000,000 numbers"),
        ("data/{rows,more}.parquet", "no file 'data/more.parquet', which 'data/{rows,more}.parquet' names"),
        ("data/**/none-*.parquet", "'data/**/none-*.parquet' matches no file"),
        ("a/" * 2100, "'" + "a/" * 38 + "a...' has 4,200 characters; at most 4,096"),
    ],
)
def test_paths_that_lead_nowhere_or_everywhere_are_told_so(there: Path, path: str, said: str) -> None:
    assert problems_of(BASE.replace("data/photos", f'"{path}"')) == [f"sources.photos.path: {said}"]


@pytest.mark.parametrize("path", ["data/*.parquet", "data/r?ws.parquet", "**/rows.parquet", "data/**/*.parquet", "dat*/rows.parquet", "{data,data}/rows.parquet", "./data/[r]ows.parquet"])
def test_patterns_find_what_they_name(there: Path, path: str) -> None:
    assert problems_of(BASE.replace("data/photos", f'"{path}"')) == []


def test_a_warm_up_that_there_is_not_has_nowhere_to_begin(there: Path) -> None:
    short = BASE.replace("lr: 1e-4", "lr: {peak: 1e-4, warmup_from: 1e-5}")
    assert problems_of(short) == ["stages[0].lr.warmup_from: in a stage of fewer than 20 steps, without `warmup`, there is no warm-up to begin from; remove it, or give warmup"]
    assert problems_of(short.replace("steps: 10", "steps: 20")) == []
    assert problems_of(short.replace("warmup_from", "warmup: 3, warmup_from")) == []


def test_a_setting_of_two_thousand_parts_is_refused(there: Path) -> None:
    flag = "stages." * 2000 + "x=1"
    assert problems_of(BASE, flag) == ["the path has 2,001 parts; at most 50 are read"]


def test_of_many_problems_the_first_500_are_looked_for(there: Path) -> None:
    text = BASE + "".join(f"stap{number}: 1\n" for number in range(9_000))
    assert len(problems_of(text)) == 500


def test_a_full_plan_written_out_has_no_adapter_that_nobody_trains(there: Path) -> None:
    problems_of(BASE.replace("lr: 1e-4", "lr: 1e-4, train: full"))
    plan = resolved_plan(read_plan(Path("plan.yaml")).plan)
    Path("again.yaml").write_text(to_yaml(plan))
    assert read_plan(Path("again.yaml")).plan == plan


def test_a_case_follows_from_its_number() -> None:
    found = [mended(SOUND, lambda content: []) for _ in range(2)]
    assert found[0] is not None
    assert found[0] == found[1]


def test_merge_before_which_no_adapter_of_the_experts_stands_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in an IndexError: an adapter whose expert no stage trains stands on neither."""
    monkeypatch.chdir(tmp_path)
    stage = "steps: 20, resolution: 16, batch: 4, lr: 1e-4"
    Path("plan.yaml").write_text(
        "model: some/model\nadapters: {a: {}, b: {}}\nsources:\n  photos: {path: hub/a/b}\nstages:\n"
        f"  - {{name: one, expert: low, {stage}, train: ['.*']}}\n  - {{name: two, {stage}, train: ['.*'], handoff: {{adapter: merge}}}}\n"
    )
    with pytest.raises(PlanError) as found:
        raise PlanError(check_plan(read_plan(Path("plan.yaml")), tmp_path))
    assert "'merge', and none of the plan's `adapters` is one of" in str(found.value)

"""Comparing runs: differences are paired, what is not paired is refused, and what is said is what was compared."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import Told, losses, run_folder

from runs import carry_out, make_world, plan_of
from stages.compare import Comparison, compare, main
from stages.evaluations import MOST_BETWEEN, rows_file, thin_out
from stages.problems import PlanError


def one_stage(folder: Path, level: float, *, salt: int = 0, seed: int = 0, **asked: object) -> Path:
    """A run of one stage whose two sources end around a level."""
    end = {"photos": losses(level, salt=salt), "edits": losses(0.5, salt=salt)}
    return run_folder(folder, [Told("learn", {None: {"photos": losses(1.0), "edits": losses(1.0)}, 100: end}, mix={"photos": 0.75, "edits": 0.25}, **asked)], seed=seed)  # type: ignore[arg-type]


def printed(found: Comparison, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


def test_differences_are_paired_row_by_row_with_their_standard_error(tmp_path: Path) -> None:
    a, b = one_stage(tmp_path / "a", 0.4), one_stage(tmp_path / "b", 0.38, salt=1)
    found = compare(a, b)
    changes = [new - old for old, new in zip(losses(0.4).values(), losses(0.38, salt=1).values(), strict=True)]
    photos = found.sources["photos"]
    assert photos.change is not None
    assert photos.change.value == pytest.approx(statistics.fmean(changes))
    assert photos.change.error == pytest.approx(statistics.stdev(changes) / math.sqrt(len(changes)))
    assert photos.a == pytest.approx(statistics.fmean(losses(0.4).values()))
    assert (photos.verdict, photos.counted, photos.lower) == ("better", 40, sum(change < 0 for change in changes))
    assert found.sources["edits"].verdict == ""
    both = [each.change for each in found.sources.values() if each.change]
    assert found.mean.change is not None
    assert found.mean.change.value == pytest.approx(statistics.fmean(change.value for change in both))
    assert found.mean.change.error == pytest.approx(math.hypot(*(change.error for change in both)) / 2)


def test_rows_that_one_run_alone_measured_are_left_out_and_counted(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", [Told("learn", {100: {"photos": losses(0.4, rows=40)}})])
    b = run_folder(tmp_path / "b", [Told("learn", {100: {"photos": losses(0.4, rows=40, first=10)}})])
    found = compare(a, b)
    assert found.sources["photos"].counted == 30
    assert found.notes == ("source 'photos': 30 held-out rows are compared; of A's 40 and B's 40 the others are in one run alone",)


def test_rows_at_other_noise_levels_are_not_subtracted(tmp_path: Path) -> None:
    levels = {"photos": {str(row): 0.5 + 0.001 * row + (0.1 if row < 4 else 0) for row in range(40)}}
    a = run_folder(tmp_path / "a", [Told("learn", {100: {"photos": losses(0.4)}})])
    b = run_folder(tmp_path / "b", [Told("learn", {100: {"photos": losses(0.4)}})], t=levels)
    found = compare(a, b)
    assert found.sources["photos"].counted == 36
    assert "4 at another noise level" in found.notes[0]
    c = run_folder(tmp_path / "c", [Told("learn", {100: {"photos": losses(0.4)}})], t={"photos": dict.fromkeys(losses(0.4), 0.1)})
    with pytest.raises(PlanError, match=r"no held-out row was measured at the same noise level in both runs"):
        compare(a, c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"the runs have other seeds \(0 and 1\).*nothing is paired.*--set seed=0 --out"),
        ({"fingerprint": "n"}, r"its model is not that of .*; compare runs that began with the same model"),
        ({"version": "1"}, r"measured in another way .*carry one of them out again"),
    ],
)
def test_what_is_not_paired_is_refused_with_a_cure(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    end = {100: {"photos": losses(0.4)}}
    a = run_folder(tmp_path / "a", [Told("learn", end)])
    b = run_folder(tmp_path / "b", [Told("learn", end)], **changes)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message) as refused:
        compare(a, b)
    assert str(refused.value).startswith(f"{b}: ")


def test_another_resolution_is_refused_and_the_stage_that_is_alike_is_named(tmp_path: Path) -> None:
    first = Told("low", {100: {"photos": losses(0.4)}})
    a = run_folder(tmp_path / "a", [first, Told("high", {100: {"photos": losses(0.4)}}, asks={"resolution": 128})])
    b = run_folder(tmp_path / "b", [first, Told("high", {100: {"photos": losses(0.4)}}, asks={"resolution": 256})])
    with pytest.raises(PlanError, match=r"resolution 256 at the end of stage 'high' \(step 100\), and 128 at .*; write --stage low, where they are"):
        compare(a, b)
    assert compare(a, b, "low").pairs[0].a.evaluation.stage == "low"
    c = run_folder(tmp_path / "c", [Told("other", {100: {"photos": losses(0.4)}}, asks={"pyramid": {"levels": 2}, "resolution": 128})])
    with pytest.raises(PlanError, match=r"pyramid 2 levels, gamma .*, and none at .*no stage of the same name was measured alike"):
        compare(a, c)


def test_two_revisions_of_one_repository_are_compared_and_another_repository_is_not(tmp_path: Path) -> None:
    end = [Told("learn", {100: {"photos": losses(0.4)}})]
    a, b, c = (run_folder(tmp_path / name, end, fingerprint=fingerprint) for name, fingerprint in (("a", "org/model@main"), ("b", "org/model@3de6"), ("c", "org/other@main")))
    assert compare(a, b).sources["photos"].change is not None
    with pytest.raises(PlanError, match="its model is not that of"):
        compare(a, c)


def test_ends_of_finished_runs_are_compared_whatever_their_stages_are_called(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", [Told("one", {50: {"photos": losses(0.5)}, 100: {"photos": losses(0.4)}})])
    b = run_folder(tmp_path / "b", [Told("first", {100: {"photos": losses(0.5)}}), Told("second", {60: {"photos": losses(0.3)}}, steps=60)])
    pair = compare(a, b).pairs[0]
    assert [(side.evaluation.stage, side.evaluation.step) for side in (pair.a, pair.b)] == [("one", 100), ("second", 60)]


def test_of_a_run_under_way_the_last_common_point_is_compared(tmp_path: Path) -> None:
    def stages(until: int) -> list[Told]:
        refine = {step: {"photos": losses(0.3)} for step in (None, 20, 40, 60, 100) if (step or 0) <= until}
        return [Told("expose", {100: {"photos": losses(0.5)}}), Told("refine", refine, ended=until == 100)]

    whole, half = run_folder(tmp_path / "whole", stages(100)), run_folder(tmp_path / "half", stages(40))
    begun = run_folder(tmp_path / "begun", stages(0))
    for other, place in ((half, ("refine", 40)), (begun, ("expose", 100))):
        pair = compare(whole, other).pairs[0]
        assert [(side.evaluation.stage, side.evaluation.step) for side in (pair.a, pair.b)] == [place, place]
    assert "a part of stage 'refine' (step 40)" in " ".join(printed(compare(whole, half)).split())
    pair = compare(whole, half, "refine").pairs[0]
    assert [side.evaluation.step for side in (pair.a, pair.b)] == [40, 40]
    with pytest.raises(PlanError, match=r"begun has measured nothing in a stage 'refine' \(it has in: expose\)"):
        compare(whole, begun, "refine")


def test_of_a_long_stage_rows_of_at_most_a_hundred_evaluations_and_the_newest_stay_and_all_of_its_ends(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations"
    folder.mkdir()
    others = ["1-long-start.json", "1-long-step-002000.json", "2-long-step-000021.json", "size.json"]
    for name in others:
        (folder / name).touch()
    kept: dict[int, set[int]] = {}
    for step in range(10, 2000, 10):
        rows_file(tmp_path, 0, "long", step).touch()
        thin_out(tmp_path, 0, "long", step, 10)
        kept[step] = {int(file.stem[-6:]) for file in folder.glob("1-long-step-*") if file.name not in others}
        assert step in kept[step]
        assert len(kept[step]) <= MOST_BETWEEN + 1
    assert kept[1000] == set(range(10, 1001, 10))
    assert kept[1010] == {*range(20, 1001, 20), 1010}
    assert kept[1990] == {*range(20, 1981, 20), 1990}
    assert {file.name for file in folder.iterdir()} >= set(others)
    assert kept[1010] - kept[1990] == {1010}, "a longer run has what a shorter one has, but for its newest"


def test_where_rows_of_the_last_common_point_are_gone_the_last_that_both_have_kept_is_compared(tmp_path: Path) -> None:
    steps = {step: {"photos": losses(0.5 - step / 1000)} for step in (20, 40, 60)}
    a, b = (run_folder(tmp_path / name, [Told("learn", steps, ended=False)]) for name in ("a", "b"))
    rows_file(b, 0, "learn", 60).unlink()
    assert [side.evaluation.step for side in (compare(a, b).pairs[0].a, compare(a, b).pairs[0].b)] == [40, 40]


def test_rows_of_a_stage_that_was_begun_anew_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    a, b = one_stage(tmp_path / "a", 0.4), one_stage(tmp_path / "b", 0.4)
    rows = b / "evaluations" / "1-learn-step-000100.json"
    rows.write_text(rows.read_text().replace('"photos": {"0": ', '"photos": {"0": 1'))
    with pytest.raises(PlanError, match=r"its rows of source 'photos' are not those of metrics.jsonl"):
        compare(a, b)
    rows.unlink()
    with pytest.raises(PlanError, match=r"1-learn-step-000100.json: the losses of held-out rows are not there"):
        compare(a, b)


def test_arms_are_paired_by_seed_and_their_error_is_that_over_seeds(tmp_path: Path) -> None:
    draw = random.Random(0)
    gains = [draw.gauss(-0.02, 0.002) for _ in range(6)]
    a = [one_stage(tmp_path / f"a{seed}", 0.4 + 0.05 * seed, seed=seed) for seed in range(6)]
    b = [one_stage(tmp_path / f"b{seed}", 0.4 + 0.05 * seed + gain, seed=seed) for seed, gain in enumerate(gains)]
    found = compare(a, list(reversed(b)))
    photos = found.sources["photos"]
    assert photos.change is not None
    assert photos.change.value == pytest.approx(statistics.fmean(gains))
    assert photos.change.error == pytest.approx(statistics.stdev(gains) / math.sqrt(6))
    assert (photos.verdict, photos.counted, photos.lower) == ("better", 6, 6)
    assert found.mean.change is not None
    assert found.mean.change.error == pytest.approx(photos.change.error / 2)
    few = compare(a[:4], b)
    assert few.sources["photos"].verdict == ""
    assert few.notes == ("left out, for the other side has no run of the seed: b4, b5",)
    assert "Of fewer than 5 seeds there is no verdict" in printed(few)
    with pytest.raises(PlanError, match=r"seed 0 is that of .*a0 too"):
        compare([a[0], a[0]], b)


def test_runs_of_an_arm_that_differ_in_more_than_the_seed_are_named(tmp_path: Path) -> None:
    a = [one_stage(tmp_path / f"a{seed}", 0.4, seed=seed, asks={"lr": 1e-3 * (1 + seed)}) for seed in range(2)]
    b = [one_stage(tmp_path / f"b{seed}", 0.4, seed=seed) for seed in range(2)]
    assert compare(a, b).notes == ("the runs of A differ among themselves in more than the seed: stages.learn.lr",)


def test_what_differs_in_the_plans_and_what_each_run_took_is_shown(tmp_path: Path) -> None:
    a = one_stage(tmp_path / "a", 0.4)
    b = one_stage(tmp_path / "b", 0.3, asks={"mix": {"photos": 1, "edits": 3}, "clip": None})
    for run, torch in ((a, "2.12.0"), (b, "2.13.0")):
        (run / "environment.json").write_text(json.dumps({"versions": {"torch": torch, "numpy": "2.0"}}))
    found = compare(a, b)
    assert {(change.field, change.before, change.after) for change in found.plan} == {
        ("stages.learn.mix.photos", "0.75", "1.0"),
        ("stages.learn.mix.edits", "0.25", "3.0"),
        ("stages.learn.clip", "1.0", "null"),
        ("environment.versions.torch", "2.12.0", "2.13.0"),
    }
    cost = found.pairs[0].a.cost
    assert (cost.images, cost.seconds, cost.images_per_second, cost.peak_bytes) == ({"photos": 750, "edits": 250}, 30.0, 20.0, 10_000_000)
    text = printed(found, 200)
    for said in ("the end of stage 'learn' (step 100)", "▼ −0.100", "B lower in rows", "images drawn", "1,000", "10 MB", "stages.learn.clip", "mean of sources"):
        assert said in text
    html = found._repr_html_()
    assert "▼ −0.100" in html
    assert html.count("<table") == 3


def test_command_prints_json_for_machines_and_refuses_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = one_stage(tmp_path / "a", 0.4), one_stage(tmp_path / "b", 0.3)
    assert main([str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"]["photos"]["verdict"] == "better"
    assert found["sources"]["photos"]["difference"] == pytest.approx(-0.1)
    assert found["pairs"][0]["a"]["stage"] == "learn"
    assert main([f"{a}", f"{b}"]) == 0
    capsys.readouterr()
    assert main([str(a), str(tmp_path / "nothing")]) == 2
    assert "nothing: no such folder" in capsys.readouterr().err
    assert main([str(a), str(tmp_path)]) == 2
    assert "no plan.yaml lies in it" in capsys.readouterr().err
    empty = run_folder(tmp_path / "empty", [Told("learn", {None: {"photos": losses(0.4)}}, ended=False)])
    assert main([str(a), str(empty)]) == 2
    assert "nothing was measured in this run after its first step; let it come to the end of a stage" in capsys.readouterr().err
    blind = run_folder(tmp_path / "blind", [Told("learn", {100: {}})], sources={"photos": {"path": "data/photos"}}, evaluate={"rows": 0})
    assert main([str(a), str(blind)]) == 2
    assert "with `evaluate: {rows: 0}` nothing is held out" in capsys.readouterr().err


def test_compare_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    a, b = one_stage(tmp_path / "a", 0.4), one_stage(tmp_path / "b", 0.3)
    code = f"import sys; from stages.compare import main; main([{str(a)!r}, {str(b)!r}]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.launch
def test_two_real_runs_with_another_mix_are_compared_on_all_held_out_rows(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    stage = {"name": "learn", "steps": 3, "resolution": 8, "batch": 8, "lr": 0.01, "precision": "fp32"}
    for name, mix in (("a", {"photos": 1, "edits": 1}), ("b", {"photos": 3, "edits": 1})):
        carry_out(tmp_path / name, plan_of(world, stages=[{**stage, "mix": mix}], evaluate={"rows": 2, "every": 2}, previews={"rows": 0}))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert {name: each.counted for name, each in found.sources.items()} == {"photos": 2, "edits": 2}
    assert found.notes == ()
    assert [change.field for change in found.plan] == ["stages.learn.mix.photos"]
    page = json.loads((tmp_path / "b" / "ledger.json").read_text())["stages"][0]
    assert found.pairs[0].b.cost.images == {name: own["images"] for name, own in page["sources"].items()}
    kept = sorted(file.name for file in (tmp_path / "a" / "evaluations").glob("1-learn-*"))
    assert kept == ["1-learn-start.json", "1-learn-step-000002.json", "1-learn-step-000003.json"]

"""Advice about the next stage's shares: it follows clear differences alone, stays inside its band, and says why and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from run_folders import Told, losses, run_folder

import train
from runs import write_plan
from stages.advise import advise
from stages.plan import Stage
from stages.problems import PlanError
from stages.report import write_report
from stages.report.suggestion import BAND, Advice

EVEN = {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}


def advised(
    folder: Path,
    falls: Mapping[str, float],
    *,
    mix: Mapping[str, float] = EVEN,
    noise: float = 0.01,
    steps: Sequence[int | None] = (None, 20, 50, 100),
    epochs: Mapping[str, float] | None = None,
    more: Sequence[Told] = (),
) -> Advice:
    """The advice after a stage in which the loss of each source fell by so much between the steps 50 and 100, and by ten times that before step 20."""
    at = {None: 11.0, 20: 1.0, 50: 1.0, 100: 0.0}
    evaluations = {step: {name: losses(1 + fall * at[step], noise=noise, salt=10 * number + (step or 0)) for number, (name, fall) in enumerate(falls.items())} for step in steps}
    return advise(run_folder(folder, [Told("learn", evaluations, mix=mix, epochs=epochs or {}), *more]))


def test_what_gains_clearly_more_per_draw_gets_more_and_what_gains_nothing_less(tmp_path: Path) -> None:
    advice = advised(tmp_path / "run", {"a": 0.1, "b": 0.03, "c": 0.03, "d": 0.0})
    words = {each.source: each.word for each in advice.suggestions}
    assert (words["a"], words["d"]) == ("more", "less")
    shares = {each.source: each.suggested for each in advice.suggestions}
    assert shares["a"] > 0.25 > shares["d"]
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert "standard errors" in advice.suggestions[0].why
    assert advice.line.startswith("mix: {a: ")


def test_only_the_later_half_of_the_stage_and_no_warmup_is_looked_at(tmp_path: Path) -> None:
    advice = advised(tmp_path / "run", {"a": 0.1, "b": 0.1})
    assert (advice.first, advice.last) == (50, 100)
    assert advice.suggestions[0].moved is not None
    assert advice.suggestions[0].moved.value == pytest.approx(-0.1, abs=0.01)
    assert advice.suggestions[0].images == 125
    slope = advice.suggestions[0].per_thousand
    assert slope is not None
    assert slope.value == pytest.approx(-0.8, abs=0.08)
    whole = advised(tmp_path / "ends", {"a": 0.1, "b": 0.1}, steps=(None, 100))
    assert (whole.first, whole.last) == (0, 100)
    assert "the first fast fall is in it" in whole.verdict


@pytest.mark.parametrize("falls", [{"a": 0.05, "b": 0.05, "c": 0.05, "d": 0.05}, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}])
def test_shares_are_kept_where_no_source_differs_beyond_its_error(tmp_path: Path, falls: dict[str, float]) -> None:
    advice = advised(tmp_path / "run", falls, noise=0.05)
    assert {each.word for each in advice.suggestions} == {"keep"}
    assert {each.suggested for each in advice.suggestions} == {0.25}
    assert advice.verdict.startswith("The evidence does not suffice to move a share")
    assert advice.line == "mix: {a: 25, b: 25, c: 25, d: 25}"


def test_the_level_of_a_loss_does_not_matter_and_neither_do_names(tmp_path: Path) -> None:
    falls = {"a": 0.1, "b": 0.03, "c": 0.03, "d": 0.0}
    plain = {each.source: each.suggested for each in advised(tmp_path / "plain", falls).suggestions}
    steps = {50: 1.0, 100: 0.0}
    raised = {step: {name: losses(1 + (5.0 if name == "d" else 0.0) + fall * part, salt=10 * number + step) for number, (name, fall) in enumerate(falls.items())} for step, part in steps.items()}
    found = advise(run_folder(tmp_path / "raised", [Told("learn", raised, mix=EVEN)]))
    assert {each.source: each.suggested for each in found.suggestions} == pytest.approx(plain)


def test_no_share_moves_by_more_than_the_band(tmp_path: Path) -> None:
    for number, mix in enumerate(({"a": 0.9, "b": 0.04, "c": 0.03, "d": 0.03}, {"a": 0.01, "b": 0.97, "c": 0.01, "d": 0.01}, EVEN)):
        for falls in ({"a": 5.0, "b": 0.0, "c": 0.0, "d": 0.0}, {"a": 0.0, "b": 0.5, "c": 3.0, "d": 0.0}):
            advice = advised(tmp_path / f"{number}-{falls['a']}", falls, mix=mix)
            assert advice.moves
            assert math.fsum(each.suggested for each in advice.suggestions) == pytest.approx(1)
            for each in advice.suggestions:
                assert each.share / BAND - 1e-9 <= each.suggested <= each.share * BAND + 1e-9
                assert {"more": each.suggested >= each.share - 1e-9, "less": each.suggested <= each.share + 1e-9}.get(each.word, True)


def test_a_loss_that_rises_gets_more_unless_its_rows_were_seen_too_often(tmp_path: Path) -> None:
    falls = {"a": -0.3, "b": 0.02, "c": 0.02, "d": -0.03}
    lost = advised(tmp_path / "lost", falls, steps=(20, 50, 100))
    assert [each.word for each in lost.suggestions][::3] == ["more", "keep"]
    assert "further above its lowest" in lost.suggestions[0].why
    assert "by less than the tenth that is let pass" in lost.suggestions[3].why
    over = advised(tmp_path / "over", falls, steps=(20, 50, 100), epochs={"a": 14.0})
    assert over.suggestions[0].word == "less"
    assert "14 epochs, which is overfitting" in over.suggestions[0].why


def test_a_source_that_was_not_drawn_comes_back_only_if_it_got_clearly_worse(tmp_path: Path) -> None:
    advice = advised(tmp_path / "run", {"a": 0.05, "b": 0.05, "c": -0.3, "d": 0.05}, mix={"a": 0.5, "b": 0.5}, steps=(20, 50, 100))
    found = {each.source: each for each in advice.suggestions}
    assert (found["c"].share, found["c"].word, found["c"].suggested) == (0.0, "more", pytest.approx(0.05))
    assert found["c"].per_thousand is None
    assert (found["d"].word, found["d"].suggested, found["d"].why) == ("none", 0.0, "gets better without being drawn")
    assert found["a"].suggested == pytest.approx(0.475)
    assert advice.line == "mix: {a: 48, b: 48, c: 5}"


def test_a_source_with_too_few_held_out_rows_keeps_its_share(tmp_path: Path) -> None:
    at = {20: 1.0, 50: 1.0, 100: 0.0}
    evaluations = {step: {"a": losses(1 + 0.1 * part, salt=step), "b": losses(1.0, salt=step + 1), "c": losses(0.5, rows=1)} for step, part in at.items()}
    advice = advise(run_folder(tmp_path / "run", [Told("learn", evaluations, mix={"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1})]))
    found = {each.source: each for each in advice.suggestions}
    for name, share in (("c", 0.2), ("d", 0.1)):
        assert (found[name].word, found[name].moved, found[name].suggested) == ("keep", None, pytest.approx(share))
    assert found["a"].suggested > 0.4 > 0.3 > found["b"].suggested
    assert math.fsum(each.suggested for each in advice.suggestions) == pytest.approx(1)


def test_the_line_to_paste_is_a_mix_of_the_plan_language(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    line = advised(tmp_path / "run", {"a": 0.1, "b": 0.03, "c": 0.0, "d": 0.0}, mix={"a": 0.903, "b": 0.09, "c": 0.004, "d": 0.003}).line
    stage = Stage.model_validate({"name": "next", "steps": 1, "resolution": 8, "batch": 1, "lr": 1, **YAML(typ="safe").load(line)})
    assert isinstance(stage.mix, dict)
    assert set(stage.mix) == set(EVEN)
    assert all(share > 0 for share in stage.mix.values())


def test_the_last_stage_that_was_measured_twice_is_looked_at_and_the_plans_next_is_named(tmp_path: Path) -> None:
    following = Told("refine", {None: {"a": losses(0.5), "b": losses(0.5)}}, ended=False, mix={"a": 0.6, "b": 0.4})
    advice = advised(tmp_path / "run", {"a": 0.1, "b": 0.1}, mix={"a": 0.5, "b": 0.5}, more=[following])
    assert advice.stage == "learn"
    assert advice.planned == "'refine', and asks for {a: 0.6, b: 0.4}"


def test_shares_that_followed_evaluations_are_those_in_force_at_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    advised(run, {"a": 0.05, "b": 0.05}, mix={"a": 0.5, "b": 0.5})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "shares", "stage": "learn", "step": 50, "shares": {"a": 0.7, "b": 0.3}}\n')
    assert [each.share for each in advise(run).suggestions] == [0.7, 0.3]


def test_a_run_without_two_evaluations_is_refused_in_words_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    run = run_folder(tmp_path / "run", [Told("learn", {100: {"a": losses(0.5)}})])
    with pytest.raises(PlanError, match=r"no stage was measured twice.*with `evaluate: \{rows: 64\}` or more"):
        advise(run)
    with pytest.raises(PlanError, match=r"no run lies there.*--out"):
        advise(tmp_path / "data")
    assert capsys.readouterr().out == ""


def test_command_prints_the_advice_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from runs import make_world, plan_of

    world = make_world(tmp_path / "world")
    plan = write_plan(tmp_path / "plan.yaml", plan_of(world))
    folder = tmp_path / "run"
    advised(folder, {"a": 0.1, "b": 0.03, "c": 0.03, "d": 0.0})
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setenv("COLUMNS", "100")
    assert train.main([str(plan), "--advise", "--out", str(folder)]) == 0
    text = capsys.readouterr().out
    for said in ("What the next stage could draw, by stage learn from step 50 to step 100", "gains more per draw than the sources do on average", "mix: {a: ", "A rule of thumb", "benchmarks/adaptive.py"):
        assert said in text
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()} == before
    assert train.main([str(plan), "--advise", "--out", str(tmp_path / "none")]) == 2
    assert "none: no run lies there" in capsys.readouterr().err


def test_report_has_the_same_table_and_none_of_it_is_markup(tmp_path: Path) -> None:
    run = tmp_path / "run"
    advice = advised(run, {"a": 0.1, "b": 0.03, "c": 0.03, "d": 0.0})
    page = write_report(run).read_text()
    assert "What the next stage could draw" in page
    assert advice.line in page
    assert all(each.why in page for each in advice.suggestions)
    assert "could draw" not in write_report(run_folder(tmp_path / "short", [Told("learn", {100: {"a": losses(0.5)}})])).read_text()


def test_files_that_were_torn_or_hold_no_numbers_never_stop_the_report(tmp_path: Path) -> None:
    for number, (old, new) in enumerate(((b"{", b""), (b"losses", b"gone"), (b'"0": ', b'"0": NaN, "x": '), (b'"0": ', b'"0": 1e300, "x": '), (b'"0": 0', b'"0": [], "x": 0'))):
        run = tmp_path / str(number)
        advised(run, {"a": 0.1, "b": 0.03})
        file = run / "evaluations" / "1-learn-step-000100.json"
        assert old in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(old, new, 2))
        assert "<h1>" in write_report(run).read_text()
    with (run / "metrics.jsonl").open("a") as events:
        events.write('{"event": "shares", "stage": "learn", "step": 50, "shares": {"a": NaN, "b": -1, "c": 1e200}}\n')
    assert "<h1>" in write_report(run).read_text()

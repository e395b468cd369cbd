"""The benchmarks run, compare like with like, and say what they measured; nothing here is about speed."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import bare, step
from benchmarks.memory import Held, per_row
from benchmarks.mixing import OURS, Case, Settings, deviation, run, sources_drawn
from benchmarks.peers import PEERS
from benchmarks.rows import SHARES, jpeg, load_tables, make_tables, open_folder
from benchmarks.speed import BARE, bare_batches, medleys_picture, micro_batches, pillows_picture, row_numbers, stage
from benchmarks.step_model import build_tiny
from benchmarks.timed import read_timed
from benchmarks.turns import LoopEnded, in_turns
from stages.families.family import Family
from stages.families.open import ARCHITECTURES

CPU = torch.device("cpu")
TINY = Settings(sides=(64,), rows=50, seconds=0.02, rounds=2, draws=3200, position=6400, repeats=2, sources=(5,), lengths=(1000,))


@pytest.fixture(scope="module")
def printed() -> tuple[dict[str, Any], str]:
    """A whole run in miniature: its figures as JSON has them, and its tables."""
    console = Console(file=io.StringIO(), width=200)
    report = run(TINY, console)
    assert isinstance(console.file, io.StringIO)
    return json.loads(json.dumps(report)), console.file.getvalue()


def test_every_table_is_printed_and_every_figure_reported(printed: tuple[dict[str, Any], str]) -> None:
    report, text = printed
    for title in ("Rows per second", "positions per second", "Time to the first batch", "Memory held", "Largest |images drawn"):
        assert title in text
    assert {"machine", "settings", "throughput", "order", "first_batch", "memory", "shares"} <= set(report)
    assert {(each["case"], each["contender"]) for each in report["throughput"]} >= {("64x64 JPEG in Arrow", OURS), ("64x64 JPEG in Arrow", BARE), ("64x64 JPEG files", OURS)}
    assert all(each["ratio"] > 0 and each["processor_ratio"] > 0 for each in report["throughput"])
    assert all(each["ratio"] == 1 for each in report["throughput"] if each["contender"] == BARE)
    assert report["memory"][0]["rows"] == 1000
    assert len(report["first_batch"][OURS]["at_position"]) == TINY.repeats


def test_what_is_not_installed_is_said_and_left_out(printed: tuple[dict[str, Any], str]) -> None:
    report, text = printed
    measured = {each["contender"] for each in report["throughput"]}
    for name, peer in PEERS.items():
        assert (name in measured) == peer.is_installed()
        assert (f"{name}: not installed" in text) != peer.is_installed()


def test_our_images_stay_closer_to_the_shares_than_anyone_elses(printed: tuple[dict[str, Any], str]) -> None:
    shares = [each for each in printed[0]["shares"] if each["case"] in ("5 sources", "25/50/25")]
    ours = {each["case"]: each for each in shares if each["contender"] == OURS}
    others = [each for each in shares if each["contender"] != OURS]
    assert len(ours) == 2
    assert others
    assert all(ours[each["case"]]["at_every_image"] < each["at_every_image"] and ours[each["case"]]["at_every_step"] <= 2 < each["at_every_step"] for each in others)


def test_deviation_is_the_largest_of_any_prefix_and_source() -> None:
    drawn = np.asarray([0, 0, 0, 1] + [1, 0] * 62)
    found = deviation("two", "someone", drawn, np.asarray([2.0, 2.0]))
    assert found.at_every_image == 1.5
    assert found.at_every_step == 1.0


def test_bare_reads_give_the_pixels_of_the_rows_that_the_mixture_gives(tmp_path: Path) -> None:
    make_tables(tmp_path / "tables", 50, 64)
    tables = load_tables(tmp_path / "tables")
    mixture = stage(open_folder(tmp_path / "tables", tmp_path / "index"), 64, 100)
    ours = list(micro_batches(mixture, 0, 2))
    bare = list(bare_batches([row_numbers(batch) for batch in ours], tables, (64, 64), medleys_picture))
    assert {source for batch in ours for source in batch.sources} == set(SHARES)
    assert len(ours) == len(bare) > 8
    assert all(torch.equal(one.targets.pixels, other) for one, other in zip(ours, bare, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (90, 72)])
def test_shortest_decoding_gives_the_same_pixels(size: tuple[int, int]) -> None:
    stored = {"bytes": jpeg(*size, seed=1), "path": None}
    assert np.array_equal(pillows_picture(stored, (64, 64)), medleys_picture(stored, (64, 64)))


def test_rows_of_many_shapes_have_nine_aspects_and_three_numbers_of_references(tmp_path: Path) -> None:
    case = Case("many", (1, 1), aspects=9, references=2)
    mixture = case.mixture(tmp_path)
    classes = set(next(iter(mixture.selections.values())).training)
    assert len({each.aspect for each in classes}) == 9
    assert {len(each.references) for each in classes} == {0, 1, 2}
    assert np.bincount(sources_drawn(mixture, 640)).tolist() == [320, 320]


def test_memory_of_a_row_is_what_rows_add() -> None:
    few, many = (Held(5, rows, held, held, 0, 0.0) for rows, held in ((1_000, 50_000), (101_000, 450_000)))
    assert per_row(many, few) == 4.0


# --- a training step --------------------------------------------------------------------------------------------------------------------


def _measure(folder: Path, *options: str) -> None:
    """In a forked process, for accelerate's state is a process's own, and other tests start runs of several processes."""
    with (folder / "said.txt").open("w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        small = "--pixels 16 --batch 2 --rank 2 --rounds 2 --block 5 --images 4 --rows same"
        sys.exit(step.main([*small.split(), "--json", str(folder / "report.json"), *options]))


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, int]:
    """A tiny Flux of a few steps, asked to be as fast as nothing can be: figures, what was said, and the exit code."""
    folder = tmp_path_factory.mktemp("step")
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(folder, "--target", "100"), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    said = (folder / "said.txt").read_text()
    assert (folder / "report.json").exists(), said
    return json.loads((folder / "report.json").read_text()), said, process.exitcode


def test_bare_loop_computes_what_medley_computes(stepped: tuple[dict[str, Any], str, int]) -> None:
    bare, ours = stepped[0]["rows"]
    assert (bare["name"], ours["name"]) == (step.BARE, step.OURS)
    assert ours["loss"] == pytest.approx(bare["loss"], rel=1e-6)
    assert bare["of_bare"] == bare["processor_of_bare"] == 1
    assert bare["tokens_per_second"] == pytest.approx(bare["images_per_second"] * (4 * 4 + 8))  # 16 pixels are 8 latents and 4 patches a side
    assert 0 < ours["of_rate"] < 1


def test_table_of_steps_names_the_loops_the_machine_and_the_losses(stepped: tuple[dict[str, Any], str, int]) -> None:
    report, text, _ = stepped
    assert all(word in text for word in (step.BARE, step.OURS, "tiny Flux", "of the rate", "torch 2", f"{report['rows'][0]['loss']:.5f}"))


def test_missed_target_is_said_and_exits_with_1(stepped: tuple[dict[str, Any], str, int]) -> None:
    assert stepped[2] == 1
    assert "at least 100 was asked for" in stepped[1]


def test_loops_that_do_not_compute_the_same_are_not_compared() -> None:
    step.compare_losses("one", {1: 2.0, 10: 1.0001}, {1: 2.0, 10: 1.0}, 1e-3)
    with pytest.raises(step.LossesDiffer, match=r"'one': up to step 10 the loss is 1\.010000, and 1\.000000 of the bare loop"):
        step.compare_losses("one", {1: 2.0, 10: 1.01}, {1: 2.0, 10: 1.0}, 1e-3)
    with pytest.raises(step.LossesDiffer):
        step.compare_losses("one", {1: float("nan")}, {1: 2.0}, 1e-3)


@pytest.mark.parametrize("family", [name for name in bare.FAMILIES if name != "flux"])
def test_bare_loop_of_another_family_predicts_what_medley_predicts(tmp_path: Path, family: str) -> None:
    tiny = Family(ARCHITECTURES[family], str(build_tiny(tmp_path / "model", family)), None, None, CPU)
    x = torch.randn(2, *tiny.encode_images(torch.zeros(1, 3, 32, 32)).shape[1:], generator=torch.Generator().manual_seed(0))
    text, t = tiny.encode_prompts(["a red disc", "a blue disc"]), torch.tensor([0.3, 0.7])
    given = bare.Inputs(x, torch.zeros_like(x), t, text.embeds, text.pooled, text.mask)
    model = tiny.load_transformer(torch.float32, None)
    predict = bare.Predict(bare.Recorded(family, (given,), {}, (), 0, None, torch.float32), CPU).of_family
    with torch.no_grad():
        assert torch.equal(predict(model, x, given), tiny.predict(model, x, t, text))


def test_options_that_only_flux_has_are_refused_for_other_families(capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in ((["--family", "sd3", "--size", "small"], "for flux alone"), (["--folder", "10"], "add --script FILE")):
        with pytest.raises(SystemExit):
            step.main(options)
        assert said in capsys.readouterr().err


def test_means_over_other_noise_may_differ_by_chance_and_no_more() -> None:
    script, near, far = (step.Launched(name, 1, 1, 1, 1, 1, loss, 0.02) for name, loss in (("script", 1.0), ("near", 1.1), ("far", 1.2)))
    step.compare_means(script, near)
    with pytest.raises(step.LossesDiffer, match=r"'far': the mean loss is 1\.2"):
        step.compare_means(script, far)


def test_windows_are_those_of_the_log() -> None:
    windows = step.over_windows([1.0, 2.0, 4.0, 6.0], [1, 3, 4])
    assert windows == {1: 1.0, 3: 3.0, 4: 6.0}
    assert step.mean_loss(windows) == 13 / 4


def test_losses_are_read_from_the_scripts_progress_bar() -> None:
    said = "".join(f"\rSteps: 5%| | {number}/10 [00:01<00:02, 9it/s, loss={number}.5, lr=0.0001]" for number in range(1, 11) for _ in range(2))
    assert step.shown_losses(said, 10) == [6.0]
    with pytest.raises(RuntimeError, match="not of step 11"):
        step.shown_losses(said, 20)


def _steps(made: list[str], name: str, number: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for _ in range(number):
        parameter.grad = torch.ones(1)
        made.append(name)
        optimizer.step()
    made.append(f"{name} ended")


def test_loops_make_their_steps_in_turns() -> None:
    made: list[str] = []
    with in_turns({name: partial(_steps, made, name, 2) for name in ("a", "b")}) as loops:
        for name in ("a", "b", "b", "a"):
            loops[name].step()
        assert made == ["a", "b", "b", "a"]
        loops["b"].finish()
    assert made == ["a", "b", "b", "a", "b ended"]  # the other is left where it stands


def _break() -> None:
    raise ValueError("broken")


def test_loop_that_ends_or_fails_says_so() -> None:
    with in_turns({"short": partial(_steps, [], "short", 1), "broken": _break}) as loops:
        loops["short"].step()
        with pytest.raises(LoopEnded, match="'short' ended"):
            loops["short"].step()
        with pytest.raises(ValueError, match="broken"):
            loops["broken"].step()


@pytest.mark.launch
def test_scripts_steps_are_timed_without_touching_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    lines = ["import sys, time, torch", "p = torch.nn.Parameter(torch.zeros(1))", "o = torch.optim.SGD([p])", "for _ in range(int(sys.argv[1])):", "    p.grad = p.detach()", "    time.sleep(0.02)"]
    script.write_text("\n".join([*lines, "    o.step()", "raise SystemExit(3)"]))
    done = subprocess.run([sys.executable, "-m", "benchmarks.timed", str(tmp_path / "times.json"), str(script), "5"], cwd=Path(__file__).parent.parent, check=False)
    timed = read_timed(tmp_path / "times.json")
    assert done.returncode == 3
    assert len(timed.wall) == len(timed.processor) == 5
    assert len(timed.seconds(1)) == 3
    assert all(seconds >= 0.02 for seconds in timed.seconds(0))
    assert timed.peak > 10_000_000

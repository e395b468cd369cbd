"""Evaluation: the same numbers whatever the chunks, the order and the processes, paired differences with their error, and no trace of it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import stages.evaluate
from mixing.bad_rows import BadRow
from mixing.batch import MicroBatch
from mixing.buckets import Shapes
from mixing.images import fit, to_tensor
from mixing.keys import key
from mixing.selected import Choice, Selection, select
from mixing.source import open_source
from models import tiny_flux
from runs import make_data
from stages.evaluate import STRATA, evaluate, in_order
from stages.families.base import Text
from stages.families.family import Family
from stages.families.flux import Flux
from stages.measured import TENTHS, VERSION, Measured
from stages.objectives.flow import blend, noise
from stages.objectives.windows import Windows
from stages.precision import StagePrecision
from stages.shown import Shown

CPU = torch.device("cpu")
FP32 = StagePrecision("fp32", CPU)


class Watched(Family):
    """Flux in pixel space that notes what it is asked, and whose prediction can be replaced."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Flux(), str(folder), None, None, CPU)
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.wrong: Tensor | None = None

    def predict(self, transformer: nn.Module, noised: Tensor, t: Tensor, text: Text, references: Sequence[Tensor] = (), **rest: object) -> Tensor:
        self.asked.append((noised, t))
        if self.wrong is not None:
            return self.wrong.expand_as(noised)
        return super().predict(transformer, noised, t, text, references)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data", rows=210)
    tiny_flux(folder / "model", pixels=True)
    return folder


@pytest.fixture
def family(world: Path) -> Watched:
    return Watched(world / "model")


@pytest.fixture(scope="module")
def selections(world: Path) -> dict[str, Selection]:
    """21 held-out rows of `photos`, 13 of `edits`."""
    chosen = {}
    for name, path, task, rows in (("photos", "photos", "text_to_image", 21), ("edits", "edits/rows.jsonl", "edit", 13)):
        source = open_source(name, path=path, task=task, columns={}, prompt=None, split="train", on_bad_row="stop", root=world / "data")
        chosen[name] = select(source, Choice(), rows)
    return chosen


def process(index: int = 0, of: int = 1) -> Any:
    return SimpleNamespace(process_index=index, num_processes=of, device=CPU)


def measure(
    family: Family, selections: dict[str, Selection], *, accelerator: Any = None, seed: int = 5, precision: StagePrecision = FP32, bad: list[BadRow] | None = None, **more: Any
) -> Measured:
    transformer, unreadable = family.load_transformer(torch.float32, None), [] if bad is None else bad
    return evaluate(family, transformer, selections, shapes=Shapes(8, 2), precision=precision, seed=seed, accelerator=accelerator or process(), unreadable=unreadable.append, **more)


def largest_difference(one: Measured, other: Measured) -> float:
    assert {name: rows.keys() for name, rows in one.losses.items()} == {name: rows.keys() for name, rows in other.losses.items()}
    return max(abs(loss - other.losses[name][row]) for name, rows in one.losses.items() for row, loss in rows.items())


# --- always the same --------------------------------------------------------------------------------------------------------------------


def test_every_held_out_row_is_measured_once(family: Watched, selections: dict[str, Selection]) -> None:
    measured = measure(family, selections)
    for name, selection in selections.items():
        assert set(measured.losses[name]) == {selection.source.key(int(row)) for row in selection.held_out}
        assert measured.losses[name].keys() == measured.t[name].keys()
    assert measured.asked == {"photos": 21, "edits": 13}
    assert sum(len(noised) for noised, _ in family.asked) == 21 + 13


def test_measured_again_the_numbers_are_the_same(family: Watched, selections: dict[str, Selection]) -> None:
    assert measure(family, selections) == measure(family, selections)
    assert largest_difference(measure(family, selections), measure(family, selections, seed=6)) > 1e-3


@pytest.mark.parametrize("rows_at_once", [1, 4, 64])
def test_the_numbers_do_not_depend_on_how_many_rows_are_measured_at_once(
    family: Watched, selections: dict[str, Selection], monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    whole = measure(family, selections)
    monkeypatch.setattr(stages.evaluate, "_ROWS_AT_ONCE", rows_at_once)
    family.asked.clear()
    chunked = measure(family, selections)
    assert max(len(noised) for noised, _ in family.asked) == min(21, rows_at_once)
    assert chunked.t == whole.t
    assert largest_difference(whole, chunked) <= 4e-6


def test_the_numbers_do_not_depend_on_the_order_of_the_sources(family: Watched, selections: dict[str, Selection]) -> None:
    backwards = dict(reversed(selections.items()))
    assert list(backwards) != list(selections)
    assert measure(family, backwards) == measure(family, selections)
    assert measure(family, {"edits": selections["edits"]}).losses["edits"] == measure(family, selections).losses["edits"]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_numbers_do_not_depend_on_the_number_of_processes(family: Watched, selections: dict[str, Selection], monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    alone = measure(family, selections)
    parts: list[list[Any]] = []
    monkeypatch.setattr(stages.evaluate, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(stages.evaluate, "gather_object", lambda rows: [parts.append(rows), rows][1])
    for index in range(processes):
        measure(family, selections, accelerator=process(index, processes))
    assert min(len(part) for part in parts) >= 8
    monkeypatch.setattr(stages.evaluate, "gather_object", lambda rows: [row for part in parts for row in part])
    for index in range(processes):
        assert largest_difference(measure(family, selections, accelerator=process(index, processes)), alone) <= 4e-6


def test_evaluating_leaves_every_random_generator_as_it_was(family: Watched, selections: dict[str, Selection]) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    measure(family, selections)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]
    assert random.getstate() == python_state


def test_evaluating_leaves_no_gradient_and_changes_no_weight(family: Watched, selections: dict[str, Selection]) -> None:
    model = family.load_transformer(torch.float32, None).train().requires_grad_(True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    evaluate(family, model, selections, shapes=Shapes(8, 2), precision=FP32, seed=5, accelerator=process(), unreadable=lambda row: None)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad and torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


# --- what is measured -------------------------------------------------------------------------------------------------------------------


def quantiles(measured: Measured, source: str, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
    """Where each row's t stands in the density of t, logit-normal and unshifted."""
    first, last = stats.norm.cdf([math.log(low / (1 - low)) if low else -math.inf, math.log(high / (1 - high)) if high < 1 else math.inf])
    return {row: float(stats.norm.cdf(math.log(t / (1 - t))) - first) / (last - first) for row, t in measured.t[source].items()}


def test_row_j_in_a_fixed_order_is_measured_in_stratum_j_mod_8_of_the_familys_own_density(family: Watched, selections: dict[str, Selection]) -> None:
    measured = measure(family, selections)
    assert family.shift(family.tokens(8, 8)) == 1
    for name, selection in selections.items():
        of_row = quantiles(measured, name)
        ordered = [selection.source.key(row) for row in in_order(selection)]
        assert [int(of_row[row] * STRATA) for row in ordered] == [place % STRATA for place in range(len(ordered))]
    assert sorted(t for rows in measured.t.values() for t in rows.values()) == sorted(torch.cat([t for _, t in family.asked]).tolist()), "and that is what the model is told"


def test_inside_its_stratum_a_row_stands_anywhere_by_its_own_key_and_the_seed(family: Watched, selections: dict[str, Selection]) -> None:
    within = [(quantile * STRATA) % 1 for seed in range(8) for name in selections for quantile in quantiles(measure(family, selections, seed=seed), name).values()]
    assert stats.kstest(within, "uniform").pvalue > 0.01
    assert len({round(place, 4) for place in within}) > 250


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_fewer_rows_are_the_first_ones_with_the_same_t_and_the_same_loss(family: Watched, selections: dict[str, Selection], rows: int) -> None:
    whole, fewer = measure(family, selections), measure(family, selections, rows=rows)
    for name, selection in selections.items():
        first = {selection.source.key(row) for row in in_order(selection)[:rows]}
        assert fewer.losses[name].keys() == first
        assert fewer.t[name] == {row: whole.t[name][row] for row in first}
        assert fewer.losses[name] == pytest.approx({row: whole.losses[name][row] for row in first}, abs=4e-6)
        assert fewer.asked[name] == min(rows, len(selection.held_out))


def test_the_first_rows_are_those_that_would_have_been_held_out_if_so_few_were(world: Path, selections: dict[str, Selection]) -> None:
    """So they stand for all, and do not follow the order of files."""
    source = selections["photos"].source
    assert set(in_order(selections["photos"])[:8]) == set(select(source, Choice(), 8).held_out.tolist())
    assert in_order(selections["photos"]) != sorted(in_order(selections["photos"]))


def test_an_experts_rows_are_measured_where_it_is_asked(family: Watched, selections: dict[str, Selection]) -> None:
    measured = measure(family, selections, t_range=(0.4, 0.8))
    levels = [t for rows in measured.t.values() for t in rows.values()]
    assert 0.4 <= min(levels) < 0.5
    assert 0.7 < max(levels) <= 0.8
    assert [int(quantiles(measured, "photos", 0.4, 0.8)[selections["photos"].source.key(row)] * STRATA) for row in in_order(selections["photos"])[:8]] == list(range(8))
    summary = measured.summary(None, None)["photos"]
    assert [rows == 0 for rows in summary["by_timestep_rows"]] == [True] * 4 + [False] * 4 + [True] * 2


def test_on_a_pyramid_every_level_is_measured_and_t_is_what_the_model_is_told(family: Watched, selections: dict[str, Selection]) -> None:
    windows = Windows(2)
    measured = measure(family, selections, windows=windows)
    levels = sorted(t for rows in measured.t.values() for t in rows.values())
    assert levels == pytest.approx(sorted(torch.cat([t for _, t in family.asked]).tolist()), abs=4e-6)
    assert sum(noised.shape[-1] == 4 for noised, _ in family.asked for _ in noised) == sum(place % STRATA >= 4 for rows in (21, 13) for place in range(rows)), "half the way"
    assert measured.t == measure(family, selections, windows=windows, precision=StagePrecision("bf16", CPU)).t


def test_a_loss_is_that_of_its_row_at_its_timestep_with_its_own_noise(family: Watched, selections: dict[str, Selection]) -> None:
    """With a prediction of nought the loss is the mean square of e - x, and what the model sees is the blend of the two."""
    family.wrong = torch.zeros(())
    measured = measure(family, selections)
    photos = selections["photos"]
    seen = torch.cat([noised for noised, _ in family.asked])
    for row in photos.held_out.tolist()[:5]:
        example = photos.source.example(row)
        x = to_tensor(fit(example.target, 8, 8))
        e = noise((3, 8, 8), [key(5, "evaluate", "photos", example.key)])[0]
        assert measured.losses["photos"][example.key] == pytest.approx(float((e - x).square().mean()), rel=1e-5)
        x_t = blend(x[None], e[None], torch.tensor([measured.t["photos"][example.key]]))
        assert float((seen - x_t).abs().flatten(1).amax(1).min()) < 1e-6


def test_in_bf16_the_image_is_noised_with_the_timestep_that_the_model_sees(family: Watched, selections: dict[str, Selection]) -> None:
    rounded = measure(family, selections, precision=StagePrecision("bf16", CPU))
    for _, t in family.asked:
        assert torch.equal(t, family.seen_timestep(t, torch.bfloat16))
    assert rounded.t == measure(family, selections).t, "and what it is known by is the same in every precision"


# --- what is said -----------------------------------------------------------------------------------------------------------------------


def some_losses(number: int, seed: int, rows: int = 40) -> Measured:
    draw = np.random.default_rng(seed)
    losses = {f"{place:03d}.png": float(loss) for place, loss in enumerate(number + draw.random(rows))}
    return Measured({"photos": losses}, {"photos": {row: (place * 0.37) % 0.9 for place, row in enumerate(losses)}})


def test_standard_error_of_a_change_is_that_of_paired_rows() -> None:
    base, now = some_losses(0, 1), some_losses(0, 2)
    entry = now.summary(base, None)["photos"]
    pairs = np.array(list(now.losses["photos"].values())) - np.array(list(base.losses["photos"].values()))
    assert entry["since_base"] == pytest.approx(pairs.mean(), rel=1e-12)
    assert entry["since_base_error"] == pytest.approx(stats.sem(pairs), rel=1e-12)
    assert entry["since_base_error"] == pytest.approx(pairs.std(ddof=1) / math.sqrt(40), rel=1e-12)


CHANGES = ("", "_error", "_by_timestep", "_by_timestep_error")


def test_summary_says_loss_rows_tenths_of_t_and_both_changes() -> None:
    base, start, now = some_losses(3, 1), some_losses(2, 2), some_losses(1, 1)
    entry = now.summary(base, start)["photos"]
    plain = {"loss", "rows", "by_timestep", "by_timestep_rows"}
    assert set(entry) == plain | {since + kind for since in ("since_base", "since_start") for kind in CHANGES}
    losses, t = np.array(list(now.losses["photos"].values())), np.array(list(now.t["photos"].values()))
    assert entry["rows"] == 40
    assert entry["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    tenths = [losses[(t >= low / 10) & (t < (low + 1) / 10)] for low in range(TENTHS)]
    assert entry["by_timestep_rows"] == [len(tenth) for tenth in tenths]
    assert sum(entry["by_timestep_rows"]) == 40
    assert entry["by_timestep"][:9] == pytest.approx([tenth.mean() for tenth in tenths[:9]], rel=1e-12)
    assert entry["by_timestep"][9] is None, "no row is there"
    assert entry["since_base"] == pytest.approx(-2, rel=1e-9)
    assert entry["since_base_error"] == pytest.approx(0, abs=1e-12)
    changes = losses - np.array(list(start.losses["photos"].values()))
    in_tenths = [changes[(t >= low / 10) & (t < (low + 1) / 10)] for low in range(TENTHS - 1)]
    assert entry["since_start_by_timestep"][:9] == pytest.approx([tenth.mean() for tenth in in_tenths], rel=1e-9)
    assert entry["since_start_by_timestep_error"][:9] == pytest.approx([stats.sem(tenth) for tenth in in_tenths], rel=1e-9)
    assert entry["since_start_by_timestep"][9] is entry["since_start_by_timestep_error"][9] is None
    assert set(now.summary(None, None)["photos"]) == plain


def test_rows_that_were_measured_at_another_noise_level_are_not_paired() -> None:
    """As those of a source that has grown since, whose rows have moved on in the order."""
    base, now = some_losses(0, 1), some_losses(1, 1)
    moved = Measured(base.losses, {"photos": {row: t if place % 4 else 0.95 for place, (row, t) in enumerate(base.t["photos"].items())}})
    changed = Measured({"photos": {row: loss + (0 if place % 4 else 100) for place, (row, loss) in enumerate(now.losses["photos"].items())}}, now.t)
    assert changed.summary(moved, None)["photos"]["since_base"] == pytest.approx(1, rel=1e-9)


def test_a_change_is_taken_over_the_rows_that_both_have() -> None:
    base, now = some_losses(0, 1), some_losses(1, 1)
    fewer = Measured({"photos": {row: loss for place, (row, loss) in enumerate(base.losses["photos"].items()) if place % 2}}, base.t)
    assert now.summary(fewer, None)["photos"]["since_base"] == pytest.approx(1, rel=1e-9)
    assert "since_base" not in now.summary(Measured({}, {}), None)["photos"]
    only = Measured({"photos": {"000.png": 0.0}}, base.t)
    assert "since_base" not in now.summary(only, None)["photos"], "one pair has no standard error"


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_summary_of_few_rows_is_json_that_every_reader_takes(rows: int) -> None:
    """NaN is not JSON: a browser's JSON.parse refuses the whole line."""
    summary = some_losses(0, 1, rows).summary(some_losses(0, 2, rows), None)
    json.dumps(summary, allow_nan=False)


def test_measured_goes_through_its_file_bit_for_bit(family: Watched, selections: dict[str, Selection], tmp_path: Path) -> None:
    measured = measure(family, selections)
    measured.save(tmp_path / "evaluations" / "base.json")
    assert Measured.load(tmp_path / "evaluations" / "base.json") == measured
    assert json.loads((tmp_path / "evaluations" / "base.json").read_text())["version"] == VERSION


def test_what_a_former_version_measured_is_as_good_as_not_measured(tmp_path: Path) -> None:
    """Its rows stood in the middle of their strata: differences to them would be of other noise levels."""
    (tmp_path / "base.json").write_text(json.dumps({"losses": {"photos": {"a": 1.0}}, "strata": {"photos": {"a": 0}}}))
    assert Measured.load(tmp_path / "base.json") is None
    assert Measured.load(tmp_path / "other.json") is None


def test_a_held_out_row_that_cannot_be_read_is_left_out_and_the_others_keep_their_numbers(world: Path, tmp_path: Path, family: Watched) -> None:
    make_data(tmp_path / "data", rows=60)
    chosen = []
    for _ in range(2):
        source = open_source("photos", path="photos", task="text_to_image", columns={}, prompt=None, split="train", on_bad_row="stop", root=tmp_path / "data")
        chosen.append({"photos": select(source, Choice(), 6)})
    whole = measure(family, chosen[0])
    broken = next(iter(whole.losses["photos"]))
    content = (tmp_path / "data" / "photos" / broken).read_bytes()
    (tmp_path / "data" / "photos" / broken).write_bytes(content[: len(content) // 2])
    bad: list[BadRow] = []
    without = measure(family, chosen[1], bad=bad)
    assert [(row.source, row.key) for row in bad] == [("photos", broken)]
    assert without.losses["photos"].keys() == whole.losses["photos"].keys() - {broken}
    for row, loss in without.losses["photos"].items():
        assert loss == pytest.approx(whole.losses["photos"][row], abs=4e-6)
        assert without.t["photos"][row] == whole.t["photos"][row]


def test_a_held_out_row_whose_latents_are_no_numbers_is_left_out_and_the_others_keep_their_numbers(family: Watched, selections: dict[str, Selection], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(family, selections)
    broken, rest = list(whole.losses["photos"])[3], whole.losses["photos"].copy()
    del rest[broken]
    actual = stages.evaluate.show

    def ruined(family: Family, batch: MicroBatch) -> Shown:
        shown = actual(family, batch)
        shown.x[[row == broken for row in batch.keys]] = math.nan
        return shown

    monkeypatch.setattr(stages.evaluate, "show", ruined)
    bad: list[BadRow] = []
    without = measure(family, selections, bad=bad)
    assert bad == [BadRow("photos", broken, "its latents hold values that are no numbers")]
    assert without.losses["edits"] == whole.losses["edits"]
    assert without.losses["photos"] == pytest.approx(rest, abs=4e-6)

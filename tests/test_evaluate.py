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
from mixing.buckets import Shapes
from mixing.images import fit, to_tensor
from mixing.keys import key
from mixing.selected import Choice, Selection, select
from mixing.source import open_source
from models import tiny_flux
from runs import make_data
from stages.evaluate import STRATA, Measured, evaluate
from stages.families.base import Text
from stages.families.family import Family
from stages.families.flux import Flux
from stages.objectives.flow import Density, blend, noise
from stages.precision import StagePrecision

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
    family: Family, selections: dict[str, Selection], *, accelerator: Any = None, seed: int = 5, precision: StagePrecision = FP32, bad: list[BadRow] | None = None
) -> Measured:
    transformer, unreadable = family.load_transformer(torch.float32, None), [] if bad is None else bad
    return evaluate(family, transformer, selections, shapes=Shapes(8, 2), precision=precision, seed=seed, accelerator=accelerator or process(), unreadable=unreadable.append)


def largest_difference(one: Measured, other: Measured) -> float:
    assert {name: rows.keys() for name, rows in one.losses.items()} == {name: rows.keys() for name, rows in other.losses.items()}
    return max(abs(loss - other.losses[name][row]) for name, rows in one.losses.items() for row, loss in rows.items())


# --- always the same --------------------------------------------------------------------------------------------------------------------


def test_every_held_out_row_is_measured_once(family: Watched, selections: dict[str, Selection]) -> None:
    measured = measure(family, selections)
    for name, selection in selections.items():
        assert set(measured.losses[name]) == {selection.source.key(int(row)) for row in selection.held_out}
        assert measured.losses[name].keys() == measured.strata[name].keys()
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
    assert chunked.strata == whole.strata
    assert largest_difference(whole, chunked) <= 1e-6


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
        assert largest_difference(measure(family, selections, accelerator=process(index, processes)), alone) <= 1e-6


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


def test_rows_are_spread_evenly_over_the_middles_of_eight_strata_of_the_familys_own_density(family: Watched, selections: dict[str, Selection]) -> None:
    measured = measure(family, selections)
    for name, number in (("photos", 21), ("edits", 13)):
        counts = np.bincount(list(measured.strata[name].values()), minlength=STRATA)
        assert counts.sum() == number
        assert counts.max() - counts.min() <= 1
    density = Density("logit_normal", 0.0, 1.0, family.shift(family.tokens(8, 8)))
    middles = density.t((torch.arange(STRATA, dtype=torch.float64) + 0.5) / STRATA)
    assert set(torch.cat([t for _, t in family.asked]).tolist()) == set(middles.tolist())


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
        t = Density("logit_normal", 0.0, 1.0, 1.0).t(torch.tensor([(measured.strata["photos"][example.key] + 0.5) / STRATA], dtype=torch.float64))
        x_t = blend(x[None], e[None], t)
        assert float((seen - x_t).abs().flatten(1).amax(1).min()) < 1e-6


def test_in_bf16_the_image_is_noised_with_the_timestep_that_the_model_sees(family: Watched, selections: dict[str, Selection]) -> None:
    measure(family, selections, precision=StagePrecision("bf16", CPU))
    for _, t in family.asked:
        assert torch.equal(t, family.seen_timestep(t, torch.bfloat16))


# --- what is said -----------------------------------------------------------------------------------------------------------------------


def some_losses(number: int, seed: int, rows: int = 40) -> Measured:
    draw = np.random.default_rng(seed)
    losses = {f"{place:03d}.png": float(loss) for place, loss in enumerate(number + draw.random(rows))}
    return Measured({"photos": losses}, {"photos": {row: place % STRATA for place, row in enumerate(losses)}})


def test_standard_error_of_a_change_is_that_of_paired_rows() -> None:
    base, now = some_losses(0, 1), some_losses(0, 2)
    entry = now.summary(base, None)["photos"]
    pairs = np.array(list(now.losses["photos"].values())) - np.array(list(base.losses["photos"].values()))
    assert entry["since_base"] == pytest.approx(pairs.mean(), rel=1e-12)
    assert entry["since_base_error"] == pytest.approx(stats.sem(pairs), rel=1e-12)
    assert entry["since_base_error"] == pytest.approx(pairs.std(ddof=1) / math.sqrt(40), rel=1e-12)


def test_summary_says_loss_rows_strata_and_both_changes() -> None:
    base, start, now = some_losses(3, 1), some_losses(2, 1), some_losses(1, 1)
    entry = now.summary(base, start)["photos"]
    assert set(entry) == {"loss", "rows", "by_timestep", "since_base", "since_base_error", "since_start", "since_start_error"}
    losses = list(now.losses["photos"].values())
    assert entry["rows"] == 40
    assert entry["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert entry["by_timestep"] == pytest.approx([np.mean(losses[stratum::STRATA]) for stratum in range(STRATA)], rel=1e-12)
    assert entry["since_base"] == pytest.approx(-2, rel=1e-9)
    assert entry["since_start"] == pytest.approx(-1, rel=1e-9)
    assert entry["since_base_error"] == pytest.approx(0, abs=1e-12)
    assert set(now.summary(None, None)["photos"]) == {"loss", "rows", "by_timestep"}


def test_a_change_is_taken_over_the_rows_that_both_have() -> None:
    base, now = some_losses(0, 1), some_losses(1, 1)
    fewer = Measured({"photos": {row: loss for place, (row, loss) in enumerate(base.losses["photos"].items()) if place % 2}}, base.strata)
    assert now.summary(fewer, None)["photos"]["since_base"] == pytest.approx(1, rel=1e-9)
    assert "since_base" not in now.summary(Measured({}, {}), None)["photos"]
    only = Measured({"photos": {"000.png": 0.0}}, base.strata)
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
        assert loss == pytest.approx(whole.losses["photos"][row], abs=1e-6)
        assert without.strata["photos"][row] == whole.strata["photos"][row]

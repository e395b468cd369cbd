"""The benchmarks run, compare like with like, and say what they measured; nothing here is about speed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.memory import Held, per_row
from benchmarks.mixing import OURS, Case, Settings, deviation, run, sources_drawn
from benchmarks.peers import PEERS
from benchmarks.rows import SHARES, jpeg, load_tables, make_tables, open_folder
from benchmarks.speed import BARE, bare_batches, medleys_picture, micro_batches, pillows_picture, row_numbers, stage

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

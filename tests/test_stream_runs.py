"""Runs over streams, in real processes: the same rows in the same order on 1, 2 and 4, in exact shares, whatever the shards are like."""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import mixing.parquet_shards
import mixing.tar_shards
from mixing.mixture import StageMixture
from mixing.shards import Row, Values
from mixing.share_out import read_by
from mixing.stream import Stream
from models import tiny_flux
from runs import break_pixels, carry_out, events, plan_of, square, traced, words, write_plan, write_tables, write_tars
from stages.families.open import open_family
from stages.feed import Sizes, stage_mixture
from stages.open_sources import open_selections
from stages.reader import read_plan
from stages.resolved import resolved_plan

pytestmark = pytest.mark.launch

WINDOW = 4  # rows that a lane shuffles together, so that tiny lanes have several windows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model; runs are typed in the folder above it, so that hub/user/NAME there is a dataset."""
    folder = tmp_path_factory.mktemp("world")
    tiny_flux(folder / "model", pixels=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setitem(Stream.lanes.__kwdefaults__, "rows", WINDOW)
        datasets.disable_progress_bars()
        yield folder


def write_squares(folder: Path, number: int) -> str:
    """A folder of squares with captions."""
    folder.mkdir(parents=True)
    for each in range(number):
        (folder / f"{each:03d}.png").write_bytes(square(each))
        (folder / f"{each:03d}.txt").write_text(words(each))
    return str(folder)


def plan_over(world: Path, sources: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A plan that trains an adapter on sources."""
    stage = {"steps": 8, "resolution": 8, "lr": 0.01, "precision": "fp32"}
    return plan_of(world, sources=dict(sources), stages=[{**stage, **each} for each in stages], previews={"rows": 0}, save_every=100, **changes)


def mixtures(file: Path, plan: Mapping[str, Any]) -> list[StageMixture]:
    """The mixture of each stage of a plan."""
    read = resolved_plan(read_plan(write_plan(file, plan), ()).plan)
    family = open_family(read.model, torch.device("cpu"))
    selections = open_selections(read, Path.cwd(), {})
    made: list[StageMixture] = []
    before: dict[tuple[str, str], int] = {}
    for stage in read.stages:
        made.append(stage_mixture(stage, selections, Sizes(family.pixel_multiple, family.text_tokens), seed=read.seed, drawn_before=before))
        before = {**before, **made[-1].order.drawn_after(stage.steps)}
    return made


def check_shares(folder: Path, made: Sequence[StageMixture]) -> None:
    """At the end of every step of every stage each source has given its share of the images, to within the order's guarantee."""
    lines = traced(folder)
    for name, mixture in zip(dict.fromkeys(line["stage"] for line in lines), made, strict=True):
        given: Counter[str] = Counter()
        for step in range(mixture.budget.steps):
            given.update(line["source"] for line in lines if (line["stage"], line["step"]) == (name, step))
            assert given.total() == mixture.images_before(step + 1)
            for source, share in mixture.order.asked(step + 1).items():
                assert abs(given[source] - share * given.total()) <= mixture.order.off[source] + 1e-9, (name, step, source)


def draws_of(folder: Path, made: Sequence[StageMixture]) -> dict[str, list[str]]:
    """Source, of rows of one shape, to the keys that it gave, in the order of its draws, over all stages."""
    lines = iter(traced(folder))
    keys: dict[str, dict[int, str]] = defaultdict(dict)
    for mixture in made:
        drawn = mixture.order.steps(0, mixture.budget.steps)
        for cell, draw in zip(drawn.cell.tolist(), drawn.draw.tolist(), strict=True):
            line = next(lines)
            assert line["source"] == mixture.order.cells[cell].source
            assert draw not in keys[line["source"]]
            keys[line["source"]][draw] = line["key"]
    assert next(lines, None) is None
    assert all(sorted(own) == list(range(len(own))) for own in keys.values())
    return {source: [own[draw] for draw in range(len(own))] for source, own in keys.items()}


def lanes_of(folder: Path, made: Sequence[StageMixture]) -> dict[str, dict[int, list[str]]]:
    """Stream to lane to the keys that it gave, in the order of their numbers, over all stages."""
    draws, streams = draws_of(folder, made), ((name, selection.stream) for name, selection in made[0].selections.items())
    return {name: {lane: draws[name][lane :: stream.num_lanes] for lane in range(stream.num_lanes)} for name, stream in streams if stream is not None}


def rows_of_lanes(stream: Stream | None) -> dict[int, set[str]]:
    """Lane to the keys of its rows."""
    assert stream is not None
    rows: dict[int, set[str]] = {lane: set() for lane in range(stream.num_lanes)}
    with stream.lanes(rows, {}, on_bad=lambda bad: None, stalled=lambda message: None) as reader:
        for lane, own in rows.items():
            index = 0
            while (row := reader.row(lane, index)).epoch == 0:
                own.add(row.key)
                index += 1
    return rows


def check_epochs(given: Mapping[int, Sequence[str]], rows: Mapping[int, set[str]]) -> int:
    """Each epoch of each lane gives each of the lane's rows once, in an order of its own; returns how many epochs were finished. rows: of each lane."""
    assert sum(map(len, rows.values())) == len(set().union(*rows.values()))
    epochs = 0
    for lane, keys in given.items():
        size = len(rows[lane])
        parts = [keys[start : start + size] for start in range(0, len(keys), size)]
        for part in parts:
            assert len(set(part)) == len(part)
            assert set(part) <= rows[lane]
        whole = [part for part in parts if len(part) == size]
        assert size < 4 or len({tuple(part) for part in whole}) == len(whole)
        epochs += len(whole)
    return epochs


# --- one, two and four processes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(world: Path) -> dict[str, Any]:
    """Three streams beside a folder, in two stages of which the second mixes resolutions, counts tokens and changes its shares."""
    write_tables(world / "user" / "tables" / "data", (32, 32, 32))
    sources = {
        "tars": {"path": write_tars(world / "tars", (24, 16, 32, 8)), "stream": True, "lanes": 4},
        "tables": {"path": write_tables(world / "tables", (40, 24)), "stream": True, "lanes": 8},
        "hub": {"path": "hub/user/tables", "stream": True, "lanes": 5},
        "photos": {"path": write_squares(world / "photos", 24)},
    }
    first = {"name": "first", "batch": {"images": 16, "micro": 4}, "mix": {"tars": 4, "tables": 3, "hub": 2, "photos": 1}}
    ramp = {"from": {"tars": 1, "tables": 1, "photos": 1}, "to": {"tars": 3, "hub": 1, "photos": 2}}
    levels = [{"pixels": 4, "share": 1}, {"pixels": 8, "share": 2}]
    second = {"name": "second", "steps": 5, "batch": {"tokens": 400, "micro": {"tokens": 100}}, "resolution": levels, "mix": ramp}
    return plan_over(world, sources, [first, second])


def count_reads(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Each process from here on notes every row that it reads: in folder/RANK.SOURCE.LANE where a lane reads it, elsewhere in folder/RANK."""
    folder.mkdir()

    def noted(row: Row) -> Row:
        def read() -> Values:
            thread = threading.current_thread().name.split()  # lane LANE of SOURCE
            name = f"{thread[3]}.{thread[1]}" if thread[0] == "lane" else "opening"
            with (folder / f"{os.environ.get('RANK', '0')}.{name}").open("a") as file:
                file.write(f"{row.key}\n")
            return row.read()

        return replace(row, read=read)

    for kind in (mixing.tar_shards.TarShards, mixing.parquet_shards.ParquetShards):

        def counted(*arguments: Any, _read: Any = kind.read) -> Iterator[Row]:
            yield from map(noted, _read(*arguments))

        patch.setattr(kind, "read", counted)


@dataclass(frozen=True)
class Runs:
    """One plan carried out on 1, 2 and 4 processes."""

    made: Sequence[StageMixture]
    """The mixture of each stage."""
    folders: Mapping[int, Path]
    """Processes to run folder."""
    reads: Mapping[int, Path]
    """Processes to what `count_reads` wrote."""
    printed: Mapping[int, str]


def carried_out(plan: Mapping[str, Any], folder: Path, numbers: Sequence[int], **changes: Any) -> Runs:
    """Carry a plan out on several numbers of processes."""
    folders, reads = ({number: folder / f"{what}{number}" for number in numbers} for what in ("on", "reads"))
    folder.mkdir()
    printed = {}
    for number in numbers:
        with pytest.MonkeyPatch.context() as patch:
            count_reads(patch, reads[number])
            printed[number] = carry_out(folders[number], plan, "--trace", processes=number)
    return Runs(mixtures(folder / "plan.yaml", plan), folders, reads, printed)


@pytest.fixture(scope="module")
def usual_runs(world: Path, usual: dict[str, Any]) -> Runs:
    return carried_out(usual, world / "usual", (1, 2, 4))


def test_trace_over_streams_is_the_same_on_1_2_and_4_processes(usual_runs: Runs) -> None:
    traces = [(folder / "trace.jsonl").read_bytes() for folder in usual_runs.folders.values()]
    assert traces[0] == traces[1] == traces[2]
    assert len({line["stage"] for line in traced(usual_runs.folders[1])}) == 2


def test_shares_over_streams_stay_within_the_guarantee_at_every_step(usual_runs: Runs) -> None:
    check_shares(usual_runs.folders[4], usual_runs.made)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_reads_the_rows_of_its_own_lanes_and_no_others(usual_runs: Runs, processes: int) -> None:
    for source, given in lanes_of(usual_runs.folders[processes], usual_runs.made).items():
        readers = Counter[str]()
        for lane, keys in given.items():
            (file,) = usual_runs.reads[processes].glob(f"*.{source}.{lane}")
            assert file.name == f"{lane % processes}.{source}.{lane}"
            read = file.read_text().split()
            assert set(keys) <= set(read)
            # In either stage two windows ahead and the rest of one, and in the second what it has passed of that one again.
            assert len(read) <= len(keys) + 2 * 2 * WINDOW + 3 * (WINDOW - 1)
            readers.update(set(read))
        assert set(readers.values()) == {1}


def test_held_out_rows_of_streams_are_never_trained_on(usual_runs: Runs) -> None:
    trained = {(line["source"], line["key"]) for line in traced(usual_runs.folders[1])}
    held_out = {(name, key) for name, selection in usual_runs.made[0].selections.items() for key in selection.source.keys(selection.held_out)}
    assert len(held_out) == 2 * 4
    assert not held_out & trained


def test_lane_gives_each_of_its_rows_once_an_epoch_over_both_stages(usual_runs: Runs) -> None:
    finished = {}
    for source, given in lanes_of(usual_runs.folders[4], usual_runs.made).items():
        rows = rows_of_lanes(usual_runs.made[0].selections[source].stream)
        finished[source] = check_epochs(given, rows)
    assert finished["tars"] > 2  # its shortest lane has run out
    assert finished["hub"] == 0


# --- shards as they should not be -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strange(world: Path) -> dict[str, Any]:
    """Streams of fewer shards than processes, of one row, and one that breaks off; folders of one row and of few."""
    cut = write_tars(world / "cut", (12, 12))
    shard = world / "cut" / "s-000.tar"
    with tarfile.open(shard) as tar:
        shard_bytes = tar.getmember("0008.png").offset + 512 + 10
    shard.write_bytes(shard.read_bytes()[:shard_bytes])
    sources: dict[str, Any] = {
        "one_shard": {"path": write_tars(world / "one_shard", (21,))},
        "two_shards": {"path": write_tables(world / "two_shards", (10, 17), group=100)},
        "cut": {"path": cut},
        "one_row": {"path": write_tars(world / "one_row", (1,))},
    }
    streams = {name: {**source, "stream": True, "lanes": 4} for name, source in sources.items()}
    folders = {"single": {"path": write_squares(world / "single", 1)}, "few": {"path": write_squares(world / "few", 5)}}
    stage = {"name": "only", "steps": 12, "batch": {"images": 16, "micro": 4}, "mix": {**dict.fromkeys(streams, 3), "single": 1, "few": 3}}
    return plan_over(world, {**streams, **folders}, [stage])


@pytest.fixture(scope="module")
def strange_runs(world: Path, strange: dict[str, Any]) -> Runs:
    return carried_out(strange, world / "strange", (1, 4))


def test_trace_over_strange_shards_is_the_same_on_1_and_4_processes(strange_runs: Runs) -> None:
    assert (strange_runs.folders[1] / "trace.jsonl").read_bytes() == (strange_runs.folders[4] / "trace.jsonl").read_bytes()


def test_shares_stay_exact_over_sources_that_run_out_or_end_early(strange_runs: Runs) -> None:
    check_shares(strange_runs.folders[4], strange_runs.made)


def test_fewer_shards_than_processes_and_shards_that_run_out_give_each_row_once_an_epoch(strange_runs: Runs) -> None:
    given = lanes_of(strange_runs.folders[4], strange_runs.made)
    for source in ("one_shard", "two_shards", "cut"):
        rows = rows_of_lanes(strange_runs.made[0].selections[source].stream)
        assert check_epochs(given[source], rows) >= 4  # 36 are drawn of 19 and 25 rows, in four lanes
    assert {key for keys in given["one_row"].values() for key in keys} == {"s-000.tar:0000"}


def test_folder_that_runs_out_begins_another_epoch_in_another_order(strange_runs: Runs) -> None:
    draws = draws_of(strange_runs.folders[4], strange_runs.made)
    assert set(draws["single"]) == {"000.png"}
    epochs = [tuple(draws["few"][start : start + 5]) for start in range(0, 35, 5)]
    assert all(sorted(epoch) == [f"{number:03d}.png" for number in range(5)] for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_shard_that_ends_early_gives_its_whole_rows_and_the_cut_one_is_named_and_counted_once(strange_runs: Runs) -> None:
    for folder in strange_runs.folders.values():
        (warning,) = [line["message"] for line in events(folder, "warning")]
        assert warning.startswith("source 'cut': s-000.tar:0008: the shard ends early: it ends at byte ")
        (page,) = json.loads((folder / "ledger.json").read_text())["stages"]
        assert {name: source["dropped"] for name, source in page["sources"].items() if source["dropped"]} == {"cut": {"unreadable": 1}}
        keys = {line["key"] for line in traced(folder) if line["source"] == "cut"}
        assert keys == {*(f"s-000.tar:{number:04d}" for number in range(2, 8)), *(f"s-001.tar:{number:04d}" for number in range(12, 24))}


# --- rows whose pixels are broken -----------------------------------------------------------------------------------------------------------


def test_another_row_of_its_lane_stands_in_for_one_that_cannot_be_decoded_whatever_the_number_of_processes(world: Path) -> None:
    path = write_tars(world / "broken", (20, 20))
    for shard, names in (("s-000.tar", ["0005.png", "0009.png"]), ("s-001.tar", ["0025.png"])):
        break_pixels(world / "broken" / shard, names)
    sources = {"broken": {"path": path, "stream": True, "lanes": 4}, "photos": {"path": write_squares(world / "beside", 6)}}
    stage = {"name": "only", "steps": 12, "batch": {"images": 8, "micro": 1}, "mix": {"broken": 3, "photos": 1}}
    plan = plan_over(world, sources, [stage])
    carry_out(world / "mended1", plan, "--trace")
    carry_out(world / "mended2", {**plan, "workers": 2}, "--trace", processes=2)
    assert (world / "mended1" / "trace.jsonl").read_bytes() == (world / "mended2" / "trace.jsonl").read_bytes()
    broken = {f"s-000.tar:{number:04d}" for number in (5, 9)} | {"s-001.tar:0025"}
    made = mixtures(world / "broken.yaml", plan)
    rows = rows_of_lanes(made[0].selections["broken"].stream)
    assert broken < set().union(*rows.values())
    for lane, keys in lanes_of(world / "mended2", made)["broken"].items():
        assert set(keys) == rows[lane] - broken  # 18 draws of 9 or 10 rows: what stands in comes from the same lane
    for folder in (world / "mended1", world / "mended2"):
        (page,) = json.loads((folder / "ledger.json").read_text())["stages"]
        assert page["sources"]["broken"]["dropped"] == {"unreadable": 3}
        warned = [line["message"] for line in events(folder, "warning")]
        assert {message.split(": ")[1] for message in warned} == broken
        assert len(warned) == 3


@pytest.mark.parametrize(
    ("rows", "broken", "said"),
    [
        (1, range(1), "source 'broken': a row and those that could stand in its place cannot be read; the last: s-000.tar:0000: target: "),
        (40, range(4, 40, 3), "rows cannot be read, such as s-000.tar:00"),
    ],
)
def test_stream_of_too_many_broken_rows_stops_the_run_and_is_named(world: Path, rows: int, broken: Sequence[int], said: str) -> None:
    folder = world / f"of{rows}"
    path = write_tars(folder, (rows,))
    break_pixels(folder / "s-000.tar", [f"{number:04d}.png" for number in broken])
    plan = plan_over(world, {"broken": {"path": path, "stream": True, "lanes": 2}}, [{"name": "only", "batch": {"images": 8, "micro": 4}, "mix": {"broken": 1}}])
    printed = carry_out(world / f"stopped{rows}", plan, expect=2)
    assert said in printed
    assert "Traceback" not in printed


# --- going on -------------------------------------------------------------------------------------------------------------------------------


def newest(folder: Path) -> dict[str, int]:
    """Stage folder to the step of its newest checkpoint, of those that have any."""
    steps = {stage.name: [int(step.name.removeprefix("step-")) for step in stage.glob("step-*")] for stage in (folder / "stages").iterdir()}
    return {stage: max(found) for stage, found in steps.items() if found}


def test_run_killed_between_two_stages_goes_on_in_its_streams_where_they_stood(world: Path, usual: dict[str, Any], usual_runs: Runs, tmp_path: Path) -> None:
    carry_out(tmp_path / "until", usual, "--trace", "--until", "first", record=tmp_path / "count")
    carry_out(tmp_path / "killed", usual, "--trace", kill_at=int((tmp_path / "count").read_text()) + 1)
    assert newest(tmp_path / "killed") == {"1-first": 8}
    carry_out(tmp_path / "killed", usual, "--trace", processes=2)
    assert (tmp_path / "killed" / "trace.jsonl").read_bytes() == (usual_runs.folders[1] / "trace.jsonl").read_bytes()


def test_run_goes_on_with_another_number_of_processes_in_the_same_rows(world: Path, usual: dict[str, Any], usual_runs: Runs, tmp_path: Path) -> None:
    plan = {**usual, "save_every": 1}
    folder = tmp_path / "run"
    steps = []
    for processes, kill_at in ((1, 40), (2, 60), (4, 90)):
        carry_out(folder, plan, "--trace", processes=processes, kill_at=kill_at)
        steps.append(newest(folder))
    carry_out(folder, plan, "--trace")
    assert ["2-second" in step for step in steps] == [False, False, True], steps
    assert 0 < steps[0]["1-first"] < steps[1]["1-first"] < 8, steps
    assert steps[2]["2-second"] < 5, steps
    assert (folder / "trace.jsonl").read_bytes() == (usual_runs.folders[1] / "trace.jsonl").read_bytes()


def test_more_processes_than_lanes_are_refused_with_the_cure(world: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    usual = {**usual, "sources": {**usual["sources"], "hub": {**usual["sources"]["hub"], "lanes": 1}}}
    printed = carry_out(tmp_path / "run", usual, processes=2, expect=2)
    assert "source 'hub' is read in 1 lane, fewer than the 2 processes; start fewer, or set sources.hub.lanes: 2" in printed
    assert "Traceback" not in printed


def test_step_that_leaves_a_process_without_an_image_is_refused_before_the_first(world: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    sources = {"tars": {**usual["sources"]["tars"], "lanes": 16}}
    plan = plan_over(world, sources, [{"name": "only", "batch": {"images": 3}, "mix": {"tars": 1}}])
    printed = carry_out(tmp_path / "run", plan, processes=3, expect=2)
    assert (
        "step 5, of 3 images, leaves one of the 3 processes without any, since its streams are read by the others; "
        "start fewer, or make batch larger, or set sources.tars.lanes to a multiple of 3"
    ) in printed
    assert "Traceback" not in printed
    (made,) = mixtures(tmp_path / "plan.yaml", plan)
    made.check_processes(6, 3)
    made.check_processes(0, 2)


@pytest.mark.parametrize(("lanes", "processes"), [(5, 3), (8, 2), (16, 3), (7, 7)])
def test_counts_of_draws_that_each_process_reads_are_those_of_its_lanes(lanes: int, processes: int) -> None:
    readers = np.arange(100) % lanes % processes
    counted = read_by(np.arange(101), lanes, processes)
    for process in range(processes):
        assert counted[:, process].tolist() == [0, *np.cumsum(readers == process)]


def test_a_stream_that_does_not_say_how_many_rows_it_has_fills_its_micro_batches(world: Path, tmp_path: Path) -> None:
    """The number of rows bounds a micro-batch, so that no row stands in it twice; that they are not counted is no bound."""
    sources = {"tars": {"path": write_tars(tmp_path / "tars", (24, 16)), "stream": True, "lanes": 4}}
    plan = plan_over(world, sources, [{"name": "only", "batch": {"images": 16, "micro": 4}, "mix": {"tars": 1}}])
    (mixture,) = mixtures(tmp_path / "plan.yaml", plan)
    drawn = mixture.order.steps(0, 8)
    for step in range(8):
        micro = drawn.micro[drawn.starts[step] : drawn.starts[step + 1]]
        assert np.bincount(micro).tolist() == [4] * 4

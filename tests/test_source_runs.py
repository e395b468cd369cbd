"""Runs over every kind of source, killed and resumed: the very same rows, losses and adapter as of the run that nobody disturbed."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest

from mixing.stream import Stream
from models import tiny_flux
from runs import adapter_bytes, break_pixels, carry_out, events, plan_of, square, traced, words, write_tables, write_tars

pytestmark = pytest.mark.launch

ROWS = 14


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model; runs are typed in its folder, so that hub/user/NAME there is a dataset."""
    folder = tmp_path_factory.mktemp("world")
    tiny_flux(folder / "model", pixels=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setitem(Stream.lanes.__kwdefaults__, "rows", 3)  # of a window, so that a lane of few rows has several
        datasets.disable_progress_bars()
        yield folder


def write_images(folder: Path) -> list[dict[str, Any]]:
    """Squares in a folder, each with a reference; gives their records."""
    (folder / "from").mkdir(parents=True)
    records = []
    for number in range(ROWS):
        (folder / f"{number:02d}.png").write_bytes(square(number))
        (folder / "from" / f"{number:02d}.png").write_bytes(square(1000 + number))
        records.append({"image": f"{number:02d}.png", "reference": f"from/{number:02d}.png", "prompt": words(number)})
    return records


def write_captioned(folder: Path) -> str:
    """A folder of squares with two captions each."""
    folder.mkdir()
    for number in range(ROWS):
        (folder / f"{number:02d}.png").write_bytes(square(number))
        (folder / f"{number:02d}.txt").write_text(f"{words(number)}\nthe same, {words(number)}")
    return str(folder)


def write_metadata(folder: Path) -> str:
    """A folder of squares with a metadata.jsonl, as `imagefolder` has it."""
    records = write_images(folder)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": row["image"], "text": row["prompt"]}) for row in records))
    return str(folder)


def table() -> datasets.Dataset:
    """The same rows in a table."""
    columns = {"image": [{"bytes": square(number), "path": None} for number in range(ROWS)], "text": [words(number) for number in range(ROWS)], "number": list(range(ROWS))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int64")}))


@pytest.fixture(scope="module")
def indexed(world: Path) -> dict[str, Any]:
    """Ten sources, of each kind that is looked at before it is read; some with references, several captions, a choice of rows, flips."""
    lines, values, objects = (write_images(world / kind) for kind in ("jsonl", "csv", "json"))
    (world / "jsonl" / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (world / "json" / "rows.json").write_text(json.dumps(objects))
    with (world / "csv" / "rows.csv").open("w", newline="") as file:
        written = csv.DictWriter(file, list(values[0]))
        written.writeheader()
        written.writerows(values)
    table().save_to_disk(world / "saved", num_shards=2)
    table().save_to_disk(world / "arrow", num_shards=2)
    write_tables(world / "user" / "indexed" / "data", (ROWS,))
    return {
        "captioned": {"path": write_captioned(world / "captioned"), "captions": {"dropout": 0.2, "shuffle_tags": True}},
        "metadata": {"path": write_metadata(world / "metadata"), "augment": {"flip": 0.5}},
        "jsonl": {"path": str(world / "jsonl" / "rows.jsonl"), "task": "edit"},
        "csv": {"path": str(world / "csv" / "rows.csv"), "task": "subject"},
        "json": {"path": str(world / "json" / "rows.json"), "take": {"count": 9, "seed": 5}},
        "parquet": {"path": write_tables(world / "parquet", (6, 8)), "where": "width >= 8"},
        "arrow": {"path": str(world / "arrow" / "*.arrow"), "where": "number < 11"},
        "saved": {"path": str(world / "saved")},
        "tar": {"path": write_tars(world / "tar", (6, 8))},
        "hub": {"path": "hub/user/indexed"},
    }


@pytest.fixture(scope="module")
def streamed(world: Path) -> dict[str, Any]:
    """Streams: shards on this machine; datasets as the Hub has them (tables, shards, what `datasets` itself reads); one row; a shard that ends early.

    Beside the last one lies a shard with a broken image.
    """
    write_tables(world / "user" / "tables" / "data", (10, 8), group=4)
    write_tars(world / "user" / "tars", (10, 8))
    write_metadata(world / "user" / "images")
    cut = write_tars(world / "cut", (8, 5))
    (world / "cut" / "s-000.tar").write_bytes((world / "cut" / "s-000.tar").read_bytes()[: 5 * 2048 + 530])  # inside the sixth row's image
    break_pixels(world / "cut" / "s-001.tar", ["0010.png"])
    sources = {
        "tar": {"path": write_tars(world / "streamed-tar", (6, 5, 7)), "captions": {"dropout": 0.2}},
        "parquet": {"path": write_tables(world / "streamed-parquet", (9, 9), group=4), "augment": {"flip": 0.5}},
        "edit": {"path": write_tars(world / "streamed-edit", (7, 6), reference=True), "task": "edit", "columns": {"reference": "from.png"}},
        "hub_tables": {"path": "hub/user/tables"},
        "hub_tars": {"path": "hub/user/tars"},
        "hub_images": {"path": "hub/user/images"},
        "one_row": {"path": write_tars(world / "one_row", (1,))},
        "cut": {"path": cut},
    }
    return {name: {**source, "stream": True, "lanes": 2} for name, source in sources.items()}


def plan_over(world: Path, sources: dict[str, Any], workers: int) -> dict[str, Any]:
    """Two stages over all sources, saved at every step."""
    stage = {"steps": 4, "resolution": 8, "lr": 0.01, "batch": {"images": 2 * len(sources), "micro": 4}, "mix": dict.fromkeys(sources, 1)}
    stages = [{**stage, "name": "first", "precision": "fp32"}, {**stage, "name": "second", "precision": "bf16", "ema": 0.9}]
    return plan_of(world, sources=sources, stages=stages, evaluate={"rows": 1}, previews={"rows": 0}, save_every=1, log_every=1, workers=workers)


def outcome(folder: Path) -> tuple[bytes, list[Any], bytes]:
    """The trace, the losses and the adapter of a run."""
    losses = [[line[word] for word in ("stage", "step", "loss", "losses", "drawn", "grad_norm")] for line in events(folder, "step")]
    return (folder / "trace.jsonl").read_bytes(), losses, adapter_bytes(folder)


def steps_of(folder: Path) -> Sequence[str]:
    """What the run's checkpoints are called."""
    return sorted(str(step.relative_to(folder / "stages")) for step in folder.glob("stages/*/step-*"))


@pytest.mark.parametrize(("kinds", "processes", "workers"), [("indexed", 1, 0), ("streamed", 1, 2), ("both", 2, 0)])
def test_killed_run_over_every_kind_of_source_ends_as_the_undisturbed_one(
    indexed: dict[str, Any], streamed: dict[str, Any], world: Path, tmp_path: Path, kinds: str, processes: int, workers: int
) -> None:
    """Killed at four points, one launch after the other, each time behind where the last one began."""
    sources = (indexed if kinds != "streamed" else {}) | ({f"streamed_{name}": source for name, source in streamed.items()} if kinds != "indexed" else {})
    plan = plan_over(world, sources, workers)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    carry_out(whole, plan, "--trace", processes=processes, record=tmp_path / "count")
    given = Counter((line["stage"], line["source"]) for line in traced(whole))
    assert given == {(stage, source): 8 for stage in ("first", "second") for source in sources}
    for number in ("s-000.tar:0005", "s-001.tar:0010"):  # the cut row, and the broken one
        assert (kinds != "indexed") == any(number in line["message"] for line in events(whole, "warning"))
    count = int((tmp_path / "count").read_text())
    stood = []
    for number in range(4):
        carry_out(killed, plan, "--trace", processes=processes, kill_at=count // 4 + 3 * number)
        stood.append(steps_of(killed))
    assert all(before != after for before, after in pairwise(stood)), stood
    assert stood[-1][-1].startswith("2-second/"), stood
    carry_out(killed, plan, "--trace", processes=processes)
    for was, now in zip(outcome(whole), outcome(killed), strict=True):
        assert was == now

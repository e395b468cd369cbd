"""Trackers: one curve over stages and restarts, with tables and pictures; none of them ends a run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runs import carry_out, events, make_world, plan_of
from stages.plan import Tracker
from stages.points import Picture, Point, Rows, Stages, point, points
from stages.trackers import tensorboard_curves, trackers, wandb_curves
from stages.trackers.trackers import Trackers

NAMES = ("trackio", "tensorboard", "wandb")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Path]:
    """trackio's files; it reads where they go when it is imported."""
    home = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(home))
        patch.setattr(tensorboard_curves, "_SECONDS", 1)
        for module in ("trackio", "torch.utils.tensorboard", "wandb"):
            import_module(module)  # once, for all the processes that are forked here
        yield home


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def of_trackio(home: Path, folder: Path, project: str) -> list[tuple[int, dict[str, Any]]]:
    """Step and values of each point of a run, in the order in which they came."""
    name = json.loads((folder / "tracking.json").read_text())["trackio"]["name"]
    with sqlite3.connect(home / f"{project}.db") as table:
        if not table.execute("SELECT name FROM sqlite_master WHERE name = 'metrics'").fetchall():
            return []
        return [(step, json.loads(values)) for step, values in table.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,))]


def of_tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    return [(event.step, round(event.value, 4)) for event in read.Scalars(tag)] if tag in read.Tags()["scalars"] else []


def of_wandb(folder: Path) -> list[dict[str, Any]]:
    """The values of each point of a run, in the order in which they came."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("wandb/*run-*/*.wandb")):
        for content in wandb_curves._records(file.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return found


def series(name: str, home: Path, folder: Path, project: str, tag: str) -> list[tuple[int, float]]:
    """Step and value of each point of a curve."""
    if name == "trackio":
        return [(step, round(values[tag], 4)) for step, values in of_trackio(home, folder, project) if tag in values]
    if name == "tensorboard":
        return of_tensorboard(folder, tag)
    return [(values["step"], round(values[tag], 4)) for values in of_wandb(folder) if tag in values]


def made(number: int) -> Point:
    """Point number `number`, from 1: two at each step."""
    return Point((number - 1) // 2, 1 + number // 8, f"stage-{1 + number // 8}", {"loss": float(number)})


def told(folder: Path, asked: Sequence[str], project: str, kept: int, more: int, *, warned: list[str] | None = None, killed: bool = False) -> None:
    """A launch whose record holds `kept` points, and which makes `more`. killed: it never closes its trackers."""
    said: list[str] = [] if warned is None else warned
    opened = Trackers(said.append)
    opened.open([Tracker.model_validate({"name": name}) for name in asked], folder, project, {"seed": 3}, "seed: 3\n", lambda: map(made, range(1, kept + 1)))
    for number in range(kept + 1, kept + more + 1):
        opened.add(made(number))
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    opened.close()


def in_fork(do: Callable[[], None]) -> int:
    """The exit code of a forked process that does this."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", NAMES)
def test_points_that_a_killed_run_made_after_its_checkpoint_stand_once(home: Path, tmp_path: Path, name: str) -> None:
    project = f"once-{name}"
    folder = tmp_path / "run"
    folder.mkdir()
    assert in_fork(lambda: told(folder, [name], project, 0, 9)) == 0
    assert in_fork(lambda: told(folder, [name], project, 5, 7)) == 0  # its checkpoint was after point 5
    assert [value for _, value in series(name, home, folder, project, "loss")] == [float(number) for number in range(1, 13)]


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_points_that_a_tracker_lost_when_the_run_was_killed_are_brought_to_it(home: Path, tmp_path: Path, name: str) -> None:
    project, folder = f"lost-{name}", tmp_path / "run"
    folder.mkdir()
    assert in_fork(lambda: told(folder, [name], project, 0, 60, killed=True)) == -signal.SIGKILL
    assert in_fork(lambda: told(folder, [name], project, 60, 2)) == 0
    assert [value for _, value in series(name, home, folder, project, "loss")] == [float(number) for number in range(1, 63)]


def test_a_point_that_tensorboard_was_killed_within_stands_once(tmp_path: Path) -> None:
    told(tmp_path, ["tensorboard"], "torn", 0, 3)
    [file] = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    for lost in (1, len(content) - content.rindex(b"loss") + 10, 60):
        file.write_bytes(content[:-lost])  # a piece of the mark; all but a piece of the number; the mark and some of the number
        for later in set((tmp_path / "tensorboard").iterdir()) - {file}:
            later.unlink()
        told(tmp_path, ["tensorboard"], "torn", 3, 1)
        assert [value for _, value in of_tensorboard(tmp_path, "loss")] == [1.0, 2.0, 3.0, 4.0]


def test_a_tracker_named_later_has_the_whole_run(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert in_fork(lambda: told(folder, ["tensorboard"], "later", 0, 4)) == 0
    assert in_fork(lambda: told(folder, ["tensorboard", "trackio"], "later", 4, 1)) == 0
    for name in ("tensorboard", "trackio"):
        assert [value for _, value in series(name, home, folder, "later", "loss")] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_new_run_in_a_folder_of_the_same_name_is_another_run_for_trackio(home: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "run").mkdir(parents=True)
        assert in_fork(lambda place=place: told(tmp_path / place / "run", ["trackio"], "twice", 0, 3)) == 0  # type: ignore[misc]
    names = [json.loads((tmp_path / place / "run" / "tracking.json").read_text())["trackio"]["name"] for place in ("a", "b")]
    assert names == ["run", "run-2"]
    assert len(of_trackio(home, tmp_path / "b" / "run", "twice")) == 3


class Fails:
    """Curves of a tracker that fails at its second point."""

    notes: Mapping[str, str] = {}

    def __init__(self, opening: object) -> None:
        self.added = 0

    def held(self) -> int:
        return 0

    def cut(self, number: int) -> None:
        raise AssertionError("there is nothing to cut")

    def add(self, point: Point) -> None:
        self.added += 1
        if self.added > 1:
            raise ConnectionError("the server is away")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is left alone")


def test_a_tracker_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CURVES", {**trackers.CURVES, "wandb": Fails})
    warned: list[str] = []
    told(tmp_path, ["wandb", "tensorboard"], "fails", 0, 4, warned=warned)
    assert warned == [
        "wandb fails, and its curves end here (the server is away); metrics.jsonl has all of them, and the next launch of this run brings wandb up to date"
    ]
    assert len(of_tensorboard(tmp_path, "loss")) == 4


def test_a_place_where_nothing_can_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way")
    warned: list[str] = []
    told(tmp_path, ["tensorboard"], "fails", 0, 2, warned=warned)
    assert len(warned) == 1
    assert warned[0].startswith("tensorboard fails")


def test_a_login_that_is_missing_is_a_warning_and_no_question(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def do() -> None:
        opened = Trackers((tmp_path / "warned").write_text)
        opened.open([Tracker(name="wandb", online=True)], tmp_path, "online", {}, "", list)

    assert in_fork(do) == 0
    assert (tmp_path / "warned").read_text().startswith("wandb fails, and its curves end here (nobody is logged in there; type `wandb login`")


def test_tables_and_pictures_come_to_each_tracker_on_this_machine(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=x")  # what the environment names is not asked
    monkeypatch.setenv("WANDB_MODE", "online")
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (6, 4), "red").save(folder / "red.png")
    shown = Point(3, 1, "learn", {}, {"held_out": Rows(("source", "loss"), (("photos", 0.5), ("a|b", None)))}, {"previews": Picture("red.png", "a red square")})

    def do() -> None:
        opened = Trackers(print)
        opened.open([Tracker.model_validate({"name": name}) for name in NAMES], folder, "shown", {"seed": 3}, "seed: 3\n", list)
        opened.add(shown)
        opened.close()

    assert in_fork(do) == 0
    [(step, values)] = of_trackio(home, folder, "shown")
    assert (step, values["stage"], values["stage_name"]) == (3, 1, "learn")
    assert values["held_out"]["_value"] == [{"source": "photos", "loss": 0.5}, {"source": "a|b", "loss": None}]
    assert values["previews"]["caption"] == "a red square"
    with Image.open(home / "media" / values["previews"]["file_path"]) as kept:
        assert kept.size == (6, 4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(image.step, image.width, image.height) for image in read.Images("previews")] == [(3, 6, 4)]
    texts = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert texts["held_out/text_summary"].splitlines() == ["| source | loss |", "| --- | --- |", "| photos | 0.5 |", "| a\\|b |  |"]
    assert texts["previews/caption/text_summary"] == "a red square"
    assert "seed: 3" in texts["plan/text_summary"]

    [values] = of_wandb(folder)
    assert (values["step"], values["stage_name"], values["previews.caption"]) == (3, "learn", "a red square")
    assert all(run.name.startswith(("offline-run-", "latest-run")) for run in folder.glob("wandb/*run*"))
    [table] = folder.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": ["source", "loss"], "data": [["photos", 0.5], ["a|b", None]]}


def test_a_point_stands_at_its_step_counted_over_all_stages() -> None:
    stages = Stages({"first": 100, "second": 50})
    event = {"event": "step", "stage": "second", "step": 7, "loss": 0.5, "lr": 1e-4, "grad_norm": None, "losses": {"a": 0.25}, "drawn": {"a": 3, "b": 1}}
    found = point(event, stages)
    assert found is not None
    assert (found.step, found.stage, found.name) == (107, 2, "second")
    assert found.numbers == {"loss": 0.5, "lr": 1e-4, "loss/a": 0.25, "drawn/a": 0.75, "drawn/b": 0.25}
    assert point({"event": "eval", "stage": "", "step": 0, "kind": "base", "sources": {}}, stages) == Point(0, 0, "")
    assert point({"event": "warning", "stage": "second", "step": 7, "message": "m"}, stages) is None


@pytest.mark.launch
def test_curves_of_a_killed_run_are_those_of_an_uninterrupted_one(home: Path, world: Path, tmp_path: Path) -> None:
    stage = {"steps": 6, "resolution": 8, "batch": {"images": 4, "micro": 4}, "lr": 0.01}
    plan = plan_of(world, name="curves", track=list(NAMES), log_every=1, stages=[{**stage, "name": "one"}, {**stage, "name": "two", "mix": {"photos": 3, "edits": 1}}])
    count = tmp_path / "count"
    carry_out(tmp_path / "whole", plan, record=count)
    number = int(count.read_text())
    carry_out(tmp_path / "killed", plan, kill_at=number // 2)
    said = carry_out(tmp_path / "killed", plan)
    assert "warning" not in said
    stages = Stages({"one": 6, "two": 6})
    expected = list(points(tmp_path / "whole", stages))
    losses = [(found.step, round(found.numbers["loss"], 4)) for found in expected if "loss" in found.numbers]
    assert [step for step, _ in losses] == list(range(1, 13))
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        for name in NAMES:
            assert series(name, home, folder, "curves", "loss") == losses, name
            held_out = series(name, home, folder, "curves", "held_out/photos")
            assert [step for step, _ in held_out] == [0, 0, 6, 6, 12], name
        rows = of_trackio(home, folder, "curves")
        assert len(rows) == len(expected)
        assert Counter(name for _, values in rows for name in values if name in ("held_out", "ledger", "previews", "previews/photos-1")) == {
            "held_out": 5, "ledger": 2, "previews": 2, "previews/photos-1": 2,
        }  # fmt: skip
    assert all(line["memory_bytes"] > 10_000_000 for line in events(tmp_path / "whole", "step"))

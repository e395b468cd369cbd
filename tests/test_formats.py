"""Formats: run folders that former versions left are gone on with, and those of another time are refused in words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import FINISHED, FROZEN, HALFWAY, KILLED_AFTER, make_world, plan_of_format
from rich.console import Console
from safetensors.torch import load_file

from runs import carry_out, events, traced, write_plan
from stages.advise import advise
from stages.checkpoint import newest_checkpoint, read_checkpoint
from stages.compare import compare
from stages.families.open import fingerprint
from stages.formats import FORMAT, OLDEST, FormatError, upgraded
from stages.plan import Plan
from stages.reader import read_plan
from stages.report import write_report
from stages.start import read_start

FORMER = sorted(path.name for path in FROZEN.iterdir() if path.name.isdigit())
STAGES = {"1-low": 4, "2-lanes": 6, "3-follow": 7}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("formats"))


@pytest.fixture(autouse=True)
def _in_the_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


@pytest.fixture(scope="module", params=FORMER)
def gone_on(request: pytest.FixtureRequest, world: Path) -> tuple[Path, Path, str]:
    """A run that was killed half-way under a former format, before and after today's code has gone on with it, and what that printed."""
    frozen, folder = FROZEN / request.param / HALFWAY, world / f"gone-on-{request.param}"
    shutil.copytree(frozen, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return frozen, folder, carry_out(Path(folder.name), plan_of_format(request.param), "--trace")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def assert_alike(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # another machine, or a later torch, may round otherwise
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_run_killed_under_a_former_format_ends_as_one_that_it_trained_through(gone_on: tuple[Path, Path, str]) -> None:
    frozen, folder, printed = gone_on
    assert "going on with stage 'lanes' after step 4" in printed
    assert "warning" not in printed
    whole = frozen.parent / FINISHED
    assert_alike(weights(folder), weights(whole))
    for stage, steps in STAGES.items():
        ours, theirs = (each / "stages" / stage / f"step-{steps:06d}" for each in (folder, whole))
        for file in theirs.glob("*.safetensors"):
            assert_alike(load_file(ours / file.name), load_file(file))
    assert traced(folder) == traced(whole)
    first = len(traced(frozen))
    assert traced(folder)[:first] == traced(frozen)
    assert json.loads((folder / "ledger.json").read_text()) == json.loads((whole / "ledger.json").read_text())
    for kind in ("step", "eval", "shares", "handoff"):
        ours, theirs = ([(line["stage"], line["step"] if kind != "handoff" else None) for line in events(each, kind) if "stage" in line] for each in (folder, whole))
        assert ours == theirs
    assert max(line["step"] for line in events(frozen, "step")) == KILLED_AFTER  # it had gone further than its checkpoint, so lines were cut off


def test_state_of_a_former_format_has_all_that_todays_has_once_it_is_upgraded(gone_on: tuple[Path, Path, str]) -> None:
    """Not so? What is new in a state, or in what it records of the plan, needs a new FORMAT, and a line in stages/formats.py that says what former versions did in its place."""
    frozen, folder, _ = gone_on
    whole = frozen.parent / FINISHED / "stages"
    for stage, steps in STAGES.items():
        former = read_checkpoint(whole / stage / f"step-{steps:06d}")
        manifest = json.loads((former.folder / "manifest.json").read_text())
        assert manifest["format"] == int(frozen.parent.name) < FORMAT == former.state["format"]
        if stage == "1-low":
            continue  # gone on with, it is what it was
        today = json.loads((folder / "stages" / stage / former.folder.name / "state.json").read_text())
        assert today["format"] == FORMAT
        assert list(fields(former.state, today)) == list(fields(today, former.state))


def fields(state: object, other: object, place: str = "") -> Iterator[str]:
    """The places of all fields of a state, in order; of one that is nothing in the other, where it was not known, without what it holds."""
    if isinstance(state, Mapping) and other is not None:
        for name in sorted(state):
            yield f"{place}.{name}"
            yield from fields(state[name], other.get(name, {}) if isinstance(other, Mapping) else {}, f"{place}.{name}")


@pytest.mark.parametrize("former", FORMER)
def test_run_finished_under_a_former_format_is_answered_reported_compared_and_advised_upon(world: Path, former: str, gone_on: tuple[Path, Path, str]) -> None:
    folder = world / f"finished-{former}"
    shutil.copytree(FROZEN / former / FINISHED, folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".jsonl")}
    printed = carry_out(Path(folder.name), plan_of_format(former), "--trace")
    assert printed.count("is finished") == 3
    assert "published" not in printed
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "Held-out loss" in write_report(folder).read_text()
    with (console := Console(width=160)).capture() as capture:
        console.print(compare(folder, gone_on[1]))
    assert re.search(r"photos +\S+ +\S+ +[·+-]? ?[+−-]?0\.0000", capture.get()), capture.get()
    assert advise(folder)


@pytest.mark.parametrize("former", FORMER)
def test_stage_and_run_begin_from_a_stage_and_an_adapter_of_a_former_format(world: Path, former: str) -> None:
    frozen, folder = FROZEN / former / FINISHED, world / f"appended-{former}"
    shutil.copytree(frozen, folder)
    last = load_file(frozen / "stages" / "3-follow" / "step-000007" / "adapter.safetensors")
    plan = plan_of_format(former)
    more = {**plan["stages"][0], "name": "more", "steps": 1, "lr": 0.0}
    printed = carry_out(Path(folder.name), {**plan, "stages": [*plan["stages"], {**more, "handoff": {"optimizer": "keep"}}]})
    changed = re.search(r"optimizer of 8 of 8 weights \(keep\); the function changed by (\S+) of what was learnt", printed)
    assert changed is not None, printed
    assert float(changed[1]) < 1e-4  # 0 only on the machine that the frozen run was made on
    assert_alike(read_checkpoint(folder / "stages" / "4-more" / "step-000001").tensors("adapter"), last)
    for start in (frozen, frozen / "adapter"):
        begun = read_start(asked({**plan, "start": str(start), "stages": [more]}), fingerprint("model"))
        assert begun.adapter is not None
        assert_alike(begun.adapter, last)


def asked(plan: Mapping[str, Any]) -> Plan:
    """A plan as it is read, with one source."""
    return read_plan(write_plan(Path("asked.yaml"), {**plan, "sources": {"photos": {"path": "photos"}}})).plan


@pytest.mark.parametrize(("number", "words", "cure"), [(OLDEST - 1, "an early version", "go on with the version that wrote it"), (FORMAT + 1, "a later version", "update Medley")])
def test_other_formats_are_refused_by_run_and_start_and_nothing_is_deleted(world: Path, number: int, words: str, cure: str) -> None:
    folder, plan = world / f"other-{number}", plan_of_format(FORMER[-1])
    shutil.copytree(FROZEN / FORMER[-1] / HALFWAY, folder)
    checkpoint = folder / "stages" / "2-lanes" / "step-000004"
    for name in ("manifest.json", "state.json"):
        (checkpoint / name).write_text(json.dumps({**json.loads((checkpoint / name).read_text()), "format": number}))
    with pytest.raises(FormatError):
        newest_checkpoint(checkpoint.parent, print)
    printed = carry_out(Path(folder.name), plan, expect=2)
    said = f"{Path(folder.name) / checkpoint.relative_to(folder)}: written in format {number}, by {words} of Medley; this one reads {OLDEST} to {FORMAT}; {cure}"
    assert f"{said}, or pass --out" in printed
    assert (checkpoint / "adapter.safetensors").exists()
    assert len(events(folder, "step")) == 4 + KILLED_AFTER
    with pytest.raises(ValueError, match=re.escape(f"start: {said}")):
        read_start(asked({**plan, "start": folder.name, "stages": plan["stages"][:1]}), fingerprint("model"))


def test_checkpoint_that_claims_another_format_than_it_was_written_in_is_damaged(tmp_path: Path) -> None:
    source = FROZEN / FORMER[-1] / HALFWAY / "stages" / "2-lanes" / "step-000004"
    for place, (manifest, state, words) in enumerate([(FORMAT, None, f"its manifest is of format {FORMAT}"), ("2", None, "which is no number"), (True, None, "which is no number"), (None, FORMAT, "its hash differs")]):
        folder = tmp_path / str(place) / source.name
        shutil.copytree(source, folder)
        for name, number in (("manifest.json", manifest), ("state.json", state)):
            if number is not None:
                (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "format": number}))
        with pytest.raises(ValueError, match=words):
            read_checkpoint(folder)
        assert newest_checkpoint(folder.parent, print) is None


def test_what_is_frozen_is_as_it_was_written() -> None:
    """Line ends, an editor or a well-meant update: then it would no longer be what a former version left."""
    for former in FORMER:
        for manifest in (FROZEN / former).rglob("manifest.json"):
            for name, entry in json.loads(manifest.read_text())["files"].items():
                assert sha256((manifest.parent / name).read_bytes()).hexdigest() == entry["sha256"]


def test_upgrading_leaves_what_is_there_alone() -> None:
    state: dict[str, Any] = {"format": 2, "stage": "x", "metrics_bytes": 5}
    assert upgraded(state)["metrics_bytes"] == 5
    assert state == {"format": 2, "stage": "x", "metrics_bytes": 5}
    assert upgraded({"format": FORMAT, "a": 1}) == {"format": FORMAT, "a": 1}

"""Room: a full disk is waited for, any other failure of the run's folder ends the run in words, and what is damaged is told from what was written."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError

import stages.checkpoint
import stages.log_files
import stages.open_run
import stages.room
from runs import adapter_bytes, events, make_world, plan_of, started, write_plan
from stages.checked import DamagedError, checked, read_checked
from stages.checkpoint import Checkpoint, write_checkpoint
from stages.console import EnduringConsole
from stages.digests import file_digest
from stages.evaluation_size import Size
from stages.going_on import check_finished
from stages.log_files import BEGINNING, Place
from stages.measured import Measured
from stages.model_mark import is_made_from, write_model_mark
from stages.open_run import _locked
from stages.plan import Plan, Stage
from stages.problems import PlanError, RunError
from stages.publish import _HASHES, is_as_published
from stages.quality import Quality
from stages.room import Left, Lines, Room, is_full
from stages.start import read_start
from stages.stop import Stop
from stages.untrained import _keep, _kept_outputs

FULL = OSError(errno.ENOSPC, "No space left on device")
OF_SAFETENSORS = SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")


@pytest.fixture
def stop() -> Iterator[Stop]:
    made = Stop()
    yield made
    made.close()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def room(tmp_path: Path, stop: Stop, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Room:
    monkeypatch.setattr(stages.room, "LOOKS", 0.001)
    monkeypatch.setattr(stages.room, "_TRIES", 0.002)
    monkeypatch.setattr(stages.room, "_TRIES_FOR_LITTLE", 0.002)
    made = Room(tmp_path / "run", stop, lambda message: said.append(str(message)))
    made.open()
    made.stands = "'refine', step 40,"
    return made


def failing(*errors: Exception, then: object = "written") -> Callable[[], Any]:
    """What fails in these ways, one after the other, and then gives something."""
    left = list(errors)

    def write() -> Any:
        if left:
            raise left.pop(0)
        return then

    return write


def always(error: Exception) -> Callable[[], Any]:
    def write() -> Any:
        raise error

    return write


# --- a full disk ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [FULL, OSError(errno.EDQUOT, "Disk quota exceeded"), OF_SAFETENSORS, OSError("x: Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_waited_for_and_what_was_to_be_written_is_written(room: Room, said: list[str], error: Exception) -> None:
    assert room.must("the checkpoint of 'refine', step 60,", failing(error, error, error), size=3_000_000) == "written"
    first, last = said
    for words in ("is full", str(room.folder), "the checkpoint of 'refine', step 60, needs about 3 MB", "are free", "the checkpoint of 'refine', step 40, stands", "Ctrl-C ends"):
        assert words in first
    assert "there is room again" in last


def test_where_bytes_are_free_and_cannot_be_taken_it_is_said_why(room: Room, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    room.must("the checkpoint", failing(OF_SAFETENSORS))
    assert "needs room, and the quota there is used up (quota -s), though " in said[0]
    found = os.statvfs(room.folder)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=found.f_bavail, f_frsize=found.f_frsize, f_files=1000, f_favail=0))
    room.must("the checkpoint", failing(FULL))
    assert "needs room, and no file more can be made there (df -i), though " in said[2]


def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.room, "PATIENCE", 0.02)
    with pytest.raises(RunError, match=r"full for .* ledger.json needs room.*step 40, stands. Make room, and the same command goes on"):
        room.must("ledger.json", always(FULL))


def test_a_signal_ends_the_wait_and_says_what_is_not_saved(room: Room, stop: Stop) -> None:
    stop.signal = signal.SIGTERM
    began = time.monotonic()
    with pytest.raises(Left, match=r"stopped by SIGTERM while the disk .* was full.*steps since are not saved"):
        room.must("the checkpoint", always(FULL), size=10)
    assert time.monotonic() - began < 1


def test_a_second_signal_ends_the_process_at_once(room: Room, stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.room, "LOOKS", 30.0)

    def write() -> None:
        raise FULL

    def say(message: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # noted, then the wait for the next look begins
        os.kill(os.getpid(), signal.SIGTERM)

    room._say = say
    with pytest.raises(SystemExit) as left:
        room.must("the checkpoint", write)
    assert left.value.code == 143


def test_another_failure_is_not_waited_for(room: Room, said: list[str]) -> None:
    with pytest.raises(RunError, match=r"ledger.json cannot be written: Read-only file system \(/x/ledger.json\); the checkpoint of 'refine', step 40, stands. See to the disk"):
        room.must("ledger.json", always(OSError(errno.EROFS, "Read-only file system", "/x/ledger.json")))
    assert said == []


def test_a_failure_that_comes_while_a_full_disk_is_waited_for_ends_the_run(room: Room) -> None:
    with pytest.raises(RunError, match="Input/output error"):
        room.must("ledger.json", failing(FULL, OSError(errno.EIO, "x")))


def test_nothing_is_written_into_a_folder_that_took_the_runs_place(room: Room) -> None:
    room.folder.rename(room.folder.with_name("elsewhere"))
    with pytest.raises(RunError, match="is not there any more"):
        room.must("ledger.json", lambda: pytest.fail("it wrote"))
    room.folder.mkdir()
    with pytest.raises(RunError, match="or is another folder now"):
        room.must("ledger.json", lambda: pytest.fail("it wrote"))


def test_what_a_run_can_do_without_is_warned_of(room: Room, said: list[str]) -> None:
    assert room.may("report.html", always(FULL), said.append, "python -m stages.report writes it") is None
    assert said == ["report.html is not written: No space left on device; python -m stages.report writes it"]
    assert room.may("report.html", lambda: 3, said.append, "") == 3


def test_an_error_of_the_runs_folder_is_put_into_words_and_another_ones_is_not(room: Room) -> None:
    with pytest.raises(RunError, match=r"Stale file handle.*step 40, stands"), room.ending_in_words():
        raise OSError(errno.ESTALE, "x", str(room.folder / "stages" / "1-a"))
    with pytest.raises(OSError, match="elsewhere"), room.ending_in_words():
        raise OSError(errno.ENOENT, "x", "/elsewhere")


def test_a_folder_that_cannot_be_made_is_the_plans_affair(tmp_path: Path, stop: Stop) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"no run can be written there: Not a directory.*pass --out"):
        Room(tmp_path / "file" / "run", stop, print).open()
    with pytest.raises(PlanError, match="File exists"):
        Room(tmp_path / "file", stop, print).open()


def test_a_bug_is_not_taken_for_a_full_disk() -> None:
    assert not is_full(ValueError("os error 2"))
    assert not is_full(OSError("something else"))


# --- lines ------------------------------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> list[bool]:
    """From now on, and as long as the list holds True, files take so many bytes more."""
    is_full_now, left, write = [True], [after], os.write

    def limited(descriptor: int, content: Any) -> int:
        if not is_full_now[0] or descriptor < 3:
            return write(descriptor, content)
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(content)[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    return is_full_now


@pytest.mark.parametrize("after", [0, 5, 8, 13])
def test_lines_that_find_no_room_wait_in_order_and_none_is_torn(room: Room, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    lines, file = Lines(room, "metrics", BEGINNING), room.folder / "metrics.jsonl"
    lines.add("line 0\n")
    is_full_now = full_disk(monkeypatch, after)
    for number in range(1, 6):
        lines.add(f"line {number}\n")
        content = file.read_text()
        assert content == "" or content.endswith("\n")
        time.sleep(0.002)
    assert lines.is_behind
    is_full_now[0] = False
    assert lines.place() == Place(1, 42)
    assert file.read_text() == "".join(f"line {number}\n" for number in range(6))
    assert not lines.is_behind
    assert lines.close() == 0


def test_what_found_no_room_until_the_end_is_told(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(room, "metrics", BEGINNING)
    full_disk(monkeypatch, 0)
    lines.add("line\n")
    assert lines.close() == 5


def test_lines_that_a_disk_took_and_could_not_keep_end_the_run(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the next one says that all is well, and the pages are gone (Linux)."""
    lines = Lines(room, "metrics", BEGINNING)
    lines.add("line\n")

    def fsync(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"metrics.jsonl could not be kept"):
        lines.place()


def test_a_torn_last_line_is_cut_off_and_lines_that_are_gone_are_counted(room: Room) -> None:
    file = room.folder / "metrics.jsonl"
    file.write_text("one\ntwo\nthr")
    lines = Lines(room, "metrics", Place(1, 20))
    assert lines.lost_bytes == 12
    lines.add("three\n")
    assert file.read_text() == "one\ntwo\nthree\n"
    assert Lines(room, "metrics", None).lost_bytes == 0
    file.write_bytes(b"\x00" * 200_000)  # not one line
    assert Lines(room, "metrics", Place(1, 14)).lost_bytes == 14
    assert file.read_bytes() == b""


# --- damage -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{}, {"a": 0.1, "b": [1, None, "☂"], "nan": float("inf")}])
def test_a_checked_file_is_read_back_and_any_other_content_is_told(tmp_path: Path, value: dict[str, Any]) -> None:
    file = tmp_path / "x.json"
    assert read_checked(file) is None
    file.write_text(checked(value))
    assert read_checked(file) == value
    file.write_text(json.dumps(value))  # of a former version
    assert read_checked(file) == value
    file.write_text(checked({**value, "a": 1}).replace('"a": 1', '"a": 2'))
    with pytest.raises(DamagedError, match="its checksum differs"):
        read_checked(file)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3"):
        file.write_bytes(content)
        with pytest.raises(DamagedError, match=r"x\.json"):
            read_checked(file)


def test_a_damaged_evaluation_is_none_and_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "evaluations").mkdir()
    file, size = tmp_path / "evaluations" / "a.json", tmp_path / "evaluations" / "size.json"
    Measured({"a": {"1": 0.5}}, {"a": {"1": 0.1}}, {"a": 1}).save(file)
    file.write_text(file.read_text().replace("0.5", "0.4"))
    assert Measured.load(file, said.append) is None
    Quality({}, {}, {}, {}).save(file)
    file.write_text(file.read_text()[:-3])
    assert Quality.load(file, said.append) is None
    Size(8, 8, 1, 1.0, 2.0, "dry steps").save(tmp_path)
    size.write_text(size.read_text().replace("8", "9", 1))
    assert Size.load(tmp_path, said.append) is None
    assert len(said) == 3
    assert all("json" in message for message in said)


def test_damaged_outputs_of_the_untrained_model_are_none(tmp_path: Path) -> None:
    outputs, file = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / "base-8.safetensors"
    _keep(tmp_path, "base-8", Measured({}, {}, {}), None, None, outputs)
    kept = _kept_outputs(file)
    assert kept is not None
    assert all(torch.equal(kept[name], value) for name, value in outputs.items())
    content, said = file.read_bytes(), cast(list[str], [])
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-5], b""):
        file.write_bytes(damaged)
        assert _kept_outputs(file, said.append) is None
    assert len(said) == 3


def test_a_published_adapter_is_as_published_until_its_weights_are_touched(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    assert is_as_published(tmp_path)  # of a former version, which wrote no hashes
    (tmp_path / _HASHES).write_text(checked({"a.safetensors": file_digest(tmp_path / "a.safetensors")}))
    (tmp_path / "README.md").write_text("the owner's own words")
    assert is_as_published(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"weighty")
    assert not is_as_published(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    assert not is_as_published(tmp_path)
    (tmp_path / _HASHES).write_text("{")
    assert not is_as_published(tmp_path)


def test_a_published_model_is_told_by_its_mark_and_the_hashes_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "a.safetensors"
    file.write_bytes(b"weights")
    write_model_mark(tmp_path, "abc")
    assert is_made_from(tmp_path, "abc")
    assert not is_made_from(tmp_path, "abd")
    for damaged in (b"weight", b"weighty"):
        file.write_bytes(damaged)
        assert not is_made_from(tmp_path, "abc")
    file.unlink()
    assert not is_made_from(tmp_path, "abc")


def test_a_model_that_a_former_version_published_is_told_by_the_lengths_that_it_wrote(tmp_path: Path) -> None:
    file, mark = tmp_path / "a.safetensors", tmp_path / "medley.json"
    file.write_bytes(b"weights")
    mark.write_text(json.dumps({"checkpoint": "abc", "bytes": {"a.safetensors": 7}}))
    assert is_made_from(tmp_path, "abc")
    file.write_bytes(b"weight")
    assert not is_made_from(tmp_path, "abc")
    mark.write_text(json.dumps({"checkpoint": "abc"}))
    assert is_made_from(tmp_path, "abc")
    mark.write_text("{")
    assert not is_made_from(tmp_path, "abc")


# --- finished stages --------------------------------------------------------------------------------------------------------------------


def two_stages() -> Plan:
    stages_ = [Stage.model_validate({"name": name, "steps": 4, "resolution": 8, "batch": {"images": 1}, "lr": 0.1}) for name in ("one", "two")]
    return cast(Plan, type("Plan", (), {"stages": stages_})())


def at(step: int, *, finished: bool) -> Checkpoint:
    return Checkpoint(Path("x"), step, {"finished": finished}, {})


def test_a_finished_stage_is_not_trained_again_without_being_told_to(tmp_path: Path) -> None:
    plan = two_stages()
    for newest, passed_over, found in ((None, {}, "1-one holds none"), (at(2, finished=False), {}, "only one from before its end"), (None, {0: ["step-000004: a hash differs"]}, "a hash differs")):
        with pytest.raises(PlanError, match=rf"stage 'one' was finished, for 'two' has begun.*{found}.*put it back, or delete .*1-one and the folders of the stages after it"):
            check_finished(plan, tmp_path, [newest, at(1, finished=False)], passed_over)
    (tmp_path / "stages" / "2-two" / "step-000004").mkdir(parents=True)
    with pytest.raises(PlanError, match=r"stage 'two' was trained to its end, and its last checkpoint is damaged"):
        check_finished(plan, tmp_path, [at(4, finished=True), None], {1: ["step-000004: a hash differs"]})


def test_a_run_that_only_stopped_goes_on(tmp_path: Path) -> None:
    plan = two_stages()
    (tmp_path / "stages" / "2-two" / "step-000003").mkdir(parents=True)
    for checkpoints in ([None, None], [at(2, finished=False), None], [at(4, finished=True), None], [at(4, finished=True), at(2, finished=False)], [at(4, finished=True)] * 2):
        check_finished(plan, tmp_path, checkpoints, {})


def test_a_start_does_not_fall_back_to_an_earlier_stage_where_the_last_one_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    for number, name in enumerate(("1-one", "2-two"), 1):
        write_checkpoint(tmp_path / "stages" / name, 4, {"adapter": {"a": torch.ones(number)}}, {"finished": True, "stage": name})
    (tmp_path / "stages" / ".DS_Store").write_text("")
    os.truncate(tmp_path / "stages" / "2-two" / "step-000004" / "adapter.safetensors", 3)
    plan = cast(Plan, type("Plan", (), {"start": str(tmp_path)})())
    with pytest.raises(ValueError, match=r"2-two/step-000004: adapter.safetensors is not what was written.*restore it, or name the folder of the stage"):
        read_start(plan, "fingerprint")


# --- the lock and the console -----------------------------------------------------------------------------------------------------------


def test_a_second_launch_is_refused_and_a_kill_leaves_no_lock_behind(room: Room) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with _locked(room, main=True, say=print):
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reading, 1) == b"x"
        with pytest.raises(PlanError, match="another launch is training in this folder"), _locked(room, main=True, say=print):
            pytest.fail("two launches hold one folder")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with _locked(room, main=True, say=print):
        pass


def test_a_disk_without_locks_is_warned_of_and_used(room: Room, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(file: object, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stages.open_run.fcntl, "lockf", lockf)
    with _locked(room, main=True, say=lambda message: said.append(str(message))):
        assert "keeps no locks" in said[0]


def test_what_cannot_be_printed_does_not_end_a_run() -> None:
    class Full(StringIO):
        is_full = True

        def flush(self) -> None:
            if self.is_full:
                raise FULL

    file = Full()
    console = EnduringConsole(file=file, width=80)
    console.print("one")
    file.is_full = False
    console.print("two")
    assert file.getvalue() == "one\ntwo\n"


# --- a run ------------------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_disk_was_full_ends_bit_equal_to_an_undisturbed_one(tmp_path: Path) -> None:
    """Full at the fifth and sixth file of tensors, as safetensors and as the system says it, and for lines of metrics.jsonl."""
    world = make_world(tmp_path / "world")
    plan = plan_of(world, evaluate={"rows": 0}, previews={"rows": 0}, cache="none", log_every=1, save_every=1)
    plan["stages"] = [{**plan["stages"][2], "steps": 3}]
    file, log = write_plan(tmp_path / "plan.yaml", plan), tmp_path / "log"

    def fill(rank: int) -> None:
        stages.room.LOOKS, stages.room._TRIES = 0.01, 0.02
        save_file, write, calls, writes = stages.checkpoint.save_file, os.write, 0, 0

        def full(values: Any, path: Path) -> None:
            nonlocal calls
            calls += 1
            save_file(values, path)
            if calls in (5, 6):
                raise (FULL, OF_SAFETENSORS)[calls - 5]

        def write_half(descriptor: int, content: Any) -> int:
            nonlocal writes
            writes += 1
            if descriptor > 2 and writes in (8, 9):
                if writes == 9:
                    raise FULL
                return write(descriptor, bytes(content)[: len(content) // 2])
            return write(descriptor, content)

        stages.checkpoint.save_file = full
        os.write = write_half

    for folder, before in (("whole", None), ("full", fill)):
        (child,) = started([str(file), "--out", str(tmp_path / folder), "--trace"], output=log, before=before)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, log.read_text()
    said = log.read_text()
    assert said.count("waiting for room") >= 1, said
    assert "lines of metrics.jsonl wait in memory" in said
    assert "Traceback" not in said
    assert adapter_bytes(tmp_path / "full") == adapter_bytes(tmp_path / "whole")
    assert (tmp_path / "full" / "trace.jsonl").read_bytes() == (tmp_path / "whole" / "trace.jsonl").read_bytes()
    losses = [[(line["step"], line["loss"]) for line in events(tmp_path / folder, "step")] for folder in ("whole", "full")]
    assert losses[0] == losses[1]

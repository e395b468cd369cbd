"""Logs in parts: a long run's metrics.jsonl and trace.jsonl are closed and begun anew, and whoever reads or cuts them sees one log."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import stages.log_files as log_files
from runs import adapter_bytes, carry_out, copy_run, events, make_world, plan_of, traced
from stages.compare import compare
from stages.hub.files import is_resumable, resumable
from stages.log_files import BEGINNING, LogFile, Place, log_lines, place_after, place_of, saved_place
from stages.report.record import read_record

LINES = [json.dumps({"number": number}) + "\n" for number in range(40)]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "PART_BYTES", 100)


def written(folder: Path, lines: list[str], keep: Place | None = None) -> list[Place]:
    """Write lines; gives the place after each."""
    log = LogFile(folder, "metrics", keep)
    places = []
    for line in lines:
        log.write(line)
        places.append(log.place())
    log.close()
    return places


def content(folder: Path) -> str:
    return b"".join(log_lines(folder, "metrics")).decode()


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def test_no_part_is_longer_than_its_limit_and_a_line_and_no_line_is_lost(tmp_path: Path) -> None:
    written(tmp_path, LINES)
    assert content(tmp_path) == "".join(LINES)
    sizes = parts(tmp_path)
    assert list(sizes) == [*(f"metrics-{number:06d}.jsonl" for number in range(1, len(sizes))), "metrics.jsonl"]
    assert len(sizes) > 5
    assert all(100 <= size < 100 + len(LINES[-1]) for size in list(sizes.values())[:-1])


def test_log_cut_at_any_place_is_what_was_written_before_and_goes_on_as_if_never_cut(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    places = written(tmp_path / "whole", LINES)
    for number, place in list(enumerate(places))[::4]:
        folder = copy_run(tmp_path / "whole", tmp_path / f"cut-{number}")
        LogFile(folder, "metrics", place).close()
        assert content(folder) == "".join(LINES[: number + 1])
        written(folder, LINES[number + 1 :], place)
        assert content(folder) == "".join(LINES)
        assert parts(folder) == parts(tmp_path / "whole")
    LogFile(tmp_path / "whole", "metrics", BEGINNING).close()
    assert parts(tmp_path / "whole") == {"metrics.jsonl": 0}


def test_log_whose_cut_was_killed_anywhere_is_cut_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    places = written(tmp_path / "whole", LINES)
    after = 0
    for limit in range(0, 20, 2):
        folder = copy_run(tmp_path / "whole", tmp_path / str(limit))
        left = limit
        with monkeypatch.context() as patch:

            def counting(original: Any) -> Any:
                def counted(*arguments: Any, **named: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        raise KeyboardInterrupt
                    left -= 1
                    return original(*arguments, **named)

                return counted

            for name in ("unlink", "rename", "truncate"):
                patch.setattr(os, name, counting(getattr(os, name)))
            try:
                LogFile(folder, "metrics", places[14]).close()
                after += 1
            except KeyboardInterrupt:
                pass
        written(folder, LINES[15:], places[14])
        assert content(folder) == "".join(LINES)
    assert 0 < after < 10


def test_run_killed_between_the_two_renames_of_a_new_part_loses_nothing(tmp_path: Path) -> None:
    written(tmp_path, LINES[:9])  # nine lines of 14 bytes are more than a part
    (tmp_path / "metrics.jsonl").rename(tmp_path / "metrics-000002.jsonl")
    assert content(tmp_path) == "".join(LINES[:9])
    place = LogFile(tmp_path, "metrics", None).place()
    assert place == Place(3, 0)
    assert content(tmp_path) == "".join(LINES[:9])


def test_closed_parts_may_be_taken_away_and_the_run_is_cut_at_the_same_line(tmp_path: Path) -> None:
    places = written(tmp_path, LINES)
    (tmp_path / "metrics-000001.jsonl").unlink()
    (tmp_path / "metrics-000002.jsonl").unlink()
    LogFile(tmp_path, "metrics", places[30]).close()
    assert content(tmp_path).endswith("".join(LINES[20:31]))


def test_reader_sees_every_line_once_though_a_part_is_closed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path, "metrics", None)
    for line in LINES[:10]:
        log.write(line)
    listed = log_files.closed_files

    def after_another_was_closed(folder: Path, name: log_files.LogName) -> dict[int, Path]:
        for line in LINES[10:]:
            log.write(line)
        return listed(folder, name)

    monkeypatch.setattr(log_files, "closed_files", after_another_was_closed)
    seen = [json.loads(line)["number"] for line in log_lines(tmp_path, "metrics")]
    log.close()
    assert sorted(seen) == sorted(set(seen)), "none twice"
    assert set(range(10)) <= set(seen), "none that was there is missing"


def test_place_after_a_line_is_found_over_parts_and_not_beyond_what_is_later(tmp_path: Path) -> None:
    places = written(tmp_path, LINES)

    def found(start: int, wanted: int, later: int) -> Place | None:
        return place_after(tmp_path, "metrics", places[start], lambda line: json.loads(line)["number"] == wanted, lambda line: json.loads(line)["number"] == later)

    assert found(3, 20, 30) == places[20]
    assert places[20].part > places[3].part
    assert found(3, 3, 99) is None  # it stands before
    assert found(3, 20, 10) is None
    assert found(30, 39, 99) == places[39]
    for path in tmp_path.glob("metrics-*.jsonl"):
        path.unlink()  # the user may take closed parts away
    assert found(38, 39, 99) == places[39]


def test_line_that_finds_no_room_leaves_nothing_of_itself_and_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path, "metrics", None)
    log.write(LINES[0])
    write = os.write

    def half(descriptor: int, text: memoryview) -> int:
        if len(text) > 8:
            return write(descriptor, text[:8])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            log.write(LINES[1])
    assert content(tmp_path) == LINES[0]
    log.write(LINES[1])
    assert content(tmp_path) == LINES[0] + LINES[1]
    log.close()


def test_part_that_cannot_be_begun_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path, "metrics", None)
    for line in LINES[:8]:
        log.write(line)
    before = parts(tmp_path)

    def full(path: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(log_files, "_opened", full)
        with pytest.raises(OSError, match="No space"):
            log.write(LINES[8])
    assert parts(tmp_path) == before
    log.write(LINES[8])
    log.close()
    assert content(tmp_path) == "".join(LINES[:9])
    assert len(parts(tmp_path)) == 2


def test_place_outlives_a_checkpoint_and_that_of_a_former_version_is_of_the_first_part() -> None:
    assert place_of("trace", saved_place("trace", Place(3, 17))) == Place(3, 17)
    assert place_of("metrics", {"metrics_bytes": 5}) == Place(1, 5)


def test_checkpoint_for_the_hub_brings_the_parts_up_to_its_place_and_no_later_one(tmp_path: Path) -> None:
    places = written(tmp_path, LINES)
    step = tmp_path / "stages" / "1-a" / "step-000001"
    step.mkdir(parents=True)
    for place in (places[3], places[14], places[-1]):
        state = {"stage": "a", "step": 1, **saved_place("metrics", place), **saved_place("trace", BEGINNING)}
        (step / "state.json").write_text(json.dumps(state))
        (step / "manifest.json").write_text("{}")
        found = resumable(tmp_path)
        assert found is not None
        sent = {name: path.read_bytes()[: found.first_bytes.get(name)] for name, path in found.files.items() if name.endswith(".jsonl")}
        assert all(map(is_resumable, sent))
        there = tmp_path / f"fetched-{place.part}"
        there.mkdir()
        for name, bytes_of in sent.items():
            (there / name).write_bytes(bytes_of)
        LogFile(there, "metrics", place).close()
        assert content(there) == "".join(LINES[: places.index(place) + 1])


@pytest.mark.launch
def test_run_in_parts_is_reported_compared_and_resumed_as_one_in_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "PART_BYTES", 1500)
    world = make_world(tmp_path / "world")
    plan = plan_of(world, log_every=1, track="tensorboard", previews={"rows": 0})
    plan["stages"] = [{**plan["stages"][1], "steps": 9}]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    carry_out(whole, plan, "--trace")
    assert len(list(whole.glob("metrics-*.jsonl"))) > 3
    assert len(list(whole.glob("trace-*.jsonl"))) > 1
    assert len(events(whole, "step")) == 9
    assert len(traced(whole)) == 72
    assert [step.step for step in read_record(whole).stages[0].steps] == list(range(1, 10))

    rename = Path.rename

    def killing(path: Path, target: Path) -> Path:
        """Die between the two renames that close the third part and begin the fourth."""
        moved = rename(path, target)
        if Path(target).name == "metrics-000003.jsonl":
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killing)
        carry_out(killed, plan, "--trace", kill_at=10**9)
    assert not (killed / "metrics.jsonl").exists()
    carry_out(killed, plan, "--trace")
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert list(log_lines(killed, "trace")) == list(log_lines(whole, "trace"))
    losses = [[(line["step"], line["loss"]) for line in events(folder, "step")] for folder in (whole, killed)]
    assert losses[0] == losses[1]
    assert compare(whole, killed).mean.a == compare(whole, killed).mean.b

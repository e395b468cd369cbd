"""The tensor store: what comes back is what was put under that very key, or nothing, whatever happens to the files and whoever else is at work."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import stages.tensor_store
from stages.tensor_store import TensorStore

FORK = multiprocessing.get_context("fork")
MOMENT = 1_000_000_000  # a time long ago, in seconds


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def open_store(folder: Path, *, limit: int | None = None, writer: str = "test") -> TensorStore:
    return TensorStore(folder, limit_bytes=limit, writer=writer)


def value(number: int, length: int = 4) -> dict[str, Tensor]:
    return {"x": torch.full((length,), float(number))}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def same(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> bool:
    """Equal to the last bit of every value, in names, dtypes and shapes too."""
    return found is not None and list(found) == sorted(wanted) and all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in wanted.items())


# --- what is put and got ----------------------------------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit_with_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        "embeds": torch.randn(3, 5).to(torch.bfloat16),
        "pooled": torch.randn(7),
        "half": torch.randn(2, 1, 3).to(torch.float16),
        "turned": torch.randn(4, 6).t(),
        "single": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "odd": torch.tensor([0.0, -0.0, float("inf"), 1e-42]),
    }
    store = open_store(tmp_path)
    store.put(key(1), tensors)
    store.put(key(2), value(2))
    assert same(store.get(key(1)), tensors)
    store.close()
    found = open_store(tmp_path).get(key(1))
    assert same(found, tensors)
    assert found is not None
    assert torch.equal(found["odd"].view(torch.int32), tensors["odd"].view(torch.int32))
    assert len(shards(tmp_path)) == 1


def test_what_is_got_and_what_was_put_are_the_callers_own(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    given_away = value(1)
    store.put(key(1), given_away)
    given_away["x"].zero_()
    for _ in range(2):
        found = store.get(key(1))
        assert same(found, value(1))
        assert found is not None
        found["x"].zero_()
        assert same(store.get(key(1)), value(1))
        store.flush()


def test_a_shard_is_a_safetensors_file_that_its_library_reads(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    entries = {number: {"embeds": torch.randn(3).to(torch.bfloat16), "pooled": torch.randn(number)} for number in range(1, 5)}
    for number, tensors in entries.items():
        store.put(key(number), tensors)
    store.close()
    with safe_open(shards(tmp_path)[0], framework="pt") as file:
        assert set(file.keys()) == {f"{key(number).hex()}/{part}" for number in entries for part in ("embeds", "pooled")}
        assert all(torch.equal(file.get_tensor(f"{key(number).hex()}/{part}"), tensor) for number, tensors in entries.items() for part, tensor in tensors.items())


def test_an_entry_is_written_once(tmp_path: Path) -> None:
    for _ in range(3):
        store = open_store(tmp_path)
        store.put(key(1), value(1))
        store.close()
    assert len(shards(tmp_path)) == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "none found"),
        ({"a/b": torch.zeros(1)}, r"\['a/b'\] found"),
        ({"x": torch.zeros(1, dtype=torch.float64)}, "x: torch.float64 found; torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool are kept"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path).put(key(1), tensors)


def test_a_key_of_another_length_a_strange_writer_and_a_limit_of_nothing_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for act in (lambda: store.get(b"short"), lambda: store.put(b"short", value(1)), lambda: open_store(tmp_path, writer="a/b"), lambda: open_store(tmp_path, limit=0)):
        with pytest.raises(ValueError, match=r"found;|needed;"):
            act()


# --- no entry under another's key --------------------------------------------------------------------------------------------------------

# Keys that share halves, and differ in single bits: what an index by less than all 128 bits would mix up.
KEYS = [one + other for one in (bytes(8), b"\xff" * 8, bytes(7) + b"\x01") for other in (bytes(8), b"\xff" * 8, b"\x80" + bytes(7))]
STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "put", "flush", "refresh", "reopen", "other puts", "other flushes"]), st.sampled_from(KEYS)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, limit=st.sampled_from([None, 700, 2000]))
def test_an_entry_is_never_used_for_another_key(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bytes]], limit: int | None) -> None:
    folder = tmp_path_factory.mktemp("store")
    wanted = {each: {"x": torch.tensor([float(number), -float(number)]), "y": torch.full((number,), 1.0)} for number, each in enumerate(KEYS)}
    store, other = open_store(folder, limit=limit), open_store(folder, limit=limit, writer="other")
    held: set[bytes] = set()
    for act, each in steps:
        if act == "put":
            store.put(each, wanted[each])
            held.add(each)
        elif act == "flush":
            store.flush()
        elif act == "refresh":
            store.refresh()
        elif act == "reopen":
            store.close()
            store = open_store(folder, limit=limit)
        elif act == "other puts":
            other.put(each, wanted[each])
        else:
            other.flush()
        for asked in KEYS:
            found = store.get(asked)
            assert found is None or same(found, wanted[asked])
            assert limit is not None or asked not in held or found is not None
    store.close()
    other.close()
    assert store.take_warnings() == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a shard of two entries."""
    store = open_store(tmp_path_factory.mktemp("whole"))
    store.put(key(1), value(1, 2))
    store.put(key(2), {"a": torch.tensor([2.0]), "b": torch.tensor([3.0]).half()})
    store.close()
    return shards(store._folder)[0].read_bytes()


def test_any_byte_may_be_damaged_and_what_comes_back_is_right_or_nothing(tmp_path: Path, whole: bytes) -> None:
    wanted = {1: value(1, 2), 2: {"a": torch.tensor([2.0]), "b": torch.tensor([3.0]).half()}}
    path, lost = tmp_path / "one.safetensors", 0
    for place in range(len(whole)):
        for change in (0x01, 0x10, 0x20, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            store = open_store(tmp_path)
            found = {number: store.get(key(number)) for number in (0, 1, 2, 3, 256 + 1)}
            assert found[0] is found[3] is found[257] is None
            assert all(found[number] is None or same(found[number], wanted[number]) for number in wanted)
            missing = any(found[number] is None for number in wanted)
            lost += missing
            store.close()
    assert lost > 2 * len(whole)  # most bytes count


def test_a_file_cut_anywhere_is_not_used_and_named(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "one.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        store = open_store(tmp_path)
        assert store.get(key(1)) is store.get(key(2)) is None
        assert [str(path) in warning and "delete it" in warning for warning in store.take_warnings()] == [True]
        store.refresh()
        assert store.take_warnings() == []  # each once


FOREIGN: dict[str, bytes | None] = {
    "weights.safetensors": (lambda text: len(text).to_bytes(8, "little") + text + bytes(4))(json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()),
    "deep.safetensors": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "list.safetensors": (2).to_bytes(8, "little") + b"[]",
    "huge.safetensors": b"\xff" * 64,
    "notes.txt": b"my own notes",
    "empty": b"",
    "folder": None,
}


def test_foreign_files_are_named_and_neither_used_nor_deleted(tmp_path: Path) -> None:
    for name, content in FOREIGN.items():
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content)
    store = open_store(tmp_path, limit=600)
    assert sorted(warning.split(":")[0].removeprefix(f"{tmp_path}/") for warning in store.take_warnings()) == sorted(FOREIGN)
    for number in range(20):
        store.put(key(number), value(number))
        store.flush()
    assert all((tmp_path / name).exists() for name in FOREIGN)
    assert same(store.get(key(19)), value(19))


def test_a_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(key(1), value(1))
    store.close()
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    store = open_store(tmp_path)
    assert store.get(key(1)) is None
    assert "is damaged and is made anew" in store.take_warnings()[0]
    store.put(key(1), value(1))
    store.close()
    assert same(open_store(tmp_path).get(key(1)), value(1))


# --- the limit --------------------------------------------------------------------------------------------------------------------------


def fill(store: TensorStore, numbers: range, length: int = 100) -> None:
    """One shard an entry, each older than the next."""
    for number in numbers:
        before = set(shards(store._folder))
        store.put(key(number), value(number, length))
        store.flush()
        for path in set(shards(store._folder)) - before:
            os.utime(path, (MOMENT + number, MOMENT + number))


def test_the_least_recently_used_shards_are_deleted_beyond_the_limit(tmp_path: Path) -> None:
    fill(open_store(tmp_path), range(4))
    size = shards(tmp_path)[0].stat().st_size
    store = open_store(tmp_path, limit=4 * size)
    assert same(store.get(key(0)), value(0, 100))  # used just now
    fill(store, range(4, 5))
    assert [number for number in range(5) if store.get(key(number)) is not None] == [0, 2, 3, 4]
    assert sum(path.stat().st_size for path in shards(tmp_path)) <= 4 * size


def test_a_shard_in_use_is_marked_at_most_once_a_minute(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, range(1))
    store.get(key(0))
    path = shards(tmp_path)[0]
    assert time.time() - path.stat().st_mtime < 60
    os.utime(path, (MOMENT, MOMENT))
    store.get(key(0))
    assert path.stat().st_mtime == MOMENT


def test_two_stores_share_one_limit(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    fill(open_store(folders[0]), range(4))
    size = shards(folders[0])[0].stat().st_size
    store = TensorStore(folders[1], limit_bytes=5 * size, writer="test", shared_with=[folders[0]])
    fill(store, range(4, 8))
    assert [len(shards(folder)) for folder in folders] == [1, 4]


def test_an_entry_larger_than_the_limit_is_not_kept_and_the_rest_is(tmp_path: Path) -> None:
    store = open_store(tmp_path, limit=1000)
    store.put(key(1), value(1))
    store.put(key(2), value(2, 1000))
    store.close()
    assert store.get(key(2)) is None
    assert same(store.get(key(1)), value(1))
    assert store.take_warnings() == [f"{tmp_path}: an entry of 4,000 bytes is not cached, the limit is 1,000; raise it"]


def test_shards_are_written_when_full_and_are_small_under_a_small_limit(tmp_path: Path) -> None:
    store = open_store(tmp_path, limit=160_000)
    for number in range(50):
        store.put(key(number), value(number, 500))
    assert len(shards(tmp_path)) == 10  # of 10,000 bytes each
    assert len(store) == 50


def test_what_was_put_is_written_after_ten_seconds_and_then_ever_more_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    store = open_store(tmp_path)
    for number, (seconds, act) in enumerate([(10, store.get), (20, store.get), (40, lambda key: store.put(key, value(0))), (80, store.get)]):
        store.put(key(number), value(number))
        clock[0] += seconds - 0.1
        act(key(0))
        assert len(shards(tmp_path)) == number
        clock[0] += 0.1
        act(key(0))
        assert len(shards(tmp_path)) == number + 1


def test_a_forked_process_does_not_write_what_its_parent_put(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(key(1), value(1))

    def work() -> None:
        found = store.get(key(1))
        store._patience = 0.0
        store.get(key(1))
        store.flush()
        before = len(shards(tmp_path))
        store.put(key(2), value(2))
        store.close()
        os._exit(0 if same(found, value(1)) and before == 0 else 3)

    worker = FORK.Process(target=work)
    worker.start()
    worker.join(20)
    assert worker.exitcode == 0
    assert len(open_store(tmp_path)) == 1
    store.close()
    assert len(open_store(tmp_path)) == 2


def test_an_entry_deleted_while_it_is_looked_up_is_a_miss_and_can_be_put_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, range(2))
    reader = open_store(tmp_path)
    reader.get(key(0))
    for path in shards(tmp_path):
        path.unlink()
    assert same(reader.get(key(0)), value(0, 100))  # an open file stays until it is closed
    assert reader.get(key(1)) is None
    reader.put(key(1), value(1, 100))
    reader.close()
    assert reader.take_warnings() == []
    assert same(open_store(tmp_path).get(key(1)), value(1, 100))


# --- other processes --------------------------------------------------------------------------------------------------------------------


def _answer(store: TensorStore, pipe: Connection) -> None:
    while (asked := pipe.recv()) is not None:
        found = store.get(key(asked))
        pipe.send(None if found is None else float(found["x"][0]))


@pytest.mark.parametrize("pickled", [False, True], ids=["forked", "pickled"])
def test_a_worker_process_sees_what_the_training_process_has_flushed_since(tmp_path: Path, pickled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.tensor_store, "_LOOK_SECONDS", 0.0)
    store = open_store(tmp_path)
    fill(store, range(2))
    assert store.get(key(0)) is not None  # a file is open
    mine, theirs = FORK.Pipe()
    given = pickle.loads(pickle.dumps(store)) if pickled else store  # noqa: S301 - made here, just now
    worker = FORK.Process(target=_answer, args=(given, theirs))
    worker.start()

    def ask(number: int) -> float | None:
        mine.send(number)
        answer: float | None = mine.recv() if mine.poll(20) else pytest.fail("no answer")
        return answer

    assert [ask(0), ask(1), ask(2)] == [0.0, 1.0, None]
    store.put(key(2), value(2))
    assert ask(2) is None
    store.flush()
    assert [ask(2), ask(0)] == [2.0, 0.0]
    mine.send(None)
    worker.join(20)
    assert worker.exitcode == 0
    assert same(store.get(key(1)), value(1, 100))  # its own files are still open


def test_a_miss_looks_for_others_shards_once_a_second_and_only_in_a_folder_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    listed: list[object] = []
    whole_listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (listed.append(path), whole_listing(path))[1])
    clock = [time.monotonic() + 10]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    os.utime(tmp_path, (MOMENT, MOMENT))
    for seconds, times in ((0.0, 1), (0.5, 1), (1.1, 1), (1.1, 1)):
        clock[0] += seconds
        for _ in range(5):
            assert store.get(key(1)) is None
        assert len(listed) == times
    os.utime(tmp_path, (MOMENT + 1, MOMENT + 1))
    clock[0] += 1.1
    store.get(key(1))
    assert len(listed) == 2


def test_a_change_within_the_tick_of_the_folders_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.tensor_store, "_LOOK_SECONDS", 0.0)
    reader, store = open_store(tmp_path), open_store(tmp_path)
    fill(store, range(1))
    assert reader.get(key(0)) is not None
    stamp = tmp_path.stat().st_mtime_ns
    fill(store, range(1, 2))
    os.utime(tmp_path, ns=(stamp, stamp))  # as if both changes bore one time
    assert same(reader.get(key(1)), value(1, 100))


def _write_and_read(folder: Path, rank: int) -> None:
    store = open_store(folder, limit=60_000, writer=f"rank{rank}")
    for round_number in range(3):
        for number in range(40):
            found = store.get(key(number))
            if found is not None and not same(found, value(number, 500)):
                os._exit(3)
            if found is None and (number + round_number) % 3 != rank:
                store.put(key(number), value(number, 500))
    store.close()
    os._exit(4 if store.take_warnings() else 0)


def test_processes_write_read_and_delete_in_one_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.tensor_store, "_LOOK_SECONDS", 0.0)
    workers = [FORK.Process(target=_write_and_read, args=(tmp_path, rank)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert 20_000 < sum(path.stat().st_size for path in shards(tmp_path)) <= 60_000
    store = open_store(tmp_path)
    found = {number: store.get(key(number)) for number in range(40)}
    assert any(entry is not None for entry in found.values())
    assert all(entry is None or same(entry, value(number, 500)) for number, entry in found.items())


# --- what goes wrong --------------------------------------------------------------------------------------------------------------------


def _write_on(folder: Path) -> None:
    store = open_store(folder)
    for number in range(10**6):
        store.put(key(number), value(number, 20_000))
        if number % 4 == 3:
            store.flush()


def test_a_process_killed_at_any_instant_leaves_a_folder_that_opens(tmp_path: Path) -> None:
    written = 0
    for attempt in range(8):
        worker = FORK.Process(target=_write_on, args=(tmp_path / str(attempt),))
        worker.start()
        time.sleep(0.05 + 0.017 * attempt)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(20)
        store = open_store(tmp_path / str(attempt))
        assert store.take_warnings() == []
        assert all(same(store.get(key(number)), value(number, 20_000)) for number in range(len(store)))
        assert len(store) % 4 == 0
        written += len(store)
    assert written


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, files of at most 2,000 bytes can be written: a full disk, without filling one. It must be left before pytest writes its own output."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_there_is_one_warning_and_no_more_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, range(1))
    with small_files():
        for number in range(1, 4):
            store.put(key(number), value(number, 1000))
            store.flush()
    warnings = store.take_warnings()
    assert len(warnings) == 1
    assert "training goes on and nothing more is cached" in warnings[0]
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written either
    assert same(store.get(key(0)), value(0, 100))
    assert store.get(key(1)) is None


def test_what_killed_processes_left_half_written_is_deleted_after_an_hour(tmp_path: Path) -> None:
    old, new = tmp_path / ".rank0-000000-00.safetensors.partial", tmp_path / ".rank0-000001-00.safetensors.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    store = open_store(tmp_path)
    assert (old.exists(), new.exists(), store.take_warnings()) == (False, True, [])


def test_a_folder_that_may_only_be_read_serves_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(open_store(tmp_path), range(1))

    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    store = open_store(tmp_path)
    assert same(store.get(key(0)), value(0, 100))
    assert store.take_warnings() == []


def test_a_folder_deleted_on_the_way_is_a_warning(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    store.refresh()
    store.put(key(1), value(1))
    store.flush()
    assert store.get(key(1)) is None
    assert [str(tmp_path / "cache") in warning for warning in store.take_warnings()] == [True, True]


# --- size -------------------------------------------------------------------------------------------------------------------------------


def test_the_index_takes_at_most_40_bytes_an_entry_and_finds_each(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    numbers = [number * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128 for number in range(10_000)]
    for number in numbers:
        store.put(key(number), {"x": torch.tensor([float(number % 1000)])})
    store.close()
    store = open_store(tmp_path)
    assert len(shards(tmp_path)) == 3
    assert len(store) == 10_000
    assert store.index_bytes <= 40 * 10_000
    assert all(same(store.get(key(number)), {"x": torch.tensor([float(number % 1000)])}) for number in numbers[::97])
    assert key(5) not in store

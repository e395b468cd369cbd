"""What is read ahead is what is read in its turn; and what is remembered of files is true of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mixing.ahead import Ahead
from mixing.content import content_hash
from mixing.file_hashes import FileHashes
from mixing.keys import key
from stages.encode import AtHand
from stages.objectives import flow


@pytest.mark.parametrize("at_once", [1, 3])
def test_items_come_in_order_whether_made_ahead_or_not(at_once: int) -> None:
    with closing(Ahead(iter(range(20)), at_once=at_once)) as items:
        taken = []
        for number in range(20):
            taken.append(next(items))
            if number % 4 < 2:
                with items.meanwhile():
                    pass
        assert taken == list(range(20))
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(items)


def test_next_item_is_made_by_another_thread_inside_meanwhile_and_never_at_another_time() -> None:
    makers: list[str] = []
    inside = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(4):
            makers.append(threading.current_thread().name)
            assert number == 0 or inside.is_set()
            yield number

    waits: list[float] = []
    with closing(Ahead(numbers(), waits.append)) as items:
        for number in range(3):
            assert next(items) == number
            time.sleep(0.01)
            inside.set()
            with items.meanwhile():
                pass
            inside.clear()
    assert makers == [threading.current_thread().name, *["reading ahead"] * 3]
    assert len(waits) == 4, "the first item, and the end of each meanwhile"
    assert "reading ahead" not in {thread.name for thread in threading.enumerate()}


def test_error_ahead_is_raised_where_the_item_is_asked_for_after_those_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third is broken")

    with closing(Ahead(broken(), at_once=8)) as items:
        assert next(items) == 1
        with items.meanwhile():
            pass
        assert next(items) == 2
        with pytest.raises(ValueError, match="the third is broken"):
            next(items)


def test_error_inside_meanwhile_leaves_once_the_item_is_made() -> None:
    with closing(Ahead(iter(range(3)))) as items:
        with pytest.raises(RuntimeError, match="out of memory"), items.meanwhile():
            raise RuntimeError("out of memory")
        assert [next(items), next(items)] == [0, 1]


def test_file_is_read_again_only_where_it_may_have_changed(tmp_path: Path) -> None:
    file, hashes = tmp_path / "image", FileHashes()

    def write(content: bytes) -> None:
        file.write_bytes(content)

    write(b"one")
    assert hashes.hash(file) == (content_hash(b"one"), b"one")
    assert hashes.hash(file) == (content_hash(b"one"), b"one"), "it changed a moment ago, and might have within the same tick"
    time.sleep(0.06)
    assert hashes.hash(file)[1] == b"one"
    assert hashes.hash(file) == (content_hash(b"one"), None)
    status = os.stat(file)
    write(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as large, and dated back
    assert hashes.hash(file) == (content_hash(b"two"), b"two")
    time.sleep(0.06)
    assert hashes.hash(file)[1] == b"two"
    other = tmp_path / "other"
    other.write_bytes(b"six")
    other.rename(file)  # another file under the same name
    assert hashes.hash(file)[0] == content_hash(b"six")
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        hashes.hash(file)


def test_latents_at_hand_leave_the_least_recently_used_first() -> None:
    held = AtHand(most=3 * 16)
    for name in (b"a", b"b", b"c"):
        held.keep(name, np.zeros(4, dtype=np.float32))
    assert held.get(b"a") is not None
    held.keep(b"d", np.zeros(4, dtype=np.float32))
    assert [held.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


def test_noise_of_an_image_is_philoxs_own_of_its_key() -> None:
    keys = [*(key(1, "noise", number) for number in range(8)), 0, 2**64 - 1]
    for shape in ((4, 8, 8), (3, 5, 7), (1, 1, 1)):
        wanted = [np.random.Generator(np.random.Philox(key=each)).standard_normal(shape, dtype=np.float32) for each in keys]
        assert np.array_equal(flow.noise(shape, keys).numpy(), np.stack(wanted))

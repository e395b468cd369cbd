"""Many files: a run may hold as many as the system lets anybody, and one that may hold no more goes on with fewer."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import stages.tensor_store
from mixing.tar import Shards
from runs import write_tars
from stages.open_files import MOST, allow_many
from stages.tensor_store import TensorStore


@contextmanager
def at_most(number: int) -> Iterator[None]:
    """Inside, this process may open so many files more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    with ExitStack() as taken:
        for _ in range(lowest - len(os.listdir("/proc/self/fd"))):  # those that are free below
            taken.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + number, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_process_may_hold_as_many_as_the_system_lets_anybody() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        assert allow_many() == (MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)) >= 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_cache_that_may_open_no_more_files_still_has_every_entry(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, limit_bytes=None, writer="one")
    keys = [number.to_bytes(16, "big") for number in range(12)]
    for number, key in enumerate(keys):
        store.put(key, {"latents": torch.full((2,), float(number))})
        store.flush()
    with at_most(4):
        found = [store.get(key) for key in keys]
    assert [None if each is None else each["latents"][0].item() for each in found] == list(range(12))
    store.close()


def test_shards_are_read_though_no_more_files_may_be_open(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", [1] * 9)
    paths = sorted(map(str, (tmp_path / "tars").glob("*.tar")))
    stamps = torch.tensor([[status.st_size, status.st_mtime_ns] for status in map(os.stat, paths)]).numpy()
    shards = Shards(paths, stamps)
    with at_most(3):
        assert all(len(shards.read(number, 0, 512)) == 512 for number in [*range(9), *range(9)])


def test_another_reason_than_too_many_files_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorStore(tmp_path, limit_bytes=None, writer="one")
    store.put(bytes(16), {"latents": torch.zeros(1)})
    store.flush()

    def gone(path: Path, flags: int) -> int:
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(stages.tensor_store.os, "open", gone)
    assert store.get(bytes(16)) is None

"""Processes: how those of a launch wait for one another, agree on what they must share, and end together when one of them fails.

A collective waits half an hour at most, long enough for one process that reads slowly. Work that is the main process's alone, such as indexing the data or
publishing, is waited for here instead, as long as it takes. Whether the others still live is seen from a connection that stays open: it closes with its
process, however that ends, also on another machine, where no launcher of ours sees it, and while this process does something else.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from stages.problems import LaunchError, PlanError, RunError
from stages.stop import Stop

Value = TypeVar("Value")

COLLECTIVE = timedelta(minutes=30)
"""How long a collective waits for a process that has not come to it. NCCL's own choice is 10 minutes: less than a machine may take to fetch a model of 24 GB."""

_PATIENCE = timedelta(days=30)  # a process that has ended is noticed at once; one that lives is waited for
_GRACE = 10.0  # seconds that the process which failed, and the launcher, have before the others end themselves
_VISIBLE = 10.0  # seconds until a new file must be seen on a shared disk

_GONE = ("by peer", "pair closure", "Broken pipe", "failed to recv, got 0 bytes")  # what gloo and its store say of a process that has ended (torch 2.13)
_LATE = ("operation to complete", "wait timeout after")  # and of one that does not come
_OTHER = "another process has ended; what it says is the reason"
_GOES_WELL, _FAILS = 0, 1


class Processes:
    """The processes of a launch. One alone waits for nothing."""

    def __init__(self, accelerator: Accelerator, stop: Stop) -> None:
        """stop: what notes that the launcher ends this process."""
        self.number: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.local_rank: int = accelerator.local_process_index
        self._stop = stop
        self._closed, self._ending = False, threading.Event()
        if self.number > 1:
            # Over gloo, whatever they train on: NCCL would have the device wait, and give up in its own time.
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            # Each watches the main process, and that one all others.
            self._watched = [0] if self.rank else list(range(1, self.number))
            self._watches = [threading.Thread(target=self._watch, args=(other,), daemon=True) for other in self._watched]
            for watch in self._watches:
                watch.start()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here, as long as they live."""
        if self.number > 1:
            dist.barrier(group=self._group)

    def gathered(self, value: Value) -> list[Value]:
        """What each process hands in, by rank; waited for as in `wait`."""
        values = [value] * self.number
        if self.number > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def turns(self) -> Iterator[bool]:
        """Whether it is this process's turn, turn by turn: of the main process, of the first one of each machine, of all others; all must ask to the end.

        What one keeps on disk the next ones find, whether machines share it or not.
        """
        mine = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for turn in sorted(set(self.gathered(mine))):
            yield turn == mine
            self.wait()

    def check_shared(self, folder: Path, what: str, cure: str) -> None:
        """Raises LaunchError, on all processes, unless each of them sees what the main one writes into a folder. what, cure: for the message."""
        if self.number == 1:
            return
        [token, *_] = self.gathered(secrets.token_hex(8))
        file = folder / f".launch-{token}"  # a name that nobody has looked for, so that no network drive remembers that it was not there
        if self.is_main:
            file.touch()
        self.wait()
        until = time.monotonic() + _VISIBLE
        while not (seen := file.exists()) and time.monotonic() < until:
            time.sleep(0.2)
        missing = [str(rank) for rank, sees in enumerate(self.gathered(seen)) if not sees]
        if self.is_main:
            file.unlink()
        if missing:
            raise LaunchError(f"{what} {folder} is another folder on process {', '.join(missing)} than on process 0; {cure}")

    def check_alike(self, held: Mapping[str, str]) -> None:
        """Raises LaunchError, on all processes, if one of them holds something else than the main one. held: what, in words, to a hash of it."""
        first, *others = self.gathered(dict(held))
        for rank, other in enumerate(others, 1):
            if differing := [what for what, value in first.items() if other.get(what) != value]:
                raise LaunchError(f"{differing[0]} is not the same on process {rank} as on process 0; give every machine the same files")

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Inside, an error that tells only of another process's end is put into words, after that process and the launcher had their time; any other one is given the process's number."""
        try:
            yield
        except RuntimeError as error:
            said = str(error)
            if self.number > 1 and not isinstance(error, RunError):
                if any(words in said for words in _GONE):
                    self._leave()
                    raise RunError(_OTHER) from None
                if any(words in said for words in _LATE):
                    minutes = COLLECTIVE.total_seconds() / 60
                    raise RunError(f"another process has not come to an exchange in {minutes:.0f} minutes; it hangs, such as on a drive that does not answer ({said})") from None
            raise
        finally:
            error_here = sys.exception()
            if self.number > 1 and error_here is not None and not isinstance(error_here, (RunError, PlanError, SystemExit, GeneratorExit)):
                error_here.add_note(f"This was process {self.rank}, of 0 to {self.number - 1}.")
            self.close()

    def close(self) -> None:
        """Say the last word to the processes that watch this one, and, where all goes well, hear theirs."""
        if self.number == 1 or self._closed:
            return
        self._closed = True
        self._ending.set()
        word = _GOES_WELL if sys.exception() is None else _FAILS
        for other in self._watched:
            with suppress(RuntimeError):
                dist.send(torch.full((1,), word), dst=other, group=self._group)
        if word == _GOES_WELL:
            for watch in self._watches:
                watch.join(_GRACE)

    def _leave(self) -> None:
        """Let the process that failed speak, and the launcher end this one, which then has nothing to say itself. Raises SystemExit if it does."""
        self._ending.set()
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            if self._stop.signal is not None:
                raise SystemExit(1)
            time.sleep(0.05)

    def _watch(self, other: int) -> None:
        """Wait for another process's last word. If it fails, or ends without one, end this process too, unless it does so itself in time."""
        word = torch.full((1,), _FAILS)
        with suppress(RuntimeError):
            dist.recv(word, src=other, group=self._group)
        if int(word) == _GOES_WELL or self._ending.wait(_GRACE):
            return
        if self._stop.signal is None:
            print(f"process {self.rank} failed: {_OTHER}", file=sys.stderr, flush=True)
        # The main thread may be in a call that never returns; what is on disk is whole at any instant.
        os._exit(1)

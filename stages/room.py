"""Room: what a run cannot do without is written once there is room for it; any other failure of its folder ends the run in words. The last checkpoint stands either way.

A full disk is waited for here, by the main process alone, with its console and its memory, while the others wait as for any save. What a run can do without is warned of and left out.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.markup import escape
from safetensors import SafetensorError

from stages.hub.files import bytes_said
from stages.log_files import LogFile, LogName, Place
from stages.problems import PlanError, RunError
from stages.stop import Stop

Value = TypeVar("Value")

PATIENCE = 3600.0
"""Seconds that a full disk is waited for."""
LOOKS = 1.0
"""Seconds between two looks at what is free."""
_TRIES, _TRIES_FOR_LITTLE = 5.0, 60.0  # seconds after which it is tried again where enough seems to be free, and where not: a quota is not seen from here
_SAYS = 300.0

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_A_DISK = frozenset({errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EREMOTEIO, *_FULL})
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
Failure = (OSError, SafetensorError)
"""What writing raises: safetensors (0.8) has an error of its own, which is no OSError."""


class Left(RunError):
    """A signal came while a full disk was waited for."""


class Room:
    """What stands between a run and the disk that its folder lies on. For the main process's main thread."""

    def __init__(self, folder: Path, stop: Stop, say: Callable[[str], object]) -> None:
        """say: prints a line, in rich's markup."""
        self.folder, self.stands = folder, ""
        self._stop, self._say = stop, say
        self._folder_is: tuple[int, int] | None = None

    def open(self) -> None:
        """Make the run's folder. Raises PlanError if it cannot be made or written into."""
        try:
            self.must("the run's folder", self._make_folders)
        except Left:
            raise
        except RunError as error:
            raise not_writable(self.folder, error.__cause__ or error) from None
        self._folder_is = _identity(self.folder)

    def must(self, what: str, write: Callable[[], Value], *, size: int = 0) -> Value:
        """Write what the run cannot do without, and give what `write` gives.

        what: in words, for messages. write: leaves nothing half-written where it fails, and may be called again. size: bytes that it is known to need.
        Raises RunError where that fails for another reason than a full disk, and where the disk stays full or a signal comes meanwhile.
        """
        self._check_folder(what)
        try:
            done = write()
            self._check_folder(what)
            return done
        except Failure as error:
            failed: Exception = error
        began = tried = said = time.monotonic()
        is_said = False
        while True:
            if not is_full(failed):
                raise RunError(f"{self.folder}: {what} cannot be written: {words_of(failed)}; {self.standing()}. See to the disk, and the same command goes on") from failed
            free = free_bytes(self.folder)
            needs = f"{what} needs {f'about {bytes_said(size)}' if size else 'room'}, {_free_said(self.folder, failed, free)}"
            if self._stop.look():
                lost = f"the steps since are not saved, and are made again by the same command; it needs {f'{bytes_said(size)}' if size else 'room'} on that disk"
                raise Left(f"stopped by {self._stop.name} while the disk of {self.folder} was full: {needs}; {self.standing()}; {lost}") from failed
            now = time.monotonic()
            if now - began >= PATIENCE:
                raise RunError(f"the disk of {self.folder} was full for {PATIENCE / 60:.0f} minutes: {needs}; {self.standing()}. Make room, and the same command goes on") from failed
            if not is_said or now - said >= _SAYS:
                is_said, said = True, now
                self._say(f"[yellow]the disk of {escape(str(self.folder))} is full[/yellow]: {escape(needs)}; waiting for room, {(PATIENCE - now + began) / 60:.0f} minutes at most; {escape(self.standing())}; Ctrl-C ends")
            time.sleep(LOOKS)
            found = free_bytes(self.folder)
            if not (found > free and found >= size) and time.monotonic() - tried < (_TRIES if found >= size else _TRIES_FOR_LITTLE):
                continue
            tried = time.monotonic()
            self._check_folder(what)
            try:
                written = write()
            except Failure as error:
                failed = error
                continue
            self._say(f"there is room again after {time.monotonic() - began:.0f} s: {escape(what)} is written")
            return written

    def may(self, what: str, write: Callable[[], Value], warn: Callable[[str], object], cure: str) -> Value | None:
        """Write what the run can do without: where that fails it is warned of, and None is given. cure: what to do about it."""
        try:
            return write()
        except Failure as error:
            warn(f"{what} is not written: {words_of(error)}; {cure}")
            return None

    @contextmanager
    def ending_in_words(self) -> Iterator[None]:
        """Inside, an error that the disk of the run's folder makes, or something that another has put there or taken away, is put into words."""
        try:
            yield
        except OSError as error:
            if not self._concerns(error):
                raise
            raise RunError(f"{self.folder}: {words_of(error)}; {self.standing()}. See to the disk, and the same command goes on") from error

    def _make_folders(self) -> None:
        for folder in (self.folder, self.folder / "stages", self.folder / "evaluations"):
            folder.mkdir(parents=True, exist_ok=True)

    def _concerns(self, error: OSError) -> bool:
        """Whether it is the run folder's affair."""
        names = [Path(os.fsdecode(name)).absolute() for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        return any(name.is_relative_to(self.folder.absolute()) for name in names) or (not names and error.errno in _OF_A_DISK)

    def _check_folder(self, what: str) -> None:
        """Raises RunError if the folder that the run began in is not there any more: half of a run in a new one would be taken for a whole one."""
        if self._folder_is is not None and _identity(self.folder) != self._folder_is:
            raise RunError(f"{self.folder} is not there any more, or is another folder now, so {what} has no place; it was deleted, moved or unmounted while the run wrote into it. Put it back, and the same command goes on from its last checkpoint")

    def standing(self) -> str:
        """What is safe, in words."""
        return f"the checkpoint of {self.stands} stands" if self.stands else "no checkpoint was saved yet"


class Lines:
    """A log whose lines, where they find no room, wait in memory, in order: it holds whole lines at any instant, and the steps go on until the next save, where all of it is waited for."""

    def __init__(self, room: Room, name: LogName, keep: Place | None, at_once: int = 0) -> None:
        """keep: as of `LogFile`. at_once: bytes that are gathered before they are written."""
        self._room, self._at_once, self._what = room, at_once, f"{name}.jsonl"
        self._waiting: list[str] = []
        self._size, self._retry_at = 0, 0.0
        self.is_behind = False
        """Whether lines wait for room."""
        self._file = room.must(self._what, lambda: LogFile(room.folder, name, keep))
        self.lost_bytes = self._file.lost_bytes
        """Of what was kept, and is not there any more."""

    def add(self, text: str) -> None:
        """Add whole lines. Raises RunError where they cannot be written for another reason than a full disk."""
        self._waiting.append(text)
        self._size += len(text)
        if self._size >= self._at_once and time.monotonic() >= self._retry_at:
            try:
                self._push()
            except OSError as error:
                if not is_full(error):
                    self._room.must(self._what, self._push)  # which says so
                self._retry_at, self.is_behind = time.monotonic() + LOOKS, True

    def place(self) -> Place:
        """Where the log stands, all of it on the disk. Raises RunError where that cannot be."""
        self._room.must(self._what, self._push, size=self._size)
        try:
            return self._file.place()
        except OSError as error:  # what a disk had taken and cannot keep after all is lost, and to ask once more would not tell
            raise RunError(f"{self._room.folder}: {self._what} could not be kept: {words_of(error)}; {self._room.standing()}. See to the disk, and the same command goes on") from error

    def close(self) -> int:
        """Close the log; gives the bytes that found no room."""
        try:
            self._push()
        except OSError:
            self.is_behind = True
        finally:
            self._file.close()
        return self._size

    def _push(self) -> None:
        """Write what waits, all or nothing. Raises OSError."""
        if self._waiting:
            self._file.write("".join(self._waiting))
            self._waiting.clear()
        self._size, self.is_behind = 0, False


def not_writable(folder: Path, error: BaseException) -> PlanError:
    """What to say of a run folder that cannot be written into when a run is opened."""
    return PlanError.at(str(folder), f"no run can be written there: {words_of(error)}; pass --out with a folder that can be written into")


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk, or what its owner may take of it, is full."""
    return _number(error) in _FULL


def words_of(error: BaseException) -> str:
    """What the system says, and of which file."""
    number = _number(error)
    if number is None:
        return str(error) or type(error).__name__
    name = getattr(error, "filename", None)
    return os.strerror(number) + (f" ({os.fsdecode(name)})" if isinstance(name, (str, bytes)) else "")


def _number(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors and others write into their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1] or found[2]) if found else None


def _free_said(folder: Path, error: BaseException, free: int) -> str:
    """What there is, in words, and what there is not: a disk may have bytes left that this user, or one file more, may not take."""
    if _number(error) == errno.EDQUOT:
        return f"and the quota there is used up (quota -s), though {bytes_said(free)} are free"
    try:
        found = os.statvfs(folder)
    except OSError:
        found = None
    if found is not None and found.f_files and not found.f_favail:
        return f"and no file more can be made there (df -i), though {bytes_said(free)} are free"
    return f"{bytes_said(free)} are free"


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, to this user; 0 if that cannot be told."""
    while True:
        try:
            found = os.statvfs(folder)
            return found.f_bavail * found.f_frsize
        except FileNotFoundError:
            if folder == folder.parent:
                return 0
            folder = folder.absolute().parent
        except OSError:
            return 0


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino

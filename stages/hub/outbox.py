"""Outbox: what a run still has to send to the Hub, and what it has sent. Folders of files and JSON inside the run folder, so that the next launch goes on.

hub/outbox/NUMBER-KIND/   job.json, and in files/ what is to be sent, as it was when it was put there
hub/sent.json             what has been sent last
Neither carries a version: what cannot be read, or is of a kind that this version does not know, is taken away, and what is still to be sent is put there anew.
Imports neither torch nor huggingface_hub.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from stages.log_files import is_closed_file

Kind = Literal["trained", "checkpoint"]

_JOB = "job.json"
_FILES = "files"
_TAKEN = "taken"


@dataclass(frozen=True)
class Parcel:
    """What is to be sent in one commit."""

    kind: Kind
    """`trained`: the adapter, and the model where its weights were trained. `checkpoint`: what resuming needs."""
    repo: str
    private: bool
    """How the repository is made if there is none; one that is there is left as it is."""
    branch: str
    message: str
    """Of the commit."""
    words: str
    """What it is, for the console: `the adapter of 'refine'`."""
    mark: str
    """What tells it apart: sent once, it is not sent again."""


@dataclass(frozen=True)
class Job:
    """A parcel that lies in the outbox."""

    folder: Path
    parcel: Parcel

    @property
    def number(self) -> int:
        """Jobs are sent in the order of these."""
        return int(self.folder.name.split("-")[0])

    @property
    def files(self) -> dict[str, Path]:
        """The name that each file has in the repository, and where it lies."""
        root = self.folder / _FILES
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    @property
    def is_taken(self) -> bool:
        """Whether it is, or was, being sent."""
        return (self.folder / _TAKEN).exists()

    def take(self) -> None:
        """Note that it is being sent."""
        (self.folder / _TAKEN).touch()

    @property
    def bytes(self) -> int:
        """Of all files; 0 of a job that is just being taken out, for it has been sent."""
        try:
            return sum(path.stat().st_size for path in self.files.values())
        except FileNotFoundError:
            return 0


class Outbox:
    """The outbox of a run folder. One process puts jobs into it, one sends them; a job is there whole or not at all."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "hub"
        self._jobs, self._sent = self.folder / "outbox", self.folder / "sent.json"

    def open(self) -> None:
        """Make the folder, and give the run its name among the runs that a repository may have seen."""
        self._jobs.mkdir(parents=True, exist_ok=True)
        self.tidy()
        if "run" not in self._read():
            self.rename(secrets.token_hex(8))  # an identity decides nothing of what is learnt

    def tidy(self) -> None:
        """Take away what a process that was ended left half made or half taken out, and what cannot be read."""
        for leftover in self._jobs.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in self._jobs.glob("[0-9]*-*"):
            if _parcel(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def rename(self, run: str) -> None:
        """Go on under the name of the run that was fetched from the Hub."""
        self._jobs.mkdir(parents=True, exist_ok=True)
        self._write({"run": run, "sent": self.sent()})

    @property
    def run(self) -> str:
        """What the run is told apart by."""
        return str(self._read()["run"])

    def put(self, parcel: Parcel, files: Mapping[str, Path], *, first_bytes: Mapping[str, int] | None = None) -> Job | None:
        """Put a parcel into the outbox; None if it lies there already, or was the last of its kind that was sent. A checkpoint takes the place of one that waits.

        files: the name in the repository of each. Weights and closed parts of logs are linked, since they are never written to in their place; everything else is copied.
        first_bytes: of files that grow, how much of them is sent. Raises OSError, leaving nothing, where the disk is full.
        """
        last = next((entry for entry in reversed(self.sent()) if entry["kind"] == parcel.kind and entry["repo"] == parcel.repo), None)
        waiting = [job for job in self.jobs() if job.parcel.kind == parcel.kind and job.parcel.repo == parcel.repo]
        newest = waiting[-1].parcel.mark if waiting else last["mark"] if last else None
        if newest == parcel.mark:
            return None
        number = 1 + max([job.number for job in self.jobs()] + [entry["number"] for entry in self.sent()], default=0)
        place, partial = self._jobs / f"{number:06d}-{parcel.kind}", self._jobs / f".{number:06d}.partial"
        try:
            for name, source in files.items():
                (partial / _FILES / name).parent.mkdir(parents=True, exist_ok=True)
                _keep(source, partial / _FILES / name, (first_bytes or {}).get(name))
            (partial / _JOB).write_text(json.dumps(asdict(parcel), indent=1), encoding="utf-8")
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(place)
        for job in waiting if parcel.kind == "checkpoint" else ():  # only now: killed before, nothing would be left to send
            if not job.is_taken:  # a slow line would have old checkpoints fill the disk
                self.remove(job)
        return Job(place, parcel)

    def jobs(self) -> list[Job]:
        """What is to be sent, oldest first."""
        found = []
        for folder in sorted(self._jobs.glob("[0-9]*-*")) if self._jobs.is_dir() else []:
            if (parcel := _parcel(folder)) is not None:  # it may just have been sent
                found.append(Job(folder, parcel))
        return found

    def remove(self, job: Job) -> None:
        """Take a job out."""
        gone = job.folder.with_name(f".{job.folder.name}.gone")
        with suppress(FileNotFoundError):  # one that had to wait has just been sent by the other process
            job.folder.rename(gone)  # so that nobody sees half of it
        shutil.rmtree(gone, ignore_errors=True)

    def note_sent(self, job: Job, url: str) -> None:
        """Write down that a job has been sent, and take it out. url: of the commit."""
        parcel = job.parcel
        entry = {"number": job.number, "kind": parcel.kind, "repo": parcel.repo, "branch": parcel.branch, "what": parcel.words, "mark": parcel.mark, "bytes": job.bytes, "url": url, "files": [*job.files]}
        others = [other for other in self.sent() if (other["kind"], other["repo"]) != (parcel.kind, parcel.repo)]
        self._write({**self._read(), "sent": [*others, entry]})
        self.remove(job)

    def sent(self) -> list[dict[str, Any]]:
        """What has been sent last, of each kind to each repository."""
        return list(self._read().get("sent", []))

    def _read(self) -> dict[str, Any]:
        """What sent.json says; nothing where it is not there or cannot be read: then all is sent again, under another name."""
        try:
            found = json.loads(self._sent.read_text(encoding="utf-8"))
            is_known = all({"number", "kind", "repo", "mark", "files"} <= entry.keys() for entry in found["sent"]) and isinstance(found["run"], str)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        return dict(found) if is_known else {}

    def _write(self, content: Mapping[str, Any]) -> None:
        partial = self._sent.with_name(f".{self._sent.name}.partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self._sent)


def _parcel(folder: Path) -> Parcel | None:
    """What lies in a job's folder; None where that is not there, or cannot be read."""
    try:
        said = json.loads((folder / _JOB).read_text(encoding="utf-8"))
        parcel = Parcel(**{field.name: said[field.name] for field in fields(Parcel)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return parcel if parcel.kind in get_args(Kind) else None


def _keep(source: Path, place: Path, first_bytes: int | None) -> None:
    """Keep a file as it is now."""
    if source.suffix == ".safetensors" or (first_bytes is None and is_closed_file(source.name)):
        try:
            os.link(source, place)
            return
        except OSError:
            pass  # the disk knows no links
    shutil.copyfile(source, place)
    if first_bytes is not None:
        os.truncate(place, first_bytes)

"""Hub push: send what a run has published, now and in the foreground."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from stages.hub.files import losses_words, resumable, trained_files, trained_mark, trained_words
from stages.hub.outbox import Outbox, Parcel
from stages.hub.send import alone, send_all
from stages.hub.words import HERE, PREFIX, WAITS, is_repo
from stages.printable import printable

_TRIES = 4  # somebody waits at the console


class _Enough(Exception):
    """The Hub could not be reached for long enough."""


def push_run(folder: Path, repo: str, *, private: bool, checkpoints: bool) -> int:
    """Send what lies in the run folder and its outbox; says what is sent. Returns the exit code."""
    if not is_repo(repo):
        return _failed(f"'{repo}' is no name on the Hub; write user/name")
    files = trained_files(folder) if folder.is_dir() else {}
    if not files and not checkpoints:
        return _failed(f"{folder} has published nothing yet: it has neither adapter/ nor model/")
    outbox, late = Outbox(folder), 0
    outbox.open()
    refused: set[str] = set()

    def tell(kind: str, text: str) -> None:
        nonlocal late
        print(printable(text), flush=True)
        late += kind == "late"
        if late == _TRIES:
            raise _Enough

    with alone(outbox, tell), tempfile.TemporaryDirectory() as scratch:
        if files:
            words = trained_words(folder)
            parcel = Parcel("trained", repo, private, "main", losses_words(folder, _last_stage(folder)), words, trained_mark(folder))
            outbox.put(parcel, {**files, "README.md": _card(files["README.md"], repo, Path(scratch))} if "README.md" in files else files)
        if checkpoints:
            if (found := resumable(folder)) is None:
                return _failed(f"{folder} holds no checkpoint")
            outbox.put(found.parcel(repo, private=private), found.files, first_bytes=found.first_bytes)
        if not outbox.jobs():
            print(f"all of {folder} is on the Hub already")
            return 0
        try:
            send_all(outbox, tell, WAITS, passed_over=refused)
        except _Enough:
            return _failed("given up for now; the same command goes on")
    return 1 if refused else 0


def _card(card: Path, repo: str, scratch: Path) -> Path:
    """The card with the repository's name where it named no repository."""
    text = card.read_text(encoding="utf-8")
    if HERE not in text:
        return card
    text = text.replace(f"start: {HERE}", f"start: {PREFIX}{repo}").replace(HERE, repo)
    (scratch / card.name).write_text(text, encoding="utf-8")
    return scratch / card.name


def _last_stage(folder: Path) -> str:
    """The name of the newest stage of a run."""
    stages = sorted((folder / "stages").glob("[0-9]*-*"), key=lambda path: int(path.name.split("-")[0]))
    return stages[-1].name.partition("-")[2] if stages else folder.name


def _failed(message: str) -> int:
    print(printable(f"failed: {message}"), file=sys.stderr)
    return 1

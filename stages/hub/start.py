"""Hub start: the published adapter that `start: hub:user/name` begins from, fetched into huggingface_hub's cache, the commit written down."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from stages.checkpoint import write_whole
from stages.hub.errors import FAILURES, words_of
from stages.hub.words import PREFIX, published
from stages.layouts import ADAPTER_FILE, SECOND_FILE
from stages.peft_layout import CONFIG_FILE, WEIGHTS_FILE
from stages.processes import Processes

NOTE = "start.json"
"""In the run's folder: which commit the run begins from, for a branch may go on."""


def start_place(start: str, folder: Path, processes: Processes) -> Path:
    """Where what `start` names lies on this machine. folder: the run's. Every process must ask; the first of each machine fetches.

    Raises ValueError if the Hub has no such adapter, or cannot be asked and it was not fetched before.
    """
    if not start.startswith(PREFIX):
        return Path(start)
    place, failed = Path(start), ""
    for is_mine in processes.turns():
        if is_mine:
            try:
                place = fetched(start, folder, writes=processes.is_main)
            except ValueError as error:
                failed = str(error)
    if said := next(filter(None, processes.gathered(failed)), ""):  # whoever failed, all of them end
        raise ValueError(said)
    return place


def began_from(start: str | None, folder: Path) -> str | None:
    """What a plan's `start` names, with the commit that the run in `folder` begins from where that is on the Hub."""
    note = folder / NOTE
    if start is None or not start.startswith(PREFIX) or not note.exists():
        return start
    commit = _noted(note).get("commit")
    return start if commit is None else f"{start.partition('@')[0]}@{commit}"


def _noted(note: Path) -> dict[str, str]:
    """What is written down of the commit; nothing where there is no such file, or it is damaged."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def fetched(start: str, folder: Path, *, writes: bool) -> Path:
    """The folder in huggingface_hub's cache that holds the adapter. Offline it is found where it was fetched before. writes: whether the commit is written into `folder`."""
    wanted = published(start)
    if wanted is None:
        raise ValueError(f"start: '{start}' is not written hub:user/name or hub:user/name@revision")
    note = folder / NOTE
    known = _noted(note)
    revision = known["commit"] if known.get("start") == start else wanted.revision
    names = (ADAPTER_FILE, SECOND_FILE, WEIGHTS_FILE, CONFIG_FILE)
    try:
        place = Path(snapshot_download(wanted.repo, revision=revision, allow_patterns=list(names)))
    except FAILURES as error:
        raise ValueError(f"start: {start}: it cannot be fetched: {words_of(error)}") from None
    if not any((place / name).is_file() for name in names[:-1]):
        raise ValueError(f"start: {start} holds no adapter ({', '.join(names[:-1])}); a trained model is named by `model`")
    if writes:
        write_whole(note, json.dumps({"start": start, "commit": place.name}, indent=1))  # the cache keeps a commit in a folder of its name
    return place

"""Hub fetch: the newest checkpoint of a run that was published, brought into an empty run folder, so that the run goes on here."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from stages.hub.checkpoint import read_marker
from stages.hub.errors import FAILURES, words_of
from stages.hub.files import CHECKPOINTS, bytes_said, is_resumable
from stages.hub.outbox import Outbox
from stages.hub.words import is_repo


class FetchError(RuntimeError):
    """There is no checkpoint to be had, or no place for it."""


class NothingThere(FetchError):
    """The Hub was asked, and has no checkpoint."""


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run folder has a checkpoint of its own."""
    return any(folder.glob("stages/*/step-*"))


def fetch_run(repo: str, folder: Path) -> str:
    """Fetch what a run's branch of checkpoints holds into its folder; says what was fetched. What was fetched before it was interrupted is not fetched again.

    Raises FetchError. Nothing is trusted but names: hashes are looked at as of any checkpoint, when the run is opened.
    """
    if not is_repo(repo):
        raise FetchError(f"'{repo}' is no name on the Hub; write user/name")
    if holds_checkpoints(folder):
        raise FetchError(f"{folder} holds checkpoints of its own; give another folder by --out")
    partial = folder / ".fetched"
    try:
        api = HfApi()
        marker = read_marker(api, repo, CHECKPOINTS)
        if marker is None:
            raise NothingThere(f"{repo} has no checkpoints: they are sent where a plan says publish: {{checkpoints: true}}")
        names = {name: int(entry["bytes"]) for name, entry in marker["files"].items()}
        if foreign := [name for name in names if not is_resumable(name)]:
            raise FetchError(f"{repo}: the branch '{CHECKPOINTS}' names {foreign[0]!r}, which is no file of a run; it is not fetched")
        api.snapshot_download(repo, revision=CHECKPOINTS, allow_patterns=[glob.escape(name) for name in names], local_dir=partial)
    except FetchError:
        raise
    except RepositoryNotFoundError:
        raise NothingThere(f"the Hub has no repository {repo}, or does not show it to this token") from None
    except FAILURES as error:
        raise FetchError(f"the checkpoint cannot be fetched from {repo}: {words_of(error)}") from None
    if wrong := [name for name, size in names.items() if not (partial / name).is_file() or (partial / name).stat().st_size != size]:
        raise FetchError(f"{repo}: {wrong[0]} is not what was sent; a newer checkpoint came meanwhile: try again")
    for name in names:
        if not name.startswith("stages/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
    Outbox(folder).rename(str(marker["run"]))
    shutil.rmtree(folder / "stages", ignore_errors=True)  # it holds no checkpoint
    (partial / "stages").rename(folder / "stages")  # from now on it is that run's folder
    shutil.rmtree(partial)
    return f"{marker['checkpoint']} was fetched from {repo} into {folder}, {bytes_said(sum(names.values()))}; the command that began the run goes on with it"

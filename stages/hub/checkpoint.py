"""Hub checkpoint: a run's newest checkpoint on a branch of its own, which keeps no history and says what of it is Medley's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from stages.hub.errors import Refused, status_of
from stages.hub.files import MARKER, known_hashes
from stages.hub.outbox import Job, Outbox


def send_checkpoint(api: HfApi, outbox: Outbox, job: Job) -> str:
    """Put a checkpoint in the place of the one before. Only what the marker names is taken away, and the branch keeps no history of it."""
    parcel, files = job.parcel, job.files
    before = read_marker(api, parcel.repo, parcel.branch)
    if before is None and not _made_branch(api, outbox, job):
        raise Refused(f"{parcel.repo} has a branch '{parcel.branch}' that Medley did not make; delete it, or publish to another repository")
    if before is not None and before["run"] != outbox.run:
        raise Refused(f"the branch '{parcel.branch}' of {parcel.repo} holds the checkpoints of another run; publish to another repository, or delete the branch")
    hashes = known_hashes(files)
    marker = {"run": outbox.run, "checkpoint": parcel.words, "files": {name: {"bytes": path.stat().st_size, "sha256": hashes.get(name)} for name, path in files.items()}}
    known: dict[str, Any] = before["files"] if before else {}
    there = set(api.list_repo_files(parcel.repo, revision=parcel.branch))
    unchanged = {name for name, entry in known.items() if name in there and entry["sha256"] and entry["sha256"] == hashes.get(name)}
    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items() if name not in unchanged]
    operations.append(CommitOperationAdd(path_in_repo=MARKER, path_or_fileobj=json.dumps(marker, indent=1).encode()))
    operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in known if name in there and name not in files]
    url = str(api.create_commit(parcel.repo, operations, commit_message=parcel.message, revision=parcel.branch).commit_url)
    api.super_squash_history(parcel.repo, branch=parcel.branch, commit_message=parcel.message)
    return url


def _made_branch(api: HfApi, outbox: Outbox, job: Job) -> bool:
    """Make the branch, or see that this run made it before."""
    note, name = outbox.folder / f"branch-{job.parcel.branch}.json", job.parcel.branch
    if any(branch.name == name for branch in api.list_repo_refs(job.parcel.repo).branches):
        return note.is_file() and note.read_text(encoding="utf-8") == json.dumps(job.parcel.repo)
    partial = note.with_name(f".{note.name}.partial")
    partial.write_text(json.dumps(job.parcel.repo), encoding="utf-8")
    partial.replace(note)  # first: of a branch that was made by a process that was ended before it could say so nobody would know whose it is
    api.create_branch(job.parcel.repo, branch=name)
    return True


def read_marker(api: HfApi, repo: str, branch: str) -> dict[str, Any] | None:
    """What the branch of checkpoints says of itself; None if there is no such branch, or if it is not Medley's. Raises one of FAILURES, Refused where what it says cannot be read."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = api.hf_hub_download(repo, MARKER, revision=branch, cache_dir=scratch)
        except (RevisionNotFoundError, EntryNotFoundError) as error:
            if status_of(error) != 404:
                raise  # huggingface_hub calls it so too where the Hub cannot be reached
            return None
        try:
            found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            is_known = isinstance(found["run"], str) and isinstance(found["checkpoint"], str) and all(isinstance(entry["bytes"], int) and "sha256" in entry for entry in found["files"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_known = False
    if not is_known:
        raise Refused(f"{MARKER} on the branch '{branch}' of {repo} cannot be read; delete the branch, or update Medley if a later version made it")
    return found

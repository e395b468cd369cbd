"""Hub send: bring an outbox to the Hub, job after job, whatever the network does. The training process has this done by a process of its own.

The token is huggingface_hub's affair alone: it comes from the environment or the login, and is cut out of whatever is said.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory  # 2.4: the public one sets no time limit

from stages.hub.checkpoint import send_checkpoint
from stages.hub.errors import FAILURES, Refused, is_final, status_of, words_of
from stages.hub.files import bytes_said
from stages.hub.outbox import Job, Outbox

SILENCE = 120.0
"""Seconds without an answer after which a connection is given up."""

Tell = Callable[[str, str], None]
"""Told a kind and a sentence: `say`; `late`, it is tried again; `refused`, it is not; `sent`; of checkpoints, which are many, `note` for `say` and `sent`."""


def set_up() -> None:
    """Have huggingface_hub give up connections that no longer answer, and print nothing."""

    def patient() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = httpx2.Timeout(SILENCE)
        return client

    set_client_factory(patient)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its warnings name addresses that are signed


# --- one job ----------------------------------------------------------------------------------------------------------------------------


def make_contact(api: HfApi, repo: str, *, private: bool) -> str:
    """Make the repository if there is none, and see that it can be written. Returns what there is to say of it. Raises one of FAILURES."""
    if constants.HF_HUB_OFFLINE:
        raise Refused("HF_HUB_OFFLINE is set, so the Hub is not asked")
    if get_token() is None:
        raise Refused("there is no token; set HF_TOKEN, or type: hf auth login")
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if status_of(error) == 401 and not _is_known(api):
            raise
        api.create_repo(repo, private=private, exist_ok=True)
        return f"{repo} on the Hub was made, {_visibility(private)}"
    api.auth_check(repo, write=True)
    if bool(info.private) == private:
        return f"{repo} on the Hub can be written"
    return f"{repo} on the Hub can be written; it is {_visibility(bool(info.private))}, not {_visibility(private)} as asked, and stays so"


def _is_known(api: HfApi) -> bool:
    """Whether the token is anybody's: the Hub answers 401 for a repository that is not there, too."""
    try:
        api.whoami()
    except HfHubHTTPError as error:
        if status_of(error) == 401:
            return False
        raise
    return True


def _visibility(private: bool) -> str:
    return "private" if private else "public"


def send(api: HfApi, outbox: Outbox, job: Job) -> str:
    """Send a job as one commit; what the Hub has already, by its hash, is not sent again, and what this run sent before and has no longer is taken away.

    Returns the address of the commit. Raises one of FAILURES.
    """
    parcel, files = job.parcel, job.files
    if parcel.kind == "checkpoint":
        return send_checkpoint(api, outbox, job)
    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    if stale := {name for entry in outbox.sent() if entry["kind"] == parcel.kind and entry["repo"] == parcel.repo for name in entry["files"]} - files.keys():
        there = set(api.list_repo_files(parcel.repo, revision=parcel.branch))
        operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in sorted(stale & there)]
    return str(api.create_commit(parcel.repo, operations, commit_message=parcel.message, revision=parcel.branch).commit_url)


# --- all of them ------------------------------------------------------------------------------------------------------------------------


def send_all(outbox: Outbox, tell: Tell, waits: Sequence[float], *, passed_over: set[str], wait: Callable[[float], object] = time.sleep) -> None:
    """Send what lies in the outbox, oldest first; of several checkpoints the newest. What fails for now is tried again, without end; what is refused is added to
    `passed_over`, by the name of its folder, and stays.

    waits: seconds before each further try, the last one again and again. wait: waits so long, or less where there is a reason.
    """
    api, met = HfApi(), set[str]()
    failures = 0
    while (job := _next(outbox, passed_over)) is not None:
        parcel = job.parcel
        try:
            if parcel.repo not in met:
                make_contact(api, parcel.repo, private=parcel.private)
                met.add(parcel.repo)
            job.take()
            size = job.bytes
            tell("say" if parcel.kind == "trained" else "note", f"sending {parcel.words} to {parcel.repo}, {bytes_said(size)}")
            began = time.monotonic()
            url = send(api, outbox, job)
            tell("sent" if parcel.kind == "trained" else "note", f"{parcel.words} is on the Hub, {bytes_said(size)} in {time.monotonic() - began:.0f} s: {url}")
            outbox.note_sent(job, url)  # last, for who sees that nothing is left asks for nothing more
            failures = 0
        except FAILURES as error:
            if not job.folder.exists():  # a newer checkpoint has taken its place
                continue
            if is_final(error):
                tell("refused", f"{parcel.words} was not sent to {parcel.repo}: {words_of(error)}")
                passed_over.add(job.folder.name)
                continue
            seconds = waits[min(failures, len(waits) - 1)]
            failures += 1
            tell("late", f"{parcel.words} could not be sent to {parcel.repo}: {words_of(error)}; the next try is in {seconds:.0f} s")
            wait(seconds)


def _next(outbox: Outbox, passed_over: set[str]) -> Job | None:
    """The job to send next. Checkpoints that a later one has replaced are taken out."""
    jobs = outbox.jobs()
    checkpoints = [job for job in jobs if job.parcel.kind == "checkpoint"]
    for job in checkpoints[:-1]:
        outbox.remove(job)
    left = [job for job in jobs if job not in checkpoints[:-1] and job.folder.name not in passed_over]
    return left[0] if left else None


@contextmanager
def alone(outbox: Outbox, tell: Tell) -> Iterator[None]:
    """Wait until no other process sends from this outbox."""
    with (outbox.folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            tell("say", "another process is sending from this folder; waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def serve(run_folder: Path, repo: str, waits: Sequence[float], *, private: bool) -> None:
    """Send what is put into the outbox, until nothing more is to come: a line on standard input says that something was put there, its end that the run is over,
    and then this process ends at once. What there is to say goes to standard output, a line of JSON each."""
    outbox, poked = Outbox(run_folder), threading.Event()

    def listen() -> None:
        while os.read(0, 4096):
            poked.set()
        os._exit(0)  # what is half sent, the next launch sends

    def tell(kind: str, text: str) -> None:
        print(json.dumps({"kind": kind, "text": text}), flush=True)

    def impatient(seconds: float) -> None:
        poked.wait(seconds)
        poked.clear()

    threading.Thread(target=listen, daemon=True).start()
    with alone(outbox, tell):
        try:
            tell("say", make_contact(HfApi(), repo, private=private))
        except FAILURES as error:
            tell("refused" if is_final(error) else "late", f"nothing can be sent to {repo} now: {words_of(error)}")
        while True:
            poked.clear()
            send_all(outbox, tell, waits, passed_over=set(), wait=impatient)
            poked.wait()

"""Hub run: what a training process has of the Hub. It puts things into the outbox and goes on; a process of its own sends them, and nothing that befalls it ends the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from rich.markup import escape

from stages.hub.fetch import FetchError, NothingThere, fetch_run, holds_checkpoints
from stages.hub.files import bytes_said, losses_words, resumable, trained_files, trained_mark, trained_words
from stages.hub.outbox import Outbox, Parcel
from stages.hub.words import WAITS
from stages.plan import Publish
from stages.stop import Stop
from stages.track import Log

LEAVE = 5.0
"""Seconds that a run which was told to stop waits for what is being sent."""
FAILING = 120.0
"""Seconds that a finished run waits while sending fails."""
PATIENCE = 600.0
"""Seconds that a finished run waits at least while nothing fails, and for each megabyte another one."""
SAYS_EVERY = 30.0
FETCH_WAITS = (2.0, 10.0, 30.0)
"""Seconds before each further try to find a checkpoint on the Hub."""

_ROOT = Path(__file__).resolve().parent.parent.parent


def fetch_if_new(repo: str, folder: Path, say: Callable[[str], object]) -> None:
    """Fetch the newest checkpoint that a run has published, if its folder holds none here. Where the Hub has none, or cannot be reached, the run begins anew."""
    if holds_checkpoints(folder):
        return
    for wait in (*FETCH_WAITS, None):
        try:
            say(escape(fetch_run(repo, folder)))
            return
        except NothingThere:
            return
        except FetchError as error:
            if wait is None:
                say(f"[yellow]warning:[/yellow] {escape(str(error))}; the run begins anew")
                return
            time.sleep(wait)


class Hub:
    """The run's way to the Hub, on its main process."""

    def __init__(self, folder: Path, publish: Publish, log: Log) -> None:
        """folder: the run's. What a former launch could not send is sent first."""
        self.publish, self._folder, self._log = publish, folder, log
        self._outbox = Outbox(folder)
        self._outbox.open()
        self._unwritten: deque[tuple[str, str]] = deque()
        self._failing_since: float | None = None
        self._last_failure, self._last_text, self._closing, self._notes = "", "", False, 0
        visibility = "private" if publish.private else "public"
        log.say(f"  the Hub: {publish.repo}, {visibility}, {'after each stage' if publish.when == 'stage' else 'at the end'}{', checkpoints too' if publish.checkpoints else ''}")
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._sender = subprocess.Popen(
            [sys.executable, "-m", "stages.hub", "serve", str(folder.resolve()), publish.repo, "--waits", ",".join(map(str, WAITS)), *([] if publish.private else ["--public"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which then says when to end
        )
        assert self._sender.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._sender.stdout,), daemon=True)
        self._reader.start()

    def put_trained(self, stage: str) -> None:
        """Have what is published in the run folder now sent. stage: the last one that it has gone through."""
        self._write()
        words = f"{trained_words(self._folder)} of '{stage}'"
        parcel = Parcel("trained", self.publish.repo, self.publish.private, "main", losses_words(self._folder, stage), words, trained_mark(self._folder))
        self._put(parcel, trained_files(self._folder), {})

    def put_checkpoint(self) -> None:
        """Have the newest checkpoint sent, if the plan asks for it."""
        self._write()  # before it is seen which files there are: a line more may close a part of metrics.jsonl
        if not self.publish.checkpoints or (found := resumable(self._folder)) is None:
            return
        self._put(found.parcel(self.publish.repo, private=self.publish.private), found.files, found.first_bytes)

    def _put(self, parcel: Parcel, files: Mapping[str, Path], first_bytes: Mapping[str, int]) -> None:
        try:
            job = self._outbox.put(parcel, files, first_bytes=first_bytes)
        except OSError as error:  # a full disk, say
            self._log.warn(f"{parcel.words} could not be put into {self._outbox.folder} to be sent: {error}", "", 0)
            return
        if job is not None:
            self._poke()

    def _poke(self) -> None:
        """Have the sender look into the outbox now: what was refused is tried again, since the token may be another one."""
        if self._last_failure == "refused":
            self._failing_since, self._last_failure = None, ""
        if self._sender.poll() is None and self._sender.stdin is not None:
            with suppress(BrokenPipeError):  # it has just ended, which `_read` says
                self._sender.stdin.write(b"\n")
                self._sender.stdin.flush()

    def drain(self, stop: Stop) -> None:
        """Wait until all is sent, as long as that goes well; after a signal for a few seconds only."""
        began = said = time.monotonic()
        if self._outbox.jobs():
            self._poke()
        limit = PATIENCE + sum(job.bytes for job in self._outbox.jobs()) / 1e6
        while (jobs := self._outbox.jobs()) and self._sender.poll() is None:
            now = time.monotonic()
            if stop.signal is not None and now - began > LEAVE:
                break
            if self._failing_since is not None and (self._last_failure == "refused" or now - max(began, self._failing_since) > FAILING):
                break
            if now - began > limit:
                break
            if now - said > SAYS_EVERY:
                said = now
                size = bytes_said(sum(job.bytes for job in jobs))
                self._log.say(f"  {size} are still being sent to {jobs[0].parcel.repo}, {limit - (now - began):.0f} s more at most; Ctrl-C leaves, and the same command sends the rest")
            time.sleep(0.05)
        self._write()
        if left := self._outbox.jobs():
            what = ", ".join(dict.fromkeys(job.parcel.words for job in left))
            again = f"python -m stages.hub push {self._folder} {self.publish.repo}{'' if self.publish.private else ' --public'}"
            self._log.warn(f"{what}: not on the Hub; the same command sends it, and so does: {again}", "", 0)

    def close(self) -> None:
        """End the process that sends, whatever it is doing."""
        self._closing = True
        self._sender.terminate()
        self._sender.wait()
        self._outbox.tidy()
        self._reader.join(LEAVE)
        if self._sender.stdin is not None:
            with suppress(BrokenPipeError):
                self._sender.stdin.close()
        self._write()

    def _read(self, lines: IO[bytes]) -> None:
        """In a thread: print what the sender says as it comes. metrics.jsonl is the main thread's."""
        stray = ""
        for line in lines:
            try:
                message = json.loads(line)
                kind, text = str(message["kind"]), str(message["text"])
            except (ValueError, TypeError, KeyError):
                stray = line.decode("utf-8", "replace").strip() or stray
                continue
            if kind in ("late", "refused"):
                is_new = kind != self._last_failure if kind == "late" else text != self._last_text
                self._failing_since, self._last_failure = self._failing_since or time.monotonic(), kind
                self._last_text = text
                if is_new:  # a Hub that is away is spoken of once
                    self._say(kind, text)
                continue
            if kind in ("sent", "note"):
                self._failing_since, self._last_failure = None, ""
            self._say(kind, text)
        code = self._sender.wait()
        if code and not self._closing:
            self._say("refused", f"the process that sends to the Hub has ended with exit code {code}: {stray}")

    def _say(self, kind: str, text: str) -> None:
        self._notes += kind == "note"
        if kind != "note" or self._notes <= 2:  # of the first checkpoint it is said how large it is, and how long it takes
            self._log.say(f"[yellow]warning:[/yellow] {escape(text)}" if kind in ("late", "refused") else f"  [dim]{escape(text)}[/dim]")
        self._unwritten.append((kind, text))

    def _write(self) -> None:
        """Write what was said into metrics.jsonl."""
        while self._unwritten:
            kind, text = self._unwritten.popleft()
            self._log.write({"event": "warning", "stage": "", "step": 0, "message": text} if kind in ("late", "refused") else {"event": "hub", "message": text})

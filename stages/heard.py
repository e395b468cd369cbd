"""Heard: what the libraries beneath remark, as Python warnings or through logging, caught so that each text is shown once, in one line, and recorded.

Data workers are forked from the process that listens, and pass on by a pipe what they hear. Errors are never held back.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

from stages.printable import printable

LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "diffusers", "huggingface_hub", "peft", "torch", "transformers")
"""Those that print their log themselves, or would through Python's last resort."""
_MOST = 1000  # different texts of a launch; a library that names another file in each warning would fill the memory and the log of a long run
_LONGEST = 900  # characters kept of a text; in UTF-8, with what stands around it, it goes through a pipe in one piece
# What is as it is meant to be, and nobody can act on: torchvision is not used here, a model on pixels has neither VAE nor text encoders (diffusers 0.42), and the
# number of threads is chosen in stages/precision.py (accelerate 1.15).
_MEANT = re.compile(r"requires torchvision|of type <class 'NoneType'> cannot be saved|No LoRA keys associated to NoneType|OMP_NUM_THREADS/MKL_NUM_THREADS unset")
_SIGNED = re.compile(r"(https?://[^\s?]+)\?\S+")


@dataclass(frozen=True)
class Remark:
    """What a library said."""

    library: str
    text: str
    is_error: bool = False
    heard_by: str = ""
    """`a data worker`, `process 1`; empty for the main process."""


class Heard:
    """Listens from when it is made until it is closed. What comes before anyone is told waits. After _MOST different texts only errors are heard."""

    def __init__(self, rank: int = 0) -> None:
        """rank: of this process. Of others than the first, errors are printed at once, with the number, and all else waits to be taken."""
        self._rank, self._process = rank, os.getpid()
        self._waiting: list[Remark] = []
        self._seen: set[tuple[str, str]] = set()
        self._listener: Callable[[Remark], None] | None = None
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        os.set_blocking(self._writing, False)  # a worker whose remarks nobody reads goes on without them
        self._handler = _Handler(self._hear)
        self._taken: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
        self._showed = warnings.showwarning
        warnings.showwarning = self._show
        logging.getLogger().addHandler(self._handler)
        self.take_over()

    def take_over(self) -> None:
        """Let what libraries log come to the root, where the handler is, in place of their own handlers. To be asked again once more of them are imported."""
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            own: list[logging.Handler] = [handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]
            wants_more = 0 < logger.level < logging.WARNING or (name == "torch" and "TORCH_LOGS" in os.environ)
            if wants_more or not (own or not logger.propagate):  # who has asked for more than warnings wants to see it as it comes
                continue
            self._taken.append((logger, own, logger.propagate))
            for handler in own:
                logger.removeHandler(handler)
            logger.propagate = True

    def _show(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None) -> None:
        if file is not None:
            self._showed(message, category, filename, lineno, file, line)
            return
        self._hear(_package(filename), str(message), is_error=False)

    def _hear(self, library: str, text: str, is_error: bool) -> None:
        if _MEANT.search(text):
            return
        text = _SIGNED.sub(r"\1", text).strip()[:_LONGEST]  # what stands behind an address may be a signature
        if os.getpid() != self._process:
            self._pass_on(Remark(library, text, is_error, "a data worker"))
        elif self._rank and is_error:
            print(printable(f"process {self._rank}: {library}: {text}"), file=sys.stderr, flush=True)
        else:
            self._take_in(Remark(library, text, is_error, f"process {self._rank}" if self._rank else ""))

    def _pass_on(self, remark: Remark) -> None:
        try:
            os.write(self._writing, json.dumps(asdict(remark), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        except OSError:  # the pipe is full, or nobody reads it any more
            if remark.is_error:
                print(printable(f"{remark.library}: {remark.text}"), file=sys.stderr, flush=True)

    def _take_in(self, remark: Remark) -> None:
        """Keep a remark, or hand it on, unless it was heard before; texts that differ by numbers only are the same."""
        likeness = remark.library, re.sub(r"\d+", "#", remark.text[:200])
        if likeness in self._seen:
            return
        if len(self._seen) < _MOST:
            self._seen.add(likeness)
        elif not remark.is_error:
            return
        if self._listener:
            self._listener(remark)
        else:
            self._waiting.append(remark)

    def tell(self, listener: Callable[[Remark], None] | None) -> None:
        """Hand everything to a listener, what waits first; None: to nobody, and all of it waits."""
        self.take_over()
        self.drain()
        self._listener = listener
        if listener:
            for remark in self.take():
                listener(remark)

    def take(self) -> list[Remark]:
        """What waits; it waits no more."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def take_in(self, remarks: Sequence[Remark]) -> None:
        """Hear what other processes have heard."""
        for remark in remarks:
            self._take_in(remark)

    def drain(self) -> None:
        """Hear what data workers have passed on."""
        content = b""
        while True:
            try:
                part = os.read(self._reading, 65536)
            except BlockingIOError:
                break
            if not part:
                break
            content += part
        for line in content.split(b"\n")[:-1]:
            try:
                self._take_in(Remark(**json.loads(line)))
            except ValueError:  # it was longer than goes through a pipe in one piece
                continue

    def close(self) -> None:
        """Stop listening. Errors that nobody was told are printed."""
        self.drain()
        for remark in self.take():
            if remark.is_error:
                print(printable(f"{remark.library}: {remark.text}"), file=sys.stderr, flush=True)
        warnings.showwarning = self._showed
        logging.getLogger().removeHandler(self._handler)
        for logger, own, propagate in reversed(self._taken):
            for handler in own:
                logger.addHandler(handler)
            logger.propagate = propagate
        os.close(self._reading)
        os.close(self._writing)


class _Handler(logging.Handler):
    def __init__(self, hear: Callable[[str, str, bool], None]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self._hear(record.name.partition(".")[0], record.getMessage(), record.levelno >= logging.ERROR)


def _package(file: str) -> str:
    """The package that a file belongs to: of an installed one its name, else the folder's."""
    parts = file.replace("\\", "/").split("/")
    below = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-2:]
    return below[0].removesuffix(".py") if below and below[0] else "python"

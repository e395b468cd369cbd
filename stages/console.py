"""The console of a run: what cannot be printed, for the disk that it goes to is full or whoever reads it has gone, does not end the run. Imports no torch."""

from __future__ import annotations

import os
import sys

from stages.printable import PrintableConsole


class EnduringConsole(PrintableConsole):
    """A console that goes on without what cannot be printed. On a full disk lines wait in the stream's buffer, as far as it goes, and come out once there is room."""

    def _check_buffer(self) -> None:  # rich 15 writes here, and keeps what was not written, to try it again with each further line
        try:
            super()._check_buffer()
        except OSError:
            del self._buffer[:]

    def on_broken_pipe(self) -> None:
        """Be silent from now on; rich's own way is to end the process."""
        self.quiet = True
        _let_go(sys.stdout.fileno())


def end_console() -> None:
    """Before the process ends: give up what finds no room, since Python would end with another exit code for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _let_go(stream.fileno())


def _let_go(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)

"""Plain files, opened so that nobody waits: what lies under a name can have become a pipe since it was looked at."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

NOT_PLAIN = "it is a pipe, a socket or a device, and not a file"
"""What `open_plain` says of one."""


def open_plain(file: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """A file, open for reading; of a link, that to which it leads. buffering: as of `open`.

    It is looked at once it is open, and to open it waits for nothing: opened as usual, a pipe waits for somebody who writes. Raises OSError, also for
    what is not a plain file; its `strerror` says so.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(file))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, NOT_PLAIN, os.fspath(file))
        return os.fdopen(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(file: str | os.PathLike[str]) -> bytes:
    """All that a file holds. Errors as `open_plain`."""
    with open_plain(file) as opened:
        return opened.read()

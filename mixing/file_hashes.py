"""File hashes: what files hold, told apart by content, without reading a file again that has not changed."""

from __future__ import annotations

import os
from pathlib import Path

from mixing.content import content_hash
from mixing.index import is_fresh
from mixing.plain_file import read_plain

_MOST = 16_384  # files remembered, at some 300 bytes each; with more all are forgotten, and it costs a read each


class FileHashes:
    """`content_hash` of files, remembered while their inode, size and times stay what they were. Goes through fork and pickling."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def hash(self, path: Path) -> tuple[bytes, bytes | None]:
        """A file's hash, and what it holds if it was read for that. Raises OSError.

        A file that changed a moment ago is not remembered: it may change again within the same tick of its file system's clock.
        """
        name = str(path)
        status = os.stat(name)  # before it is read: what changes in between has other times next time
        told_by = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self._known.get(name)
        if known is not None and known[0] == told_by:
            return known[1], None
        is_settled = not is_fresh(max(status.st_mtime_ns, status.st_ctime_ns))
        content = read_plain(path)
        found = content_hash(content)
        if is_settled:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[name] = told_by, found
        else:
            self._known.pop(name, None)
        return found, content

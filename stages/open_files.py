"""Open files: how many of them a process may hold."""

from __future__ import annotations

import resource
from contextlib import suppress

MOST = 65_536


def allow_many() -> int:
    """Let this process, and the data workers that are forked from it, hold as many files open as the system lets anybody, MOST at the most. Returns how many that is.

    A shell's usual 1,024 are soon too few: a worker keeps 64 shards open of each source, and 128 of each kind that is cached; and a row whose file cannot be opened would
    be taken for a broken one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # a system that names a hard limit and allows less; what it was is what it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

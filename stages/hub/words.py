"""Words of the Hub that need no huggingface_hub: how long is waited, and how a published adapter is named in a plan."""

from __future__ import annotations

import re
from dataclasses import dataclass

WAITS = (5.0, 15.0, 60.0, 300.0, 900.0)
"""Seconds before each further try to send; the last one again and again."""

PREFIX = "hub:"
"""Of what `start` names on the Hub."""
HERE = "path/to/this/folder"
"""Stands in a card for the place of what is published, where the plan names no repository."""
_REPO = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"


@dataclass(frozen=True)
class Published:
    """A repository of the Hub, at a revision."""

    repo: str
    revision: str | None
    """Branch, tag or commit; None for the newest."""


def published(start: str) -> Published | None:
    """What `hub:user/name` or `hub:user/name@revision` names; None if it is not written so."""
    repo, at, revision = start.removeprefix(PREFIX).partition("@")
    if not start.startswith(PREFIX) or not is_repo(repo) or (at and not revision):
        return None
    return Published(repo, revision or None)


def is_repo(name: str) -> bool:
    """Whether the Hub can have a repository of this name, user/name."""
    return re.fullmatch(_REPO, name) is not None and len(name) <= 96 and "--" not in name and ".." not in name and not name.endswith(".git")

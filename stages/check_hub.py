"""Check of the Hub: whether the names that a plan gives can be names there. The Hub itself is not asked."""

from __future__ import annotations

from collections.abc import Iterator

from stages.hub.words import PREFIX, is_repo, published
from stages.problems import Problem, quoted
from stages.reader import ReadPlan


def hub_problems(read: ReadPlan) -> Iterator[Problem]:
    """What is wrong with `publish`, and with a `start` on the Hub."""
    publish, start = read.plan.publish, read.plan.start
    if publish is not None and not is_repo(publish.repo):
        yield Problem(read.place("publish", "repo"), "publish.repo", f"{quoted(publish.repo)} is no name on the Hub; write user/name")
    if start is not None and start.startswith(PREFIX) and published(start) is None:
        yield Problem(read.place("start"), "start", f"{quoted(start)}: an adapter on the Hub is written hub:user/name or hub:user/name@revision")

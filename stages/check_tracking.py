"""Check a plan's trackers: whether they are installed, and heed what is asked of them. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

from stages.problems import Location, Problem, written
from stages.reader import ReadPlan
from stages.resolved import trackers_of


def tracking_problems(read: ReadPlan) -> Iterator[Problem]:
    """What is wrong with the trackers of a plan."""
    asked, in_list = trackers_of(read.plan), isinstance(read.plan.track, list)
    for index, tracker in enumerate(asked):
        location: Location = ("track", index) if in_list else ("track",)
        if find_spec(tracker.name) is None:
            yield Problem(read.place(*location), written(location), f"'{tracker.name}' is not installed; type `pip install {tracker.name}`, or write track: trackio, or none")
        if tracker.project is not None and tracker.name == "tensorboard":
            yield Problem(read.name_place(*location, "project"), written((*location, "project")), "tensorboard knows no projects; give `tensorboard --logdir` the folder of the runs that are to stand together")
        if tracker.online and tracker.name != "wandb":
            later = " (`trackio sync` sends a project to a Space)" if tracker.name == "trackio" else ""
            yield Problem(read.name_place(*location, "online"), written((*location, "online")), f"{tracker.name} keeps everything on this machine{later}; remove it")
    for name, count in Counter(tracker.name for tracker in asked).items():
        if count > 1:
            yield Problem(read.place("track"), "track", f"'{name}' is named {count} times; name it once")

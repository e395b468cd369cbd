"""What a process is doing, for whoever kills it: a byte that both see, set by wrappers around the functions that do it. Production code has no hooks for this."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from functools import reduce, wraps
from importlib import import_module
from typing import Any

MEETING, STEPS, BETWEEN = "processes start and meet", "steps are made", "one duty is over and no other begun"

_DONE_BY = {
    BETWEEN: ("stages.open_run:open_engine",),  # the first thing that is done once they have met
    "the run is opened": tuple(f"stages.open_run:{name}" for name in ("fingerprint", "_opened", "fetch_if_new", "newest_checkpoint", "compare_names", "Log.start_trackers", "Hub.__init__")),
    STEPS: ("train:train_stage",),
    "a stage is opened": ("stages.open_leg:open_leg",),
    "the untrained model is measured": ("stages.open_leg:untrained",),
    "a stage is handed on": ("stages.open_leg:_handed_on", "stages.open_leg:build_model", "stages.open_leg:_keep", "stages.open_leg:measure_handoff"),
    "latents and embeddings are made and kept": ("stages.cache:Cache.encode_image", "stages.cache:Cache.keep_text", "stages.cache:Cache.flush"),
    "held-out rows are measured": ("stages.evaluate_leg:evaluate",),
    "previews are sampled": ("stages.run:Run.previews",),
    "a checkpoint is written": ("stages.save_leg:save_leg", "stages.finish_leg:save_leg"),
    "an adapter is published": ("stages.finish:_publish",),
    "the report is written": ("stages.run:write_report",),
    "something is put into the outbox": ("stages.hub.run:Hub._put",),
    "the Hub is waited for": ("stages.hub.run:Hub.drain",),
}
"""What is done, in words, and the functions that do it, by the places where they are looked up when they are called."""

PLACES = (MEETING, *_DONE_BY)


class Watched:
    """Made before a fork: the process behind it tells by `tell` what it is doing, and `doing` says it, also after that one was killed."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    @property
    def doing(self) -> str:
        """One of PLACES: the innermost that the process is in."""
        return PLACES[self._byte[0]]

    def tell(self) -> None:
        """In the process that is watched: from now on say what is done."""
        own = os.getpid()
        for number, (_, functions) in enumerate(_DONE_BY.items(), 1):
            for function in functions:
                module, _, path = function.partition(":")
                *inside, name = path.split(".")
                owner = reduce(getattr, inside, import_module(module))
                setattr(owner, name, self._within(getattr(owner, name), number, own))

    def _within(self, function: Callable[..., Any], number: int, own: int) -> Callable[..., Any]:
        @wraps(function)
        def telling(*arguments: Any, **named: Any) -> Any:
            if os.getpid() != own or threading.current_thread() is not threading.main_thread():  # a data worker has none of its own
                return function(*arguments, **named)
            before = self._byte[0]
            self._byte[0] = number
            try:
                return function(*arguments, **named)
            finally:
                self._byte[0] = before or PLACES.index(BETWEEN)

        return telling

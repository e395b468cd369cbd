"""Sharing out: which process takes which images of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class TooFewImages(ValueError):
    """A step has fewer images than there are processes, or its streams' lanes leave one without any."""


def share_out(tokens: Integers, owner: Integers, processes: int) -> list[Integers]:
    """The images of each process, as places in the step, in order; every process gets at least one.

    tokens: of each image of the step, [images]. owner: the process that alone can read an image, or -1, [images]. The line of the other images is cut
    where the processes have equally many tokens, to within half an image at each cut; so at most processes - 1 micro-batches are divided between two.
    Raises TooFewImages.
    """
    free = np.flatnonzero(owner < 0)
    if len(tokens) < processes:
        raise TooFewImages(f"a step has {len(tokens)} images, fewer than the {processes} processes; start fewer, or make batch larger")
    pinned = np.bincount(owner[owner >= 0], weights=tokens[owner >= 0], minlength=processes)
    room = np.maximum(tokens.sum() / processes - pinned, 0.0)
    room *= tokens[free].sum() / room.sum() if room.sum() else 0.0
    middles = np.cumsum(tokens[free]) - tokens[free] / 2
    of_free = np.minimum(np.searchsorted(np.cumsum(room), middles, side="right"), processes - 1)
    owner = owner.copy()
    owner[free] = of_free
    counts = np.bincount(owner, minlength=processes)
    for empty in np.flatnonzero(counts == 0):
        spare = free[counts[owner[free]] > 1]
        if not len(spare):
            raise TooFewImages(f"a step leaves process {empty} of {processes} without an image, since its streams are read by the others; start fewer, or make batch larger")
        taken = spare[np.abs(owner[spare] - empty).argmin()]
        counts[owner[taken]] -= 1
        owner[taken], counts[empty] = empty, 1
    return [np.flatnonzero(owner == rank) for rank in range(processes)]


def read_by(draws: Integers, lanes: int, processes: int) -> Integers:
    """How many of the first so many draws of a stream each process reads, [*draws.shape, processes].

    Draw d is of lane d % lanes, and process r reads the lanes v with v % processes == r.
    """
    whole, rest = np.divmod(draws[..., None], lanes)
    ranks = np.arange(processes)
    own, begun = (np.maximum(number - ranks + processes - 1, 0) // processes for number in (lanes, rest))
    read: Integers = whole * own + begun
    return read

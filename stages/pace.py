"""Pace: processes that make calls which need every process, such as forward passes over a sharded model, as often as the one with the most of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from stages.objectives.parts import Part


class Pace:
    """Asks, before each call that needs every process, whether any of them still has one to make. It is asked on the CPU, so no device is waited for."""

    def __init__(self) -> None:
        # NCCL exchanges what is on GPUs only, and would have the CPU wait for all that is queued there.
        self._group = dist.new_group(backend="gloo")

    def any(self, mine: bool) -> bool:
        """Whether it is true of any process; all of them must ask."""
        told = torch.tensor([int(mine)])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        return bool(told)

    def paced(self, parts: Sequence[Part], is_last: bool) -> Iterator[tuple[Part, bool, bool]]:
        """As `Training.paced`: the step's last part, whose gradients are exchanged, comes when it is the last of every process, and until then again without counting."""
        for part in parts:
            ends = is_last and part is parts[-1]
            while self.any(not ends) and ends:
                yield part, False, False
            yield part, True, ends

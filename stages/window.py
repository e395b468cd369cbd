"""Window: what a process has counted since the last line of the log. Its sums stay on the device until then, so that no step waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.sent import sent

MOST_PARTS = 256  # whose errors wait on the device to be summed up


@dataclass
class Window:
    """What has been counted on this process since the last line of the log."""

    began: float
    waited: float = 0.0
    steps: int = 0
    tokens: int = 0
    images: dict[str, int] = field(default_factory=dict)
    parts: list[CountedPart] = field(default_factory=list)
    """Those whose sums are not taken yet: to take them costs as much for many as for one."""
    sums: Tensor | None = None
    """float64 on the device: of images' errors by source; then errors and numbers of images by tenth of the noise level; then of what is trained, the errors
    weighted; then numbers of images by source that are left out of all of these, for their errors are no numbers. None: nothing was counted."""

    def sum_up(self, names: Sequence[str], device: torch.device) -> Tensor:
        """The sums, with all parts taken into them; nothing is waited for. names: of the sources."""
        if self.sums is None:
            self.sums = torch.zeros(2 * len(names) + 21, dtype=torch.float64, device=device)
        if self.parts:
            places = {name: place for place, name in enumerate(names)}
            of_source = sent(torch.tensor([places[source] for part in self.parts for source in part.sources]), device)
            t, errors, losses = (torch.cat([getattr(part, name) for part in self.parts]) for name in ("t", "errors", "losses"))
            of_tenth = (t * 10).long().clamp(max=9) + len(names)
            is_number = errors.isfinite() & losses.isfinite()
            errors, losses = (torch.where(is_number, values, 0).double() for values in (errors, losses))
            counted = is_number.double()
            places_of = torch.cat([of_source, of_tenth, of_tenth + 10, of_source + len(names) + 21])
            self.sums.index_add_(0, places_of, torch.cat([errors, errors, counted, 1 - counted]))
            self.sums[len(names) + 20] += losses.sum()
            self.parts = []
        return self.sums


@dataclass(frozen=True)
class CountedPart:
    """What a part of a micro-batch brought."""

    sources: tuple[str, ...]
    """Of each of its images."""
    t: Tensor
    """Their noise levels, float32 [b]."""
    errors: Tensor
    """float32 [b]"""
    losses: Tensor
    """The same, weighted, which is what is trained."""

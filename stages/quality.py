"""Quality: what the plan's metrics say of samples, source by source, from the same noise each time, so that differences are paired over rows.

Beside each mean stand the two ends that give it a meaning: the ceiling, what real images get, and the floor, what the samples get against another row's caption or image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mixing.batch import MicroBatch, read_rows
from mixing.buckets import Shapes
from mixing.images import from_tensor
from mixing.keys import key
from mixing.selected import Selection
from stages.checked import DamagedError, checked, ignore, read_checked
from stages.checkpoint import write_whole
from stages.engine import ALONE
from stages.evaluate import portions
from stages.families.family import Family
from stages.measured import mean, standard_error
from stages.metrics import Metric, Sampled
from stages.plan import MetricName
from stages.sampler import Sampler, sample
from stages.shown import show

_PIXELS_AT_ONCE = 4 * 1024**2  # that are sampled together ...
_MOST_AT_ONCE = 16  # ... and images

Ends = Mapping[str, Mapping[str, float]]
"""Metric to source to a number; a source of one row has no floor."""


@dataclass(frozen=True)
class Quality:
    """What the metrics say of a model."""

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Metric to source to row key to score."""
    ceiling: Ends
    floor: Ends
    how: Mapping[str, Any]
    """How samples were made and looked at; what was made otherwise is not paired with them."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(exist_ok=True)
        write_whole(path, checked(asdict(self)))

    @staticmethod
    def load(path: Path, say: Callable[[str], object] = ignore) -> Quality | None:
        """Read what `save` wrote; None if there is no such file, and where it is damaged, which is said through `say`."""
        try:
            saved = read_checked(path)
        except DamagedError as error:
            say(str(error))
            return None
        if saved is None or not all(isinstance(saved.get(name), dict) for name in Quality.__annotations__):
            return None
        return Quality(**{name: saved[name] for name in Quality.__annotations__})

    def summary(self, base: Quality | None, last: Quality | None) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """Source to metric: mean and its standard error (None of one row), rows, ceiling, floor, and the paired changes since the untrained model and since the last stage's end."""
        table: dict[str, dict[str, dict[str, float | int | None]]] = {}
        for metric, of_source in self.scores.items():
            for source, scores in of_source.items():
                values = list(scores.values())
                entry: dict[str, float | int | None] = {"mean": mean(values), "error": standard_error(values) if len(values) > 1 else None, "rows": len(values)}
                entry |= {"ceiling": self.ceiling[metric].get(source), "floor": self.floor[metric].get(source)}
                for name, other in (("since_base", base), ("since_last", last)):
                    if other is None or other.how != self.how:
                        continue
                    before = other.scores.get(metric, {}).get(source, {})
                    changes = [score - before[row] for row, score in scores.items() if row in before]
                    if len(changes) > 1:
                        entry |= {name: mean(changes), f"{name}_error": standard_error(changes)}
                table.setdefault(source, {})[metric] = entry
        return table


@torch.no_grad()
def quality(
    family: Family,
    transformer: nn.Module,
    selections: Mapping[str, Selection],
    metrics: Mapping[MetricName, Metric],
    how: Mapping[str, Any],
    *,
    samples: int,
    shapes: Shapes,
    sampler: Sampler,
    seed: int,
    accelerator: Accelerator,
    in_step: AbstractContextManager[None] = ALONE,
) -> Quality:
    """Sample the first held-out rows of every source, from noise keyed by (seed, source, row), and look at them; shared out among the processes, and the same on each.

    samples: how many rows of each source. how: what `Quality.how` says. in_step: what they are shared out in, of `Engine.shared_out`.
    """
    seen: list[tuple[str, str, str, list[list[float]]]] = []
    for metric in metrics.values():
        metric.model.to(family.device)
    at_once = max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // shapes.pixels**2))
    with in_step:
        for portion in portions(selections, samples)[accelerator.process_index :: accelerator.num_processes]:
            for first in range(0, len(portion.rows), at_once):
                for batch in read_rows(selections[portion.source], portion.rows[first : first + at_once], shapes)[0]:
                    sampled = _sampled(family, transformer, batch, selections[portion.source].source.task == "subject", sampler, seed)
                    for name, metric in metrics.items():
                        directions = metric.look(sampled)
                        each = torch.stack([directions.of_sample, directions.of_other, directions.of_real], dim=1)
                        seen += [(name, portion.source, row, numbers) for row, numbers in zip(batch.keys, each.tolist(), strict=True)]
    for metric in metrics.values():
        metric.model.to("cpu")
    gathered = sorted(gather_object(seen)) if accelerator.num_processes > 1 else sorted(seen)
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in metrics}
    ceiling: dict[str, dict[str, float]] = {name: {} for name in metrics}
    floor: dict[str, dict[str, float]] = {name: {} for name in metrics}
    for name, metric in metrics.items():
        for source in selections:
            rows = [(row, numbers) for of_metric, of_source, row, numbers in gathered if (of_metric, of_source) == (name, source)]
            if not rows:
                continue
            of_sample, of_other, of_real = torch.tensor([numbers for _, numbers in rows]).unbind(dim=1)
            scores[name][source] = dict(zip([row for row, _ in rows], metric.score(of_sample, of_other).tolist(), strict=True))
            ceiling[name][source] = mean(metric.score(of_real, of_other).tolist())
            if len(rows) > 1:
                floor[name][source] = mean(metric.score(of_sample, of_other[_moved_on([row for row, _ in rows], source, seed)]).tolist())
    return Quality(scores, ceiling, floor, dict(how))


def _sampled(family: Family, transformer: nn.Module, batch: MicroBatch, is_subject: bool, sampler: Sampler, seed: int) -> Sampled:
    """Sample a micro-batch of held-out rows. is_subject: whether its first references are what samples are compared with."""
    targets, references = batch.targets.tensor(), [reference.tensor() for reference in batch.references]
    shown = show(family, batch)
    keys = [key(seed, "quality", source, row) for source, row in zip(batch.sources, batch.keys, strict=True)]
    made, again = family.decode_latents(sample(family, transformer, shown.x.shape[1:], keys, shown, sampler)), family.decode_latents(shown.x)
    samples, real, encoded = ([from_tensor(image.cpu()) for image in images] for images in (made, targets, again))
    return Sampled(batch.prompts, samples, real, encoded, [from_tensor(image) for image in references[0]] if is_subject and references else None)


def _moved_on(rows: list[str], source: str, seed: int) -> Tensor:
    """For each row another one: the next in an order by key, of the last one the first."""
    order = sorted(range(len(rows)), key=lambda place: key(seed, "shuffled", source, rows[place]))
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return torch.tensor([following[place] for place in range(len(rows))])

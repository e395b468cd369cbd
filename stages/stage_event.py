"""The event of a stage: what metrics.jsonl says of it at its start and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.resolved import main_resolution, objective_words, resolution_words, resolved_batch, resolved_levels, resolved_storage, step_words
from stages.sharing import numbers

if TYPE_CHECKING:
    from stages.leg import Leg


def stage_event(leg: Leg) -> dict[str, Any]:
    """What metrics.jsonl says of a stage at its start and end."""
    stage = leg.stage
    return {
        "event": "stage",
        "index": leg.index,
        "stage": stage.name,
        "steps": stage.steps,
        "images": leg.mixture.images_before(stage.steps) / stage.steps,
        "batch": resolved_batch(stage).model_dump(mode="json", exclude_none=True),
        "resolution": main_resolution(stage),
        "step_holds": step_words(stage),
        "asks": objective_words(stage),
        "seen_at": resolution_words(stage),
        "levels": [level.model_dump() for level in resolved_levels(stage)],
        "precision": stage.precision,
        "base": resolved_storage(stage),
        "optimizer": stage.optimizer.name,
        "skipped": leg.skipped,
        "train": stage.train,
        "trainable": sum(numbers(parameter) for parameter in leg.training.trainable.values()),
        "parameters": sum(parameter.numel() for name, parameter in leg.model.named_parameters() if ".lora_" not in name),
        "mix": leg.mixture.asked(),
        "tokens_per_step": leg.mixture.tokens_before(stage.steps) / stage.steps,
    }

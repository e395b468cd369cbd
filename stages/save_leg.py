"""Save a leg: a checkpoint of everything that resuming needs."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from torch import Tensor

from stages.adapter import adapter_weights
from stages.checkpoint import keep_newest, step_folder, write_checkpoint, write_whole
from stages.ledger import ledger_entry
from stages.leg import Leg
from stages.log_files import BEGINNING, Place, saved_place
from stages.placed import all_adapters
from stages.ruin import refuse_ruin
from stages.sharing import whole

if TYPE_CHECKING:
    from mixing.lanes import State


def save_leg(leg: Leg, *, finished: bool = False, probed: dict[str, Tensor] | None = None, logged: Place | None = None) -> None:
    """Write a checkpoint of everything that resuming needs; every process takes part, the main one writes.

    logged: up to where metrics.jsonl stands when it is gone on with; None is all of it. Raises TrainingError where numbers would be kept that are none.
    """
    run, stage = leg.run, leg.stage
    refuse_ruin(leg)
    names = list(leg.mixture.sources)
    counted = leg.summed([*(leg.images.get(name, 0) for name in names), *(leg.tokens.get(name, 0) for name in names), *leg.levels])
    lanes = leg.lanes.states(leg.mixture, leg.step)
    if run.accelerator.num_processes > 1 and leg.lanes.readers:
        everywhere: list[dict[str, dict[str, State]]] = gather_object([lanes])
        lanes = {name: {lane: state for own in everywhere for lane, state in own[name].items()} for name in lanes}
    if run.cache:
        run.cache.flush()
        leg.warn_of_cache()
    leg.check_rows()
    tensors = _tensors(leg) if run.engine.is_sharded or run.accelerator.is_main_process else {}
    if run.accelerator.is_main_process:
        if probed is not None:
            tensors["probe"] = probed
        images, tokens = (dict(zip(names, counted[first : first + len(names)], strict=True)) for first in (0, len(names)))
        levels = counted[2 * len(names) :]
        folder = run.stage_folder(leg.index)
        place = step_folder(folder, leg.step)
        entry = ledger_entry(leg.mixture, stage.name, leg.step, images, tokens, levels, {name: len(rows) for name, rows in leg.bad.items()})
        run.log.write({"event": "save", "stage": stage.name, "step": leg.step, "folder": str(place.relative_to(run.folder))})
        if finished:
            counted_of = ("asked", "drawn", "images", "tokens", "epochs", "unique_rows")
            sources = {name: {field: page[field] for field in counted_of if field in page} for name, page in entry["sources"].items()}
            run.log.write({"event": "ledger", "stage": stage.name, "step": leg.step, "images": entry["images"], "sources": sources})
        drawn: dict[str, dict[str, int]] = {}
        for (source, signature), count in {**run.drawn_before(), **leg.mixture.order.drawn_after(leg.step)}.items():
            drawn.setdefault(source, {})[signature] = count
        base = leg.base_file
        state = {
            "stage": stage.name,
            "index": leg.index,
            "finished": finished,
            "adapters": {name: placed.settings.model_dump(mode="json") for name, placed in all_adapters(run.plan, leg.index).items()},
            "plan": run.recorded(stage),
            "base": None if base is None or stage.train == "full" else os.path.relpath(base, place),
            "scaler": leg.precision.scaler.state_dict(),
            "skipped": leg.skipped,
            "skipped_in_a_row": leg.skipped_in_a_row,
            "guard": leg.guard.state(),
            "ema_updates": leg.average.updates if leg.average else None,
            "images": images,
            "tokens": tokens,
            "levels": levels,
            "lanes": {**leg.lanes.others, **lanes},
            "to_evaluate": leg.to_evaluate,
            "adaptive": leg.follower.state() if leg.follower else None,
            "bad": leg.bad,
            "drawn": drawn,
            "ledger": entry,
            "seconds": leg.seconds_before + time.monotonic() - leg.began,
            "processes": run.accelerator.num_processes,
            **saved_place("metrics", logged or run.log.place()),
            **saved_place("trace", run.trace.place() if run.trace else BEGINNING),
        }
        room, step = run.room, leg.step
        size = sum(value.nbytes for values in tensors.values() for value in values.values())
        room.must(f"the checkpoint of '{stage.name}', step {step},", lambda: write_checkpoint(folder, step, tensors, state), size=size)
        room.stands = f"'{stage.name}', step {step},"
        room.must("what stands in the place of older checkpoints", lambda: keep_newest(folder, 1 if finished else run.plan.keep, step))
        room.must("ledger.json", lambda: write_whole(run.folder / "ledger.json", json.dumps(run.ledger(entry), indent=1)))
        if run.hub is not None:
            run.hub.put_checkpoint()
    run.processes.wait()
    run.room.stands = f"'{stage.name}', step {leg.step},"  # each process may come to say it


def _tensors(leg: Leg) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of weights and optimizer, whole and on the CPU."""
    tensors = {"optimizer": leg.training.optimizer_state()}
    with leg.training.gathered():
        if leg.stage.train == "full":
            tensors["transformer"] = {name: whole(value) for name, value in leg.model.state_dict().items()}
        else:
            tensors["adapter"] = {**leg.carried, **adapter_weights(leg.model)}
    if leg.average:
        tensors["ema"] = {name: whole(value) for name, value in leg.average.values.items()}
    return tensors

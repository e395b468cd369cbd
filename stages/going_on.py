"""Going on: what a checkpoint records of the plan that it was trained under, and whether the plan at hand is still the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixing.selected import Selection
from stages.checkpoint import Checkpoint, step_folder
from stages.plan import MixAdaptive, Plan, Stage
from stages.reader import PlanError, resolved
from stages.resolved import num_held_out, still_mixes

# On what is learnt, which is the same to the bit: a run that ran out of memory goes on with more of it, and one that skipped too many steps with a wider limit.
_WITHOUT_EFFECT = ("checkpointing", "offload", "guard")
_BY_SIZE = ("repeat", "rows")  # what a mix by size heeds of a source, and shares by name do not


def recorded(plan: Plan, stage: Stage, model: str, selections: Mapping[str, Selection]) -> dict[str, Any]:
    """What decides a stage's result: kept in its checkpoints, and compared when a run goes on. model: its fingerprint."""
    whole = resolved(plan)
    own = {field: value for field, value in whole["stages"][plan.stages.index(stage)].items() if field not in _WITHOUT_EFFECT}
    mixes = still_mixes(stage)
    by_size = any(not isinstance(mix, dict) for mix in mixes)
    drawn = [name for name in plan.sources if by_size or any(isinstance(mix, dict) and mix.get(name) for mix in mixes)]
    sources = {name: {field: value for field, value in whole["sources"][name].items() if field not in _BY_SIZE} for name in drawn}
    if by_size:
        sources = {name: {**fields, **{field: getattr(plan.sources[name], field) for field in _BY_SIZE}} for name, fields in sources.items()}
    return {
        "seed": plan.seed,
        "model": whole["model"],
        "fingerprint": model,
        "adapter": whole.get("adapter"),
        **({"adapters": whole["adapters"]} if plan.adapters else {}),
        "start": whole.get("start"),
        "evaluate.rows": num_held_out(plan),
        **({"evaluate.every": plan.evaluate.every} if isinstance(stage.mix, MixAdaptive) else {}),
        "stage": {**own, "guard": {"on_spike": "skip", "sigmas": stage.guard.sigmas}} if stage.guard.on_spike == "skip" else own,
        "sources": sources,
        "rows": {name: selections[name].source.fingerprint for name in drawn},
    }


def stage_folder(folder: Path, index: int, name: str) -> Path:
    """stages/NUMBER-NAME, numbered from 1."""
    return folder / "stages" / f"{index + 1}-{name}"


def check_finished(plan: Plan, folder: Path, checkpoints: Sequence[Checkpoint | None], passed_over: Mapping[int, Sequence[str]]) -> None:
    """Raise PlanError if a stage was finished and its last checkpoint is gone or damaged: to train it again is for whoever owns the run to choose.

    checkpoints: the newest whole one of each stage. passed_over: by the stage's number, what was said of others.
    """
    for index, stage in enumerate(plan.stages):
        newest, place = checkpoints[index], stage_folder(folder, index, stage.name)
        if newest is not None and newest.state["finished"]:
            continue
        found = "; ".join(passed_over.get(index, ())) or f"{place} holds {'only one from before its end' if newest else 'none'}"
        if begun := [later.name for number, later in enumerate(plan.stages) if number > index and checkpoints[number] is not None]:
            cure = f"put it back, or delete {place} and the folders of the stages after it, to train from there anew, which ends the same"
            raise PlanError.at(str(folder), f"stage '{stage.name}' was finished, for '{begun[0]}' has begun, and its last checkpoint is not there whole ({found}); {cure}")
        if newest is None and os.path.lexists(step_folder(place, stage.steps)):
            cure = f"put it back, or delete {place} to train that stage anew, which ends the same; what is published stays as it is until then"
            raise PlanError.at(str(folder), f"stage '{stage.name}' was trained to its end, and its last checkpoint is damaged ({found}); {cure}")


def compare_stage(folder: Path, index: int, stage: Stage, checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Raise PlanError if a stage that has begun was trained under another plan or on other rows."""
    state = checkpoint.state
    if not isinstance(state.get("plan"), dict):
        raise PlanError.at(str(checkpoint.folder), "is no checkpoint of a stage, though it lies in a stage's folder; delete it")
    old, new = dict(state["plan"]), dict(now)
    rows_old, rows_new = old.pop("rows"), new.pop("rows")
    word = "finished" if state["finished"] else f"at step {state['step']} of {state['plan']['stage']['steps']}"
    cure = "pass --out, or restore the value" if state["finished"] else f"pass --out, restore the value, or delete {stage_folder(folder, index, stage.name)} to train that stage anew"
    differences = [f"{name} was {before}, is {after}" for name, before, after in _differences(old, new, "")]
    differences = [text.replace("stage.", f"stages[{index}].", 1) if text.startswith("stage.") else text for text in differences]
    if differences:
        raise PlanError.at(str(folder), f"holds another plan ({'; '.join(differences)}, and stage '{stage.name}' is {word}); {cure}")
    changed = [name for name in rows_new if rows_old.get(name) != rows_new[name]]
    if changed and not state["finished"]:
        raise PlanError.at(f"sources.{changed[0]}", f"its rows have changed since stage '{stage.name}' began ({word}); restore them, pass --out, or delete {stage_folder(folder, index, stage.name)}")


def _differences(old: Any, new: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{place}.{name}" if place else name)
    elif old != new:
        yield place, old, new


def compare_names(plan: Plan, folder: Path) -> None:
    """Raise PlanError if the folder holds a stage that the plan does not have at its place."""
    expected = {stage_folder(folder, index, stage.name).name for index, stage in enumerate(plan.stages)}
    for found in sorted((folder / "stages").iterdir()):
        if found.is_dir() and found.name not in expected and any(found.glob("step-*")):
            raise PlanError.at(str(folder), f"holds stage '{found.name}', which the plan does not have at that place; pass --out, or restore the stage's name and place")

"""Trained: whether in each stage of a run those weights changed that train, and no others. Told from the checkpoints alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.adapter import fresh_key, fresh_rows, of_adapter
from stages.checkpoint import Checkpoint, read_checkpoint, step_folder
from stages.going_on import stage_folder
from stages.handoff import MERGED
from stages.pairs import layers_of
from stages.placed import Placed, placed_adapters, target_of
from stages.plan import Plan, Stage
from stages.rehearsal.verdict import Verdict, judged
from stages.resolved import resolved_rate


def trained(plan: Plan, folder: Path, model: Path) -> Verdict:
    """Whether in each stage those weights changed that train, and the others are byte for byte what they were."""
    wrong: list[str] = []
    numbers: dict[str, object] = {}
    changed_in_all = kept_in_all = 0
    latest: dict[str | None, Checkpoint] = {}  # of each transformer
    idle: list[str] = []
    for index, stage in enumerate(plan.stages):
        before = latest.get(stage.expert)
        try:
            after = read_checkpoint(step_folder(stage_folder(folder, index, stage.name), stage.steps))
        except ValueError as error:
            wrong.append(f"the last checkpoint of stage '{stage.name}' is not whole: {error}")
            break
        found = _of_full(after, before, model) if stage.train == "full" else _of_adapters(plan, index, after, before, is_fresh=plan.start is None)
        numbers[stage.name] = {"changed": found.changed, "kept": found.kept, "not_compared": found.not_compared, "without_gradient": found.idle}
        changed_in_all, kept_in_all = changed_in_all + found.changed, kept_in_all + found.kept
        if resolved_rate(stage).peak > 0 and stage.steps > 1:  # the first step may be made at rate 0
            is_few = 3 * len(found.idle) <= found.changed  # else it is no matter of a last block's last layers
            idle += found.idle if is_few else []
            wrong += [f"stage '{stage.name}': {name} trains and did not change" for name in (found.stuck if is_few else [*found.stuck, *found.idle])]
        wrong += [f"stage '{stage.name}': {name} does not train and changed" for name in found.moved]
        if stage.ema is not None and not after.has("ema"):
            wrong.append(f"stage '{stage.name}' keeps an average, and its checkpoint has none")
        if stage.handoff.adapter == "merge" and before is not None and not (stage_folder(folder, index, stage.name) / MERGED).is_dir():
            wrong.append(f"stage '{stage.name}' merges, and there is no base that the adapter was folded into")
        latest[stage.expert] = after
    found_in_all = f"{changed_in_all} weights and pairs changed, {kept_in_all} stayed as they were"
    if idle:
        found_in_all += f"; the gradient of {', '.join(dict.fromkeys(idle))} is 0, for nothing comes of what they do in this model: leave them out of what trains"
    return judged("what trains changes, and nothing else", wrong, found_in_all, numbers)


@dataclass
class _Moves:
    """Of a stage's weights or pairs."""

    changed: int = 0
    kept: int = 0
    not_compared: int = 0
    stuck: list[str] = field(default_factory=list)
    """Those that train and did not change."""
    moved: list[str] = field(default_factory=list)
    """Those that do not train and changed."""
    idle: list[str] = field(default_factory=list)
    """Those that train and did not change, for their gradient was 0 in every step."""

    def note(self, name: str, *, trains: bool, changed: bool, is_idle: bool = False) -> None:
        """Count one."""
        self.changed += changed
        self.kept += not changed
        if trains and not changed:
            (self.idle if is_idle else self.stuck).append(name)
        if changed and not trains:
            self.moved.append(name)


def _of_full(after: Checkpoint, before: Checkpoint | None, model: Path) -> _Moves:
    """Every weight of the transformer trains."""
    moves, optimizer = _Moves(), after.tensors("optimizer")
    old = before.tensors("transformer") if before is not None and before.has("transformer") else _weights_of(model / "transformer")
    for name, value in after.tensors("transformer").items():
        if name not in old:
            moves.not_compared += 1
            continue
        moves.note(name, trains=True, changed=not torch.equal(old[name].to(value.dtype), value), is_idle=_is_idle(optimizer, name))
    return moves


def _is_idle(optimizer: Mapping[str, Tensor], name: str) -> bool:
    """Whether the optimizer has seen a parameter, and no gradient of it but 0. name: of the model's parameter."""
    seen = optimizer.get(f"{name}::exp_avg_sq")
    return seen is not None and not bool(seen.any())


def _weights_of(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def _of_adapters(plan: Plan, index: int, after: Checkpoint, before: Checkpoint | None, *, is_fresh: bool) -> _Moves:
    """Pairs, by layer, of every adapter of the stage."""
    moves, stage, placed = _Moves(), plan.stages[index], placed_adapters(plan, index)
    new, optimizer = after.tensors("adapter"), after.tensors("optimizer")
    old = before.tensors("adapter") if before is not None and before.has("adapter") else {}
    for name, settings in placed.items():
        now, was = of_adapter(new, name), of_adapter(old, name)
        taken_over = bool(was) and stage.handoff.adapter != "merge" and not (stage.handoff.adapter == "stack" and not settings.frozen)
        for layer in layers_of(now):
            own = {part: now[f"{layer}.{part}"] for part in _PARTS if f"{layer}.{part}" in now}
            trains = not settings.frozen and trains_in(stage, name, layer, list(placed))
            is_idle = _is_idle(optimizer, f"{layer}.lora_B.{name}.weight")
            if taken_over and stage.handoff.adapter == "shrink":
                moves.not_compared += 1
            elif taken_over:
                held = {part: was[f"{layer}.{part}"] for part in own if f"{layer}.{part}" in was}
                moves.note(_called(name, layer), trains=trains, changed=_differs(own, held), is_idle=is_idle)
            elif before is None and not is_fresh:
                moves.not_compared += 1  # what `start` brings is compared by the handoff
            else:
                moves.note(_called(name, layer), trains=trains, changed=_differs(own, _fresh(plan, name, settings, layer, own)), is_idle=is_idle)
    return moves


_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def trains_in(stage: Stage, adapter: str, layer: str, adapters: Sequence[str]) -> bool:
    """Whether a layer's pair of an adapter trains in a stage, by the plan's words."""
    if isinstance(stage.train, str):
        return stage.train == "adapter"
    for entry in stage.train:
        named, pattern = target_of(entry, adapters)
        if named in (None, adapter) and (pattern is None or re.fullmatch(pattern, layer)):
            return True
    return False


def _called(adapter: str, layer: str) -> str:
    return layer if adapter == "default" else f"{adapter}:{layer}"


def _fresh(plan: Plan, name: str, settings: Placed, layer: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pair as it begins."""
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    return {"lora_A.weight": fresh_rows(down.shape, fresh_key(plan.seed, layer, name, settings.turn)), "lora_B.weight": torch.zeros_like(up)}


def _differs(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> bool:
    """Whether a pair is another than it was. A larger one is the same where its first rows are, and B has zeros beside what it had, up to a factor."""
    for part, was in old.items():
        now = new[part]
        if now.shape == was.shape:
            if not torch.equal(now, was):
                return True
        elif part == "lora_A.weight":
            if not torch.equal(now[: len(was)], was):
                return True
        elif part == "lora_B.weight":
            rank = was.shape[1]
            scale = float(now[:, :rank].norm() / was.norm()) if float(was.norm()) else 0.0
            if bool(now[:, rank:].any()) or not torch.allclose(now[:, :rank], scale * was, rtol=1e-5, atol=1e-9):
                return True
    return False

"""Handoff: build a stage's model from what the last one left, and measure whether it is still the same function.

Every stage builds its model anew from disk, so starting, handing on and resuming are one path.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mixing.batch import MicroBatch, read_rows
from mixing.buckets import RowClass, Shapes
from mixing.keys import key
from mixing.selected import Selection
from stages.adapter import adapter_weights, choose_trainable, load_adapter_weights, of_adapter, place_adapters, saved_name, without_input_casts
from stages.checkpoint import Checkpoint, read_checkpoint
from stages.families.family import Family
from stages.objectives import flow
from stages.offload import leave_out_of_ddp
from stages.pairs import grown, joined, layers_of, merged, ranks_of, rescaled, shrunk
from stages.placed import DEFAULT, Placed, all_adapters, experts_of, placed_adapters
from stages.plan import Plan, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.resolved import resolved_storage
from stages.sampler import OtherExpert
from stages.shown import show
from stages.storage import load_stored, stored

_PROBED_T = (0.1, 0.5, 0.9)
_PROBED_ROWS = 4
EXACT = 1e-4
"""What a hand-off that changes nothing may change of the function, relative to what was learnt: rounding, where one machine computes both."""
_ELSEWHERE = 1e-4  # of the outputs themselves in fp32: another machine, device or version of torch multiplies in another order
MERGED = "base"
"""The folder, in a stage's, that holds the base which the adapter was folded into."""


@dataclass(frozen=True)
class Baton:
    """What passes from stage to stage: where the base's weights are, and the adapter's weights."""

    base: Path | None
    """A safetensors file of the transformer's weights; None for the model as the plan names it."""
    adapter: Mapping[str, Tensor] | None
    """The pairs by the names that `adapter_weights` gives them; None before the first stage that trains them."""
    origin: str
    """Where they come from, for the log."""


def read_baton(checkpoint: Checkpoint) -> Baton:
    """What a stage's last checkpoint hands on. Raises PlanError if the base that it was merged into is damaged."""
    base = checkpoint.file("transformer") if checkpoint.has("transformer") else None
    if base is None and checkpoint.state["base"] is not None:
        base = (checkpoint.folder / checkpoint.state["base"]).resolve()
        if base.parent.parent.name == MERGED:  # of another stage's checkpoint the hashes were looked at before
            try:
                read_checkpoint(base.parent)
            except ValueError as error:
                raise PlanError.at(str(base.parent), f"{error}; restore it, or delete {base.parents[2]} and what comes after it to train that stage anew") from None
    return Baton(base, checkpoint.tensors("adapter") if checkpoint.has("adapter") else None, str(checkpoint.state["stage"]))


@dataclass(frozen=True)
class HandedOn:
    """What a stage begins with."""

    baton: Baton
    merged: dict[str, Tensor] | None = None
    """The weights of the base with the adapter folded in, float32 on the CPU, where the stage asks for that; they take the place of `baton.base`."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Of each layer that was shrunk, by how much of itself its product changed."""


def hand_on(family: Family, plan: Plan, stage: Stage, baton: Baton) -> HandedOn:
    """What the stage before has left, in the form that the stage's `handoff` asks for. Raises ValueError where a rank does not fit what is found."""
    way = stage.handoff.adapter
    if baton.adapter is None or stage.train == "full" or way == "continue":
        return HandedOn(baton)
    index = plan.stages.index(stage)
    before, after = placed_adapters(plan, index - 1), placed_adapters(plan, index)
    if way == "stack":
        return HandedOn(baton)
    if way == "merge":
        return HandedOn(replace(baton, adapter=None), _folded(family, plan, stage, baton, before))
    name, target = list(after.items())[-1]
    rank, old = target.settings.rank, list(before.values())[-1]
    own = of_adapter(baton.adapter, name)
    errors: dict[str, float] = {}
    if way == "grow":
        factor = old.scale / target.scale
    else:
        found = joined([(of_adapter(baton.adapter, each), placed.scale) for each, placed in before.items()]) if len(before) > 1 else rescaled(own, old.scale)
        if least := [f"{layer} has rank {found_rank}" for layer, found_rank in ranks_of(found).items() if found_rank < rank]:
            raise ValueError(f"'shrink' to rank {rank}, and layer {least[0]}; write grow, or a smaller rank")
        own, errors = shrunk(found, rank, 1 / target.scale)
        factor = 1.0
    try:
        own = grown(own, rank, factor, seed=plan.seed, adapter=name, turn=target.turn)
    except ValueError as error:
        raise ValueError(f"'grow' to rank {rank}: {error}; write shrink, or a larger rank") from None
    rest = {} if way == "shrink" else dict(baton.adapter)  # those that were stacked on, as they are
    return HandedOn(replace(baton, adapter={**rest, **{saved_name(name, each): value for each, value in own.items()}}), errors=errors)


def _folded(family: Family, plan: Plan, stage: Stage, baton: Baton, before: Mapping[str, Placed]) -> dict[str, Tensor]:
    """The base's weights with the adapters folded in, float32."""
    assert baton.adapter is not None
    weights = {name: value.detach().cpu() for name, value in family.load_transformer(torch.float32, baton.base, stage.expert).state_dict().items()}
    for name, placed in before.items():
        own = of_adapter(baton.adapter, name)
        for layer in layers_of(own):
            weights[f"{layer}.weight"] = merged(weights[f"{layer}.weight"], own, layer, placed.scale)
    return weights


def carried(plan: Plan, stage: Stage, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pairs that do not stand on a stage's model, since they are another expert's: its checkpoints carry them along."""
    index = plan.stages.index(stage)
    elsewhere = all_adapters(plan, index).keys() - placed_adapters(plan, index).keys()
    return {saved_name(name, each): value for name in sorted(elsewhere) for each, value in of_adapter(weights, name).items()}


def other_experts(family: Family, plan: Plan, stage: Stage, weights: Mapping[str, Tensor]) -> tuple[OtherExpert, ...]:
    """The model's other transformers, in evaluation mode, with what they have learnt so far. weights: the adapters of a checkpoint, theirs among them."""
    if stage.expert is None:
        return ()
    index, owners = plan.stages.index(stage), experts_of(plan)
    found = []
    for expert in family.experts:
        if expert == stage.expert:
            continue
        model = load_stored(family, stored(stage), None, expert)
        theirs = {name: placed for name, placed in all_adapters(plan, index).items() if owners.get(name) == {expert} and of_adapter(weights, name)}
        if theirs:
            place_adapters(model, theirs, family.target_patterns, plan.seed)
            load_adapter_weights(model, {saved_name(name, each): value for name in theirs for each, value in of_adapter(weights, name).items()}, stage.name)
        found.append(OtherExpert(*family.expert_range(expert), model.requires_grad_(False).eval()))
    return tuple(found)


def build_model(family: Family, plan: Plan, stage: Stage, place: str, baton: Baton, device: torch.device | None = None) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A stage's transformer with what trains in it, by name.

    place: the stage's place in the plan, for errors. baton: as `hand_on` gives it; an adapter of which it has nothing begins afresh. device: None for
    the family's.
    """
    model = load_stored(family, stored(stage), baton.base, stage.expert, device)
    placed = placed_adapters(plan, plan.stages.index(stage))
    if stage.train != "full":
        place_adapters(model, placed, family.target_patterns, plan.seed)
        if baton.adapter is not None:
            fresh = {name for name in placed if not of_adapter(baton.adapter, name)}
            begun = {each: value for each, value in adapter_weights(model).items() if (each.rpartition(":")[0] or DEFAULT) in fresh}
            others = carried(plan, stage, baton.adapter)
            load_adapter_weights(model, {**begun, **{each: value for each, value in baton.adapter.items() if each not in others}}, baton.origin)
        if stage.precision != "fp32":
            without_input_casts(model)
    trainable = choose_trainable(model, stage.train, f"{place}.train", frozen=[name for name, each in placed.items() if each.frozen], unread=family.unread)
    leave_out_of_ddp(model)
    model.train()
    return model, trainable


def probe_batches(selections: Mapping[str, Selection], shapes: Shapes, names: Collection[str] | None = None) -> dict[str, MicroBatch]:
    """Fixed inputs by a name that says which rows they are: the first rows, held out where there are any, of a source with some number of references and regions.

    names: those to read again; left out, one for each number of references and regions, of the first source that has it. Rows that are gone are left
    out, and so are streams without held-out rows.
    """
    batches: dict[str, MicroBatch] = {}
    seen: set[tuple[int, int]] = set()
    for source_name, selection in selections.items():
        source = selection.source
        for number in sorted({(len(row_class.references), row_class.regions) for row_class in selection.training}):
            rows = [row for row in selection.held_out.tolist() if _shown(selection.class_of(row)) == number]
            if not rows and selection.stream is None:
                rows = list(next(training for row_class, training in selection.training.items() if _shown(row_class) == number)[:_PROBED_ROWS])
            rows = [int(row) for row in rows[:_PROBED_ROWS]]
            of_regions = f" and {number[1]} regions" if number[1] else ""
            name = f"{number[0]} references{of_regions} of {source_name} {key(*(source.key(row) for row in rows)):016x}"
            if rows and (name in names if names is not None else number not in seen):
                found, _ = read_rows(selection, rows, shapes)
                if found:
                    seen.add(number)
                    batches[name] = found[0]
    return batches


def _shown(row_class: RowClass) -> tuple[int, int]:
    """How many references and regions a row has."""
    return len(row_class.references), row_class.regions


@torch.no_grad()
def probe(family: Family, transformer: nn.Module, batches: Mapping[str, MicroBatch], precision: StagePrecision, seed: int) -> dict[str, Tensor]:
    """What the model predicts on fixed inputs at t = 0.1, 0.5 and 0.9: `NAME t` to float32 [B, C, h, w] on the CPU."""
    outputs = {}
    for name, batch in batches.items():
        shown = show(family, batch)
        x = shown.x
        e = flow.noise(x.shape[1:], [key(seed, "probe", source, row) for source, row in zip(batch.sources, batch.keys, strict=True)]).to(x.device)
        for value in _PROBED_T:
            t = torch.full((x.shape[0],), value, device=x.device)
            with precision.autocast():
                predicted = shown.predict(family, transformer, family.path.blend(x, e, t), t)
            outputs[f"{name} {value}"] = predicted.float().cpu()
    return outputs


def probed_names(outputs: Mapping[str, Tensor]) -> set[str]:
    """The names of the inputs that outputs were made from."""
    return {name.rsplit(" ", 1)[0] for name in outputs}


def deltas(new: Mapping[str, Tensor], old: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """|new - old| / |old - base| at each probed t, over the inputs that all three have seen: the change at a handoff relative to all that was learnt so far."""
    norms = {value: (_norm(new, old, names), _norm(old, base, names)) for value, names in _probed(new, old, base)}
    return {value: changed / learnt if learnt else changed for value, (changed, learnt) in norms.items()}


def exact_within(new: Mapping[str, Tensor], old: Mapping[str, Tensor], base: Mapping[str, Tensor], *, same_launch: bool) -> dict[str, float]:
    """What `deltas` may at most be at each t where nothing may change the function. same_launch: whether it computed both outputs; another may have run on another machine."""
    if same_launch:
        return {value: EXACT for value, _ in _probed(new, old, base)}
    norms = {value: (_norm(old, {}, names), _norm(old, base, names)) for value, names in _probed(new, old, base)}
    return {value: max(EXACT, _ELSEWHERE * (size / learnt if learnt else size)) for value, (size, learnt) in norms.items()}


def _probed(new: Mapping[str, Tensor], old: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    """Each probed t for which there are outputs of all three, and their names."""
    of_value = {str(value): [name for name in old if name.endswith(f" {value}") and name in new and name in base] for value in _PROBED_T}
    return [(value, names) for value, names in of_value.items() if names]


def _norm(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Of all outputs of these names together; less the other's, where it has them."""
    return math.sqrt(sum(float((one[name] - other[name] if name in other else one[name]).double().square().sum()) for name in names))


def cause_of_change(before: Stage, after: Stage) -> str | None:
    """Why the function may change from one stage to the next, or None if it must not."""
    causes = []
    if before.expert != after.expert:
        causes.append(f"another transformer, expert {before.expert} -> {after.expert}")
    if after.handoff.adapter == "shrink":
        causes.append("the adapter was shrunk")
    if after.handoff.adapter == "merge" and resolved_storage(after) != "fp32":
        causes.append(f"the adapter was merged into a base in {resolved_storage(after)}")
    if before.precision != after.precision:
        causes.append(f"precision {before.precision} -> {after.precision}")
    if before.attention != after.attention:
        causes.append(f"attention by {before.attention} -> {after.attention}")
    if resolved_storage(before) != resolved_storage(after):
        causes.append(f"base stored in {resolved_storage(before)} -> {resolved_storage(after)}")
    return ", ".join(causes) or None


def same_outputs(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference between two probes; 0 where there was nothing to probe on."""
    return max((float((one[name] - other[name]).abs().max()) for name in one), default=0.0)


def stage_changes(before: Stage, after: Stage) -> dict[str, Sequence[object]]:
    """The fields in which a stage differs from the one before it: name to [before, after]."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: [old[name], new[name]] for name in new if name != "name" and old[name] != new[name]}

"""Handoff: build a stage's model from what the last one left, and measure whether it is still the same function.

Every stage builds its model anew from disk, so starting, handing on and resuming are one path.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mixing.batch import MicroBatch, read_rows
from mixing.buckets import Shapes
from mixing.keys import key
from mixing.selected import Selection
from stages.adapter import add_adapter, choose_trainable, load_adapter_weights, without_input_casts
from stages.checkpoint import Checkpoint, newest_checkpoint
from stages.encode import encode
from stages.families.base import Family
from stages.objectives import flow
from stages.plan import Plan, Stage
from stages.precision import DTYPES, StagePrecision
from stages.resolved import resolved_storage

_PROBED_T = (0.1, 0.5, 0.9)
_PROBED_ROWS = 4
EXACT = 1e-4
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Baton:
    """What passes from stage to stage: where the base's weights are, and the adapter's weights."""

    base: Path | None
    """A safetensors file of the transformer's weights; None for the model as the plan names it."""
    adapter: Mapping[str, Tensor] | None
    """The pairs; None before the first stage that trains them."""
    origin: str
    """Where they come from, for the log."""


def read_baton(checkpoint: Checkpoint) -> Baton:
    """What a stage's last checkpoint hands on."""
    base = checkpoint.file("transformer") if checkpoint.has("transformer") else None
    if base is None and checkpoint.state["base"] is not None:
        base = (checkpoint.folder / checkpoint.state["base"]).resolve()
    return Baton(base, checkpoint.tensors("adapter") if checkpoint.has("adapter") else None, str(checkpoint.state["stage"]))


def read_start(plan: Plan, fingerprint: str) -> Baton:
    """What `start:` names: a run's folder (its last finished stage), one stage's folder, or a published adapter (its folder or file).

    Raises ValueError if there is none of these, if it was trained on another model, or if its adapter has another rank.
    """
    place = Path(plan.start or "")
    scale = (plan.adapter.alpha or plan.adapter.rank) / plan.adapter.rank
    file = place / ADAPTER_FILE if place.is_dir() else place
    if file.is_file() and file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as header:
            notes = header.metadata() or {}
        if notes.get("medley.model", fingerprint) != fingerprint:
            raise ValueError(f"start: {file} was trained on another model than the plan's")
        weights = {name.removeprefix("transformer."): value.float() for name, value in load_file(file).items()}
        # Medley's own files hold the scale in B and say alpha = rank; other trainers leave it beside.
        config = json.loads(notes.get("lora_adapter_metadata", "{}"))
        rank = float(config.get("transformer.r", 1))
        scale /= float(config.get("transformer.lora_alpha", rank)) / rank
        return Baton(None, {name: value / scale if ".lora_B." in name else value for name, value in weights.items()}, str(file))
    if (place / "stages").is_dir():
        folders = sorted((place / "stages").iterdir(), key=lambda folder: int(folder.name.split("-")[0]))
    else:
        folders = [place]
    for folder in reversed(folders):
        checkpoint = newest_checkpoint(folder, lambda message: None)
        if checkpoint is None or not checkpoint.state["finished"]:
            continue
        recorded = checkpoint.state["plan"]
        if recorded["fingerprint"] != fingerprint:
            raise ValueError(f"start: {folder} was trained on another model than the plan's")
        baton = read_baton(checkpoint)
        if baton.adapter is None:
            return Baton(baton.base, None, str(folder))
        if recorded["adapter"]["rank"] != plan.adapter.rank:
            raise ValueError(f"start: the adapter of {folder} has rank {recorded['adapter']['rank']}, the plan asks for {plan.adapter.rank}; restore the rank")
        factor = (recorded["adapter"]["alpha"] or recorded["adapter"]["rank"]) / recorded["adapter"]["rank"] / scale
        return Baton(baton.base, {name: value * factor if ".lora_B." in name else value for name, value in baton.adapter.items()}, str(folder))
    raise ValueError(f"start: {place} is neither a run's folder with a finished stage, nor a finished stage's folder, nor an adapter ({ADAPTER_FILE})")


def build_model(family: Family, plan: Plan, stage: Stage, place: str, baton: Baton) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A stage's transformer with what trains in it, by name. place: the stage's place in the plan, for errors."""
    model = family.load_transformer(DTYPES[resolved_storage(stage)], baton.base)
    if stage.train != "full":
        add_adapter(model, plan.adapter, family.target_patterns, plan.seed)
        if baton.adapter is not None:
            load_adapter_weights(model, baton.adapter, baton.origin)
        if stage.precision != "fp32":
            without_input_casts(model)
    trainable = choose_trainable(model, stage.train, f"{place}.train")
    model.train()
    return model, trainable


def probe_batches(selections: Mapping[str, Selection], shapes: Shapes, names: Collection[str] | None = None) -> dict[str, MicroBatch]:
    """Fixed inputs by a name that says which rows they are: the first rows, held out where there are any, of a source with some number of references.

    names: those to read again; left out, one for each number of references, of the first source that has it. Rows that are gone are left out, and so
    are streams without held-out rows.
    """
    batches: dict[str, MicroBatch] = {}
    seen: set[int] = set()
    for source_name, selection in selections.items():
        source = selection.source
        for number in sorted({len(row_class.references) for row_class in selection.training}):
            rows = [row for row in selection.held_out.tolist() if source.num_references[row] == number]
            if not rows and selection.stream is None:
                rows = list(next(training for row_class, training in selection.training.items() if len(row_class.references) == number)[:_PROBED_ROWS])
            rows = [int(row) for row in rows[:_PROBED_ROWS]]
            name = f"{number} references of {source_name} {key(*(source.key(row) for row in rows)):016x}"
            if rows and (name in names if names is not None else number not in seen):
                found, _ = read_rows(selection, rows, shapes)
                if found:
                    seen.add(number)
                    batches[name] = found[0]
    return batches


@torch.no_grad()
def probe(family: Family, transformer: nn.Module, batches: Mapping[str, MicroBatch], precision: StagePrecision, seed: int) -> dict[str, Tensor]:
    """What the model predicts on fixed inputs at t = 0.1, 0.5 and 0.9: `NAME t` to float32 [B, C, h, w] on the CPU."""
    outputs = {}
    for name, batch in batches.items():
        x = encode(family, batch.targets)
        e = flow.noise(x.shape[1:], [key(seed, "probe", source, row) for source, row in zip(batch.sources, batch.keys, strict=True)]).to(x.device)
        text, references = family.encode_prompts(batch.prompts), [encode(family, reference) for reference in batch.references]
        for value in _PROBED_T:
            t = torch.full((x.shape[0],), value, device=x.device)
            with precision.autocast():
                predicted = family.predict(transformer, flow.blend(x, e, t), t, text, references)
            outputs[f"{name} {value}"] = predicted.float().cpu()
    return outputs


def probed_names(outputs: Mapping[str, Tensor]) -> set[str]:
    """The names of the inputs that outputs were made from."""
    return {name.rsplit(" ", 1)[0] for name in outputs}


def deltas(new: Mapping[str, Tensor], old: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """|new - old| / |old - base| at each probed t, over the inputs that all three have seen: the change at a handoff relative to all that was learnt so far."""
    change: dict[str, float] = {}
    for value in _PROBED_T:
        names = [name for name in old if name.endswith(f" {value}") and name in new and name in base]
        if names:
            changed = sum(float((new[name] - old[name]).double().square().sum()) for name in names) ** 0.5
            learnt = sum(float((old[name] - base[name]).double().square().sum()) for name in names) ** 0.5
            change[str(value)] = changed / learnt if learnt else changed
    return change


def cause_of_change(before: Stage, after: Stage) -> str | None:
    """Why the function may change from one stage to the next, or None if it must not."""
    causes = []
    if before.precision != after.precision:
        causes.append(f"precision {before.precision} -> {after.precision}")
    if resolved_storage(before) != resolved_storage(after):
        causes.append(f"base stored in {resolved_storage(before)} -> {resolved_storage(after)}")
    return ", ".join(causes) or None


def same_outputs(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference between two probes."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def stage_changes(before: Stage, after: Stage) -> dict[str, Sequence[object]]:
    """The fields in which a stage differs from the one before it: name to [before, after]."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: [old[name], new[name]] for name in new if name != "name" and old[name] != new[name]}

"""Publishing: the adapter as the stock pipeline loads it, with its history, loaded back and compared before it is called published."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mixing.batch import MicroBatch
from stages.adapter import exactly, lora_layers, of_adapter
from stages.checkpoint import sync
from stages.families.family import Family
from stages.handoff import ADAPTER_FILE, probe, same_outputs
from stages.pairs import joined, ranks_of
from stages.placed import all_adapters, newest, placed_adapters, scale_of, total_rank
from stages.plan import Adapter, Model, Plan
from stages.precision import DTYPES, StagePrecision
from stages.problems import RunError

_OUTPUTS = 1e-5  # of the largest output; over a base in bf16 the outputs alone cannot tell a weak adapter from rounding, the pairs can
_PAIRS = {"fp32": 1e-5, "bf16": 2e-2}  # of a pair's product; a pipeline in bf16 rounds the pairs too


class PublishError(RunError):
    """The adapter that was written does not give the output that training saw."""


def publish_adapter(
    folder: Path,
    family: Family,
    plan: Plan,
    weights: Mapping[str, Tensor],
    base: Path | None,
    storage: str,
    precision: StagePrecision,
    saw: Mapping[str, Tensor],
    batches: Mapping[str, MicroBatch],
    notes: Mapping[str, str],
    card: str,
    sheet: Path,
) -> float:
    """Write adapter/ and prove it: load it into a fresh base with the stock pipeline, and compare the outputs.

    weights: the pairs as checkpoints name them; several adapters are written as one, and beside it each alone. base: weights of the transformer they sit on, or None for the model itself; storage: its dtype.
    saw: what the trained model gave on `batches` in `precision`. sheet: a picture for the card, if it exists. Returns the largest difference
    of the outputs. Raises PublishError if it is more than rounding; then what was published before stands.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    one, settings = as_one(plan, weights)
    write_adapter(partial / ADAPTER_FILE, one, settings, notes)
    everything = all_adapters(plan, len(plan.stages) - 1)
    for name, each in everything.items() if len(everything) > 1 else ():
        write_adapter(partial / f"{name}.safetensors", of_adapter(weights, name), each.settings, notes)
    if sheet.exists():
        shutil.copyfile(sheet, partial / "previews.png")
    (partial / "README.md").write_text(card, encoding="utf-8")
    fresh = family.load_transformer(DTYPES[storage], base)
    family.stock_pipeline(fresh, encoders=False).load_lora_weights(partial, weight_name=ADAPTER_FILE)
    off = _largest_change(fresh, one, scale_of(settings))
    difference = same_outputs(saw, probe(family, fresh, batches, precision, plan.seed))
    largest = max(float(output.abs().max()) for output in saw.values())
    if not off <= _PAIRS[storage] or (storage == "fp32" and not difference <= _OUTPUTS * max(1.0, largest)):
        shutil.rmtree(partial)
        raise PublishError(
            f"{folder}: not published: loaded back by {family.pipeline_class}, a layer's pair differs from the trained one by {off:.3g} of itself, and the outputs by up to {difference:.3g}"
        )
    for path in partial.iterdir():
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)
    return difference


def as_one(plan: Plan, weights: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Adapter]:
    """What the last stage's adapters add together, as the pairs of one adapter, and its settings. weights: as checkpoints name them."""
    placed = placed_adapters(plan, len(plan.stages) - 1)
    if len(placed) == 1:
        ((name, only),) = placed.items()
        return of_adapter(weights, name), only.settings
    rank = total_rank(placed)
    return joined([(of_adapter(weights, name), each.scale) for name, each in placed.items()]), Adapter().model_copy(update={"rank": rank, "alpha": float(rank)})


def _largest_change(loaded: nn.Module, weights: Mapping[str, Tensor], scale: float) -> float:
    """The largest |loaded - trained| / |trained| over the layers, of the product that a pair adds to its layer, and of DoRA's magnitudes; infinite if a
    layer has none."""
    layers = lora_layers(loaded)
    names = {name.split(".lora_")[0] for name in weights}
    if names != set(layers):
        return float("inf")
    worst = 0.0
    for name in names:
        (adapter,) = layers[name].active_adapters
        down, up = layers[name].lora_A[adapter].weight, layers[name].lora_B[adapter].weight
        trained = scale * (weights[f"{name}.lora_B.weight"].to(up.device) @ weights[f"{name}.lora_A.weight"].to(up.device))
        change = float((layers[name].scaling[adapter] * (up.detach().float() @ down.detach().float()) - trained).norm())
        worst = max(worst, change / max(float(trained.norm()), 1e-30)) if math.isfinite(change) else float("inf")
        magnitude = weights.get(f"{name}.lora_magnitude_vector")
        if (magnitude is not None) != (adapter in layers[name].lora_magnitude_vector):
            return float("inf")
        if magnitude is not None:
            changed = float((layers[name].lora_magnitude_vector[adapter].weight.detach().float() - magnitude.to(up.device)).norm() / magnitude.norm())
            worst = max(worst, changed) if math.isfinite(changed) else float("inf")
    return worst


def write_adapter(path: Path, weights: Mapping[str, Tensor], adapter: Adapter, notes: Mapping[str, str]) -> None:
    """Write the pairs so that no reader needs metadata: the scale is multiplied into B, and alpha is the rank.

    A file without metadata whose alpha is not its rank loads at the wrong strength in silence (diffusers 0.42.1, peft 0.21.2); the metadata
    is there all the same. weights: of one adapter. notes: further strings of the header (plan, ledger).
    """
    scale = scale_of(adapter)
    baked = {f"transformer.{name}": (value * scale if ".lora_B." in name else value).contiguous() for name, value in weights.items()}
    modules = sorted({name.split(".lora_")[0] for name in weights})
    config: dict[str, Any] = {"transformer.r": adapter.rank, "transformer.lora_alpha": adapter.rank, "transformer.target_modules": exactly(modules)}
    # Adapters with other targets, joined, have other ranks in places. A pattern is matched against a name's end unless it begins with ^ (peft 0.21).
    if ranks := {f"^{re.escape(layer)}": rank for layer, rank in ranks_of(weights).items() if rank != adapter.rank}:
        config |= {"transformer.rank_pattern": ranks, "transformer.alpha_pattern": ranks}
    if adapter.variant == "dora":
        config["transformer.use_dora"] = True
    save_file(baked, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True), **notes})
    sort_header(path)


def sort_header(path: Path) -> None:
    """Put a safetensors file's metadata in order: the library (0.8) writes it in another order each time, and equal runs must end in equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise PublishError(f"{path}: its header cannot be put in order")
        file.seek(8)
        file.write(text.ljust(length))


def model_card(plan: Plan, family: Family, table: str, ledger: Mapping[str, Any], versions: Mapping[str, str], base_note: str | None) -> str:
    """The adapter's README.md: how to load it, what it saw, how well it does, and with what it was made."""
    repo = plan.model.repo if isinstance(plan.model, Model) else plan.model
    placed = placed_adapters(plan, len(plan.stages) - 1)
    settings = newest(placed).settings
    saw = ["| stage | source | asked | drawn | images | epochs |", "|---|---|---:|---:|---:|---:|"]
    for stage in ledger["stages"]:
        for name, entry in stage["sources"].items():
            epochs = f"{entry['epochs']:.2f}" if "epochs" in entry else "a stream"
            saw.append(f"| {stage['stage']} | {name} | {entry['asked']:.1%} | {entry['drawn']:.1%} | {entry['images']:,} | {epochs} |")
    base = base_note or f'pipe = {family.pipeline_class}.from_pretrained({json.dumps(repo)}, torch_dtype=torch.bfloat16)'
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            f"base_model: {json.dumps(repo)}",
            "tags: [lora, medley]",
            "---",
            f"# {plan.name}",
            "",
            f"A {'DoRA' if settings.variant == 'dora' else 'LoRA'} of rank {total_rank(placed)} for {repo}, trained by Medley in {len(plan.stages)} stages: {', '.join(stage.name for stage in plan.stages)}.",
            "",
            "```python",
            "import torch",
            f"from diffusers import {family.pipeline_class}",
            "",
            base,
            f'pipe.load_lora_weights("path/to/this/folder", weight_name="{ADAPTER_FILE}")',
            "```",
            "",
            "## What it saw",
            "",
            *saw,
            "",
            "## Held-out loss",
            "",
            table,
            "",
            "## Made with",
            "",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
            "The resolved plan and the ledger are in the file's metadata (`medley.plan`, `medley.ledger`).",
            "",
        ]
    )

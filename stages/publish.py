"""Publishing: the adapter as the stock pipeline loads it, with its history, loaded back and compared before it is called published."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mixing.batch import MicroBatch
from stages.adapter import lora_layers, of_adapter
from stages.checked import DamagedError, checked, read_checked
from stages.digests import file_digest
from stages.disk import sync
from stages.families.family import Family
from stages.handoff import probe, same_outputs
from stages.layouts import load_back, write_adapter, write_layouts
from stages.pairs import joined
from stages.placed import placed_adapters, scale_of, total_rank
from stages.plan import Adapter, Plan, Quantised
from stages.precision import DTYPES, StagePrecision
from stages.problems import RunError
from stages.storage import quantise

NONE: Mapping[str, Path] = MappingProxyType({})
_HASHES = ".medley.json"  # hidden, so that it is no part of what goes to the Hub
_OUTPUTS = 1e-5  # of the largest output, over a base in fp32
_ROUNDED = 0.5  # of the outputs' norm, over a base in bf16: they cannot tell a weak adapter from rounding, the pairs can; but another model they tell
_PAIRS = {"fp32": 1e-5, "bf16": 2e-2}  # of a pair's product; a pipeline in bf16 rounds the pairs too


class PublishError(RunError):
    """The adapter that was written does not give the output that training saw."""


@dataclass(frozen=True)
class Trained:
    """What one transformer has learnt."""

    index: int
    """The number of the last stage that trained it: its adapters are those that stand there."""
    expert: str | None
    """Which of the model's transformers it is; None for the only one."""
    weights: Mapping[str, Tensor]
    """The pairs as checkpoints name them; several adapters are written as one, and beside it each alone."""
    base: Path | None
    """Weights of the transformer that they sit on; None for the model itself."""
    storage: str
    """Its dtype; of a quantised one, that of the weights that are not."""
    precision: StagePrecision
    saw: Mapping[str, Tensor]
    """What the trained transformer gave on the fixed inputs, in `precision`."""
    blocks: Quantised | None = None
    """What its blocks are quantised to. The proof quantises the fresh transformer alike: so it is the function that training saw, and takes no more memory."""


def make_adapter(
    folder: Path,
    family: Family,
    plan: Plan,
    trained: Sequence[Trained],
    batches: Mapping[str, MicroBatch],
    notes: Mapping[str, str],
    card: str,
    sheet: Path,
    images: Mapping[str, Path] = NONE,
) -> float:
    """Write what adapter/ is to hold beside its place, and prove it: load it into fresh transformers as the family's users do, and compare the outputs on `batches`.

    trained: one entry for each transformer that learnt. notes: strings of the files' headers. sheet: a picture for the card, if it exists. images: further
    ones, by the names that they have beside it. Returns the largest
    difference of the outputs; where there are no batches, as of a stream of which no row is held out, the pairs alone are compared. Raises PublishError if it is more than rounding. What was published before stands until `show_adapter`.
    """
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        return _fill(partial, folder, family, plan, trained, batches, notes, card, sheet, images)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not to be kept full by it
        raise


def show_adapter(folder: Path) -> None:
    """Bring what `make_adapter` wrote into view, in the place of what was published before."""
    clear_old(folder)
    if folder.exists():
        folder.rename(_old(folder))
    _partial(folder).rename(folder)
    sync(folder.parent)
    clear_old(folder)


def clear_old(folder: Path) -> None:
    """Take away what was published before, where a process was killed before it could. folder: what is in view."""
    shutil.rmtree(_old(folder), ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _fill(
    partial: Path, folder: Path, family: Family, plan: Plan, trained: Sequence[Trained], batches: Mapping[str, MicroBatch], notes: Mapping[str, str], card: str, sheet: Path, images: Mapping[str, Path]
) -> float:
    """Write what `make_adapter` makes into `partial`, and prove it. folder: where it will be. Returns and raises as that does."""
    if sheet.exists():
        shutil.copyfile(sheet, partial / "previews.png")
    for name, image in images.items():
        (partial / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(image, partial / name)
    worst, said = 0.0, []
    for each in trained:
        fresh = family.load_transformer(DTYPES[each.storage], each.base, each.expert, device=family.device if each.blocks is None else torch.device("cpu"))
        one, settings = as_one(plan, each.weights, each.index)
        said.append(write_layouts(partial, family, one, settings, notes, each.expert, fresh))
        standing = placed_adapters(plan, each.index)
        for name, placed in standing.items() if len(standing) > 1 else ():
            write_adapter(partial / f"{name}.safetensors", of_adapter(each.weights, name), placed.settings, notes)
        load_back(partial, family, fresh, each.expert)
        if each.blocks is not None:
            quantise(fresh, each.blocks, family.device)
            fresh.to(family.device)
        off = _largest_change(fresh, one, scale_of(settings))
        outputs = probe(family, fresh, batches, each.precision, plan.seed)
        difference = same_outputs(each.saw, outputs)
        if not off <= _PAIRS[each.storage] or not _agree(each, outputs, difference):
            of_expert = f" (expert {each.expert})" if each.expert else ""
            raise PublishError(
                f"{folder}: not published: loaded back by {family.pipeline_class}{of_expert}, a layer's pair differs from the trained one by {off:.3g} of itself, "
                f"and the outputs by up to {difference:.3g}"
            )
        worst = max(worst, difference)
    (partial / "README.md").write_text("\n".join([card, "## ComfyUI", "", *said, ""]), encoding="utf-8")
    weights = {path.name: file_digest(path) for path in sorted(partial.glob("*.safetensors"))}
    (partial / _HASHES).write_text(checked(weights), encoding="utf-8")
    for path in partial.rglob("*"):
        sync(path)
    return worst


def is_as_published(folder: Path) -> bool:
    """Whether the weights in adapter/ are those that were published there; the card may be edited. A former version wrote no hashes: then they are believed."""
    try:
        weights = read_checked(folder / _HASHES)
        return weights is None or all(file_digest(folder / name) == digest for name, digest in weights.items())
    except (DamagedError, OSError):
        return False


def _agree(trained: Trained, outputs: Mapping[str, Tensor], difference: float) -> bool:
    """Whether what a fresh transformer gives with the adapter is what training saw, but for rounding. difference: the largest."""
    if trained.storage == "fp32":
        return difference <= _OUTPUTS * max([1.0, *(float(output.abs().max()) for output in trained.saw.values())])
    apart = sum(float((outputs[name] - saw).double().square().sum()) for name, saw in trained.saw.items())
    whole = sum(float(saw.double().square().sum()) for saw in trained.saw.values())
    return apart <= _ROUNDED**2 * whole


def as_one(plan: Plan, weights: Mapping[str, Tensor], index: int = -1) -> tuple[Mapping[str, Tensor], Adapter]:
    """What a stage's adapters add together, as the pairs of one adapter, and its settings. weights: as checkpoints name them. index: the stage's; the last one's if -1."""
    placed = placed_adapters(plan, index % len(plan.stages))
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


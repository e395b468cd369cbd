"""Hand-offs of adapters: grown, shrunk, stacked and folded in, the function stays what it was, or it is said by how much it is not; also from other trainers' files."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import stages.layouts
from mixing.batch import MicroBatch
from mixing.buckets import Shapes, class_of
from mixing.selected import Choice, Selection, select
from mixing.source import Source as Rows
from mixing.source import open_source
from models import tiny_flux
from runs import adapter_bytes, carry_out, copy_run, events, launch, make_data, make_world, plan_of, write_plan
from stages import save_leg
from stages.adapter import adapter_weights, add_adapter, load_adapter_weights, lora_layers
from stages.checkpoint import read_checkpoint
from stages.explain import explain, show
from stages.families.family import Family
from stages.families.flux import Flux
from stages.handoff import EXACT, Baton, build_model, carried, cause_of_change, deltas, exact_within, hand_on, probe, probe_batches, read_baton
from stages.layouts import ADAPTER_FILE, write_adapter
from stages.leg import Leg
from stages.pairs import grown, joined, layers_of, merged, pair, ranks_of, shrunk
from stages.placed import Placed, placed_adapters, scale_of
from stages.plan import Adapter, Handoff, Plan, Source, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.publish import PublishError, Trained, as_one, make_adapter
from stages.resolved import resolved_plan
from stages.start import read_start

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MicroBatch]:
    root = make_data(tmp_path_factory.mktemp("data"))
    source = open_source("photos", path="photos", task="text_to_image", columns={}, prompt=None, split="train", on_bad_row="stop", root=root)
    return probe_batches({"photos": select(source, Choice(), 2)}, Shapes(8, 2))


def plan_with(adapter: Adapter, *handoffs: Handoff, start: str | None = None, **changes: Any) -> Plan:
    """Stages in float32: a first one, and one after each handoff; with `start` the first is after the first handoff."""
    stages = [Stage(name=f"s{number}", steps=1, lr=0.1, batch=1, resolution=8, precision="fp32", handoff=handoff) for number, handoff in enumerate((*(() if start else (Handoff(),)), *handoffs))]
    stages = [stage.model_copy(update=changes) for stage in stages]
    return Plan(name="tiny", model="none", adapter=adapter, sources={"photos": Source(path="photos")}, stages=stages, start=start)


def taught(family: Family, plan: Plan, index: int = 0, *, seed: int = 4) -> Baton:
    """What a stage hands on whose pairs have an effect."""
    model, _ = build_model(family, plan, plan.stages[index], "stages[0]", Baton(None, None, "test"))
    generator = torch.Generator().manual_seed(seed)
    weights = adapter_weights(model)
    drawn = {name: value + 0.1 * value.abs().mean() if name.endswith("vector") else 0.1 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    return Baton(None, drawn, "test")


def outputs(family: Family, model: nn.Module, batches: Mapping[str, MicroBatch]) -> dict[str, Tensor]:
    return probe(family, model, batches, StagePrecision("fp32", CPU), 0)


def handed(family: Family, plan: Plan, index: int, baton: Baton, folder: Path) -> tuple[nn.Module, Baton, Mapping[str, float]]:
    """A stage's model after its handoff, as open_leg builds it."""
    found = hand_on(family, plan, plan.stages[index], baton)
    own = found.baton
    if found.merged is not None:
        save_file(found.merged, folder / "merged.safetensors")
        own = replace(own, base=folder / "merged.safetensors")
    return build_model(family, plan, plan.stages[index], f"stages[{index}]", own)[0], own, found.errors


# --- the pairs themselves, against float64 ----------------------------------------------------------------------------------------------


def drawn(rank: int, out: int = 7, inside: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"one.lora_A.weight": torch.randn(rank, inside, generator=generator), "one.lora_B.weight": torch.randn(out, rank, generator=generator)}


def product(weights: Mapping[str, Tensor], layer: str = "one") -> Tensor:
    down, up = pair(weights, layer)
    return up.double() @ down.double()


def test_grown_pairs_have_the_product_that_they_had_and_rows_that_can_learn() -> None:
    old = drawn(2)
    new = grown(old, 5, 0.5, seed=3, adapter="default", turn=0)
    down, up = pair(new, "one")
    assert down.shape == (5, 5)
    assert torch.allclose(product(new), 0.5 * product(old))
    assert not up[:, 2:].any()
    assert 0 < float(down[2:].abs().max()) <= 5**-0.5
    assert not torch.equal(down[2:], grown(old, 5, 0.5, seed=4, adapter="default", turn=0)["one.lora_A.weight"][2:])
    with pytest.raises(ValueError, match="layer one has rank 2, which is more than 1"):
        grown(old, 1, 1.0, seed=3, adapter="default", turn=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shrunk_pairs_are_the_truncated_singular_values_of_the_product(rank: int) -> None:
    old = drawn(4)
    new, errors = shrunk(old, rank, 0.5)
    left, values, right = torch.linalg.svd(product(old), full_matrices=False)
    assert torch.allclose(product(new), 0.5 * (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-6)
    assert errors["one"] == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-6)
    assert ranks_of(new) == {"one": rank}


def test_pairs_whose_product_has_a_smaller_rank_are_shrunk_without_loss_and_leave_no_dead_rows() -> None:
    untrained = {**drawn(4), "one.lora_B.weight": torch.zeros(7, 4)}
    twice = joined([(drawn(2), 1.0), (drawn(2), 3.0)])
    for old, rank in ((untrained, 0), (twice, 2)):
        new, errors = shrunk(old, 3, 1.0)
        assert ranks_of(new) == {"one": rank}
        assert errors["one"] < 1e-6
        again = grown(new, 3, 1.0, seed=0, adapter="default", turn=0)
        assert torch.allclose(product(again), product(old), atol=1e-5)
        assert bool(again["one.lora_A.weight"].abs().sum(dim=1).all()), "a row of zeros beside a column of zeros never learns"


def test_joined_adapters_add_what_each_of_them_adds() -> None:
    one, other = drawn(2), {**drawn(3, seed=1), **{name.replace("one", "two"): value for name, value in drawn(3, seed=2).items()}}
    both = joined([(one, 0.5), (other, 2.0)])
    assert ranks_of(both) == {"one": 5, "two": 3}
    assert torch.allclose(product(both), 0.5 * product(one) + 2 * product(other))
    assert torch.allclose(product(both, "two"), 2 * product(other, "two"))


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_a_pair_is_folded_into_a_weight_as_peft_folds_it(variant: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    weight = model.get_parameter("0.weight").detach().clone()
    add_adapter(model, Adapter(rank=2, alpha=6, targets=["0"], variant=variant), {}, 0)
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.rand(value.shape, generator=generator) for name, value in adapter_weights(model).items()}
    load_adapter_weights(model, weights, "test")
    layer = lora_layers(model)["0"]
    layer.merge()
    assert torch.allclose(merged(weight, weights, "0", layer.scaling["default"]), layer.get_base_layer().weight, atol=1e-6)


# --- a stage's model --------------------------------------------------------------------------------------------------------------------

EXACTLY = {
    "continue": Handoff(),
    "grow": Handoff(adapter="grow", rank=4),
    "grow with an alpha": Handoff(adapter="grow", rank=4, alpha=2),
    "stack": Handoff(adapter="stack", rank=3),
    "merge": Handoff(adapter="merge"),
}


@pytest.mark.parametrize(("way", "variant"), [(way, variant) for way in EXACTLY for variant in ("lora", "rslora", "dora") if (way, variant) != ("stack", "dora")])
def test_an_exact_handoff_leaves_the_function_as_it_is(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, way: str, variant: str) -> None:
    plan = plan_with(Adapter(rank=2, alpha=6, variant=variant), EXACTLY[way])
    baton = taught(family, plan)
    old = build_model(family, plan, plan.stages[0], "stages[0]", baton)[0]
    new, _, errors = handed(family, plan, 1, baton, tmp_path)
    base = family.load_transformer(torch.float32, None)
    delta = deltas(outputs(family, new, batches), outputs(family, old, batches), outputs(family, base, batches))
    assert max(delta.values()) <= EXACT
    assert not errors
    assert cause_of_change(plan.stages[0], plan.stages[1]) is None


def test_what_another_machine_computed_may_be_rounded_otherwise_but_is_no_other_function(family: Family, batches: dict[str, MicroBatch]) -> None:
    """An adapter that has learnt a thousandth of the outputs: rounding elsewhere is 1e-5 of them, and a hundredth of what was learnt."""
    base = outputs(family, family.load_transformer(torch.float32, None), batches)
    old = {name: value * 1.001 for name, value in base.items()}
    elsewhere = {name: value * (1 + 1e-5) for name, value in old.items()}
    for new, is_exact in ((old, True), (elsewhere, True), (base, False)):
        within = exact_within(new, old, base, same_launch=False)
        assert all(change <= within[t] for t, change in deltas(new, old, base).items()) == is_exact
    assert not any(change <= EXACT for change in deltas(elsewhere, old, base).values())
    assert set(exact_within(elsewhere, old, base, same_launch=True).values()) == {EXACT}
    assert list(exact_within(old, {name: 2 * value for name, value in base.items()}, base, same_launch=False).values()) == pytest.approx([2e-4] * 3)


def test_a_grown_adapters_scale_is_the_old_one_unless_its_alpha_is_given() -> None:
    plan = plan_with(Adapter(rank=2, alpha=6), EXACTLY["grow"], EXACTLY["grow with an alpha"].model_copy(update={"rank": 8}))
    assert [placed_adapters(plan, index)["default"].scale for index in range(3)] == [3, 3, 0.25]


def test_a_shrunk_adapter_says_its_error_and_a_lossless_one_says_none(family: Family, batches: dict[str, MicroBatch], tmp_path: Path) -> None:
    plan = plan_with(Adapter(rank=4), Handoff(adapter="shrink", rank=2))
    baton = taught(family, plan)
    old, base = build_model(family, plan, plan.stages[0], "test", baton)[0], family.load_transformer(torch.float32, None)
    new, _, errors = handed(family, plan, 1, baton, tmp_path)
    delta = max(deltas(outputs(family, new, batches), outputs(family, old, batches), outputs(family, base, batches)).values())
    assert set(errors) == set(lora_layers(new))
    assert 0.05 < min(errors.values()) <= max(errors.values()) < 1
    assert 0.01 < delta < 1
    assert cause_of_change(plan.stages[0], plan.stages[1]) == "the adapter was shrunk"
    assert baton.adapter is not None
    low = {name: torch.cat([value[:2], torch.zeros_like(value[2:])]) if ".lora_A." in name else value for name, value in baton.adapter.items()}
    exact, _, errors = handed(family, plan, 1, replace(baton, adapter=low), tmp_path)
    old = build_model(family, plan, plan.stages[0], "test", replace(baton, adapter=low))[0]
    assert max(errors.values()) < 1e-6
    assert max(deltas(outputs(family, exact, batches), outputs(family, old, batches), outputs(family, base, batches)).values()) <= EXACT


def test_stacked_adapters_are_frozen_shrunk_and_published_as_one(family: Family, batches: dict[str, MicroBatch], tmp_path: Path) -> None:
    """Two stacked on a first, each with an effect; joined by shrinking to the rank that they have together, nothing is lost."""
    plan = plan_with(Adapter(rank=2, alpha=6), Handoff(adapter="stack", rank=3), Handoff(adapter="stack"), Handoff(adapter="shrink", rank=7))
    baton = taught(family, plan, 2)
    assert list(placed_adapters(plan, 2)) == ["default", "stack2", "stack3"]
    model, trainable = build_model(family, plan, plan.stages[2], "test", baton)
    assert all(".stack3." in name for name in trainable)
    assert len(trainable) == 2 * len(lora_layers(model))
    before = outputs(family, model, batches)
    base = outputs(family, family.load_transformer(torch.float32, None), batches)
    one, _, errors = handed(family, plan, 3, baton, tmp_path)
    assert max(errors.values()) < 1e-6
    assert max(deltas(outputs(family, one, batches), before, base).values()) <= EXACT
    until = plan.model_copy(update={"stages": plan.stages[:3]})
    assert baton.adapter is not None
    weights, settings = as_one(until, baton.adapter)
    write_adapter(tmp_path / ADAPTER_FILE, weights, settings, {})
    fresh = family.load_transformer(torch.float32, None)
    family.stock_pipeline(fresh).load_lora_weights(tmp_path, weight_name=ADAPTER_FILE)
    assert max(float((value - before[name]).abs().max()) for name, value in outputs(family, fresh, batches).items()) <= 1e-5


def test_a_merge_into_bf16_is_a_declared_change(family: Family) -> None:
    plan = plan_with(Adapter(rank=2), Handoff(adapter="merge", lossy=True))
    after = plan.stages[1].model_copy(update={"precision": "bf16", "base": "bf16"})
    assert cause_of_change(plan.stages[0].model_copy(update={"precision": "bf16", "base": "bf16"}), after) == "the adapter was merged into a base in bf16"


def test_an_adapter_that_begins_after_a_merge_is_drawn_anew(family: Family, tmp_path: Path) -> None:
    plan = plan_with(Adapter(rank=2), Handoff(adapter="merge"))
    first = adapter_weights(build_model(family, plan, plan.stages[0], "test", Baton(None, None, "test"))[0])
    again = adapter_weights(handed(family, plan, 1, taught(family, plan), tmp_path)[0])
    for name, value in again.items():
        assert torch.equal(value, torch.zeros_like(value)) if ".lora_B." in name else not torch.equal(value, first[name])


@pytest.mark.parametrize(("handoff", "rank"), [(Handoff(adapter="grow"), 8), (Handoff(adapter="shrink"), 2), (Handoff(adapter="stack"), 4), (Handoff(adapter="merge"), 4)])
def test_ranks_that_are_left_out_are_written_out_and_mean_the_same(handoff: Handoff, rank: int) -> None:
    plan = plan_with(Adapter(rank=4, alpha=2), handoff, Handoff())
    resolved = resolved_plan(plan)
    assert resolved.stages[1].handoff.rank == rank
    assert resolved_plan(resolved) == resolved
    for index in range(3):
        assert placed_adapters(resolved, index) == placed_adapters(plan, index)
    assert list(placed_adapters(plan, 2).values())[-1].settings == Adapter(rank=rank, alpha=rank / 2)


def test_a_scale_is_alpha_over_the_rank_and_of_rslora_over_its_root() -> None:
    assert scale_of(Adapter(rank=16)) == 1
    assert scale_of(Adapter(rank=16, alpha=8)) == 0.5
    assert scale_of(Adapter(rank=16, alpha=8, variant="rslora")) == 2
    assert Placed(Adapter(rank=4, alpha=8, variant="dora")).scale == 2


def test_adapters_of_another_expert_stand_on_no_stage_and_are_carried_along() -> None:
    """Each of a model's experts is a transformer of its own."""
    common = {"steps": 1, "resolution": 64, "batch": 1, "lr": 0.1}
    stages = [{**common, "name": f"s{number}", "expert": expert, "train": [name]} for number, (expert, name) in enumerate([("high", "rough"), ("low", "fine"), ("high", "rough")])]
    plan = Plan.model_validate({"model": "x", "sources": {"photos": {"path": "hub/a/b"}}, "adapters": {"rough": {}, "fine": {"rank": 2}}, "stages": stages})
    assert [list(placed_adapters(plan, index)) for index in range(3)] == [["rough"], ["fine"], ["rough"]]
    weights = {f"{name}:{each}": value for name in ("rough", "fine") for each, value in drawn(2).items()}
    for index, name in enumerate(["fine", "rough", "fine"]):
        assert carried(plan, plan.stages[index], weights).keys() == {each for each in weights if each.startswith(f"{name}:")}
    assert cause_of_change(plan.stages[0], plan.stages[1]) == "another transformer, expert high -> low"
    same = plan.model_copy(update={"stages": [stage.model_copy(update={"expert": "high"}) for stage in plan.stages]})
    assert list(placed_adapters(same, 0)) == ["rough", "fine"]
    assert not carried(same, same.stages[0], weights)


def explained(adapter: dict[str, Any], *stages: dict[str, Any]) -> str:
    """What --explain says, without a model, of a plan with these stages."""
    common = {"steps": 1, "resolution": 64, "batch": 1, "lr": 0.1}
    plan = Plan.model_validate({"model": "x", "sources": {"photos": {"path": "hub/a/b"}}, **adapter, "stages": [{**common, "name": f"s{number}", **stage} for number, stage in enumerate(stages)]})
    none = np.empty(0, dtype=np.int32)
    source = Rows("photos", "text_to_image", none.astype(np.uint8), np.empty((0, 2), dtype=np.uint32), (), "", None)  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), width=200)
    show(explain(plan, {"photos": Selection(source, {class_of((64, 64), []): np.arange(9, dtype=np.int32)}, none)}, None), console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_explain_says_in_which_form_the_adapter_is_handed_on_and_what_of_it_trains() -> None:
    ways = [{"handoff": {"adapter": way}, "precision": "fp32"} for way in ("grow", "stack", "shrink", "merge")]
    said = explained({"adapter": {"rank": 4}}, {}, *ways)
    for part in ("grown to rank 8; the function stays", "is frozen, and a fresh one of rank 4 put", "shrunk to rank 6 by SVD", "is folded into the base; a fresh one of rank 4"):
        assert part in said
    said = explained({"adapters": {"cond": {}, "core": {}}}, {}, {"train": ["cond", "core:a.*", "b"]}, ways[3])
    for part in ("the adapters cond and core", "adapter cond and adapter core where a.* matches and every adapter where b matches", "folded into the base; each begins anew"):
        assert part in said


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_dora_is_published_over_any_base_and_with_other_magnitudes_is_not(
    family: Family, batches: dict[str, MicroBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    plan = plan_with(Adapter(rank=2, alpha=6, variant="dora"), precision="bf16" if storage == "bf16" else "fp32")
    baton = taught(family, plan)
    assert baton.adapter is not None
    precision = StagePrecision(plan.stages[0].precision, CPU)
    model = build_model(family, plan, plan.stages[0], "test", baton)[0]
    saw = probe(family, model, batches, precision, plan.seed)

    def publish() -> float:
        assert baton.adapter is not None
        return make_adapter(tmp_path / "adapter", family, plan, [Trained(len(plan.stages) - 1, None, baton.adapter, None, storage, precision, saw)], batches, {}, "card", Path("none"))

    assert publish() <= (1e-5 if storage == "fp32" else 0.1)

    def spoilt(path: Path, weights: Mapping[str, Tensor], *rest: Any) -> None:
        write_adapter(path, {name: value * 1.05 if name.endswith("vector") else value for name, value in weights.items()}, *rest)

    monkeypatch.setattr(stages.layouts, "write_adapter", spoilt)
    with pytest.raises(PublishError, match="not published"):
        publish()


# --- what a plan starts from ------------------------------------------------------------------------------------------------------------


def same(family: Family, batches: Mapping[str, MicroBatch], one: nn.Module, other: nn.Module) -> bool:
    return max(float((value - outputs(family, other, batches)[name]).abs().max()) for name, value in outputs(family, one, batches).items()) <= 1e-5


@pytest.mark.parametrize("layout", ["alpha tensors", "alpha tensors, peft's prefix", "alpha in peft's config", "patterns and rsLoRA in metadata", "nothing", "adapter's name in the keys"])
def test_an_adapter_of_another_trainer_is_a_start_at_its_own_strength(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, layout: str) -> None:
    """Pairs of rank 2 with alpha 6, written as trainers write them; the plan has its own alpha."""
    trained = family.load_transformer(torch.float32, None)
    variant = "rslora" if "rsLoRA" in layout else "lora"
    alpha = 2 if layout == "nothing" else 6
    add_adapter(trained, Adapter(rank=2, alpha=alpha, variant=variant), family.target_patterns, 0)
    generator = torch.Generator().manual_seed(4)
    weights = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in adapter_weights(trained).items()}
    load_adapter_weights(trained, weights, "test")
    layers = layers_of(weights)
    file, metadata = tmp_path / "other.safetensors", {"format": "pt"}
    prefix = "base_model.model." if "peft" in layout else "transformer."
    content = {f"{prefix}{name}": value for name, value in weights.items()}
    if "tensors" in layout:
        content |= {f"{prefix}{layer}.alpha": torch.tensor(6.0) for layer in layers}
    elif "config" in layout:
        file = tmp_path / "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False}))
    elif "patterns" in layout:
        config = {"r": 8, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {layer: 2 for layer in layers}, "alpha_pattern": {f"^{layer}": 6 for layer in layers}}
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    elif "name" in layout:
        content = {name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): value for name, value in content.items()}
        content |= {f"{prefix}{layer}.alpha": torch.tensor([6.0]) for layer in layers}
    save_file(content, file, metadata=metadata)
    place = tmp_path if "config" in layout else file
    plan = plan_with(Adapter(rank=2, alpha=1), Handoff(), start=str(place))
    baton = read_start(plan, "any")
    assert same(family, batches, trained, build_model(family, plan, plan.stages[0], "test", baton)[0])


def test_what_peft_itself_saves_is_a_start(family: Family, batches: dict[str, MicroBatch], tmp_path: Path) -> None:
    wrapped = get_peft_model(family.load_transformer(torch.float32, None), LoraConfig(r=2, lora_alpha=5, target_modules=r"single_transformer_blocks.*\.to_[qk]", init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    plan = plan_with(Adapter(rank=2, targets=[r"single_transformer_blocks\.\d+\.attn\.to_[qk]"]), Handoff(), start=str(tmp_path))
    model, _ = build_model(family, plan, plan.stages[0], "test", read_start(plan, "any"))
    assert same(family, batches, wrapped.base_model.model, model)


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_a_start_of_another_rank_is_grown_or_shrunk_where_the_first_stage_says_so(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, variant: str) -> None:
    old = plan_with(Adapter(rank=4, alpha=2, variant=variant))
    baton = taught(family, old)
    trained = build_model(family, old, old.stages[0], "test", baton)[0]
    assert baton.adapter is not None
    write_adapter(tmp_path / ADAPTER_FILE, baton.adapter, Adapter(rank=4, alpha=2, variant=variant), {})
    for handoff in (Handoff(adapter="grow"), Handoff(adapter="grow", rank=6)):
        plan = plan_with(Adapter(rank=6 if handoff.rank is None else 4, alpha=3, variant=variant), handoff, start=str(tmp_path))
        assert same(family, batches, trained, handed(family, plan, 0, read_start(plan, "any"), tmp_path)[0])
    if variant == "dora":
        return
    plan = plan_with(Adapter(rank=2, alpha=3, variant=variant), Handoff(adapter="shrink"), start=str(tmp_path))
    _, own, errors = handed(family, plan, 0, read_start(plan, "any"), tmp_path)
    assert own.adapter is not None
    assert set(ranks_of(own.adapter).values()) == {2}
    assert 0 < max(errors.values()) < 1
    for handoff, said in ((Handoff(adapter="grow"), "'grow' to rank 2: layer .* has rank 4, which is more than 2; write shrink"), (Handoff(adapter="shrink", rank=8), "'shrink' to rank 8, and layer .* has rank 4; write grow")):
        plan = plan_with(Adapter(rank=2, variant=variant), handoff, start=str(tmp_path))
        with pytest.raises(ValueError, match=said):
            hand_on(family, plan, plan.stages[0], read_start(plan, "any"))


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"transformer.one.lora_down.weight": torch.zeros(2, 3)}, {}, "holds 'transformer.one.lora_down.weight'; what can be read is LAYER.lora_A.weight"),
        ({"transformer.one.lora_A.weight": torch.zeros(2, 3)}, {}, "layer 'one' has no lora_B.weight"),
        ({**drawn(2), "one.lora_magnitude_vector": torch.ones(7)}, {}, "is a DoRA, the plan asks for variant lora; restore the variant"),
        (drawn(2), {"lora_adapter_metadata": "{"}, "its config is not JSON"),
        (drawn(2), {"lora_adapter_metadata": json.dumps({"lora_alpha": "much"})}, "its config cannot be understood"),
        (drawn(2), {"lora_adapter_metadata": json.dumps({"alpha_pattern": {"(": 1}})}, "its config cannot be understood"),
        (drawn(2), {"medley.model": "another"}, "was trained on another model"),
    ],
)
def test_a_file_that_is_no_start_is_refused_with_what_it_holds(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], said: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    with pytest.raises(ValueError, match=said):
        read_start(plan_with(Adapter(rank=2), Handoff(), start=str(tmp_path / "x.safetensors")), "this")


# --- whole runs -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def handing_plan(world: Path) -> dict[str, Any]:
    """Every way of handing on, one after another, with dropout; a step each is saved, so that a kill falls inside a stage."""
    stage = {"steps": 2, "resolution": 8, "batch": {"images": 4, "micro": 2}, "lr": 0.01, "precision": "fp32", "mix": {"photos": 1}}
    ways: dict[str, dict[str, Any]] = {
        "learn": {},
        "grow": {"handoff": {"adapter": "grow"}},
        "stack": {"handoff": {"adapter": "stack", "rank": 1}, "ema": 0.9},
        "shrink": {"handoff": {"adapter": "shrink", "rank": 2}},
        "merge": {"handoff": {"adapter": "merge"}},
        "last": {"handoff": {"adapter": "stack", "optimizer": "reset"}},
    }
    stages = [{**stage, "name": name, **change} for name, change in ways.items()]
    sources = {"photos": plan_of(world)["sources"]["photos"]}
    return plan_of(world, adapter={"rank": 2, "alpha": 4, "dropout": 0.25}, sources=sources, stages=stages, previews={"rows": 0}, evaluate={"rows": 1}, save_every=1)


@pytest.fixture(scope="module")
def run(world: Path) -> tuple[Path, str]:
    """A finished run of every way, and what it printed; not to be written into."""
    return world / "ways", carry_out(world / "ways", handing_plan(world))


def last_adapter(folder: Path, stage: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(sorted((folder / "stages" / stage).glob("step-*"))[-1] / "adapter.safetensors")
    return tensors


def test_a_run_says_of_every_handoff_how_much_the_function_changed(run: tuple[Path, str]) -> None:
    folder, printed = run
    found = {line["to"]: line for line in events(folder, "handoff")}
    assert list(found) == ["grow", "stack", "shrink", "merge", "last"]
    for name, line in found.items():
        assert line["exact"] is (name != "shrink")
        assert name == "shrink" or max(line["delta"].values()) <= EXACT
    assert found["shrink"]["cause"] == "the adapter was shrunk"
    assert 0 < found["shrink"]["error"]["mean"] <= found["shrink"]["error"]["worst"] < 1
    assert found["shrink"]["error"]["worst"] == max(found["shrink"]["errors"].values())
    assert "shrunk to rank 2: a layer's product changed by" in printed
    assert found["merge"]["kept"] == ["the adapter, folded into the base, and a fresh one of rank 2"]


def test_a_stacked_on_adapter_stays_byte_for_byte_and_the_fresh_one_learns(run: tuple[Path, str]) -> None:
    folder = run[0]
    before, after = last_adapter(folder, "2-grow"), last_adapter(folder, "3-stack")
    assert {name: value.numpy().tobytes() for name, value in before.items()} == {name: value.numpy().tobytes() for name, value in after.items() if ":" not in name}
    fresh = {name: value for name, value in after.items() if name.startswith("stack2:")}
    assert len(fresh) == len(before)
    assert all(value.any() for value in fresh.values())


def test_a_merge_leaves_a_base_of_its_own_that_is_published(run: tuple[Path, str], world: Path) -> None:
    folder = run[0]
    original = load_file(world / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(folder / "stages" / "5-merge" / "base" / "step-000000" / "transformer.safetensors")
    published = load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    adapted = {f"{layer}.weight" for layer in layers_of(last_adapter(folder, "4-shrink"))}
    assert {name for name in base if not torch.equal(base[name], original[name])} == adapted
    assert all(torch.equal(published[name], value) for name, value in base.items())


def test_a_stacks_published_files_are_all_as_one_and_each_alone(run: tuple[Path, str]) -> None:
    folder = run[0]
    assert {path.name for path in (folder / "adapter").glob("*.safetensors")} == {ADAPTER_FILE, "default.safetensors", "stack2.safetensors"}
    one, *parts = (load_file(folder / "adapter" / name) for name in (ADAPTER_FILE, "default.safetensors", "stack2.safetensors"))
    for layer in layers_of(one):
        assert torch.allclose(product(one, layer), product(parts[0], layer) + product(parts[1], layer), atol=1e-7)
    (line,) = events(folder, "publish")
    assert line["max_difference"] <= 1e-5


def test_a_damaged_merged_base_is_named_and_not_gone_on_from(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = copy_run(run[0], tmp_path / "run")
    checkpoint = read_checkpoint(folder / "stages" / "6-last" / "step-000002")
    base = read_baton(checkpoint).base
    assert base == folder / "stages" / "5-merge" / "base" / "step-000000" / "transformer.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"!")
    with pytest.raises(PlanError, match=r"transformer.safetensors is not what was written .*; restore it, or delete .*5-merge and what comes after it"):
        read_baton(checkpoint)


@pytest.mark.launch
def test_a_run_that_is_killed_in_the_middle_of_every_stage_ends_in_the_same_bytes(run: tuple[Path, str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed (kill -9) after the first step of each stage, and gone on with."""
    save = save_leg.save_leg

    def save_and_die(leg: Leg, *, finished: bool = False, probed: dict[str, Tensor] | None = None) -> None:
        save(leg, finished=finished, probed=probed)
        if not finished:
            os.kill(os.getpid(), signal.SIGKILL)

    folder, killed = run[0], tmp_path / "killed"
    file = write_plan(tmp_path / "plan.yaml", handing_plan(world))
    with monkeypatch.context() as patch:
        patch.setattr(save_leg, "save_leg", save_and_die)  # the loop takes it from there
        for number in range(1, 7):
            assert launch([str(file), "--out", str(killed)]) == [-signal.SIGKILL]
            assert [path.name for path in killed.glob(f"stages/{number}-*/step-*")] == ["step-000001"]
    carry_out(killed, handing_plan(world))
    assert adapter_bytes(killed) == adapter_bytes(folder)
    for stage in ("2-grow", "4-shrink", "5-merge"):
        assert (killed / "stages" / stage / "step-000002" / "adapter.safetensors").read_bytes() == (folder / "stages" / stage / "step-000002" / "adapter.safetensors").read_bytes()


# --- several adapters in a run ----------------------------------------------------------------------------------------------------------


def named_plan(world: Path, **changes: Any) -> dict[str, Any]:
    """Two adapters with dropout, over a base in bf16: first one learns, then the other, then a part of each, from what both have learnt."""
    stage = {"steps": 2, "resolution": 8, "batch": {"images": 4, "micro": 2}, "lr": 0.01, "precision": "bf16"}
    trains: dict[str, list[str]] = {"first": ["cond"], "second": ["core"], "third": [r"cond:.*\.to_q", r"core:.*\.to_k"]}
    adapters = {"cond": {"rank": 2, "alpha": 4, "targets": "attention", "dropout": 0.3}, "core": {"rank": 3, "dropout": 0.1, "variant": "rslora"}}
    stages = [{**stage, "name": name, "train": train, "handoff": {"optimizer": "keep" if name == "third" else "reset"}} for name, train in trains.items()]
    del stages[0]["handoff"], stages[2]["handoff"]
    plan = plan_of(world, adapters=adapters, stages=stages, previews={"rows": 0}, evaluate={"rows": 1}, save_every=1)
    del plan["adapter"]
    return {**plan, **changes}


@pytest.fixture(scope="module")
def named(world: Path) -> Path:
    """A finished run of two adapters; not to be written into."""
    carry_out(world / "named", named_plan(world))
    return world / "named"


def test_of_several_adapters_those_that_a_stage_does_not_name_stay_byte_for_byte(named: Path) -> None:
    ends = [last_adapter(named, stage) for stage in ("1-first", "2-second", "3-third")]
    assert not any(value.any() for name, value in ends[0].items() if name.startswith("core:") and ".lora_B." in name)
    for before, after, trained in ((ends[0], ends[1], r"core:.*"), (ends[1], ends[2], r"cond:.*\.to_q\..*|core:.*\.to_k\..*")):
        changed = {name for name, value in after.items() if value.numpy().tobytes() != before[name].numpy().tobytes()}
        assert changed == {name for name in after if re.fullmatch(trained, name)}


def test_several_adapters_are_published_as_one_and_each_alone(named: Path, family: Family) -> None:
    one, cond, core = (load_file(named / "adapter" / name) for name in (ADAPTER_FILE, "cond.safetensors", "core.safetensors"))
    assert set(ranks_of(one).values()) == {3, 5}
    for layer in layers_of(one):
        parts = [product(part, layer) for part in (cond, core) if f"{layer}.lora_A.weight" in part]
        assert torch.allclose(product(one, layer), sum(parts[1:], parts[0]), atol=1e-7)
    assert "A LoRA of rank 5 for" in (named / "adapter" / "README.md").read_text()
    fresh = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(fresh)
    for name in ("cond", "core"):
        pipe.load_lora_weights(named / "adapter", weight_name=f"{name}.safetensors", adapter_name=name)
    assert {name for layer in lora_layers(fresh).values() for name in layer.lora_A} == {"cond", "core"}


@pytest.mark.launch
def test_dropout_makes_another_run_and_resuming_and_two_processes_make_the_same(named: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first step and gone on with, bit for bit; with two processes to rounding; without dropout not at all."""
    plan = named_plan(world)
    file = write_plan(tmp_path / "plan.yaml", plan)
    save = save_leg.save_leg

    def save_and_die(leg: Leg, *, finished: bool = False, probed: dict[str, Tensor] | None = None) -> None:
        save(leg, finished=finished, probed=probed)
        if leg.index == 2 and not finished:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(save_leg, "save_leg", save_and_die)  # the loop takes it from there
        assert launch([str(file), "--out", str(tmp_path / "killed")]) == [-signal.SIGKILL]
    carry_out(tmp_path / "killed", plan)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(named)
    first = {**plan, "stages": [{**plan["stages"][0], "precision": "fp32"}]}
    carry_out(tmp_path / "two", first, processes=2)
    carry_out(tmp_path / "one", first)
    carry_out(tmp_path / "whole", {**first, "adapters": {**plan["adapters"], "cond": {**plan["adapters"]["cond"], "dropout": 0.0}}})
    two, one, whole = (last_adapter(tmp_path / name, "1-first") for name in ("two", "one", "whole"))
    assert all(torch.allclose(value, two[name], atol=1e-5) for name, value in one.items())
    assert not all(torch.allclose(value, whole[name], atol=1e-4) for name, value in one.items())


def branch(named: Path, world: Path, **changes: Any) -> Plan:
    """A plan of one stage that begins from the run of two adapters."""
    stage = {"name": "more", "steps": 1, "resolution": 8, "batch": 4, "lr": 0.0, "precision": "fp32", "handoff": changes.pop("handoff", {})}
    return Plan.model_validate({"model": str(world / "model"), "sources": plan_of(world)["sources"], "stages": [stage], "start": str(named), **changes})


def test_a_branch_takes_over_several_adapters_by_name_at_its_own_scales(named: Path, world: Path) -> None:
    fingerprint = read_checkpoint(named / "stages" / "3-third" / "step-000002").state["plan"]["fingerprint"]
    cond, core = {"rank": 2, "targets": "attention"}, {"rank": 3, "variant": "rslora"}
    found = read_start(branch(named, world, adapters={"cond": cond, "core": core}), fingerprint).adapter
    assert found is not None
    ended = last_adapter(named, "3-third")
    assert found.keys() == ended.keys()
    for name, value in ended.items():
        assert torch.allclose(found[name], value * (2 if name.startswith("cond:") and ".lora_B." in name else 1))
    for adapters, said in (
        ({"cond": cond}, r"has an adapter 'core', which the plan has not \(adapters: cond\); add it"),
        ({"cond": {**cond, "rank": 4}, "core": core}, "adapter 'cond' of .* has rank 2, the plan asks for 4; restore the rank$"),
    ):
        with pytest.raises(ValueError, match=said):
            read_start(branch(named, world, adapters=adapters), fingerprint)
    with pytest.raises(ValueError, match=r"brings one adapter without a name, and the plan names its adapters \(cond\)"):
        read_start(branch(named / "adapter", world, adapters={"cond": cond}), fingerprint)


def test_a_branch_with_one_adapter_takes_over_several_as_one(named: Path, world: Path, family: Family) -> None:
    fingerprint = read_checkpoint(named / "stages" / "3-third" / "step-000002").state["plan"]["fingerprint"]
    plan = branch(named, world, adapter={"rank": 2}, handoff={"adapter": "shrink"})
    baton = read_start(plan, fingerprint)
    ended = last_adapter(named, "3-third")
    assert baton.adapter is not None
    for layer in layers_of(baton.adapter):
        parts = [scale * product(ended, f"{name}:{layer}") for name, scale in (("cond", 2.0), ("core", 3**0.5)) if f"{name}:{layer}.lora_A.weight" in ended]
        assert torch.allclose(product(baton.adapter, layer), sum(parts[1:], parts[0]), atol=1e-7)
    shrunken = hand_on(family, plan, plan.stages[0], baton)
    assert shrunken.baton.adapter is not None
    assert set(ranks_of(shrunken.baton.adapter).values()) == {2}
    with pytest.raises(ValueError, match="has rank 5, the plan asks for 2; restore the rank, or let the first stage change it: handoff"):
        read_start(branch(named, world, adapter={"rank": 2}), fingerprint)


@pytest.mark.launch
def test_a_run_from_a_larger_adapter_says_what_shrinking_it_cost(run: tuple[Path, str], world: Path, tmp_path: Path) -> None:
    plan = handing_plan(world)
    begun = {**plan, "model": str(run[0] / "model"), "start": str(run[0] / "adapter"), "adapter": {"rank": 1}, "stages": [{**plan["stages"][0], "steps": 1, "handoff": {"adapter": "shrink"}}]}
    assert "shrunk to rank 1: a layer's product changed by" in carry_out(tmp_path / "run", begun)
    (line,) = events(tmp_path / "run", "handoff")
    assert line["cause"] == "the adapter was shrunk"
    assert set(ranks_of(last_adapter(tmp_path / "run", "1-learn")).values()) == {1}
    assert "has rank" not in carry_out(tmp_path / "run", begun), "the finished run is answered"

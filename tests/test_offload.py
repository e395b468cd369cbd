"""Offload: a base that is kept on the CPU gives the same numbers to the bit, stays where it was put, and leaves nothing of itself on the device."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from families import noise
from models import tiny_flux
from runs import adapter_bytes, carry_out, events, make_data, plan_of, write_plan
from stages.adapter import add_adapter, choose_trainable, lora_layers, without_input_casts
from stages.check import check_plan
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image
from stages.handoff import cause_of_change
from stages.offload import OffloadedLinear, leave_out_of_ddp, off_device_bytes
from stages.plan import Adapter, Checkpointing, Quantised, Stage
from stages.reader import read_plan
from stages.recomputation import recompute
from stages.storage import Stored, block_layers, keep_off, load_stored

CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = {"flux": flux, "flux2": flux2, "lumina2": lumina2, "omnigen": omnigen, "pixart": pixart, "qwen_image": qwen_image, "sana": sana, "sd3": sd3, "wan": wan, "z_image": z_image}


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny model of each family."""
    return open_family(str(MODELS[request.param].build(tmp_path_factory.mktemp(request.param) / "model")), CPU)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Flux in pixel space."""
    return open_family(str(tiny_flux(tmp_path_factory.mktemp("one") / "model", pixels=True)), CPU)


class Sent:
    """What a `Counting` lane has copied."""

    def __init__(self, tensors: list[Tensor], lane: Counting) -> None:
        self.tensors, self.lane = tensors, lane

    def wait(self) -> list[Tensor]:
        self.lane.waited += 1
        return self.tensors


class Counting:
    """A lane that copies, as one to another device would, and counts."""

    def __init__(self, early: bool) -> None:
        self.sets_out_early = early
        self.sent = self.waited = 0
        self.copies: list[weakref.ref[Any]] = []

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        self.sent += 1
        copies = [tensor.detach().clone() for tensor in tensors]
        self.copies += [weakref.ref(copied.untyped_storage()) for copied in copies]
        return Sent(copies, self)

    @property
    def alive(self) -> int:
        """Copied tensors that something holds still."""
        return sum(reference() is not None for reference in self.copies)


def with_pairs(model: nn.Module, family: Family, variant: str = "lora") -> nn.Module:
    """The model with an adapter that counts."""
    add_adapter(model, Adapter(rank=2, targets="linear", variant=variant), family.target_patterns, 0)  # type: ignore[arg-type]
    for number, layer in enumerate(lora_layers(model).values()):
        with torch.no_grad():
            up = layer.lora_B["default"].weight
            up.copy_(0.3 * noise(*up.shape, seed=number))
    return model


def offloaded(family: Family, dtype: torch.dtype, blocks: Quantised | None, lane: Counting | None = None) -> nn.Module:
    """A transformer that is kept off the device, by a lane of the test's own."""
    return keep_off(family.load_transformer(dtype, None), blocks, CPU, lane)


def inputs(family: Family) -> tuple[Any, ...]:
    """Two images, their noise levels and prompts."""
    side, small = 4 * family.pixel_multiple, 2 * family.pixel_multiple
    channels = family.encode_images(torch.zeros(1, 3, small, small)).shape[1]
    x = noise(2, channels, side // family.factor, side // family.factor)
    return x, torch.tensor([0.3, 0.6]), family.encode_prompts(["a red disc", "a blue square"])


def gradients(family: Family, model: nn.Module, precision: torch.dtype | None, asked: Checkpointing = "none") -> dict[str, Tensor]:
    """Of an adapter, and the output they were taken of."""
    weights = choose_trainable(model.train(), "adapter", "test")
    if precision is not None:
        without_input_casts(model)
    recompute(model, asked, CPU)
    with torch.autocast("cpu", dtype=precision) if precision else nullcontext():
        predicted = family.predict(model, *inputs(family))
    predicted.square().mean().backward()
    return {"": predicted.detach()} | {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_every_family_learns_the_same_to_the_bit_from_a_base_that_is_kept_off_the_device(family: Family, precision: torch.dtype | None) -> None:
    lane = Counting(early=True)
    dtype = precision or torch.float32
    plain = gradients(family, with_pairs(family.load_transformer(dtype, None), family), precision)
    assert len(plain) > 1
    assert same(plain, gradients(family, with_pairs(offloaded(family, dtype, None, lane), family), precision))
    assert lane.sent > 0


@pytest.mark.parametrize("blocks", [None, "nf4", "int8"])
@pytest.mark.parametrize("asked", ["none", "full"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_over_every_storage_in_every_precision_with_blocks_computed_again_the_bits_are_the_same(one: Family, blocks: Quantised | None, asked: Checkpointing, precision: torch.dtype | None) -> None:
    dtype = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
    plain = gradients(one, with_pairs(load_stored(one, Stored(dtype, blocks), None), one), precision, asked)
    assert same(plain, gradients(one, with_pairs(offloaded(one, dtype, blocks, Counting(early=True)), one), precision, asked))
    assert same(plain, gradients(one, with_pairs(load_stored(one, Stored(dtype, blocks, True), None), one), precision, asked))


def test_a_dora_reads_the_rows_of_a_base_that_is_kept_off_the_device(one: Family) -> None:
    plain = gradients(one, with_pairs(one.load_transformer(torch.float32, None), one, "dora"), None)
    assert any("magnitude" in name for name in plain)
    assert same(plain, gradients(one, with_pairs(offloaded(one, torch.float32, None, Counting(early=False)), one, "dora"), None))


@pytest.mark.parametrize("blocks", [None, "nf4", "int8"])
def test_nothing_of_the_base_is_kept_between_the_passes_nor_after_them(one: Family, blocks: Quantised | None) -> None:
    lane = Counting(early=True)
    model = with_pairs(offloaded(one, torch.float32, blocks, lane), one).train()
    choose_trainable(model, "adapter", "test")
    for _ in range(2):
        loss = one.predict(model, *inputs(one)).square().mean()
        assert lane.alive <= 2, "but for the layer that sets out early, with its scale"
        loss.backward()
        assert lane.alive <= 2
    assert lane.waited == lane.sent or lane.waited == lane.sent - 1


@pytest.mark.parametrize("asked", ["none", "full"])
def test_the_order_of_layers_is_learnt_in_the_first_pass_and_hardly_a_copy_is_in_vain(one: Family, asked: Checkpointing) -> None:
    lane, exact = Counting(early=True), Counting(early=False)
    models = [with_pairs(offloaded(one, torch.float32, None, each), one) for each in (lane, exact)]
    for model in models:
        gradients(one, model, None, asked)
    first, needed = lane.sent, exact.sent
    assert first >= needed
    for model in models:
        gradients(one, model, None, asked)
    assert exact.sent == 2 * needed
    assert lane.sent - first <= needed + 3
    assert len(block_layers(models[0])) <= needed / (3 if asked == "full" else 2) + 3  # the first block's products may need no gradient of their input


def test_the_weights_stay_on_the_cpu_while_the_model_and_its_adapter_are_on_another_device(one: Family) -> None:
    whole = one.load_transformer(torch.float32, None)
    size = sum(layer.weight.nbytes for layer in block_layers(whole).values())
    model = with_pairs(keep_off(whole, None, META), one).to(META)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, OffloadedLinear)}
    assert layers.keys() == block_layers(model).keys()
    assert off_device_bytes(model) == size
    kept = {f"{name}.weight" for name in layers}
    assert {name for name, parameter in model.named_parameters() if parameter.device == CPU} == kept
    weights = choose_trainable(model, "adapter", "test")
    assert {parameter.device for parameter in weights.values()} == {META}
    block = next(iter(model.transformer_blocks.children())).ff.net[0].proj  # type: ignore[union-attr, operator]
    x = torch.zeros(2, 3, block.in_features, device=META, requires_grad=True)
    (made := block(x)).sum().backward()
    assert made.device == x.grad.device == META  # type: ignore[union-attr]
    assert {name for name, parameter in model.named_parameters() if parameter.device == CPU} == kept


def test_weights_are_counted_and_named_as_if_they_were_on_the_device(one: Family) -> None:
    plain = with_pairs(one.load_transformer(torch.float32, None), one).state_dict()
    kept = with_pairs(offloaded(one, torch.float32, None), one).state_dict()
    assert set(plain) == set(kept)
    assert all(torch.equal(value, kept[name]) for name, value in plain.items())


def test_ddp_overlooks_what_is_kept_off_the_device_and_nothing_else(one: Family) -> None:
    model = with_pairs(offloaded(one, torch.float32, None), one)
    choose_trainable(model, "adapter", "test")
    leave_out_of_ddp(model)
    overlooked = set(model._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]
    assert overlooked == {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, OffloadedLinear)}
    plain = copy.deepcopy(one.load_transformer(torch.float32, None))
    leave_out_of_ddp(plain)
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore")
    assert hasattr(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")


def test_offload_is_no_cause_of_a_change() -> None:
    stage = Stage.model_validate({"name": "a", "steps": 1, "resolution": 8, "batch": 1, "lr": 1e-4})
    assert cause_of_change(stage, stage.model_copy(update={"offload": True})) is None


@pytest.mark.parametrize(("changes", "said"), [({"train": "full"}, "train: full changes them"), ({"precision": "fp8"}, "weights that come to the device for each product")])
def test_what_cannot_be_kept_off_the_device_is_refused_before_anything_is_loaded(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    make_data(tmp_path / "data")
    tiny_flux(tmp_path / "model", pixels=True)
    stage = {"name": "only", "steps": 2, "resolution": 8, "batch": 4, "lr": 0.01, "offload": True}
    for asked, problems in (({**stage, **changes}, 1), (stage, 0)):
        read = read_plan(write_plan(tmp_path / "plan.yaml", plan_of(tmp_path, stages=[asked])))
        found = [str(problem) for problem in check_plan(read, tmp_path) if "offload" in str(problem)]
        assert len(found) == problems
        assert all(said in each for each in found)


# --- runs -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_run_with_the_base_off_the_device_is_the_run_without_and_goes_on_either_way(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    tiny_flux(tmp_path / "model", pixels=True)
    stage = {"steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "bf16"}

    def plan(*of: bool) -> dict[str, Any]:
        stages = [{**stage, "name": f"stage{number}", "base": base, **({"offload": True} if asked else {})} for number, (asked, base) in enumerate(zip(of, ("bf16", "nf4"), strict=True))]
        return plan_of(tmp_path, stages=stages, adapter={"rank": 2}, previews={"rows": 1, "steps": 1})

    carry_out(tmp_path / "plain", plan(False, False))
    carry_out(tmp_path / "kept", plan(False, True), "--until", "stage0")
    printed = carry_out(tmp_path / "kept", plan(True, True))
    assert "of the base's weights are kept on the CPU" in printed
    assert [line["off_device_bytes"] > 0 for line in events(tmp_path / "kept", "stage") if line["state"] == "start"] == [False, True]
    one, other = (load_file(next(tmp_path.glob(f"{name}/stages/2-stage1/step-*/adapter.safetensors"))) for name in ("plain", "kept"))
    assert same(one, other)
    losses = [[line["sources"] for line in events(tmp_path / name, "eval")] for name in ("plain", "kept")]
    assert losses[0] == losses[1]
    carry_out(tmp_path / "two", plan(True, True), processes=2)
    assert adapter_bytes(tmp_path / "two")

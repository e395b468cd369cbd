"""What a base in nf4 or int8 computes, keeps and weighs; that adapters learn over it, go from one storage to the next, and are published as training saw them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from torch import Tensor, nn

from models import tiny_flux
from runs import adapter_bytes, carry_out, events, make_world, plan_of
from stages.adapter import add_adapter, choose_trainable
from stages.explain import ModelFacts, stage_bytes
from stages.families.family import Family
from stages.families.flux import Flux
from stages.families.open import open_family
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image
from stages.feed import Sizes
from stages.handoff import cause_of_change
from stages.plan import Adapter, Plan, Quantised, Stage
from stages.precision import Multiplied, StagePrecision
from stages.prior import make_prior, prior_folder
from stages.resolved import plain_storage, quantised, resolved_storage
from stages.storage import QuantisedLinear, Stored, block_layers, left_plain, load_stored, quantise, stored, stored_bytes

CPU = torch.device("cpu")
BLOCKS: tuple[Quantised, ...] = ("nf4", "int8")
BUILT: Mapping[str, Callable[[Path], Path]] = {
    each.__name__.rpartition(".")[2]: each.build for each in (flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image)
}
# The linear layers of each family that stay as they are, besides `EMBEDDERS`.
OUTSIDE = {
    "flux": {"context_embedder", "x_embedder", "norm_out.linear", "proj_out"},
    "flux2": {"double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear", "x_embedder", "context_embedder", "norm_out.linear", "proj_out"},
    "lumina2": {"x_embedder", "norm_out.linear_1", "norm_out.linear_2"},
    "omnigen": {"norm_out.linear", "proj_out"},
    "pixart": {"adaln_single.linear", "proj_out"},
    "qwen_image": {"img_in", "txt_in", "norm_out.linear", "proj_out"},
    "sana": {"time_embed.linear", "proj_out"},
    "sd3": {"context_embedder", "norm_out.linear", "proj_out"},
    "wan": {"condition_embedder.time_proj", "proj_out"},
    "z_image": {"all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1", "cap_embedder.1"},
}
EMBEDDERS = ("timestep_embedder", "text_embedder", "guidance_embedder", "time_embedder", "caption_embedder", "caption_projection", "t_embedder", "time_token")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(storage: Quantised, *, inputs: int = 96, outputs: int = 40, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantisedLinear]:
    """A plain layer and the quantised one that is made from it."""
    plain = nn.Linear(inputs, outputs)
    with torch.no_grad():
        plain.weight.copy_(random(outputs, inputs) / 10)
        assert plain.bias is not None
        plain.bias.copy_(random(outputs, seed=1))
    plain = plain.to(dtype)
    return plain, QuantisedLinear(plain, storage, CPU)


def family_of(name: str, folder: Path) -> Family:
    return open_family(str(BUILT[name](folder / name)), CPU)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


def predict(family: Family, model: nn.Module) -> Tensor:
    """What a transformer predicts on noise."""
    side = max(2 * family.pixel_multiple, 16)
    shape = family.encode_images(torch.zeros(1, 3, side, side)).shape
    return family.predict(model, random(*shape), torch.tensor([0.6]), family.encode_prompts(["a red disc"]))


# --- a layer ----------------------------------------------------------------------------------------------------------------------------


def test_nf4_weights_are_those_of_bitsandbytes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plain, layer = layer_of("nf4", inputs=128, dtype=dtype)
        assert torch.equal(layer.whole(dtype), dequantize_4bit(*quantize_4bit(plain.weight.detach(), quant_type="nf4")))


def test_nf4_weights_are_the_nearest_that_the_paper_has() -> None:
    """Against float64: sixteen values, of which 0 and the ends are exact, times the largest of 64 numbers."""
    plain, layer = layer_of("nf4")  # its rows are one and a half blocks long
    blocks = plain.weight.detach().double().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = quantize_4bit(torch.ones(64), quant_type="nf4")[1].code.double()
    assert (len(values), float(values.min()), float(values.max())) == (16, -1, 1)
    assert 0 in values
    nearest = values[(blocks / largest).unsqueeze(-1).sub(values).abs().argmin(dim=-1)] * largest
    assert torch.allclose(layer.whole(torch.float32).double().view(-1, 64), nearest, atol=1e-6)


def test_int8_weights_are_off_by_at_most_half_of_a_127th_of_their_rows_largest() -> None:
    plain, layer = layer_of("int8")
    weight = plain.weight.detach().double()
    off = (layer.whole(torch.float32).double() - weight).abs()
    allowed = weight.abs().amax(dim=1, keepdim=True) / 127 * (0.5 + 127 * 2**-9)  # the scale is rounded to bf16, which tells at the ends
    assert bool((off <= allowed).all())
    assert torch.equal(layer.whole(torch.bfloat16), layer.whole(torch.float32).bfloat16()), "made anew in bf16 it is rounded once"


def test_int8_keeps_rows_of_zeros() -> None:
    plain = nn.Linear(8, 3)
    nn.init.zeros_(plain.weight)
    layer = QuantisedLinear(plain, "int8", CPU)
    assert torch.equal(layer.whole(torch.float32), plain.weight.detach())
    assert torch.equal(layer.whole(torch.float16), plain.weight.detach().half())


@pytest.mark.parametrize("storage", BLOCKS)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_product_and_gradient_are_those_of_a_plain_layer_with_the_weight_that_is_stood_for(storage: Quantised, mode: str) -> None:
    precision = StagePrecision(mode, CPU)
    plain, layer = layer_of(storage)
    with torch.no_grad():
        plain.weight.copy_(layer.whole(torch.float32))
    found = []
    for each in (plain, layer):
        x = random(2, 5, 96, seed=3).requires_grad_()
        with precision.autocast():
            output = each.requires_grad_(False)(x)
        output.square().sum().backward()
        found.append((output.detach(), x.grad))
    (one, one_gradient), (other, other_gradient) = found
    assert one.dtype == other.dtype == precision.dtype
    assert torch.equal(one, other)
    assert one_gradient is not None
    assert other_gradient is not None
    assert torch.equal(one_gradient, other_gradient)


@pytest.mark.parametrize("storage", BLOCKS)
def test_one_layer_multiplies_in_whatever_the_stage_computes_in_and_in_evaluation_as_in_training(storage: Quantised) -> None:
    """The layers of bitsandbytes keep the dtype of their first product, and its Linear8bitLt is another function in evaluation (0.50.2)."""
    _, layer = layer_of(storage)
    x, kept = random(7, 96), [value.clone() for value in (layer.weight, layer.scale, layer.bias)]
    for mode in ("bf16", "fp32", "fp16", "bf16"):
        precision = StagePrecision(mode, CPU)
        with Multiplied() as watch, precision.autocast():
            trained = layer.train()(x.requires_grad_())
        with Multiplied() as backwards:
            trained.sum().backward()
        with precision.autocast(), torch.no_grad():
            assert torch.equal(layer.eval()(x), trained)
        assert watch.verdict() == backwards.verdict() == mode
        assert trained.dtype == precision.dtype
    assert all(torch.equal(now, then) for now, then in zip((layer.weight, layer.scale, layer.bias), kept, strict=True))


@pytest.mark.parametrize("storage", BLOCKS)
def test_no_whole_weight_is_kept_for_the_backward_pass(storage: Quantised) -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    plain, layer = layer_of(storage)
    for each, keeps in ((plain.requires_grad_(False), True), (layer, False)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            each(random(2, 96).requires_grad_())
        assert (40 * 96 in saved) is keeps


def test_dequantising_several_rows_at_once_still_takes_the_wrong_scales_on_a_cpu() -> None:
    """Once this fails, `QuantisedLinear.whole` need not make one row of them (bitsandbytes 0.50.2)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("the fault is in the code that bitsandbytes has for AVX-512")
    plain, layer = layer_of("nf4")
    assert not torch.allclose(dequantize_4bit(*quantize_4bit(plain.weight.detach(), quant_type="nf4")), layer.whole(torch.float32), atol=1e-3)


# --- a transformer ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT)
def test_every_family_trains_an_adapter_over_quantised_blocks_in_the_stages_precision(name: str, tmp_path: Path) -> None:
    family = family_of(name, tmp_path)
    plain = family.load_transformer(torch.bfloat16, None)
    linear = {each for each, module in plain.named_modules() if isinstance(module, nn.Linear)}
    layers = set(block_layers(plain))
    assert {each for each in linear - layers if not any(word in each for word in EMBEDDERS)} == {each for each in OUTSIDE[name] if not any(word in each for word in EMBEDDERS)}
    precision = StagePrecision("bf16", CPU)
    with precision.autocast(), torch.no_grad():
        reference = predict(family, plain)
    apart = {}
    for storage in BLOCKS:
        model = load_stored(family, Stored(torch.bfloat16, storage), None)
        assert {each for each, module in model.named_modules() if isinstance(module, QuantisedLinear)} == layers
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with precision.autocast(), torch.no_grad():
            before = predict(family, model)
        add_adapter(model, Adapter(rank=2, targets="linear"), family.target_patterns, 0)
        trainable = choose_trainable(model, "adapter", "test")
        with Multiplied() as watch, precision.autocast():
            output = predict(family, model.train())
        output.square().mean().backward()
        assert torch.equal(output.detach(), before), "a fresh adapter leaves the function as it is"
        assert watch.verdict() == "bf16"
        ups = [parameter for each, parameter in trainable.items() if ".lora_B." in each]
        assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
        reached = [parameter.grad is not None and bool(parameter.grad.abs().max() > 0) for parameter in ups]
        assert sum(reached) >= len(reached) - 8, "layers that nothing reads have none"
        assert bool(output.isfinite().all())
        apart[storage] = float((before - reference).norm() / reference.norm())
    assert 0 < apart["int8"] < 0.06, apart
    assert apart["int8"] < apart["nf4"] < 0.5, apart


def test_what_is_not_in_the_blocks_stays_bit_for_bit(family: Family) -> None:
    plain, model = family.load_transformer(torch.bfloat16, None).state_dict(), load_stored(family, Stored(torch.bfloat16, "nf4"), None)
    changed = {f"{name}.weight" for name in block_layers(model)}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.items() if name not in changed)


@pytest.mark.parametrize("storage", BLOCKS)
def test_the_same_weights_give_the_same_bits_and_adapters_may_stand_there_already(family: Family, storage: Quantised) -> None:
    first = load_stored(family, Stored(torch.bfloat16, storage), None)
    later = family.load_transformer(torch.bfloat16, None)
    settings = Adapter(rank=2, targets="linear")
    add_adapter(first, settings, family.target_patterns, 0)
    add_adapter(later, settings, family.target_patterns, 0)
    quantise(later, storage, CPU)
    for (name, one), (other_name, other) in zip(first.state_dict().items(), later.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)


@pytest.mark.parametrize("storage", ["fp32", "bf16", *BLOCKS])
def test_bytes_that_are_said_are_those_that_are_held(family: Family, storage: str) -> None:
    plain, model = family.load_transformer(torch.float32, None), load_stored(family, stored(stage_of(base=storage)), None)
    held = sum(value.numel() * value.element_size() for value in model.parameters())
    assert stored_bytes(plain)[storage] == held  # type: ignore[index]
    facts = ModelFacts("flux", 1, stored_bytes(plain), (0,), Sizes(16, 8), left_plain(plain))
    assert stage_bytes(0, stage_of(base=storage), facts) == held
    if storage in BLOCKS:
        model = load_stored(family, stored(stage_of(base=storage, precision="fp32")), None)
        assert stage_bytes(0, stage_of(base=storage, precision="fp32"), facts) == sum(value.numel() * value.element_size() for value in model.parameters())


def stage_of(**fields: object) -> Stage:
    return Stage.model_validate({"name": "a", "steps": 100, "resolution": 16, "batch": 4, "lr": 1e-4, **fields})


def test_beside_quantised_blocks_weights_are_stored_as_if_nothing_were_said() -> None:
    for precision, plain in (("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")):
        for base in BLOCKS:
            stage = stage_of(precision=precision, base=base)
            assert (resolved_storage(stage), quantised(stage), plain_storage(stage)) == (base, base, plain)
        assert (resolved_storage(stage_of(precision=precision)), quantised(stage_of(precision=precision))) == (plain, None)
    assert cause_of_change(stage_of(base="bf16"), stage_of(base="nf4")) == "base stored in bf16 -> nf4"
    assert cause_of_change(stage_of(base="nf4"), stage_of(base="nf4")) is None


def test_prior_images_are_made_over_the_storage_of_the_first_stage_that_draws_them(family: Family, tmp_path: Path) -> None:
    made = {}
    for base in ("bf16", "fp32", "nf4"):
        stage = {"name": "a", "steps": 1, "resolution": 8, "batch": 1, "lr": 1e-4, "base": base}
        source = {"prior": {"prompts": ["a red disc"], "count": 1, "steps": 1}}
        plan = Plan.model_validate({"name": base, "model": family.repo, "sources": {"prior": source}, "stages": [stage]})
        folder = prior_folder(plan, "prior", "a model", tmp_path, tmp_path)
        alone: Any = SimpleNamespace(is_main=True, number=1, rank=0, wait=lambda: None, gathered=lambda value: [value])
        engine: Any = SimpleNamespace(place=lambda model: model, release=lambda model: None, loads_on=family.device)
        make_prior(plan, "prior", folder, family, alone, engine, lambda model: nullcontext(), tmp_path, lambda text: None)
        made[base] = folder, (folder / "000000.png").read_bytes()
    assert made["bf16"] == made["fp32"], "in full they are made in what the device is good at"
    assert made["nf4"][0] != made["bf16"][0]
    assert made["nf4"][1] != made["bf16"][1]


# --- a run ------------------------------------------------------------------------------------------------------------------------------

STAGE = {"steps": 3, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "bf16"}
STORED = {"plain": "bf16", "four": "nf4", "eight": "int8", "back": "bf16", "last": "nf4"}


def switching(world: Path) -> dict[str, Any]:
    return plan_of(world, stages=[{**STAGE, "name": name, "base": base} for name, base in STORED.items()], previews={"rows": 0})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run that goes through all storages; not to be written into."""
    carry_out(world / "whole", switching(world), record=world / "events")
    return world / "whole"


def last_step(folder: Path, stage: str) -> Path:
    return sorted(folder.glob(f"stages/*-{stage}/step-*"))[-1]


def test_each_switch_is_measured_with_its_cause_and_never_passes_for_the_same_function(whole: Path) -> None:
    handed = events(whole, "handoff")
    assert [line["cause"] for line in handed] == [f"base stored in {one} -> {other}" for one, other in zip(list(STORED.values())[:-1], list(STORED.values())[1:], strict=True)]
    for line in handed:
        assert not line["exact"]
        assert 0 < max(line["delta"].values()) < 10
    assert {line["multiplied_in"] for line in events(whole, "step")} == {"bf16"}
    assert [line["base"] for line in events(whole, "stage") if line.get("state") == "start"] == list(STORED.values())


def test_the_base_is_evaluated_in_each_storage_and_compared_with_its_own(whole: Path) -> None:
    losses = {name: json.loads((whole / "evaluations" / f"base-8{name}.json").read_text()) for name in ("", "-nf4", "-int8")}
    assert len({json.dumps(each) for each in losses.values()}) == 3
    assert len([line for line in events(whole, "eval") if line["kind"] == "base"]) == 3
    bases = [line["sources"]["photos"]["loss"] for line in events(whole, "eval") if line["kind"] == "base"]
    own = dict(zip(("bf16", *BLOCKS), bases, strict=True))
    for line in events(whole, "eval"):
        if line["kind"] == "start":
            found = line["sources"]["photos"]
            assert found["loss"] - found["since_base"] == pytest.approx(own[STORED[line["stage"]]], abs=1e-6)


def test_the_adapter_is_handed_over_a_switch_exactly(world: Path, tmp_path: Path) -> None:
    """With a rate that is nothing, what the first stage learnt comes out of the others, bit for bit."""
    plan = switching(world)
    plan["stages"] = [{**plan["stages"][0], "steps": 1}, *({**stage, "steps": 1, "lr": 1e-30} for stage in plan["stages"][1:3])]
    carry_out(tmp_path / "same", plan)
    first, last = (load_file(last_step(tmp_path / "same", stage) / "adapter.safetensors") for stage in ("plain", "eight"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_an_adapter_learnt_over_nf4_is_published_as_training_saw_it_and_says_so(whole: Path) -> None:
    (line,) = events(whole, "publish")
    assert line["max_difference"] < 0.1
    card = (whole / "adapter" / "README.md").read_text()
    assert "the base was stored in bf16, then nf4, then int8;" in card


@pytest.mark.launch
def test_a_run_killed_in_an_nf4_stage_ends_bit_equal(world: Path, whole: Path, tmp_path: Path) -> None:
    folder, plan = tmp_path / "killed", switching(world)
    carry_out(folder, plan, kill_at=int((world / "events").read_text()) * 2 // 5)
    state = json.loads((last_step(folder, "four") / "state.json").read_text())
    assert not state["finished"]
    carry_out(folder, plan)
    assert adapter_bytes(folder) == adapter_bytes(whole)
    for stage in STORED:
        one, other = (load_file(last_step(place, stage) / "optimizer.safetensors") for place in (folder, whole))
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.launch
def test_two_processes_train_over_a_quantised_base(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world, stages=[{**STAGE, "name": "four", "base": "nf4", "steps": 2, "precision": "fp32"}], previews={"rows": 0})
    for processes in (1, 2):
        carry_out(tmp_path / str(processes), plan, processes=processes)
    one, other = (load_file(last_step(tmp_path / str(processes), "four") / "adapter.safetensors") for processes in (1, 2))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)

"""The adapter: where its pairs go, how they begin, what trains, what stays byte for byte, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import tiny_flux
from stages.adapter import (
    TargetError,
    adapter_names,
    adapter_weights,
    add_adapter,
    choose_trainable,
    load_adapter_weights,
    lora_layers,
    matched,
    of_adapter,
    place_adapters,
    without_input_casts,
)
from stages.dropout import Drawing, KeyedDropout, add_dropout
from stages.families.family import Family
from stages.families.flux import Flux
from stages.layouts import write_adapter
from stages.objectives import flow
from stages.objectives.parts import errors, whole
from stages.optim import make_optimizer
from stages.pairs import joined, ranks_of
from stages.placed import Placed
from stages.plan import Adapter, Optimizer

CPU = torch.device("cpu")
PROMPTS = ["a red disc", "make it blue"]
T = torch.tensor([0.3, 0.8])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


def adapted(family: Family, settings: Adapter, *, seed: int = 0, storage: torch.dtype = torch.float32) -> nn.Module:
    model = family.load_transformer(storage, None)
    add_adapter(model, settings, family.target_patterns, seed)
    return model


def randomised(model: nn.Module) -> nn.Module:
    """With pairs that have an effect."""
    generator = torch.Generator().manual_seed(4)
    load_adapter_weights(model, {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in adapter_weights(model).items()}, "test")
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def predict(family: Family, model: nn.Module) -> Tensor:
    return family.predict(model, images(), T, family.encode_prompts(PROMPTS), (0.5 * images(),))


def train_for(family: Family, model: nn.Module, trainable: dict[str, nn.Parameter], steps: int) -> None:
    optimizer = make_optimizer(trainable, Optimizer())
    optimizer.param_groups[0]["lr"] = 0.01
    for step in range(steps):
        e = flow.noise((3, 8, 8), [2 * step, 2 * step + 1])
        part = whole(family.path, images(), e, T)
        errors(family.predict(model, part.noised, T, family.encode_prompts(PROMPTS), ()), part).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Layers(nn.Module):
    """Linear layers of given names, registered in the given order; each 6 -> 4."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 4))


# --- how a fresh adapter begins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_fresh_adapter_leaves_the_function_exactly_as_it_is(family: Family, storage: torch.dtype) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=storage != torch.float32):
        before = predict(family, family.load_transformer(storage, None))
        after = predict(family, adapted(family, Adapter(rank=4, alpha=32, targets="linear"), storage=storage))
    assert torch.equal(before, after)


def test_fresh_pairs_depend_on_seed_and_layer_name_alone() -> None:
    names = ["one", "other", "third"]
    forwards, backwards = Layers(names), Layers(names[::-1])
    with_more = Layers(["zero", *names])
    for model in (forwards, backwards):
        add_adapter(model, Adapter(rank=2, targets=names), {}, 7)
    add_adapter(with_more, Adapter(rank=2, targets=["zero", *names[::-1]]), {}, 7)
    weights = adapter_weights(forwards)
    assert all(torch.equal(weights[name], value) for name, value in adapter_weights(backwards).items())
    assert all(torch.equal(adapter_weights(with_more)[name], value) for name, value in weights.items())
    other_seed = Layers(names)
    add_adapter(other_seed, Adapter(rank=2, targets=names), {}, 8)
    downs = [weights[f"{name}.lora_A.weight"] for name in names] + [adapter_weights(other_seed)["one.lora_A.weight"]]
    assert not any(torch.equal(a, b) for place, a in enumerate(downs) for b in downs[:place])


def test_fresh_pairs_are_distributed_as_pefts_own() -> None:
    ours, theirs = nn.Sequential(nn.Linear(400, 10)), nn.Sequential(nn.Linear(400, 10))
    add_adapter(ours, Adapter(rank=64, targets=["0"]), {}, 0)
    inject_adapter_in_model(LoraConfig(r=64, lora_alpha=64, target_modules=["0"]), theirs)
    one, other = (lora_layers(model)["0"].lora_A["default"].weight.detach() for model in (ours, theirs))
    bound = 1 / math.sqrt(400)
    for found in (one, other):
        assert 0.999 * bound < found.abs().max() <= bound
    assert float(one.std()) == pytest.approx(float(other.std()), rel=0.02)
    assert torch.equal(lora_layers(ours)["0"].lora_B["default"].weight, torch.zeros(10, 64))


def test_pairs_are_float32_over_a_base_in_bf16(family: Family) -> None:
    model = adapted(family, Adapter(rank=2), storage=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" not in name} == {torch.bfloat16}
    assert {parameter.dtype for parameter in choose_trainable(model, "adapter", "test").values()} == {torch.float32}
    assert {value.dtype for value in adapter_weights(model).values()} == {torch.float32}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 1.0), (6.0, 3.0), (0.5, 0.25)])
def test_a_pair_adds_alpha_over_rank_times_b_times_a(alpha: float | None, scale: float) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    add_adapter(model, Adapter(rank=2, alpha=alpha, targets=["0"]), {}, 0)
    randomised(model)
    layer, pair = lora_layers(model)["0"], {name: value.double() for name, value in adapter_weights(model).items()}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weight = layer.base_layer.weight.double() + scale * pair["0.lora_B.weight"] @ pair["0.lora_A.weight"]
    wanted = x.double() @ weight.T + layer.base_layer.bias.double()
    assert torch.allclose(model(x).double(), wanted, atol=1e-6)


# --- which layers get a pair ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "number"), [("attention", 8 + 3), ("blocks", 8 + 3 + 4 + 2), ("linear", 8 + 3 + 4 + 2 + 2 + 1)])
def test_words_target_the_layers_that_they_promise(family: Family, word: str, number: int) -> None:
    """One block of two streams (8 of attention, 4 of feed-forward, 2 of modulation) and one of a single stream (3, 2, 1)."""
    model = family.load_transformer(torch.float32, None)
    names = add_adapter(model, Adapter(rank=2, targets=word), family.target_patterns, 0)  # type: ignore[arg-type]
    assert len(names) == len(set(names)) == number
    assert list(lora_layers(model)) == names
    assert all(("attn" in name) for name in names) is (word == "attention")
    assert any(("norm" in name) for name in names) is (word == "linear")


def test_linear_is_every_linear_layer_of_the_blocks_and_no_other(family: Family) -> None:
    model = family.load_transformer(torch.float32, None)
    wanted = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "transformer_blocks." in name]
    assert matched(model, family.target_patterns["linear"], "test") == wanted


@pytest.mark.parametrize("patterns", [["proj_out"], ["x_embedder", r"transformer_blocks\.0\.attn\.to_q"], [r"norm_out\.linear"], [r".*\.to_q"]])
def test_pairs_go_where_a_pattern_matches_the_whole_name_and_nowhere_else(family: Family, patterns: list[str]) -> None:
    """peft matches a list of names at their ends: `proj_out` would also be `single_transformer_blocks.0.proj_out`."""
    model = family.load_transformer(torch.float32, None)
    wanted = matched(model, patterns, "test")
    assert add_adapter(model, Adapter(rank=2, targets=patterns), family.target_patterns, 0) == wanted
    assert list(lora_layers(model)) == wanted


def test_pattern_that_matches_nothing_is_refused_with_its_place(family: Family) -> None:
    model = family.load_transformer(torch.float32, None)
    with pytest.raises(TargetError, match=r"adapter\.targets: pattern 'transformer_block\\\.0.*' matches none of the 28 linear layers, .*'proj_out'"):
        add_adapter(model, Adapter(targets=[r".*\.to_q", r"transformer_block\.0.*"]), family.target_patterns, 0)
    assert not lora_layers(model)


def test_layers_keep_their_names_once_they_carry_a_pair(family: Family) -> None:
    model = family.load_transformer(torch.float32, None)
    before = matched(model, [".*"], "test")
    add_adapter(model, Adapter(rank=2, targets="linear"), family.target_patterns, 0)
    assert matched(model, [".*"], "test") == before


# --- what trains ------------------------------------------------------------------------------------------------------------------------


def test_what_is_chosen_trains_and_nothing_else(family: Family) -> None:
    model = adapted(family, Adapter(rank=2, targets="attention"))
    every = [name for name, _ in model.named_parameters()]
    pairs = [name for name in every if ".lora_" in name]
    of_one = [name for name in pairs if name.startswith("transformer_blocks.0.attn.to_q.")]
    choices: list[tuple[str | list[str], list[str]]] = [
        ("adapter", pairs),
        ("full", [name for name in every if ".lora_" not in name]),
        ([r"transformer_blocks\.0\.attn\.to_q"], of_one),
        ([r".*\.to_q", r".*\.to_q"], [name for name in pairs if ".to_q." in name]),
    ]
    for train, wanted in choices:
        trainable = choose_trainable(model, train, "stages[0].train")
        assert list(trainable) == wanted
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == wanted
        assert all(trainable[name] is parameter for name, parameter in model.named_parameters() if name in trainable)
    assert len(of_one) == 2


def test_full_training_of_a_model_without_an_adapter_trains_every_weight(family: Family) -> None:
    model = family.load_transformer(torch.float32, None)
    assert list(choose_trainable(model, "full", "test")) == [name for name, _ in model.named_parameters()]


def test_train_pattern_that_matches_no_pair_is_refused_with_its_place(family: Family) -> None:
    model = adapted(family, Adapter(rank=2, targets="attention"))
    with pytest.raises(TargetError, match=r"stages\[2\]\.train: pattern 'proj_out' matches none of the 11 layers that carry a pair"):
        choose_trainable(model, [r".*\.to_q", "proj_out"], "stages[2].train")


@pytest.mark.parametrize("train", ["adapter", [r"transformer_blocks\.0\.attn\.to_[qk]"]])
def test_frozen_weights_are_the_same_bytes_after_training_and_the_chosen_are_not(family: Family, train: str | list[str]) -> None:
    model = adapted(family, Adapter(rank=2))
    trainable = choose_trainable(model, train, "test")
    before = copies(model)
    train_for(family, model, trainable, 3)
    changed = [name for name, parameter in model.named_parameters() if parameter.detach().numpy().tobytes() != before[name].numpy().tobytes()]
    assert changed == list(trainable)


def test_full_training_leaves_the_adapter_as_it_is(family: Family) -> None:
    model = randomised(adapted(family, Adapter(rank=2)))
    trainable = choose_trainable(model, "full", "test")
    before = adapter_weights(model)
    train_for(family, model, trainable, 1)
    assert all(torch.equal(value, before[name]) for name, value in adapter_weights(model).items())


# --- saving and loading -----------------------------------------------------------------------------------------------------------------


def test_saved_pairs_give_another_model_the_same_function(family: Family) -> None:
    settings = Adapter(rank=2, alpha=6, targets="linear")
    one, other = randomised(adapted(family, settings)), adapted(family, settings, seed=5)
    weights = adapter_weights(one)
    assert {name.split(".lora_")[1] for name in weights} == {"A.weight", "B.weight"}
    load_adapter_weights(other, weights, "test")
    assert all(torch.equal(value, weights[name]) for name, value in adapter_weights(other).items())
    with torch.no_grad():
        assert torch.equal(predict(family, one), predict(family, other))
        assert (predict(family, one) - predict(family, adapted(family, settings))).abs().max() > 1e-2


def test_saved_pairs_are_copies(family: Family) -> None:
    model = adapted(family, Adapter(rank=2))
    trainable = choose_trainable(model, "adapter", "test")
    saved = adapter_weights(model)
    kept = {name: value.clone() for name, value in saved.items()}
    train_for(family, model, trainable, 1)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "1 missing, 0 left over, 0 of another shape"),
        ("extra", "0 missing, 1 left over, 0 of another shape"),
        ("shape", "0 missing, 0 left over, 1 of another shape"),
    ],
)
def test_pairs_that_are_not_the_plans_are_refused(family: Family, fault: str, said: str) -> None:
    model = adapted(family, Adapter(rank=2))
    weights, before = adapter_weights(model), adapter_weights(model)
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        weights["elsewhere.lora_A.weight"] = torch.zeros(2, 2)
    else:
        weights[name] = torch.zeros(3, weights[name].shape[1])
    with pytest.raises(ValueError, match=f"runs/old: .*{said}, such as .*rank and targets"):
        load_adapter_weights(model, {name: value + 1 for name, value in weights.items()}, "runs/old")
    assert all(torch.equal(value, before[name]) for name, value in adapter_weights(model).items()), "a refused file must change nothing"


# --- casts ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leaving_out_pefts_casts_changes_no_bit_of_output_or_gradient_under_autocast(family: Family, storage: torch.dtype, dtype: torch.dtype) -> None:
    found = []
    for without in (False, True):
        model = randomised(adapted(family, Adapter(rank=2, targets="linear"), storage=storage))
        trainable = choose_trainable(model, "adapter", "test")
        if without:
            without_input_casts(model)
        with torch.autocast("cpu", dtype):
            output = predict(family, model)
        output.square().mean().backward()
        found.append((output.detach(), {name: parameter.grad for name, parameter in trainable.items()}))
    (one, gradients), (other, again) = found
    assert torch.equal(one, other)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert again[name] is not None
        assert torch.equal(gradient, again[name])  # type: ignore[arg-type]
        assert gradient.dtype == torch.float32


def test_pefts_casts_cost_memory_that_is_saved_without_them(family: Family) -> None:
    """The test that fails once peft no longer casts (0.21.2 does), and `without_input_casts` is no longer needed."""
    saved = []
    for without in (False, True):
        model = adapted(family, Adapter(rank=2), storage=torch.bfloat16)
        choose_trainable(model, "adapter", "test")
        if without:
            without_input_casts(model)
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            output = predict(family, model)
        saved.append(sum(kept.values()))
        del output
    assert saved[1] < saved[0]


# --- variants ---------------------------------------------------------------------------------------------------------------------------


def strengthened(family: Family, settings: Adapter, *, storage: torch.dtype = torch.float32) -> nn.Module:
    """With pairs that have an effect, and magnitudes that are not the weights' own."""
    model = adapted(family, settings, storage=storage)
    generator = torch.Generator().manual_seed(4)
    weights = {
        name: value * (1 + 0.1 * torch.rand(value.shape, generator=generator)) if name.endswith("vector") else 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in adapter_weights(model).items()
    }
    load_adapter_weights(model, weights, "test")
    return model


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_a_fresh_adapter_of_each_variant_leaves_the_function_as_it_is_and_is_float32(family: Family, variant: str, storage: torch.dtype) -> None:
    """Also over a base in bf16, with the casts as stages have them: lengths of rows that were taken in bf16 would change the output by a hundredth."""
    model = adapted(family, Adapter(rank=4, alpha=32, variant=variant), storage=storage)
    without_input_casts(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=storage != torch.float32):
        before, after = predict(family, family.load_transformer(storage, None)), predict(family, model)
    assert float((before - after).norm() / before.norm()) <= 1e-6
    assert {value.dtype for value in choose_trainable(model, "adapter", "test").values()} == {torch.float32}


def test_rslora_adds_alpha_over_the_root_of_the_rank_times_b_times_a() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    add_adapter(model, Adapter(rank=4, alpha=6, targets=["0"], variant="rslora"), {}, 0)
    randomised(model)
    layer, weights = lora_layers(model)["0"], {name: value.double() for name, value in adapter_weights(model).items()}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weight = layer.base_layer.weight.double() + 3 * weights["0.lora_B.weight"] @ weights["0.lora_A.weight"]
    assert torch.allclose(model(x).double(), x.double() @ weight.T + layer.base_layer.bias.double(), atol=1e-6)


def test_dora_gives_rows_of_the_summed_weight_the_lengths_of_its_magnitudes() -> None:
    """Source: Liu et al. 2024, arXiv:2402.09353, equation 5."""
    model = nn.Sequential(nn.Linear(6, 4))
    add_adapter(model, Adapter(rank=2, alpha=6, targets=["0"], variant="dora"), {}, 0)
    randomised(model)
    layer, weights = lora_layers(model)["0"], {name: value.double() for name, value in adapter_weights(model).items()}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    summed = layer.base_layer.weight.double() + 3 * weights["0.lora_B.weight"] @ weights["0.lora_A.weight"]
    weight = weights["0.lora_magnitude_vector"][:, None] * summed / summed.norm(dim=1, keepdim=True)
    assert torch.allclose(model(x).double(), x.double() @ weight.T + layer.base_layer.bias.double(), atol=1e-6)


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without metadata"])
@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_a_published_variant_loads_in_the_stock_pipeline_and_gives_what_training_saw(family: Family, tmp_path: Path, variant: str, metadata: bool) -> None:
    settings = Adapter(rank=4, alpha=6, variant=variant)
    model = strengthened(family, settings)
    write_adapter(tmp_path / "x.safetensors", adapter_weights(model), settings, {})
    if not metadata:
        save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "x.safetensors")
    assert {value.dtype for value in load_file(tmp_path / "x.safetensors").values()} == {torch.float32}
    fresh = family.load_transformer(torch.float32, None)
    family.stock_pipeline(fresh).load_lora_weights(tmp_path, weight_name="x.safetensors")
    with torch.no_grad():
        assert (predict(family, fresh) - predict(family, model)).abs().max() <= 1e-5
        assert (predict(family, fresh) - predict(family, family.load_transformer(torch.float32, None))).abs().max() > 1e-2


# --- several adapters on one model ------------------------------------------------------------------------------------------------------

TWO = {
    "cond": Placed(Adapter(rank=2, alpha=6, targets=[r"transformer_blocks.*\.(to_q|to_k)"])),
    "core": Placed(Adapter(rank=3, targets="attention", variant="rslora")),
}


def with_two(family: Family) -> nn.Module:
    """Two adapters that have an effect, on some layers both."""
    model = family.load_transformer(torch.float32, None)
    place_adapters(model, TWO, family.target_patterns, 0)
    return randomised(model)


def test_all_adapters_are_active_and_add_up(family: Family) -> None:
    model = with_two(family)
    assert adapter_names(model) == ["cond", "core"]
    weights = adapter_weights(model)
    parts = [(of_adapter(weights, name), placed.scale) for name, placed in TWO.items()]
    one = joined(parts)
    assert set(ranks_of(one).values()) == {3, 5}
    plain, found = family.load_transformer(torch.float32, None), family.load_transformer(torch.float32, None)
    with torch.no_grad():
        for layer in ranks_of(one):
            found.get_parameter(f"{layer}.weight").add_(one[f"{layer}.lora_B.weight"] @ one[f"{layer}.lora_A.weight"])
        assert (predict(family, found) - predict(family, model)).abs().max() <= 1e-5
        assert (predict(family, plain) - predict(family, model)).abs().max() > 1e-2


def test_joined_adapters_load_in_the_stock_pipeline_and_give_what_training_saw(family: Family, tmp_path: Path) -> None:
    """Their ranks differ from layer to layer; without metadata too."""
    model = with_two(family)
    weights = adapter_weights(model)
    one = joined([(of_adapter(weights, name), placed.scale) for name, placed in TWO.items()])
    write_adapter(tmp_path / "x.safetensors", one, Adapter(rank=5, alpha=5), {})
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "bare.safetensors")
    for name in ("x.safetensors", "bare.safetensors"):
        fresh = family.load_transformer(torch.float32, None)
        family.stock_pipeline(fresh).load_lora_weights(tmp_path, weight_name=name)
        with torch.no_grad():
            assert (predict(family, fresh) - predict(family, model)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("train", "number"),
    [("adapter", 2 + 11), (["cond"], 2), (["core"], 11), (["core", "cond"], 2 + 11), ([r"transformer_blocks.*\.to_q"], 2), ([r"cond:transformer_blocks.*\.to_q"], 1), (["cond", r"core:single.*"], 2 + 3)],
)
def test_adapters_train_by_name_and_pattern_and_what_is_frozen_stays_byte_for_byte(family: Family, train: str | list[str], number: int) -> None:
    model = with_two(family)
    trainable = choose_trainable(model, train, "test")
    assert len(trainable) == 2 * number
    before = copies(model)
    train_for(family, model, trainable, 2)
    changed = [name for name, parameter in model.named_parameters() if parameter.detach().numpy().tobytes() != before[name].numpy().tobytes()]
    assert changed == list(trainable)


def test_a_pattern_of_one_adapter_that_matches_none_of_its_layers_is_refused(family: Family) -> None:
    with pytest.raises(TargetError, match=r"stages\[0\]\.train: pattern 'single.*' matches none of the 2 layers that carry a pair of adapter 'cond', which are named like 'transformer_blocks"):
        choose_trainable(with_two(family), ["cond:single.*"], "stages[0].train")


def test_an_adapter_that_another_was_stacked_on_does_not_train_whatever_is_asked(family: Family) -> None:
    model = with_two(family)
    for train in ("adapter", [".*"]):
        assert {name.split(".")[-2] for name in choose_trainable(model, train, "test", frozen=["cond"])} == {"core"}


def test_several_adapters_are_saved_and_loaded_by_name(family: Family) -> None:
    """One of them is called as modules are: peft's own saving mixes them up then (0.21.2)."""
    placed = {"attn": TWO["cond"], "weight": TWO["core"]}
    one, other = (family.load_transformer(torch.float32, None) for _ in range(2))
    for model, seed in ((one, 0), (other, 1)):
        place_adapters(model, placed, family.target_patterns, seed)
    weights = adapter_weights(randomised(one))
    assert {name.split(":")[0] for name in weights} == {"attn", "weight"}
    assert len(of_adapter(weights, "attn")) == 4
    load_adapter_weights(other, weights, "test")
    with torch.no_grad():
        assert torch.equal(predict(family, one), predict(family, other))


# --- dropout ----------------------------------------------------------------------------------------------------------------------------


def test_dropout_leaves_out_its_share_scales_up_the_rest_and_is_none_outside() -> None:
    drawing = Drawing()
    layer, x = KeyedDropout(0.25, "adapter:layer", drawing), torch.ones(3, 50, 40)
    assert layer(x) is x
    with drawing.of([7, 8, 9]):
        found = layer(x)
        assert torch.equal(found, layer(x)), "a layer that is computed again, for its gradient, must be given the same mask"
        assert not torch.equal(found, KeyedDropout(0.25, "adapter:other", drawing)(x))
    assert layer(x) is x
    assert found.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float((found == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(found[0], found[1])


def test_an_images_mask_does_not_depend_on_what_else_is_in_the_batch_nor_on_torchs_state() -> None:
    drawing = Drawing()
    layer, x = KeyedDropout(0.5, "adapter:layer", drawing), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    with drawing.of([7, 8, 9]):
        together = layer(x)
    torch.manual_seed(5)
    for place, image in enumerate((7, 8, 9)):
        with drawing.of([image]):
            assert torch.equal(layer(x[place : place + 1])[0], together[place])
    with drawing.of([7, 8]):  # no image has a row of its own here: one mask for all, of these two
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_of_a_layers_input_is_what_the_pair_multiplies(variant: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    settings = Adapter(rank=2, alpha=6, targets=["0"], variant=variant, dropout=0.5)
    add_adapter(model, settings, {}, 0)
    randomised(model)
    drawing = add_dropout(model, {"default": Placed(settings)}, choose_trainable(model, "adapter", "test").values())
    layer, weights = lora_layers(model)["0"], {name: value.double() for name, value in adapter_weights(model).items()}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    whole = model(x)
    with drawing.of(list(range(5))):
        found, masked = model.train()(x), layer.lora_dropout["default"](x).double()
        assert not torch.equal(model(x), whole)
    base, product = layer.base_layer.weight.double(), 3 * weights["0.lora_B.weight"] @ weights["0.lora_A.weight"]
    if variant == "dora":
        factor = weights["0.lora_magnitude_vector"] / (base + product).norm(dim=1)
        wanted = x.double() @ base.T + (factor - 1) * (masked @ base.T) + factor * (masked @ product.T)
    else:
        wanted = x.double() @ base.T + masked @ product.T
    assert torch.allclose(found.double(), wanted + layer.base_layer.bias.double(), atol=1e-6)
    assert torch.allclose(model.eval()(x), whole, atol=1e-6)


def test_gradients_under_dropout_are_those_of_smaller_batches_summed_and_of_recomputed_layers(family: Family) -> None:
    """So that neither the number of processes nor gradient checkpointing changes a step."""
    settings = Adapter(rank=2, targets="linear", dropout=0.3)
    found: list[Mapping[str, Tensor]] = []
    for parts, checkpointing in (([[0, 1]], False), ([[0], [1]], False), ([[0, 1]], True)):
        model = randomised(adapted(family, settings))
        trainable = choose_trainable(model, "adapter", "test")
        drawing = add_dropout(model, {"default": Placed(settings)}, trainable.values())
        model.train()
        if checkpointing:
            FluxTransformer2DModel.enable_gradient_checkpointing(model)
        for rows in parts:
            with drawing.of([100 + row for row in rows]):
                output = family.predict(model, images()[rows], T[rows], family.encode_prompts([PROMPTS[row] for row in rows]), ())
                output.square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in trainable.items() if parameter.grad is not None})
    whole, summed, again = found
    assert whole.keys() == trainable.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, summed[name], rtol=1e-4, atol=1e-5), name
        assert torch.allclose(gradient, again[name], rtol=1e-5, atol=1e-6), name


def test_only_pairs_that_train_are_dropped() -> None:
    model = Layers(["one", "other"])
    settings = {"cond": Placed(Adapter(rank=2, targets=["one", "other"], dropout=0.5)), "core": Placed(Adapter(rank=2, targets=["one"]))}
    place_adapters(model, settings, {}, 0)
    add_dropout(model, settings, choose_trainable(model, ["cond:one", "core"], "test").values())
    dropped = {(name, adapter) for name, layer in lora_layers(model).items() for adapter, module in layer.lora_dropout.items() if isinstance(module, KeyedDropout)}
    assert dropped == {("one", "cond")}

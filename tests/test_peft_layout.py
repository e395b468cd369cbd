"""peft's own layout: `PeftModel.from_pretrained` gives what training saw, alphas, ranks and DoRA included, and equal adapters are equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from families import CPU, PROMPTS, largest, noise
from stages.adapter import adapter_weights, add_adapter, load_adapter_weights, lora_layers
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import pixart
from stages.pairs import layers_of, rescaled
from stages.peft_layout import CONFIG_FILE, WEIGHTS_FILE, write_peft_adapter
from stages.placed import scale_of
from stages.plan import Adapter

SETTINGS = {
    "alpha is the rank": Adapter(rank=2),
    "alpha 6": Adapter(rank=2, alpha=6, targets="linear"),
    "rslora": Adapter(rank=4, alpha=2, variant="rslora"),
    "dora": Adapter(rank=2, alpha=6, variant="dora"),
    "some layers": Adapter(rank=3, alpha=1, targets=[r".*\.0\.attn1\.to_q", r"proj_out"]),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return open_family(str(pixart.build(tmp_path_factory.mktemp("model") / "m")), CPU)


@torch.no_grad()
def outputs(family: Family, model: nn.Module) -> Tensor:
    return family.predict(model, noise(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), family.encode_prompts(PROMPTS))


def trained(family: Family, settings: Adapter) -> nn.Module:
    model = family.load_transformer(torch.float32, None)
    add_adapter(model, settings, family.target_patterns, 0)
    weights = adapter_weights(model)
    load_adapter_weights(model, {name: value * 1.1 if name.endswith("vector") else 0.3 * noise(*value.shape, seed=number) for number, (name, value) in enumerate(weights.items())}, "test")
    return model


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_loads_the_folder_at_the_strength_that_training_saw(family: Family, settings: Adapter, tmp_path: Path) -> None:
    model = trained(family, settings)
    write_peft_adapter(tmp_path, rescaled(adapter_weights(model), scale_of(settings)), rank=settings.rank, target_modules=list(lora_layers(model)), metadata={"note": "a"})
    fresh = family.load_transformer(torch.float32, None)
    plain = outputs(family, fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    wanted = outputs(family, model)
    assert largest(outputs(family, loaded), wanted) <= 1e-5 * float(wanted.abs().max())
    assert largest(plain, wanted) > 1e-2
    assert set(lora_layers(fresh)) == set(lora_layers(model))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == settings.rank


def test_layers_may_have_other_ranks_and_one_whose_name_ends_as_anothers_keeps_its_own(tmp_path: Path) -> None:
    ranks = {"to_q": 4, "block.to_q": 2, "block.to_k": 2}
    weights = {}
    for number, (layer, rank) in enumerate(ranks.items()):
        weights |= {f"{layer}.lora_A.weight": noise(rank, 6, seed=number), f"{layer}.lora_B.weight": noise(6, rank, seed=10 + number)}
    write_peft_adapter(tmp_path, weights, rank=2, target_modules=list(ranks), metadata={})
    linear = nn.Linear(6, 6, bias=False)
    model = nn.ModuleDict({"to_q": linear, "block": nn.ModuleDict({"to_q": nn.Linear(6, 6, bias=False), "to_k": nn.Linear(6, 6, bias=False)})})
    x, plain = noise(3, 6), linear(noise(3, 6)).detach()
    PeftModel.from_pretrained(model, tmp_path)
    assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == ranks
    assert largest(lora_layers(model)["to_q"](x).detach(), plain + x @ weights["to_q.lora_A.weight"].T @ weights["to_q.lora_B.weight"].T) <= 1e-5


def test_equal_adapters_are_equal_bytes(family: Family, tmp_path: Path) -> None:
    weights = adapter_weights(trained(family, Adapter(rank=2)))
    notes = {f"note {number}": "☂" * number for number in range(20)}
    for name, some in (("one", weights), ("other", dict(reversed(weights.items())))):
        write_peft_adapter(tmp_path / name, some, rank=2, target_modules=layers_of(weights), metadata=notes)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    with safe_open(tmp_path / "one" / WEIGHTS_FILE, framework="pt") as header:
        assert header.metadata() == {"format": "pt", **notes}


def test_layers_that_are_not_those_of_the_weights_are_refused(family: Family, tmp_path: Path) -> None:
    weights = adapter_weights(trained(family, Adapter(rank=2)))
    with pytest.raises(ValueError, match=r"target_modules has 19 layers and the weights have pairs of 20; they differ in \['transformer_blocks"):
        write_peft_adapter(tmp_path, weights, rank=2, target_modules=layers_of(weights)[1:], metadata={})

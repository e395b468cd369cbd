"""Compiled blocks: the same function to the bit (by aot_eager, which inductor stands on), in each precision, with dropout and recomputation; and what was measured stays measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models import tiny_flux
from runs import carry_out, events, make_world, plan_of, write_plan
from stages.adapter import add_adapter, choose_trainable
from stages.check import check_plan
from stages.compiled import blocks, compile_blocks, counted, forget_compiled, uncompiled
from stages.dropout import add_dropout
from stages.families.family import Family
from stages.families.flux import Flux
from stages.families.open import open_family
from stages.families.tiny import flux, flux2, qwen_image, wan, z_image
from stages.placed import Placed
from stages.plan import Adapter
from stages.precision import Multiplied, StagePrecision
from stages.reader import read_plan
from stages.recomputation import recompute

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    forget_compiled()


def predict(family: Family, model: nn.Module, images: int = 2) -> Tensor:
    x = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return family.predict(model, x, torch.linspace(0.3, 0.8, images), family.encode_prompts(["a red disc"] * images))


def trained(family: Family, mode: str, *, compiled: bool, dropout: float = 0.0, checkpointing: str = "none") -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A model, what it predicts, and the gradients of its pairs."""
    model = family.load_transformer(torch.float32, None)
    settings = Adapter(rank=2, dropout=dropout)
    add_adapter(model, settings, family.target_patterns, 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trainable = choose_trainable(model, "adapter", "test")
    drawing = add_dropout(model, {"default": Placed(settings, False)}, trainable.values())
    recompute(model, checkpointing, CPU)  # type: ignore[arg-type]
    assert compile_blocks(model, "aot_eager" if compiled else False) == (2 if compiled else 0)
    with drawing.of([5, 6]):
        with StagePrecision(mode, CPU).autocast():
            output = predict(family, model.train())
        output.square().mean().backward()
    return model, output.detach(), {name: parameter.grad for name, parameter in trainable.items() if parameter.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_compiled_code_of_one_precision_is_never_used_in_another(family: Family) -> None:
    """One after the other in one process, without forgetting between them, which a run does besides."""
    outputs = {}
    for mode in ("fp32", "bf16"):
        _, plain, gradients = trained(family, mode, compiled=False)
        model, output, compiled_gradients = trained(family, mode, compiled=True)
        assert counted().graphs == 2, "one for each kind of block"
        assert not counters["graph_break"]
        assert torch.equal(output, plain)
        assert same(compiled_gradients, gradients)
        assert list(model.state_dict()) == list(trained(family, mode, compiled=False)[0].state_dict()), "names stay as they are"
        outputs[mode] = output
    assert not torch.equal(outputs["fp32"], outputs["bf16"])
    before = counted().graphs
    with torch.no_grad(), uncompiled():
        predict(family, model, images=1)
    assert counted().graphs == before, "what is measured runs the blocks as they are"


def test_dropout_and_recomputation_are_the_same_in_compiled_blocks(family: Family) -> None:
    _, plain, gradients = trained(family, "fp32", compiled=False, dropout=0.5, checkpointing="full")
    _, output, compiled_gradients = trained(family, "fp32", compiled=True, dropout=0.5, checkpointing="full")
    _, without, _ = trained(family, "fp32", compiled=False)
    assert torch.equal(output, plain)
    assert same(compiled_gradients, gradients)
    assert not torch.equal(output, without), "something was dropped"


@pytest.mark.parametrize("tiny", [flux, flux2, qwen_image, wan, z_image], ids=lambda module: module.__name__.rpartition(".")[2])
def test_blocks_are_those_that_diffusers_compiles_where_it_knows_them(tiny: Any, tmp_path: Path) -> None:
    model: Any = open_family(str(tiny.build(tmp_path / "model")), CPU).load_transformer(torch.float32, None)
    assert {id(block) for block in blocks(model)} == {id(module) for module in model.modules() if type(module).__name__ in model._repeated_blocks}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])


def test_a_block_that_is_called_first_while_its_products_are_counted_is_still_never_compiled() -> None:
    """Once this fails, products can be counted in the first step itself, and `Leg.measure_multiplied` can go (torch 2.13)."""
    graphs = []
    for watched in (True, False):
        forget_compiled()
        model = Model()
        compile_blocks(model, "aot_eager")
        with Multiplied() if watched else uncompiled():
            model.blocks[0](torch.ones(2, 4))
        model.blocks[0](torch.ones(2, 4))
        graphs.append(counted().graphs)
    assert graphs == [0, 1]


def test_more_graphs_than_are_made_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.compiled._MOST_GRAPHS", 2)
    model = Model()
    compile_blocks(model, "aot_eager")
    told = []
    for dimensions in range(1, 4):
        x = torch.ones(*[1] * dimensions, 2, 4)
        assert torch.equal(model.blocks[0](x), model.blocks[0].layer(x))
        told.append((counted().graphs, counted().passed_limit))
    assert told == [(1, False), (2, False), (2, True)]


# --- a run ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_run_with_compiled_blocks_learns_the_same_to_the_bit_and_says_what_it_multiplied_in(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    found = []
    for asked in (False, "aot_eager"):
        stage = {"name": "only", "steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "bf16", "compile": asked}
        folder = tmp_path / str(asked)
        carry_out(folder, plan_of(world, stages=[stage], sources={"photos": {"path": str(world / "data" / "photos")}}))
        assert {line["multiplied_in"] for line in events(folder, "step")} == {"bf16"}
        assert [line["compiled_blocks"] for line in events(folder, "stage") if line["state"] == "start"] == [2 if asked else 0]
        found.append(load_file(next(folder.glob("stages/*/step-000002/adapter.safetensors"))))
    assert same(found[0], found[1])


def test_compiled_code_over_weights_that_come_and_go_is_refused(tmp_path: Path) -> None:
    make_world(tmp_path)
    stage = {"name": "only", "steps": 2, "resolution": 8, "batch": 4, "lr": 0.01, "compile": True, "offload": True}
    (problem,) = check_plan(read_plan(write_plan(tmp_path / "plan.yaml", plan_of(tmp_path, stages=[stage]))), tmp_path)
    assert (problem.where, problem.message) == (
        "stages[0].compile",
        "weights that come to the device for each product (`offload`) cannot be part of compiled code; leave one of the two out",
    )

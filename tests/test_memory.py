"""Memory: recomputed activations change no gradient, encoders leave while training does without them, and what does not fit is known before anything trains."""

from __future__ import annotations

import io
import random
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from families import adapted, noise
from mixing.buckets import RowClass, Signature, class_of
from mixing.selected import Selection
from mixing.source import Source
from models import tiny_flux
from runs import carry_out, events, make_data, plan_of, write_plan
from stages.adapter import choose_trainable
from stages.dropout import add_dropout
from stages.dry_step import Largest, dry_step, largest_micro_batch, out_of_memory_words
from stages.explain import ModelFacts, explain, show
from stages.families.base import RegionTexts
from stages.families.facts import FAMILIES, tasks_of
from stages.families.family import Family
from stages.families.open import ARCHITECTURES, open_family
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image
from stages.feed import Sizes, stage_mixture
from stages.memory import EncoderRest
from stages.placed import placed_adapters
from stages.plan import Checkpointing, Every, Plan, Stage
from stages.reader import PlanError, read_plan
from stages.recomputation import recomputation_words, recompute, recomputed_every

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODELS: Mapping[str, Callable[[Path], Path]] = {
    "flux": lambda folder: flux.build(folder, guidance=True, pipeline="FluxKontextPipeline"),
    "flux2": flux2.build,
    "lumina2": lumina2.build,
    "omnigen": omnigen.build,
    "pixart": pixart.build,
    "qwen_image": qwen_image.build,
    "sana": sana.build,
    "sd3": sd3.build,
    "wan": wan.build,
    "z_image": z_image.build,
}
ASKED: tuple[Checkpointing, ...] = ("none", Every(every=2), "full")


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny model of each family."""
    return open_family(str(MODELS[request.param](tmp_path_factory.mktemp(request.param) / "model")), CPU)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Flux in pixel space."""
    return open_family(str(tiny_flux(tmp_path_factory.mktemp("one") / "model", pixels=True)), CPU)


# --- recomputation ----------------------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside it and live still; views of a model's weights are none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary({weight.untyped_storage(): True for weight in model.parameters()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@dataclass
class Made:
    """What a forward and a backward pass gave."""

    gradients: dict[str, Tensor | None]
    kept: int
    """Bytes between the two."""
    peak: int


def made(family: Family, asked: Checkpointing, *, precision: torch.dtype | None = None, drop: bool = False, regions: bool = False) -> Made:
    """The gradients of an adapter whose blocks are computed again as asked, and the memory that it took."""
    model = adapted(family).train()
    weights = choose_trainable(model, "adapter", "test")
    recompute(model, asked, CPU)
    plan = Plan.model_validate({"model": "m", "adapter": {"rank": 2, "dropout": 0.5 if drop else 0}, "sources": {"a": {"path": "a"}}, "stages": [STAGE]})
    drawing = add_dropout(model, placed_adapters(plan, 0), weights.values())
    side, small = 4 * family.pixel_multiple, 2 * family.pixel_multiple
    x = noise(2, family.encode_images(torch.zeros(1, 3, small, small)).shape[1], side // family.factor, side // family.factor)
    t = torch.tensor([0.3, 0.6])
    text = family.encode_prompts(["a red disc", "a blue square"])
    masks = torch.zeros(2, 1, side, side, dtype=torch.bool)
    masks[:, :, : side // 2] = True
    own = RegionTexts((family.encode_prompts(["a green square", "a disc"]),), masks) if regions else None
    with torch.no_grad():
        family.predict(model, x, t, text, regions=own)  # what is reckoned once, such as angles of positions, is no activation
    with drawing.of([1, 2]), Live(model) as live:
        with torch.autocast("cpu", dtype=precision) if precision else nullcontext():
            predicted = family.predict(model, x, t, text, regions=own)
        kept = live.now
        predicted.square().mean().backward()
    return Made({name: weight.grad for name, weight in weights.items()}, kept, live.peak)


def same(one: Made, other: Made) -> bool:
    """Whether all gradients agree to the bit."""
    pairs = [(gradient, other.gradients[name]) for name, gradient in one.gradients.items()]
    return all(first is second is None or (first is not None and second is not None and torch.equal(first, second)) for first, second in pairs)


STAGE: Mapping[str, Any] = {"name": "only", "steps": 4, "resolution": 8, "batch": 4, "lr": 0.01, "precision": "fp32"}


def test_every_family_knows_which_of_its_blocks_can_be_computed_again() -> None:
    assert set(MODELS) == set(ARCHITECTURES) == set(FAMILIES)
    assert all(architecture.transformer_class._supports_gradient_checkpointing for architecture in ARCHITECTURES.values())


def test_recomputed_blocks_leave_every_gradient_as_it_is_to_the_bit_and_keep_fewer_activations(family: Family) -> None:
    none, every_second, full = (made(family, asked) for asked in ASKED)
    assert any(gradient is not None and bool(gradient.any()) for gradient in none.gradients.values())
    assert same(none, every_second)
    assert same(none, full)
    assert full.kept < 0.75 * none.kept  # these models are so small that prompts, masks and angles of positions are a good part of it
    assert full.kept <= every_second.kept < none.kept
    assert full.peak < none.peak or family.name == "lumina2"  # of whose tiny model one block is computed again, all at once


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_and_with_dropout_recomputed_blocks_see_the_same_masks_and_round_alike(one: Family, precision: torch.dtype) -> None:
    plain = made(one, "none", precision=precision)
    none, full = (made(one, asked, precision=precision, drop=True) for asked in ("none", "full"))
    assert not same(plain, none), "nothing was dropped"
    assert same(none, full)


@pytest.mark.parametrize("name", [name for name, facts in FAMILIES.items() if any("entity" in tasks for tasks in facts.pipelines.values())])
def test_recomputed_blocks_see_the_masks_of_regions(name: str, tmp_path: Path) -> None:
    family = open_family(str({"flux": tiny_flux}.get(name, lambda folder, pixels: MODELS[name](folder))(tmp_path / "model", pixels=True)), CPU)
    plain, none, full = made(family, "none"), made(family, "none", regions=True), made(family, "full", regions=True)
    assert not same(plain, none)
    assert same(none, full)


def test_where_no_gradient_is_taken_nothing_is_computed_again(one: Family) -> None:
    model, calls = adapted(one), []
    assert recompute(model, "full", CPU) == 1
    hooks = [block.register_forward_pre_hook(lambda *of: calls.append(1)) for block in (*model.transformer_blocks, *model.single_transformer_blocks)]  # type: ignore[union-attr]
    x, t, text = noise(1, 3, 8, 8), torch.tensor([0.5]), one.encode_prompts(["a red disc"])
    with torch.no_grad():
        one.predict(model, x, t, text)
    assert len(calls) == len(hooks)
    predicted = one.predict(model, x, t, text)
    predicted.sum().backward()
    assert len(calls) == 3 * len(hooks)


@pytest.mark.parametrize(
    ("asked", "parameters", "device", "every"),
    [
        ("auto", 12_000_000_000, CUDA, 1),
        ("auto", 600_000_000, CUDA, 0),
        ("auto", 12_000_000_000, CPU, 0),
        ("none", 12_000_000_000, CUDA, 0),
        ("full", 10, CPU, 1),
        (Every(every=3), 10, CPU, 3),
    ],
)
def test_auto_computes_again_what_is_large_and_on_a_gpu(asked: Checkpointing, parameters: int, device: torch.device, every: int) -> None:
    assert recomputed_every(asked, parameters, device) == every


def test_recomputation_is_said_in_words() -> None:
    assert [recomputation_words(every) for every in (0, 1, 2, 3, 4, 11, 21, 113)] == [
        "", "every block", "every 2nd block", "every 3rd block", "every 4th block", "every 11th block", "every 21st block", "every 113th block",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{every: 1}", "stages[0].checkpointing.every: 1 is not a whole number from 2 to 1,000"),
        ("half", "stages[0].checkpointing: 'half' is not one of"),
    ],
)
def test_another_word_for_checkpointing_is_refused_with_those_that_there_are(tmp_path: Path, written: str, message: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(f"model: m\nsources: {{a: {{path: a}}}}\nstages:\n- {{name: only, steps: 4, resolution: 8, batch: 4, lr: 0.01, checkpointing: {written}}}\n")
    with pytest.raises(PlanError) as caught:
        read_plan(file)
    assert message in str(caught.value)


def test_what_is_computed_again_is_explained() -> None:
    console = Console(file=io.StringIO(), width=100)
    stages = [{**STAGE, "name": f"stage{number}", "checkpointing": asked} for number, asked in enumerate(("auto", "none", "full", {"every": 3}))]
    plan = Plan.model_validate({"model": "m", "sources": {"a": {"path": "a"}}, "stages": stages})
    facts = ModelFacts("flux", 3 * 10**9, {"fp32": 12 * 10**9, "bf16": 6 * 10**9}, (10**6,) * 4, Sizes(2, 8), 0)
    show(explain(plan, {"a": selection("a", {class_of((64, 64), []): 9})}, facts), console)
    assert isinstance(console.file, io.StringIO)
    said = " ".join(console.file.getvalue().split())
    assert said.count("activations come on top") == 4
    of_stages = [part.split("work about")[0] for part in said.split("activations come on top")[1:]]
    assert [part.strip() for part in of_stages] == [
        "activations those of every block are computed again for the gradient, on a GPU",
        "",
        "activations those of every block are computed again for the gradient",
        "activations those of every 3rd block are computed again for the gradient",
    ]


# --- encoders ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class FakeEncoders:
    """Encoders that are loaded when they are used, and counted."""

    device: torch.device = CPU
    encoder_uses: int = 0
    loads: int = 0
    held_encoders: tuple[str, ...] = ()
    released: list[int] = field(default_factory=list)

    def use(self) -> None:
        self.encoder_uses += 1
        self.loads += not self.held_encoders
        self.held_encoders = ("vae", "text encoders")

    def release_encoders(self) -> None:
        self.held_encoders = ()


def test_encoders_go_after_fifty_steps_without_them_and_not_before() -> None:
    encoders = FakeEncoders()
    encoders.use()
    rest = EncoderRest(encoders)
    assert [step for step in range(1, 200) if rest.step()] == [50]
    assert encoders.held_encoders == ()


def test_a_use_on_the_way_begins_the_count_anew() -> None:
    encoders = FakeEncoders()
    rest = EncoderRest(encoders)
    gone = []
    for step in range(1, 200):
        if step in (1, 30):
            encoders.use()
        if rest.step():
            gone.append(step)
    assert gone == [80]


@pytest.mark.parametrize("period", [6, 9, 70])
def test_encoders_that_are_needed_again_and_again_are_loaded_again_a_few_times_only(period: int) -> None:
    encoders = FakeEncoders()
    rest = EncoderRest(encoders, patience=5)
    for step in range(2000):
        if step % period == 0:
            encoders.use()
        rest.step()
    assert 1 < encoders.loads <= 2 + np.log2(period / 5)
    assert rest.patience >= period


def test_what_an_evaluation_loads_goes_at_once_if_the_steps_do_without() -> None:
    encoders = FakeEncoders()
    rest = EncoderRest(encoders)
    encoders.use()
    assert rest.aside() is None, "before the first step nobody knows"
    encoders.use()
    rest.step()
    encoders.use()
    assert rest.aside() is None, "the steps need them"
    for _ in range(60):
        rest.step()
    assert not encoders.held_encoders
    encoders.use()
    released = rest.aside()
    assert released is not None
    assert released.parts == ("vae", "text encoders")
    assert min(released.bytes_before, released.bytes_after) > 0


def test_a_family_counts_how_often_its_encoders_are_asked_for_and_lets_go_of_them(tmp_path: Path) -> None:
    family = open_family(str(tiny_flux(tmp_path / "model", pixels=False)), CPU)
    assert (family.encoder_uses, family.held_encoders) == (0, ())
    family.encode_prompts(["a red disc"])
    assert (family.encoder_uses > 0, family.held_encoders) == (True, ("text encoders",))
    uses = family.encoder_uses
    family.encode_prompts(["a red disc"])
    assert family.encoder_uses == uses, "it was at hand"
    family.encode_images(torch.zeros(1, 3, 16, 16))
    assert (family.encoder_uses, family.held_encoders) == (uses + 1, ("vae", "text encoders"))
    family.release_encoders()
    assert family.held_encoders == ()


# --- the dry step -----------------------------------------------------------------------------------------------------------------------


def plan_with(**changes: Any) -> Plan:
    """A plan of one stage in pixel space."""
    return Plan.model_validate({"model": "m", "adapter": {"rank": 2, "targets": "linear"}, "sources": {"a": {"path": "a"}}, "stages": [{**STAGE, **changes}]})


def generators() -> tuple[Any, ...]:
    """The state of everything that could be drawn from unkeyed."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_every_family_makes_a_dry_step_of_all_that_it_can_be_shown(family: Family) -> None:
    tasks, side = tasks_of(family.pipeline_class), 4 * family.pixel_multiple
    number = 0 if "edit" not in tasks else 1
    signature = Signature((side, side), ((side, side),) * number, 1 if "entity" in tasks else 0)
    before = generators()
    plan = plan_with(checkpointing="full", dropout={"prompt": 0.1}, ema=0.9)
    assert dry_step(family, plan, 0, Largest("a", signature, 2, 99, 0), processes=2)[0] is None
    assert generators() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"pyramid": {"levels": 2}, "batch": {"images": 4, "micro": 4}},
        {"train": "full", "optimizer": {"betas": [0.9, 0.99]}},
        {"precision": "fp16", "base": "fp32"},
        {"precision": "bf16", "base": "nf4", "checkpointing": {"every": 2}},
    ],
)
def test_a_dry_step_is_made_as_the_stage_trains(one: Family, changes: dict[str, Any]) -> None:
    assert dry_step(one, plan_with(**changes), 0, Largest("a", Signature((8, 8), ()), 4, 24, 0), processes=1)[0] is None


def test_the_largest_micro_batch_has_the_most_tokens_and_no_more_images_than_fall_to_a_process() -> None:
    wide, square = class_of((64, 128), []), class_of((64, 64), [(64, 64)])
    selections = {"a": selection("a", {wide: 9}), "b": selection("b", {square: 9})}
    stage = Stage.model_validate({**STAGE, "batch": {"images": 8, "micro": 4}, "resolution": [{"pixels": 32, "share": 1}, {"pixels": 16, "share": 1}]})
    mixture = stage_mixture(stage, selections, Sizes(2, 8), seed=0, drawn_before={})
    found = largest_micro_batch(mixture, 1)
    assert found == Largest("b", Signature((32, 32), ((32, 32),)), 4, 8 + 256 + 256, 0)
    assert largest_micro_batch(mixture, 4).images == 2
    assert largest_micro_batch(mixture, 8).images == 1


def selection(name: str, classes: dict[RowClass, int]) -> Selection:
    none = np.empty(0, dtype=np.int32)
    source = Source(name, "edit", none.astype(np.uint8), np.empty((0, 2), dtype=np.uint32), (), "", None)  # type: ignore[arg-type]
    return Selection(source, {each: np.arange(rows, dtype=np.int32) for each, rows in classes.items()}, none)


@pytest.mark.parametrize(
    ("changes", "cures"),
    [
        ({"batch": {"images": 6, "micro": 3}}, "stages[2].batch.micro: 1, or stages[2].base: bf16, with precision: bf16, or stages[2].checkpointing: full, or stages[2].offload: true, or a stages[2].resolution below 8"),
        ({"batch": 1, "checkpointing": "full", "precision": "bf16"}, "stages[2].base: nf4, or stages[2].offload: true, or a stages[2].resolution below 8"),
        ({"batch": 1, "checkpointing": "full", "precision": "bf16", "base": "nf4", "offload": True}, "a stages[2].resolution below 8"),
        ({"batch": {"tokens": 99}, "train": "full", "checkpointing": "full"}, "stages[2].batch.micro: 1, or stages[2].optimizer.name: adamw8bit, or a stages[2].resolution below 8, or stages[2].train: adapter"),
        ({"batch": 1, "train": "full", "checkpointing": "full", "ema": 0.9, "optimizer": {"name": "adamw8bit"}}, "no stages[2].ema, or a stages[2].resolution below 8, or stages[2].train: adapter"),
    ],
)
def test_what_takes_less_memory_is_named_and_nothing_that_the_plan_has_already(changes: dict[str, Any], cures: str) -> None:
    stage = Stage.model_validate({**STAGE, **changes})
    images = 1 if stage.batch == 1 else 3
    said = out_of_memory_words(stage, 2, Largest("a", Signature((8, 16), ()), images, 40, 0), "CUDA out of memory")
    assert said.startswith(f"stage 'only' does not fit into the device's memory: a micro-batch of {'1 image' if images == 1 else '3 images'} of source 'a', 16x8 pixels, 40 tokens each, in ")
    assert said.endswith(f"ran out of it (CUDA out of memory). Set {cures}")


# --- runs -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model in pixel space and one with a VAE."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    tiny_flux(folder / "model", pixels=True)
    tiny_flux(folder / "encoded", pixels=False)
    return folder


def short_plan(world: Path, *stage_changes: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A stage for each of `stage_changes`."""
    stage = {"steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "bf16"}
    stages = [{**stage, "name": f"stage{number}", **each} for number, each in enumerate(stage_changes)]
    adapter = {"rank": 2, "dropout": 0.2}
    return plan_of(world, **{"stages": stages, "adapter": adapter, "previews": {"rows": 0}, "log_every": 1, **changes})


def learnt(folder: Path) -> dict[str, list[float]]:
    """The numbers of the published adapter; its header holds the plan."""
    return {name: value.flatten().tolist() for name, value in load_file(folder / "adapter" / "pytorch_lora_weights.safetensors").items()}


@pytest.mark.launch
def test_recomputation_changes_nothing_of_a_run_and_may_be_changed_where_a_run_goes_on(world: Path, tmp_path: Path) -> None:
    plain = short_plan(world, {}, {})
    carry_out(tmp_path / "plain", plain)
    carry_out(tmp_path / "other", plain, "--until", "stage0")
    printed = carry_out(tmp_path / "other", short_plan(world, {"checkpointing": "full"}, {"checkpointing": {"every": 2}}))
    assert "stage 1/2 'stage0' is finished" in printed
    assert "activations of every 2nd block are computed again" in printed
    assert learnt(tmp_path / "other") == learnt(tmp_path / "plain")
    losses = [[line["sources"] for line in events(tmp_path / name, "eval")] for name in ("plain", "other")]
    assert losses[0] == losses[1]


@pytest.mark.launch
def test_recomputation_changes_nothing_on_two_processes(world: Path, tmp_path: Path) -> None:
    for name, asked in (("none", "none"), ("full", "full")):
        carry_out(tmp_path / name, short_plan(world, {"checkpointing": asked}), processes=2)
    assert learnt(tmp_path / "none") == learnt(tmp_path / "full")


@pytest.mark.launch
def test_a_run_whose_steps_find_all_encoded_lets_go_of_what_previews_have_loaded(world: Path, tmp_path: Path) -> None:
    plan = short_plan(world, {}, {}, model=str(world / "encoded"), cache={"folder": str(tmp_path / "cache")}, previews={"rows": 1, "steps": 1})
    plan["stages"] = [{**stage, "resolution": 16} for stage in plan["stages"]]
    carry_out(tmp_path / "first", plan)
    carry_out(tmp_path / "second", plan)
    released = [event for event in events(tmp_path / "second", "memory") if event["kind"] == "released"]
    assert [(event["stage"], event["step"], event["parts"]) for event in released] == [("stage0", 2, ["vae"])] * 2 + [("stage1", 2, ["vae"])], "first what the untrained model's have loaded"
    assert all(event["bytes_before"] > 0 and event["bytes_after"] > 0 for event in released)
    assert learnt(tmp_path / "first") == learnt(tmp_path / "second")


@pytest.mark.launch
def test_a_dry_step_changes_nothing_of_a_run_and_tries_what_differs_once(world: Path, tmp_path: Path) -> None:
    stages = ({}, {"batch": {"images": 8, "micro": 2}}, {"precision": "fp32", "handoff": {"adapter": "stack", "rank": 2}}, {"handoff": {"adapter": "shrink", "rank": 1}})
    plan = short_plan(world, *stages)
    carry_out(tmp_path / "without", plan)
    said = carry_out(tmp_path / "with", {**plan, "dry_step": True})
    assert "dry step of 'stage0': a micro-batch of 4 images of source" in said
    tried = [[(event["stage"], event["images"]) for event in events(tmp_path / name, "memory") if event["kind"] == "dry_step"] for name in ("without", "with")]
    assert tried == [[], [("stage0", 4), ("stage2", 4), ("stage3", 4)]]
    assert learnt(tmp_path / "with") == learnt(tmp_path / "without")


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_what_does_not_fit_into_memory_is_known_before_anything_trains(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    whole = Family.predict

    def too_large(self: Family, transformer: nn.Module, noised: Tensor, *others: Any, **named: Any) -> Tensor:
        if noised.numel() > 2 * 3 * 8 * 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")
        return whole(self, transformer, noised, *others, **named)

    monkeypatch.setattr(Family, "predict", too_large)
    plan = short_plan(world, {"batch": {"images": 4, "micro": 2}}, {"resolution": 16, "batch": {"images": 4, "micro": 2}}, dry_step=True)
    said = " ".join(carry_out(tmp_path / "run", plan, processes=processes, expect=1).split())
    assert "failed: stage 'stage1' does not fit into the device's memory: a micro-batch of 2 images of source 'edits', 16x16" in said
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB). Set stages[1].batch.micro: 1, or stages[1].checkpointing: full" in said
    assert events(tmp_path / "run", "step") == events(tmp_path / "run", "stage") == []


@pytest.mark.launch
def test_another_error_of_a_dry_step_is_not_taken_for_a_lack_of_memory(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*others: Any, **named: Any) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Family, "predict", broken)
    said = carry_out(tmp_path / "run", short_plan(world, {}, dry_step=True), expect=1)
    assert "RuntimeError: shapes cannot be multiplied" in said
    assert "does not fit" not in said


def test_a_plan_with_memory_words_is_read_back_as_it_was_written(tmp_path: Path, world: Path) -> None:
    plan = short_plan(world, {"checkpointing": {"every": 2}}, {"checkpointing": "none"}, dry_step=False)
    read = read_plan(write_plan(tmp_path / "plan.yaml", plan)).plan
    assert [stage.checkpointing for stage in read.stages] == [Every(every=2), "none"]
    assert read.dry_step is False

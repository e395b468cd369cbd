"""Publishing: the stock pipeline loads the adapter at the strength that training saw, without metadata too; what cannot be proved is not published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import stages.layouts
from mixing.batch import MicroBatch
from mixing.buckets import Shapes
from mixing.selected import Choice, select
from mixing.source import open_source
from models import tiny_flux
from runs import launch, make_data, make_world, plan_of, write_plan
from stages.adapter import adapter_weights, add_adapter, load_adapter_weights
from stages.families.family import Family
from stages.families.flux import Flux
from stages.handoff import probe, probe_batches
from stages.header import sort_header
from stages.layouts import ADAPTER_FILE, write_adapter
from stages.plan import Adapter, Plan, Source, Stage
from stages.precision import DTYPES, StagePrecision
from stages.publish import PublishError, Trained, make_adapter, show_adapter
from stages.start import read_start

CPU = torch.device("cpu")
NOTES = {"medley.plan": "name: tiny\nseed: 3 # ☂\n", "medley.ledger": json.dumps({"stages": []}), "medley.model": "abc", "medley.checkpoint": "0" * 64}
SETTINGS = [Adapter(rank=2), Adapter(rank=2, alpha=6), Adapter(rank=4, alpha=1, targets="linear"), Adapter(rank=3, alpha=16, targets=[r".*\.to_q", r"norm_out\.linear"])]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MicroBatch]:
    root = make_data(tmp_path_factory.mktemp("data"))
    selections = {}
    for name, path, task in (("photos", "photos", "text_to_image"), ("edits", "edits/rows.jsonl", "edit")):
        source = open_source(name, path=path, task=task, columns={}, prompt=None, split="train", on_bad_row="stop", root=root)
        selections[name] = select(source, Choice(), 2)
    return probe_batches(selections, Shapes(8, 2))


def plan_with(settings: Adapter, family: Family) -> Plan:
    stage = Stage(name="only", steps=1, lr=0.1, batch=1, resolution=8)
    return Plan(name="tiny", model=family.repo, adapter=settings, sources={"photos": Source(path="photos")}, stages=[stage])


def trained(family: Family, settings: Adapter, *, strength: float = 0.1, storage: str = "fp32") -> nn.Module:
    """As after training: with pairs that have an effect."""
    model = family.load_transformer(DTYPES[storage], None)
    add_adapter(model, settings, family.target_patterns, 0)
    generator = torch.Generator().manual_seed(4)
    load_adapter_weights(model, {name: strength * torch.randn(value.shape, generator=generator) for name, value in adapter_weights(model).items()}, "test")
    return model


def outputs(family: Family, model: nn.Module, batches: Mapping[str, MicroBatch], mode: str = "fp32") -> dict[str, Tensor]:
    return probe(family, model, batches, StagePrecision(mode, CPU), 0)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def publish(
    folder: Path, family: Family, model: nn.Module, settings: Adapter, batches: Mapping[str, MicroBatch], *, storage: str = "fp32", card: str = "card", sheet: Path = Path("none")
) -> float:
    mode = "fp32" if storage == "fp32" else "bf16"
    saw = outputs(family, model, batches, mode)
    worst = make_adapter(folder, family, plan_with(settings, family), [Trained(0, None, adapter_weights(model), None, storage, StagePrecision(mode, CPU), saw)], batches, NOTES, card, sheet)
    show_adapter(folder)
    return worst


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the file ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without metadata"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"rank {settings.rank} alpha {settings.alpha}")
def test_the_stock_pipeline_loads_the_file_at_the_strength_that_training_saw(
    family: Family, batches: dict[str, MicroBatch], tmp_path: Path, settings: Adapter, metadata: bool
) -> None:
    model = trained(family, settings)
    write_adapter(tmp_path / ADAPTER_FILE, adapter_weights(model), settings, NOTES)
    if not metadata:
        save_file(load_file(tmp_path / ADAPTER_FILE), tmp_path / ADAPTER_FILE)
    fresh = family.load_transformer(torch.float32, None)
    plain = outputs(family, fresh, batches)
    family.stock_pipeline(fresh).load_lora_weights(tmp_path, weight_name=ADAPTER_FILE)
    wanted = outputs(family, model, batches)
    assert difference(outputs(family, fresh, batches), wanted) <= 1e-5
    assert difference(plain, wanted) > 1e-2


def test_the_files_metadata_holds_the_notes_and_an_alpha_equal_to_the_rank(family: Family, tmp_path: Path) -> None:
    settings = Adapter(rank=2, alpha=6)
    write_adapter(tmp_path / "file.safetensors", adapter_weights(trained(family, settings)), settings, NOTES)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as header:
        metadata = header.metadata()
    assert {name: metadata[name] for name in NOTES} == NOTES
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 2
    assert len(config["transformer.target_modules"].split("|")) == 17


def test_equal_adapters_are_equal_files(family: Family, tmp_path: Path) -> None:
    weights = adapter_weights(trained(family, SETTINGS[1]))
    notes = {f"note {number}": str(number) for number in range(20)}
    files = set()
    for number in range(8):
        write_adapter(tmp_path / f"{number}", weights, SETTINGS[1], notes if number % 2 else dict(reversed(notes.items())))
        files.add((tmp_path / f"{number}").read_bytes())
    assert len(files) == 1


def test_putting_a_header_in_order_changes_nothing_else(tmp_path: Path) -> None:
    tensors = {"ä.weight": torch.randn(3, 5), "b": torch.arange(7)}
    metadata = {"z": '☂\n"quoted" \\ \x01 \x7f', "a": "", "plan": "x" * 5000}
    save_file(tensors, tmp_path / "file", metadata=metadata)
    size = (tmp_path / "file").stat().st_size
    sort_header(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == size
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "file").items())
    with safe_open(tmp_path / "file", framework="pt") as header:
        assert header.metadata() == metadata
        assert set(header.keys()) == set(tensors)


@pytest.mark.parametrize("settings", [Adapter(rank=2), Adapter(rank=2, alpha=6), Adapter(rank=4, alpha=1)], ids=lambda settings: f"alpha {settings.alpha}")
def test_a_published_adapter_is_a_start_that_gives_the_same_function(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, settings: Adapter) -> None:
    model = trained(family, settings)
    write_adapter(tmp_path / ADAPTER_FILE, adapter_weights(model), settings, NOTES)
    for place in (tmp_path, tmp_path / ADAPTER_FILE):
        plan = plan_with(settings, family).model_copy(update={"start": str(place)})
        baton = read_start(plan, "abc")
        assert baton.base is None
        assert baton.adapter is not None
        again = family.load_transformer(torch.float32, None)
        add_adapter(again, settings, family.target_patterns, 9)
        load_adapter_weights(again, baton.adapter, "test")
        assert difference(outputs(family, again, batches), outputs(family, model, batches)) <= 1e-5
    with pytest.raises(ValueError, match="another model"):
        read_start(plan, "abd")


@pytest.mark.parametrize("alpha", [2, 6])
def test_an_adapter_that_another_trainer_saved_is_a_start_at_the_strength_that_its_metadata_says(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, alpha: int) -> None:
    """As the diffusers scripts save it: B as it is, and alpha beside it."""
    settings = Adapter(rank=2, alpha=6)
    model = trained(family, Adapter(rank=2, alpha=alpha))
    weights = adapter_weights(model)
    config = {"r": 2, "lora_alpha": alpha, "target_modules": sorted({name.split(".lora_")[0] for name in weights})}
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config)
    baton = read_start(plan_with(settings, family).model_copy(update={"start": str(tmp_path)}), "abc")
    assert baton.adapter is not None
    again = family.load_transformer(torch.float32, None)
    add_adapter(again, settings, family.target_patterns, 9)
    load_adapter_weights(again, baton.adapter, "test")
    assert difference(outputs(family, again, batches), outputs(family, model, batches)) <= 1e-5


# --- the folder -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_publishing_writes_adapter_card_and_previews_and_says_how_close_the_pipeline_came(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, storage: str) -> None:
    (tmp_path / "sheet.png").write_bytes(b"a picture")
    model = trained(family, SETTINGS[1], storage=storage)
    found = publish(tmp_path / "adapter", family, model, SETTINGS[1], batches, storage=storage, card="# card ☂", sheet=tmp_path / "sheet.png")
    assert 0 <= found <= (1e-5 if storage == "fp32" else 0.1)
    assert set(contents(tmp_path / "adapter")) == {ADAPTER_FILE, ".medley.json", "README.md", "previews.png"}
    assert (tmp_path / "adapter" / "README.md").read_text() == f"# card ☂\n## ComfyUI\n\nComfyUI reads `{ADAPTER_FILE}`.\n"
    assert (tmp_path / "adapter" / "previews.png").read_bytes() == b"a picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "sheet.png"]


def test_publishing_again_replaces_what_was_published_and_leaves_nothing_beside_it(family: Family, batches: dict[str, MicroBatch], tmp_path: Path) -> None:
    publish(tmp_path / "adapter", family, trained(family, SETTINGS[0]), SETTINGS[0], batches)
    before = contents(tmp_path / "adapter")
    publish(tmp_path / "adapter", family, trained(family, SETTINGS[0], strength=0.2), SETTINGS[0], batches, card="new")
    after = contents(tmp_path / "adapter")
    assert after["README.md"].startswith(b"new\n")
    assert after[ADAPTER_FILE] != before[ADAPTER_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.5, 1.0])
def test_an_adapter_that_was_written_right_is_published_over_a_base_in_bf16(family: Family, batches: dict[str, MicroBatch], tmp_path: Path, strength: float) -> None:
    """Also a strong one whose alpha / rank is no power of two: bf16 rounds 3 (B A x) and (3 B) A x apart, and that is no fault of the file."""
    publish(tmp_path / "adapter", family, trained(family, SETTINGS[1], strength=strength, storage="bf16"), SETTINGS[1], batches, storage="bf16")


def zeroed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def doubled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * value if ".lora_B." in name else value for name, value in weights.items()}


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half of the layers only."""
    names = sorted({name.split(".lora_")[0] for name in weights})
    return {name: value for name, value in weights.items() if name.split(".lora_")[0] in names[::2]}


def nothing(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Not a number."""
    return {name: torch.full_like(value, float("nan")) for name, value in weights.items()}


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", [zeroed, doubled, halved, nothing])
@pytest.mark.parametrize("strength", [0.1, 0.01])
def test_an_adapter_that_was_written_wrong_is_not_published_and_the_former_one_stands(
    family: Family,
    batches: dict[str, MicroBatch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    spoil: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    strength: float,
) -> None:
    """Over a base in bf16 too, and where the adapter changes the output by half a hundredth: little is not nothing."""
    settings = SETTINGS[1]
    publish(tmp_path / "adapter", family, trained(family, settings, strength=0.2), settings, batches)
    before = contents(tmp_path / "adapter")

    def write(path: Path, weights: Mapping[str, Tensor], *rest: Any) -> None:
        write_adapter(path, spoil(weights), *rest)

    monkeypatch.setattr(stages.layouts, "write_adapter", write)
    with pytest.raises(PublishError, match="not published"):
        publish(tmp_path / "adapter", family, trained(family, settings, strength=strength, storage=storage), settings, batches, storage=storage)
    assert contents(tmp_path / "adapter") == before


# --- a run without an adapter -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one stage that trains every weight and keeps their average."""
    folder = tmp_path_factory.mktemp("full")
    world = make_world(folder / "world")
    plan = plan_of(world, previews={"rows": 0})
    del plan["adapter"]
    plan["stages"] = [{**plan["stages"][0], "ema": 0.9}]
    launch([str(write_plan(folder / "tiny.yaml", plan)), "--out", str(folder / "run")], output=folder / "log")
    return folder


@pytest.mark.launch
def test_a_plan_of_full_stages_alone_is_carried_out(full: Path) -> None:
    assert (full / "run" / "model" / "model_index.json").exists(), (full / "log").read_text()


@pytest.mark.launch
def test_the_model_of_a_stage_with_ema_is_published_with_its_average(full: Path) -> None:
    """As docs/plan.md says: it is evaluated and published in the place of the raw weights."""
    published = load_file(full / "run" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    average = load_file(full / "run" / "stages" / "1-found" / "step-000006" / "ema.safetensors")
    assert all(torch.equal(published[name], value) for name, value in average.items())


@pytest.mark.launch
def test_a_full_stage_appended_to_a_finished_run_is_what_its_model_folder_holds_then(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    plan = plan_of(world, previews={"rows": 0})
    del plan["adapter"]
    for number in (1, 2):
        legs = [plan["stages"][0], {**plan["stages"][0], "name": "more"}][:number]
        file = write_plan(tmp_path / "tiny.yaml", {**plan, "stages": legs})
        assert launch([str(file), "--out", str(tmp_path / "run")], output=tmp_path / "log") == [0], (tmp_path / "log").read_text()
        trained = next((tmp_path / "run" / "stages" / f"{number}-{legs[-1]['name']}").glob("step-*"))
        published = load_file(tmp_path / "run" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(published[name], value) for name, value in load_file(trained / "transformer.safetensors").items())

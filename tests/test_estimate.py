"""The memory that is said before a stage trains is what a step takes: storage by storage against a step with numbers, and in bytes of a process."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.estimate import Case, Found, found, in_a_process
from mixing.buckets import Signature
from mixing.keys import key
from models import tiny_flux
from runs import carry_out, events, make_data, plan_of, write_plan
from stages.dropout import add_dropout
from stages.estimate import Counted, Estimate, encoder_bytes, estimate, estimate_words, latent_channels
from stages.explain import explain_run, show
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image
from stages.handoff import Baton, build_model
from stages.largest import Largest, made_up
from stages.memory import held_bytes, peak_bytes, restart_peak
from stages.objective import LeftOut, Objective
from stages.objectives.parts import losses
from stages.offload import off_device_bytes
from stages.placed import placed_adapters
from stages.plan import Plan
from stages.precision import StagePrecision
from stages.reader import read_plan
from stages.recomputation import recompute
from stages.storage import stored_bytes

CPU = torch.device("cpu")
MODELS = {"flux": flux, "flux2": flux2, "lumina2": lumina2, "omnigen": omnigen, "pixart": pixart, "qwen_image": qwen_image, "sana": sana, "sd3": sd3, "wan": wan, "z_image": z_image}
ASKED: Mapping[str, Mapping[str, Any]] = {
    "plain": {"precision": "fp32"},
    "quantised, computed again": {"precision": "bf16", "base": "nf4", "checkpointing": "full"},
    "full": {"precision": "fp32", "train": "full", "ema": 0.9},
}


QUICK = ("flux",)  # the others with -m slow: each takes seconds on a machine that is busy


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny model of each family."""
    return open_family(str(MODELS[request.param].build(tmp_path_factory.mktemp(request.param) / "model")), CPU)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Flux with a VAE."""
    return open_family(str(tiny_flux(tmp_path_factory.mktemp("one") / "model", pixels=False)), CPU)


def plan_with(**changes: Any) -> Plan:
    stage = {"name": "only", "steps": 4, "resolution": 8, "batch": {"images": 2, "micro": 2}, "lr": 0.01, **changes}
    return Plan.model_validate({"model": "m", "adapter": {"rank": 2, "targets": "linear"}, "sources": {"a": {"path": "a"}}, "stages": [stage]})


def largest_of(family: Family, images: int = 2) -> Largest:
    side = 4 * family.pixel_multiple
    return Largest("a", Signature((side, side), ()), images, 99, 0)


def really(family: Family, plan: Plan, largest: Largest) -> tuple[int, int]:
    """Bytes of a stage's model, and at the peak of its first step, counted as they are made."""
    stage = plan.stages[0]
    model, trainable = build_model(family, plan, stage, "stages[0]", Baton(None, None, "the test"))
    drawing = add_dropout(model, placed_adapters(plan, 0), trainable.values())
    recompute(model, stage.checkpointing, CPU)
    text = family.encode_prompts([" ".join(["word"] * max(1, family.text_tokens))]).rows(torch.zeros(largest.images, dtype=torch.int64))
    batch, shown = made_up(family, largest, 1, latent_channels(family), text)
    none, precision = (False,) * largest.images, StagePrecision(stage.precision, CPU)
    held = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    with Counted([*model.parameters(), *model.buffers()]) as counted:
        for part in Objective(family, stage, key("estimate"), precision.dtype, largest.images).parts(batch, shown, LeftOut(none, none), 0):
            with drawing.of([0] * largest.images):
                with precision.autocast():
                    predicted = shown.predict_part(family, model, part)
                losses(predicted, part).sum().backward()  # type: ignore[no-untyped-call]
    return held, counted.peak


@pytest.mark.parametrize("asked", ASKED)
def test_a_step_without_numbers_takes_what_the_step_takes_in_every_family(family: Family, asked: str) -> None:
    plan, largest = plan_with(**ASKED[asked]), largest_of(family)
    told = estimate(family, plan, 0, largest, "cpu")
    held, peak = really(family, plan, largest)
    trained = told.trained if asked != "full" else told.trained // 4  # weight, two moments, average; the moments are made in the first step
    assert told.base + (trained // 3 if asked != "full" else trained) == held
    # These prompts are shorter or longer than a real model's: tiny SD3's CLIP has 8 tokens and not 77, tiny OmniGen's ids stand for two ways to read a prompt.
    assert told.step == pytest.approx(peak, rel=0.02 if family.name not in ("sd3", "omnigen") else 0.35)


def test_making_a_step_without_numbers_leaves_nothing_of_it_behind(family: Family) -> None:
    largest, plan = largest_of(family), plan_with(precision="fp32")
    estimate(family, plan, 0, largest, "cuda")
    model, _ = build_model(family, plan, plan.stages[0], "stages[0]", Baton(None, None, "the test"))
    text = family.encode_prompts(["a red disc"] * 2)
    _, shown = made_up(family, largest, 1, latent_channels(family), text)
    predicted = shown.predict(family, model, shown.x, torch.tensor([0.3, 0.6]))
    assert not isinstance(predicted, FakeTensor)
    assert bool(predicted.isfinite().all())


def test_nothing_is_encoded_for_an_estimate(tmp_path: Path) -> None:
    family = open_family(str(tiny_flux(tmp_path / "model", pixels=False)), CPU)
    told = estimate(family, plan_with(), 0, largest_of(family), "cuda")
    assert family.encoder_uses == 0
    assert family.held_encoders == ()
    (vae, prompter) = family.vae, family.prompter
    parts = [part for part in prompter.components.values() if isinstance(part, torch.nn.Module)]
    numbers = [sum(each.numel() for each in part.parameters()) for part in (vae, *parts)]
    assert told.encoders == encoder_bytes(family, "cuda") == 4 * numbers[0] + 2 * sum(numbers[1:])
    assert encoder_bytes(family, "cpu") == 4 * sum(numbers)


def test_a_base_kept_off_the_device_is_counted_where_it_is(one: Family) -> None:
    plain, kept = (estimate(one, plan_with(precision="bf16", offload=asked), 0, largest_of(one), "cuda") for asked in (False, True))
    assert plain.off_device == 0
    assert plain.base == kept.base + kept.off_device
    assert kept.off_device == off_device_bytes(build_model(one, plan_with(precision="bf16", offload=True), plan_with(precision="bf16", offload=True).stages[0], "", Baton(None, None, ""))[0])
    assert kept.peak < plain.peak
    assert estimate(one, plan_with(precision="bf16", offload=True), 0, largest_of(one), "cpu").off_device == 0, "on the CPU it is there anyhow"


def test_more_images_an_average_and_further_processes_take_more(one: Family) -> None:
    def peak(images: int = 2, processes: int = 1, **changes: Any) -> int:
        return estimate(one, plan_with(precision="fp32", **changes), 0, largest_of(one, images), "cpu", processes=processes).peak

    assert peak() < peak(4)
    numbers = estimate(one, plan_with(precision="fp32"), 0, largest_of(one), "cpu").trained // 12
    assert peak(ema=0.9) - peak() == 4 * numbers
    assert peak(processes=2) - peak() == 4 * numbers
    assert peak(optimizer={"name": "adamw8bit"}) - peak() == -6 * numbers
    assert peak(checkpointing="full") < peak()


def test_on_a_gpu_autocast_keeps_norms_in_float32(one: Family) -> None:
    cpu, gpu = (estimate(one, plan_with(precision="bf16", checkpointing="none"), 0, largest_of(one, 4), kind) for kind in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert gpu.step > cpu.step
    assert estimate(one, plan_with(precision="bf16", checkpointing="full"), 0, largest_of(one, 4), "cuda").step < gpu.step


def test_an_estimate_is_said_with_what_it_is_the_sum_of() -> None:
    said = estimate_words(Estimate(2**30, 2**31, 2**20, 2**29, 2**28))
    assert said == (
        "1.5 GiB at a step's peak (1 GiB the frozen weights, 1 MiB what trains, with its optimizer, 512 MiB gradients and activations), 2 GiB of weights beside it on the CPU, "
        "and 256 MiB more while images and prompts are encoded"
    )


@pytest.mark.skipif(peak_bytes(CPU) is None, reason="only Linux tells a process its peak")
def test_the_peak_of_a_process_can_be_measured_from_now_on() -> None:
    taken = torch.ones(50_000_000)
    del taken
    restart_peak(CPU)
    before = held_bytes(CPU)
    taken = torch.ones(30_000_000)
    del taken
    peak = peak_bytes(CPU)
    assert peak is not None
    assert 115e6 < peak - before < 135e6


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.skipif(peak_bytes(CPU) is None, reason="only Linux tells a process its peak")
@pytest.mark.parametrize("case", [Case("flux", {"precision": "fp32"}, 1), Case("sd3", {"precision": "fp32"}, 2), Case("flux", {"precision": "bf16"}, 4)], ids=str)
def test_the_estimate_is_within_15_percent_of_what_a_process_takes(case: Case) -> None:
    assert abs(in_a_process(case, "cpu").ratio - 1) < 0.15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("case", [Case("flux", {"precision": "bf16"}, 4), Case("flux", {"precision": "bf16", "base": "nf4", "offload": True}, 4), Case("sd3", {"precision": "bf16", "checkpointing": "full"}, 4)], ids=str)
def test_the_estimate_is_within_15_percent_of_what_torch_allocates_on_a_gpu(case: Case) -> None:
    told: Found = found(case, torch.device("cuda"))
    assert abs(told.ratio - 1) < 0.15


@pytest.mark.launch
def test_explain_says_what_a_step_takes_on_a_cpu_and_on_a_gpu_and_a_run_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "data")
    tiny_flux(tmp_path / "model", pixels=True)
    stage = {"name": "only", "steps": 2, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "bf16"}
    plan = plan_of(tmp_path, stages=[stage], previews={"rows": 0})
    console = Console(file=io.StringIO(), width=100)
    show(explain_run(read_plan(write_plan(tmp_path / "plan.yaml", plan)).plan), console)
    assert isinstance(console.file, io.StringIO)
    said = " ".join(console.file.getvalue().split())
    assert "memory on this CPU" in said
    assert "; on a GPU" in said
    assert "at a step's peak (" in said
    monkeypatch.setattr("stages.finish_leg._LEAST_TO_ESTIMATE", 1)
    carry_out(tmp_path / "run", plan)
    (line,) = [event for event in events(tmp_path / "run", "memory") if event["kind"] == "peak"]
    assert line["estimated_bytes"] > 0
    assert line["peak_bytes"] > 0


def test_weights_are_counted_as_they_are_stored(one: Family) -> None:
    plain = one.load_transformer(torch.float32, None)
    for storage, size in stored_bytes(plain).items():
        told = estimate(one, plan_with(precision="bf16", base=storage), 0, largest_of(one), "cpu")
        assert told.base == size

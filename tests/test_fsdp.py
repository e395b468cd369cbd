"""FSDP2 over gloo on the CPU: the same training as by one process, of a model of which each process has a part."""

from __future__ import annotations

import multiprocessing
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import adapted, noise
from runs import FSDP2, carry_out, events, free_port, make_world, plan_of, traced
from stages.adapter import choose_trainable
from stages.families.open import open_family
from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image
from stages.fsdp import Sharded
from stages.launched import Launched, launched, read_launched
from stages.precision import StagePrecision, start_accelerator
from stages.problems import LaunchError
from stages.sharing import whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def short(world: Path, **changes: Any) -> dict[str, Any]:
    """Every weight with an average, the adapter over nf4, the adapter with references left out of some images: in float32, with an epsilon under which rounding stays rounding.

    With three sources the first process of two has more to evaluate and to sample, and where references are left out a micro-batch has one part or two.
    """
    photos = world / "data" / "photos"
    plan = plan_of(world, save_every=1, **changes)
    plan["sources"]["others"] = {"path": str(photos)}
    shared = {"steps": 3, "optimizer": {"eps": 1e-2}, "precision": "fp32", "resolution": 8, "batch": {"images": 8, "micro": 2}, "lr": 0.01}
    plan["stages"] = [
        {**shared, "name": "found", "train": "full", "ema": 0.9, "mix": {"photos": 1}},
        {**shared, "name": "expose", "base": "nf4", "mix": {"photos": 2, "edits": 1, "others": 1}},
        {**shared, "name": "refine", "ema": 0.9, "mix": {"photos": 1, "edits": 3}, "dropout": {"references": 0.5, "prompt": 0.2}},
    ]
    return plan


def apart(one: Path, other: Path) -> float:
    """Largest difference of two runs' published adapters."""
    first, second = (load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def by_one(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    carry_out(folder, short(world), "--trace")
    return folder


def test_sharded_run_through_all_stages_ends_as_that_of_one_process(world: Path, by_one: Path, tmp_path: Path) -> None:
    said = carry_out(tmp_path / "sharded", short(world), "--trace", processes=2, told=FSDP2)
    assert "2 processes by FSDP2" in said
    assert traced(by_one) == traced(tmp_path / "sharded")
    assert apart(by_one, tmp_path / "sharded") < 1e-6
    for mine, other in zip(events(by_one, "step"), events(tmp_path / "sharded", "step"), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)
    for mine, other in zip(events(by_one, "eval"), events(tmp_path / "sharded", "eval"), strict=True):
        rows = {name: (entry["rows"], entry["loss"]) for name, entry in mine["sources"].items()}
        assert rows == {name: (entry["rows"], pytest.approx(entry["loss"], rel=1e-5)) for name, entry in other["sources"].items()}
    held = re.findall(r"holds (\d+\.\d)% of the model's numbers", said)
    assert len(held) == 3
    assert all(49 < float(share) < 60 for share in held), "half of the base, and adapters whole"


def test_run_goes_on_under_other_engines_and_numbers_of_processes(world: Path, by_one: Path, tmp_path: Path) -> None:
    folder, record = tmp_path / "run", tmp_path / "events"
    carry_out(tmp_path / "counted", short(world), "--until", "found", processes=2, told=FSDP2, record=record)
    carry_out(folder, short(world), processes=2, told=FSDP2, kill_at=int(record.read_text()) * 3 // 4)  # in the first stage, which trains every weight with an average
    first = carry_out(folder, short(world), "--until", "found")
    assert "going on with stage 'found' after step" in first
    carry_out(folder, short(world), "--until", "expose", processes=2)
    carry_out(folder, short(world), processes=2, told=FSDP2)
    assert {run["engine"] for run in events(folder, "run")} == {"", "DDP", "FSDP2"}
    assert apart(by_one, folder) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "told", "stage"),
    [
        (4, {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {}),
        (2, {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}),
        (2, {"FSDP_TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock,FluxSingleTransformerBlock"}, {}),
        (2, {}, {"compile": "aot_eager", "checkpointing": "full"}),
    ],
    ids=["two replicas of two", "gathered weights kept", "classes named", "compiled and recomputed"],
)
def test_other_ways_to_shard_end_alike(world: Path, by_one: Path, tmp_path: Path, processes: int, told: dict[str, str], stage: dict[str, str]) -> None:
    plan = short(world)
    for each in plan["stages"]:
        each |= stage
    carry_out(tmp_path / "run", plan, processes=processes, told={**FSDP2, **told})
    assert apart(by_one, tmp_path / "run") < 1e-6


def learn_sharded(rank: int, port: int, folder: Path, found: Any) -> None:
    """In a process of its own: the gradients of an adapter, and of every weight, of a whole model and of a sharded one; hands in the largest difference of each."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    engine = Sharded(Launched("fsdp2"), start_accelerator())
    family, precision = open_family(str(folder), torch.device("cpu")), StagePrecision("fp32", torch.device("cpu"))
    side, small = 4 * family.pixel_multiple, 2 * family.pixel_multiple
    x = noise(2, family.encode_images(torch.zeros(1, 3, small, small)).shape[1], side // family.factor, side // family.factor)
    apart = []
    for train in ("adapter", "full"):
        gradients = []
        for sharded in (False, True):
            model = adapted(family) if train == "adapter" else family.load_transformer(torch.float32, None)
            training: Any = SimpleNamespace(wrapped=model, trainable=choose_trainable(model.train(), train, "test", unread=family.unread))
            if sharded:
                training = engine.train(model, training.trainable, lambda parameters: torch.optim.SGD(parameters.values(), lr=0.1), precision)
                assert engine.held_share(model) < 0.95
            predicted = family.predict(training.wrapped, x, torch.tensor([0.3, 0.6]), family.encode_prompts(["a red disc", "a blue square"]))
            predicted.square().mean().backward()
            gradients.append({name: whole(weight.grad) for name, weight in training.trainable.items() if weight.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        size = max(float(gradient.abs().max()) for gradient in gradients[0].values())
        apart.append(max(float((gradient - gradients[1][name]).abs().max()) for name, gradient in gradients[0].items()) / size)
    found.put((rank, apart))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("build", [flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image], ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_family_learns_sharded_what_it_learns_whole(build: Any, tmp_path: Path) -> None:
    folder, forked = build.build(tmp_path / "model"), multiprocessing.get_context("fork")
    found, port = forked.Queue(), free_port()
    processes = [forked.Process(target=learn_sharded, args=(rank, port, folder, found)) for rank in range(2)]
    for process in processes:
        process.start()
    apart = dict(found.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    assert all(largest < 1e-5 for rank in (0, 1) for largest in apart[rank]), apart


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1; write 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true, which is not heeded; write offload: true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "write checkpointing: full into the plan's stages"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "write fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2, which is not heeded"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "write compile: true into the stages"),
    ],
)
def test_what_the_launcher_is_told_and_medley_does_not_heed_is_refused_by_name(told: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)):
        read_launched({**FSDP2, **told})


def test_while_a_run_goes_on_libraries_do_not_see_that_it_is_sharded() -> None:
    environment = {**FSDP2, "PATH": "x", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
    before = dict(environment)
    with launched(environment) as told:
        assert environment == {"PATH": "x"}
        assert (told.engine, told.reshard, told.blocks, told.replicas) == ("fsdp2", True, (), 2)
    assert environment == before


def test_one_process_and_an_optimizer_of_whole_weights_are_refused_before_anything_is_loaded(world: Path, tmp_path: Path) -> None:
    assert "shares a model out among processes, and one was started" in carry_out(tmp_path / "alone", short(world), told=FSDP2, expect=1)
    plan = short(world)
    plan["stages"][0]["optimizer"] = {"name": "adamw8bit"}
    said = carry_out(tmp_path / "bits", plan, processes=2, told=FSDP2, expect=2)
    assert "stages[0].optimizer: 'adamw8bit' takes whole weights, and train: full is sharded by FSDP2; write adamw" in said

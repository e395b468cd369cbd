"""What a run does, measured on tiny ones: stages, handoffs, what trained, what it leaves behind, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import tiny_flux
from runs import adapter_bytes, copy_run, events, launch, make_world, plan_of, write_plan

PROCESSES = pytest.mark.launch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """A finished run of the three tiny stages; not to be written into."""
    run(world / "finished", plan_of(world), "--trace")
    return world / "finished"


def run(folder: Path, plan: dict[str, Any], *options: str, processes: int = 1, expect: int = 0) -> str:
    """Carry out a plan in a forked process; returns what it printed."""
    file = write_plan(folder.with_suffix(".yaml"), plan)
    output = folder.with_suffix(".log")
    output.unlink(missing_ok=True)
    codes = launch([str(file), "--out", str(folder), *options], processes=processes, output=output)
    assert codes == [expect] * processes, output.read_text()
    return output.read_text()


def last_step(folder: Path, stage: str) -> Path:
    return sorted((folder / "stages" / stage).glob("step-*"))[-1]


def trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


# --- what a run leaves behind -----------------------------------------------------------------------------------------------------------


def test_run_folder_holds_what_the_design_promises(finished: Path) -> None:
    for name in ("plan.yaml", "environment.json", "metrics.jsonl", "ledger.json", "trace.jsonl", "report.html", "adapter/pytorch_lora_weights.safetensors", "adapter/README.md", "model/model_index.json"):
        assert (finished / name).stat().st_size > 0, name
    assert sorted(path.name for path in (finished / "stages").iterdir()) == ["1-found", "2-expose", "3-refine"]
    manifest = json.loads((last_step(finished, "2-expose") / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter.safetensors", "optimizer.safetensors", "probe.safetensors", "state.json"}
    suffixes = {path.suffix for path in (finished / "stages").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_ledger_counts_what_the_trace_shows(finished: Path) -> None:
    ledger = json.loads((finished / "ledger.json").read_text())
    for page in ledger["stages"]:
        rows = [line for line in trace(finished) if line["stage"] == page["stage"]]
        assert len(rows) == page["images"] == 48
        for name, entry in page["sources"].items():
            assert entry["images"] == sum(line["source"] == name for line in rows)
            assert entry["drawn"] == pytest.approx(entry["images"] / 48)
            if page["stage"] == "found":
                assert entry["unique_rows"] == len({line["key"] for line in rows if line["source"] == name})
    refine = ledger["stages"][2]["sources"]
    assert refine["photos"]["asked"] == pytest.approx(0.75)
    assert abs(refine["photos"]["images"] - 36) <= 4


def test_held_out_rows_are_never_trained_on(finished: Path) -> None:
    measured = json.loads((finished / "evaluations" / "base-8.json").read_text())["losses"]
    drawn = {(line["source"], line["key"]) for line in trace(finished)}
    held_out = {(source, row) for source, rows in measured.items() for row in rows}
    assert len(held_out) == 4
    assert not drawn & held_out


def test_each_stage_multiplied_in_the_dtype_that_its_plan_asks_for(finished: Path) -> None:
    asked = {"found": "fp32", "expose": "bf16", "refine": "fp32"}
    for line in events(finished, "step"):
        assert line["multiplied_in"] == asked[line["stage"]]


@PROCESSES
def test_fp16_stage_multiplies_in_fp16_and_scales_its_loss(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"] = [{**plan["stages"][1], "name": "half", "precision": "fp16"}]
    run(tmp_path / "half", plan)
    steps = events(tmp_path / "half", "step")
    assert {line["multiplied_in"] for line in steps} == {"fp16"}
    assert steps[-1]["loss_scale"] > 1


def test_learning_rate_is_the_plans_at_every_logged_step(finished: Path) -> None:
    rates = {(line["stage"], line["step"]): line["lr"] for line in events(finished, "step")}
    assert rates["found", 1] == rates["found", 6] == 0.01
    assert rates["refine", 1] == 0.01
    assert rates["refine", 6] == pytest.approx(0.0, abs=1e-12)


# --- what trained -----------------------------------------------------------------------------------------------------------------------


def test_full_stage_changes_every_weight_and_adapter_stages_none_of_the_base(finished: Path, world: Path) -> None:
    original = load_file(world / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = load_file(last_step(finished, "1-found") / "transformer.safetensors")
    assert original.keys() == trained.keys()
    assert all(not torch.equal(original[name], trained[name]) for name in original)
    published = load_file(finished / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(published[name], trained[name]) for name in trained)


def test_every_pair_of_the_adapter_trained(finished: Path) -> None:
    first, second = (load_file(last_step(finished, stage) / "adapter.safetensors") for stage in ("2-expose", "3-refine"))
    assert all(value.dtype == torch.float32 and value.abs().max() > 0 for value in first.values())
    assert all(not torch.equal(first[name], second[name]) for name in first)


@PROCESSES
def test_patterns_train_only_what_they_match(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"] = [plan["stages"][1], {**plan["stages"][2], "train": [r"transformer_blocks\.0\.attn\.to_[qkv]"]}]
    run(tmp_path / "some", plan)
    before, after = (load_file(last_step(tmp_path / "some", stage) / "adapter.safetensors") for stage in ("1-expose", "2-refine"))
    changed = {name.split(".lora_")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"}


@PROCESSES
def test_pattern_that_matches_nothing_is_an_error_before_training(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"] = [{**plan["stages"][1], "train": [r"transformer_block\..*"]}]
    printed = run(tmp_path / "none", plan, expect=2)
    assert "stages[0].train" in printed
    assert "matches none of the" in printed
    assert "Traceback" not in printed


# --- handoffs ---------------------------------------------------------------------------------------------------------------------------


def test_handoff_says_how_much_the_function_changed_and_why(finished: Path) -> None:
    to_bf16, to_fp32 = events(finished, "handoff")
    assert to_bf16["cause"] == "precision fp32 -> bf16, base stored in fp32 -> bf16"
    assert 0 < max(to_bf16["delta"].values()) < 0.1
    assert not to_fp32["exact"]
    assert to_fp32["changes"]["precision"] == ["bf16", "fp32"]


@PROCESSES
def test_the_first_loss_after_a_handoff_is_the_last_stages_model_on_the_same_rows(world: Path, tmp_path: Path) -> None:
    """Precision and storage agree: the held-out losses before and after the handoff are the same numbers, and so is the function."""
    plan = plan_of(world)
    plan["stages"] = [{**stage, "precision": "fp32", "base": "fp32", "ema": None} for stage in plan["stages"]]
    run(tmp_path / "same", plan)
    ends = {line["stage"]: line["sources"] for line in events(tmp_path / "same", "eval") if line["kind"] == "end"}
    starts = {line["stage"]: line["sources"] for line in events(tmp_path / "same", "eval") if line["kind"] == "start"}
    for before, after in (("found", "expose"), ("expose", "refine")):
        for source in ("photos", "edits"):
            assert starts[after][source]["loss"] == pytest.approx(ends[before][source]["loss"], rel=1e-6)
    assert all(line["exact"] and max(line["delta"].values()) <= 1e-4 for line in events(tmp_path / "same", "handoff"))


@PROCESSES
def test_optimizer_is_kept_where_the_plan_says_so(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"] = [plan["stages"][1], {**plan["stages"][2], "handoff": {"optimizer": "keep"}}]
    run(tmp_path / "kept", plan)
    first, second = (load_file(last_step(tmp_path / "kept", stage) / "optimizer.safetensors") for stage in ("1-expose", "2-refine"))
    assert {float(value) for name, value in first.items() if name.endswith("::step")} == {6.0}
    assert {float(value) for name, value in second.items() if name.endswith("::step")} == {12.0}
    (handoff,) = events(tmp_path / "kept", "handoff")
    assert any("optimizer" in word for word in handoff["kept"])


# --- publishing -------------------------------------------------------------------------------------------------------------------------


def test_published_adapter_loads_in_the_stock_pipeline_and_gives_what_training_saw(finished: Path) -> None:
    (line,) = events(finished, "publish")
    assert line["max_difference"] <= 1e-5
    pipe = FluxPipeline.from_pretrained(finished / "model", vae=None)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 8}
    plain = pipe("a red square", **options, generator=torch.Generator().manual_seed(0)).images
    pipe.load_lora_weights(finished / "adapter", weight_name="pytorch_lora_weights.safetensors")
    adapted = pipe("a red square", **options, generator=torch.Generator().manual_seed(0)).images
    assert (plain - adapted).abs().max() > 1e-3
    with safe_open(finished / "adapter" / "pytorch_lora_weights.safetensors", "pt") as header:
        notes = header.metadata()
    assert "refine" in notes["medley.plan"]
    assert [page["stage"] for page in json.loads(notes["medley.ledger"])["stages"]] == ["found", "expose", "refine"]
    card = (finished / "adapter" / "README.md").read_text()
    assert "| refine | photos | 75.0% |" in card


@PROCESSES
@pytest.mark.parametrize("pipeline", ["FluxPipeline", "FluxKontextPipeline"])
def test_guidance_distilled_model_with_a_vae_trains_at_two_resolutions_and_its_adapter_loads(world: Path, tmp_path: Path, pipeline: str) -> None:
    model = tiny_flux(tmp_path / "model", pixels=False, guidance=True, pipeline=pipeline)
    plan = plan_of(world, model={"repo": str(model), "guidance": 2.0})
    plan["stages"] = [{**plan["stages"][1], "steps": 3}, {**plan["stages"][2], "steps": 3, "precision": "bf16", "resolution": 16}]
    printed = run(tmp_path / "run", plan)
    assert f"loaded back by {pipeline}" in printed
    assert not (tmp_path / "run" / "model").exists(), "the base was not trained"
    (handoff,) = events(tmp_path / "run", "handoff")
    assert handoff["changes"]["resolution"] == [8, 16]
    assert max(handoff["delta"].values()) < 1e-6
    base = [line for line in events(tmp_path / "run", "eval") if line["kind"] == "base"]
    assert len(base) == 2, "one for each resolution"


# --- going on ---------------------------------------------------------------------------------------------------------------------------


@PROCESSES
def test_finished_run_is_answered_without_training_again(finished: Path, world: Path, tmp_path: Path) -> None:
    folder = copy_run(finished, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*.safetensors")}
    printed = run(folder, plan_of(world))
    assert "'refine' is finished" in printed
    assert {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*.safetensors")} == before
    assert adapter_bytes(folder) == adapter_bytes(finished)
    assert len(events(folder, "publish")) == 1


@PROCESSES
def test_appended_stage_is_trained_next_as_if_it_had_always_been_there(world: Path, tmp_path: Path, finished: Path) -> None:
    plan = plan_of(world)
    run(tmp_path / "short", {**plan, "stages": plan["stages"][:2]}, "--trace")
    printed = run(tmp_path / "short", plan, "--trace")
    assert "'expose' is finished" in printed
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(finished)
    assert (tmp_path / "short" / "trace.jsonl").read_bytes() == (finished / "trace.jsonl").read_bytes()


@PROCESSES
def test_stages_appended_with_new_sources_of_a_new_kind_are_measured_on_the_rows_of_old(world: Path, tmp_path: Path) -> None:
    """The new source stands first, and brings a signature that the base was not measured on."""
    plan = plan_of(world)
    stage = {**plan["stages"][1], "precision": "fp32", "base": "fp32"}
    photos, edits = ({name: plan["sources"][name]} for name in ("photos", "edits"))
    run(tmp_path / "run", {**plan, "sources": photos, "stages": [{**stage, "mix": {"photos": 1}}]})
    stages = [{**stage, "mix": {"photos": 1}}, {**stage, "name": "both"}, {**stage, "name": "last"}]
    more = {"more": {**plan["sources"]["photos"], "take": {"count": 20}}}
    run(tmp_path / "run", {**plan, "sources": {**more, **edits, **photos}, "stages": stages})
    first, second = events(tmp_path / "run", "handoff")
    for handoff in (first, second):
        assert handoff["exact"]
        assert set(handoff["delta"]) == {"0.1", "0.5", "0.9"}
        assert max(handoff["delta"].values()) <= 1e-4
    (end,) = [line for line in events(tmp_path / "run", "eval") if line["stage"] == "last" and line["kind"] == "end"]
    assert all("since_base" in entry for entry in end["sources"].values())
    assert set(end["sources"]) == {"more", "edits", "photos"}


@PROCESSES
def test_until_stops_after_a_stage_and_the_same_command_goes_on(world: Path, tmp_path: Path, finished: Path) -> None:
    run(tmp_path / "part", plan_of(world), "--until", "expose")
    assert not (tmp_path / "part" / "adapter").exists()
    run(tmp_path / "part", plan_of(world), "--until", "refine")
    assert adapter_bytes(tmp_path / "part") == adapter_bytes(finished), "the last stage is the end"


@PROCESSES
def test_a_last_stage_that_was_deleted_is_trained_anew_and_published_as_it_was(world: Path, tmp_path: Path, finished: Path) -> None:
    folder = copy_run(finished, tmp_path / "again")
    shutil.rmtree(folder / "stages" / "3-refine")
    run(folder, plan_of(world), "--trace")
    assert adapter_bytes(folder) == adapter_bytes(finished)
    assert [line["max_difference"] for line in events(folder, "publish")] == [line["max_difference"] for line in events(finished, "publish")]
    assert (folder / "trace.jsonl").read_bytes() == (finished / "trace.jsonl").read_bytes()


@PROCESSES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.expose.lr=0.02", "stages[1].lr.peak was 0.01, is 0.02, and stage 'expose' is finished"),
        ("seed=4", "seed was 3, is 4"),
        ("sources.edits.take.count=10", "sources.edits.take"),
        ("adapter.rank=3", "adapter.rank was 2, is 3"),
    ],
)
def test_changing_a_finished_stage_is_refused_by_name(finished: Path, world: Path, tmp_path: Path, change: str, message: str) -> None:
    folder = copy_run(finished, tmp_path / "changed")
    printed = run(folder, plan_of(world), "--set", change, expect=2)
    assert message in printed
    assert "pass --out" in printed
    assert "Traceback" not in printed


@PROCESSES
def test_changing_a_later_stage_is_fine(world: Path, tmp_path: Path) -> None:
    run(tmp_path / "later", plan_of(world), "--until", "found")
    run(tmp_path / "later", plan_of(world), "--set", "stages.expose.lr=0.02", "--set", "log_every=3")
    assert events(tmp_path / "later", "step")[-1]["stage"] == "refine"


@PROCESSES
def test_renamed_stage_is_refused(finished: Path, world: Path, tmp_path: Path) -> None:
    folder = copy_run(finished, tmp_path / "renamed")
    plan = plan_of(world)
    plan["stages"][1]["name"] = "other"
    assert "holds stage '2-expose', which the plan does not have at that place" in run(folder, plan, expect=2)


@PROCESSES
def test_changed_rows_are_refused_in_a_stage_that_has_begun(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    file, folder = write_plan(tmp_path / "p.yaml", plan_of(world)), tmp_path / "run"
    assert launch([str(file), "--out", str(folder)], kill_at=40) == [-9]
    (world / "data" / "photos" / "001.txt").write_text("a blue disc")
    log = tmp_path / "log"
    assert launch([str(file), "--out", str(folder)], output=log) == [2]
    assert "its rows have changed since stage" in log.read_text()


@PROCESSES
def test_branch_starts_from_another_runs_stage_and_from_a_published_adapter(finished: Path, world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    stage = {**plan["stages"][2], "precision": "fp32", "steps": 1, "lr": 0.0, "ema": None}
    whole = {**plan, "stages": [stage], "start": str(finished)}
    run(tmp_path / "whole", whole)
    assert load_file(last_step(tmp_path / "whole", "1-refine") / "adapter.safetensors").keys()
    for place, other in (("stage", finished / "stages" / "3-refine"), ("run", finished)):
        run(tmp_path / place, {**whole, "start": str(other)})
        started, ended = (load_file(last_step(folder, name) / "adapter.safetensors") for folder, name in ((tmp_path / place, "1-refine"), (finished, "3-refine")))
        assert all(torch.equal(started[name], ended[name]) for name in ended)
    # the published file holds the moving average, with alpha / rank in B, and belongs to the model that the run trained
    published = {**whole, "start": str(finished / "adapter"), "adapter": {"rank": 2, "alpha": 1}}
    assert "belongs to the weights that its run had trained before it" in run(tmp_path / "untrained", published, expect=2)
    run(tmp_path / "published", {**published, "model": str(finished / "model")})
    started = load_file(last_step(tmp_path / "published", "1-refine") / "adapter.safetensors")
    published = load_file(finished / "adapter" / "pytorch_lora_weights.safetensors")
    name = next(name for name in started if ".lora_B." in name)
    assert torch.allclose(started[name] * 0.5, published[f"transformer.{name}"])


@PROCESSES
def test_start_that_is_nothing_or_another_rank_is_refused(finished: Path, world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"] = plan["stages"][2:]
    assert "start" in run(tmp_path / "a", {**plan, "start": str(tmp_path / "nowhere")}, expect=2)
    assert "has rank 2, the plan asks for 5" in run(tmp_path / "b", {**plan, "start": str(finished), "adapter": {"rank": 5}}, expect=2)


@PROCESSES
def test_torn_checkpoint_is_named_and_the_one_before_is_taken(world: Path, tmp_path: Path, finished: Path) -> None:
    file, folder, log = write_plan(tmp_path / "p.yaml", plan_of(world, keep=3)), tmp_path / "run", tmp_path / "log"
    assert launch([str(file), "--out", str(folder)], output=log, kill_at=90) == [-9]
    torn = sorted(folder.glob("stages/*/step-*/optimizer.safetensors"))[-1]
    data = bytearray(torn.read_bytes())
    data[-3] ^= 1
    torn.write_bytes(bytes(data))
    assert launch([str(file), "--out", str(folder)], output=log) == [0]
    assert "optimizer.safetensors is not what was written" in log.read_text()
    gone_on, whole = (load_file(run / "adapter" / "pytorch_lora_weights.safetensors") for run in (folder, finished))
    assert all(torch.equal(gone_on[name], whole[name]) for name in whole)


@PROCESSES
def test_second_launch_on_one_folder_is_refused(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"][0]["steps"] = 100_000
    file, folder = write_plan(tmp_path / "p.yaml", plan), tmp_path / "run"
    child = os.fork()
    if child == 0:
        launch([str(file), "--out", str(folder)])
        os._exit(0)
    wait_for(folder, steps=2)
    log = tmp_path / "log"
    assert launch([str(file), "--out", str(folder)], output=log) == [2]
    assert "another launch is training in this folder" in log.read_text()
    end_children(child)


def wait_for(folder: Path, steps: int) -> None:
    """Wait until a run has logged so many steps."""
    for _ in range(600):
        if (folder / "metrics.jsonl").exists() and len(events(folder, "step")) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not begin")


def end_children(child: int) -> None:
    """Kill a forked launcher and what it launched."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == child:
            os.kill(int(path.parent.name), signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@PROCESSES
@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)])
def test_signal_saves_and_leaves_within_seconds_and_the_same_command_goes_on(world: Path, tmp_path: Path, number: signal.Signals, code: int, workers: int) -> None:
    plan = plan_of(world, workers=workers, log_every=1, save_every=10**6)
    plan["stages"] = [{**plan["stages"][1], "steps": 80}]
    file, folder, log = write_plan(tmp_path / "p.yaml", plan), tmp_path / "run", tmp_path / "log"
    import train

    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os._exit(train.main([str(file), "--out", str(folder)]))
    wait_for(folder, steps=3)
    began = time.monotonic()
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert time.monotonic() - began < 10
    assert os.waitstatus_to_exitcode(status) == code, log.read_text()
    step = int(last_step(folder, "1-expose").name.removeprefix("step-"))
    assert 3 <= step < 80
    assert launch([str(file), "--out", str(folder)]) == [0]
    assert launch([str(file), "--out", str(tmp_path / "whole")]) == [0]
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")


@PROCESSES
def test_run_whose_launcher_was_killed_saves_and_leaves(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world, log_every=1, save_every=10**6)
    plan["stages"] = [{**plan["stages"][1], "steps": 100_000}]
    file, folder = write_plan(tmp_path / "p.yaml", plan), tmp_path / "run"
    launcher = os.fork()
    if launcher == 0:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        launch([str(file), "--out", str(folder)])
        os._exit(0)
    wait_for(folder, steps=3)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    for _ in range(200):
        if list((folder / "stages" / "1-expose").glob("step-*")):
            break
        time.sleep(0.05)
    assert int(last_step(folder, "1-expose").name.removeprefix("step-")) < 100_000


# --- processes --------------------------------------------------------------------------------------------------------------------------


@PROCESSES
def test_run_begun_with_one_process_and_finished_with_two_draws_the_same_rows(world: Path, tmp_path: Path, finished: Path) -> None:
    run(tmp_path / "both", plan_of(world), "--trace", "--until", "found")
    run(tmp_path / "both", plan_of(world), "--trace", processes=2)
    assert (tmp_path / "both" / "trace.jsonl").read_bytes() == (finished / "trace.jsonl").read_bytes()


@PROCESSES
def test_two_and_three_processes_take_the_step_that_one_takes(world: Path, tmp_path: Path) -> None:
    """Images of a step are added up in another order, and AdamW makes a whole step of a gradient that is nothing but rounding; a large eps keeps it from that."""
    plan = plan_of(world)
    for stage in plan["stages"]:
        stage |= {"optimizer": {"eps": 1e-2}, "precision": "fp32"}
    ends = []
    for processes in (1, 2, 3):
        run(tmp_path / str(processes), plan, processes=processes)
        ends.append(load_file(tmp_path / str(processes) / "adapter" / "pytorch_lora_weights.safetensors"))
    for other in ends[1:]:
        assert max(float((ends[0][name] - other[name]).abs().max()) for name in other) <= 1e-5


@PROCESSES
def test_step_with_fewer_images_than_processes_is_refused_with_the_cure(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"][1]["batch"] = 1
    printed = run(tmp_path / "odd", plan, processes=2, expect=2)
    assert "stages[1].batch" in printed
    assert "a step of 1 image cannot be shared by 2 processes; start fewer, or make batch larger" in printed
    assert "Traceback" not in printed


# --- rows that cannot be read -----------------------------------------------------------------------------------------------------------


def damaged_world(folder: Path, rows: int, broken: int) -> Path:
    """A world with photos whose header is sound and whose pixels are cut off."""
    from runs import make_data

    world = make_world(folder)
    shutil.rmtree(world / "data")
    make_data(world / "data", rows)
    for number in range(broken):
        path = world / "data" / "photos" / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:80])
    return world


@PROCESSES
def test_unreadable_rows_are_replaced_named_and_counted(tmp_path: Path) -> None:
    world = damaged_world(tmp_path / "w", 120, 1)
    plan = plan_of(world, workers=2)
    plan["stages"] = [{**plan["stages"][1], "steps": 16, "mix": {"photos": 1}, "batch": {"images": 8, "micro": 4}}]
    printed = run(tmp_path / "run", plan, "--trace")
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert "000.png" in printed
    assert ledger["stages"][0]["sources"]["photos"]["dropped"] == {"unreadable": 1}
    assert all(line["key"] != "000.png" for line in trace(tmp_path / "run"))
    assert len(trace(tmp_path / "run")) == 16 * 8


@PROCESSES
@pytest.mark.parametrize(("broken", "on_bad_row"), [(3, "skip"), (1, "stop")])
def test_too_many_unreadable_rows_stop_the_run(tmp_path: Path, broken: int, on_bad_row: str) -> None:
    world = damaged_world(tmp_path / "w", 120, broken)
    plan = plan_of(world)
    plan["sources"]["photos"]["on_bad_row"] = on_bad_row
    plan["stages"] = [{**plan["stages"][1], "steps": 60, "mix": {"photos": 1}}]
    printed = run(tmp_path / "run", plan, expect=2)
    assert "of 120 rows cannot be read" in printed
    assert "Traceback" not in printed


@PROCESSES
def test_loss_that_is_no_number_stops_the_run_with_the_last_checkpoint_whole(world: Path, tmp_path: Path) -> None:
    transformer = load_file(world / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(world / "model", tmp_path / "model")
    broken = {name: torch.full_like(value, float("nan")) if name == "proj_out.bias" else value for name, value in transformer.items()}
    save_file(broken, tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    plan = {**plan_of(world), "model": str(tmp_path / "model")}
    plan["stages"] = plan["stages"][1:]
    printed = run(tmp_path / "nan", plan, expect=1)
    assert "step 6: all 8 losses are no numbers, those of " in printed
    assert "all 6 steps of the stage were skipped; the checkpoint of 'expose', step 4, stands" in printed

"""A rehearsal keeps what matters of a plan, finds what is broken and names it, and says what it does not prove."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import train
from mixing.where import parse
from models import tiny_clip, tiny_flux
from runs import copy_run, make_data, plan_of, write_plan
from stages.check import check_plan
from stages.checkpoint import read_checkpoint, write_checkpoint
from stages.families.facts import KNOWN, PIPELINES
from stages.open_sources import open_selections
from stages.plan import Batch, Change, LearningRate, Model, Plan, Source
from stages.problems import PlanError
from stages.reader import read_plan, to_yaml
from stages.rehearsal import likeness as likeness_module
from stages.rehearsal import trained, verdicts
from stages.rehearsal.launches import Killed, _environment, killable
from stages.rehearsal.likeness import build_likeness, likeness_of
from stages.rehearsal.miniature import SmallSource, Tiny, miniature, small_numbers, small_ranks, small_sides
from stages.rehearsal.own_rows import first_rows, is_small, is_there
from stages.rehearsal.rows import make_rows
from stages.rehearse import checked_but_for_places, rehearse
from stages.resolved import main_resolution, resolved_levels, resolved_plan, resolved_rate

# --- a whole rehearsal ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that are here, edits and shards that are not, and a tiny model."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    shutil.rmtree(folder / "data" / "edits")
    tiny_flux(folder / "model", pixels=True)
    return folder


@pytest.fixture(scope="module")
def rehearsed(world: Path) -> Path:
    """The folder of a rehearsal of three stages over real, made and streamed rows; not to be written into."""
    plan = plan_of(world)
    plan["sources"]["shards"] = {"path": str(world / "gone-{000..063}.tar"), "stream": True, "lanes": 2}
    stage = {"steps": 400, "resolution": 8, "batch": {"images": 64, "micro": 4}, "lr": 1e-2}
    plan["stages"] = [
        {**stage, "name": "found", "train": "full", "precision": "fp32", "mix": {"photos": 1}},
        {**stage, "name": "expose", "precision": "bf16", "mix": {"photos": 5, "edits": 4, "shards": 3}, "lr": {"peak": 1e-2, "warmup": 40, "schedule": "cosine"}},
        {**stage, "name": "refine", "precision": "fp32", "mix": {"photos": 3, "edits": 1}, "ema": 0.9, "train": [r"transformer_blocks\.0\.attn\..*"]},
    ]
    file, folder = write_plan(world / "plan.yaml", plan), world / "rehearsal"
    assert train.main([str(file), "--rehearse", "--out", str(folder)]) == 0
    return folder


def record(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "rehearsal.json").read_text())
    return loaded


def small_plan(folder: Path) -> Plan:
    """The miniature of a rehearsal, as it was judged."""
    return resolved_plan(read_plan(folder / "plan.yaml").plan)


@pytest.mark.launch
def test_plan_rehearses_over_real_made_and_streamed_rows_and_every_promise_is_proved(rehearsed: Path) -> None:
    found = record(rehearsed)
    assert found["state"] == "passed", found
    assert {verdict["promise"]: verdict["outcome"] for verdict in found["verdicts"]} == dict.fromkeys((verdict["promise"] for verdict in found["verdicts"]), "proved")
    assert len(found["verdicts"]) == 9
    assert {name: source["made"] for name, source in found["sources"].items()} == {"photos": False, "edits": True, "shards": True}
    assert found["sources"]["edits"]["references"] == 1


@pytest.mark.launch
def test_run_is_killed_inside_a_later_stage_and_goes_on_from_its_checkpoint(rehearsed: Path) -> None:
    found = record(rehearsed)
    killed = Killed(**found["killed"])
    assert killed.stage in ("expose", "refine")
    assert 2 <= killed.saved < killed.step < 6
    lines = [json.loads(line) for line in (rehearsed / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert {"stage": killed.stage, "step": killed.saved} in [line.get("resumed_from") for line in lines]


@pytest.mark.launch
def test_rehearsal_says_what_it_does_not_prove_and_what_the_full_run_will_take(rehearsed: Path) -> None:
    found = record(rehearsed)
    assert any("edits, shards" in sentence for sentence in found["not_proved"])
    assert "400 steps of 64 images, 25.6 k images at 8 pixels" in found["full_run"]["found"]
    assert "0 at step 0, 0.01 from step 40, then by a cosine to 0 at step 399" in found["full_run"]["expose"]
    assert "MiB" in found["full_run"]["refine"] or "KiB" in found["full_run"]["refine"]


@pytest.mark.launch
def test_earlier_rehearsal_is_replaced_and_anything_else_is_left_alone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    file = write_plan(tmp_path.with_suffix(".yaml"), plan_of(world))
    assert train.main([str(file), "--rehearse", "--out", str(tmp_path)]) == 2
    assert "holds something that is no rehearsal; pass --out" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()


# --- every verdict can fail -------------------------------------------------------------------------------------------------------------


def doctored(rehearsed: Path, place: Path) -> Path:
    """A copy of the run that went straight through."""
    return copy_run(rehearsed / "straight", place / "straight")


def relogged(folder: Path, event: str, stage: str, changes: Mapping[str, object]) -> None:
    """Change the last line of an event of a stage in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    place = max(number for number, line in enumerate(lines) if line["event"] == event and stage in (line.get("stage"), line.get("to"), ""))
    lines[place] |= changes
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.launch
@pytest.mark.parametrize(
    ("event", "stage", "changes", "verdict", "names"),
    [
        ("step", "expose", {"step": 7}, verdicts.steps_made, "stage 'expose' made 6 of 6 steps"),
        ("stage", "refine", {"state": "start"}, verdicts.steps_made, "stage 'refine' made 6 of 6 steps and did not end"),
        ("step", "expose", {"lr": 0.5}, verdicts.rates, "stage 'expose', step 5: the rate was 0.5, asked 0"),
        ("step", "found", {"loss": float("nan")}, verdicts.losses, "stage 'found', step 6: the loss is nan"),
        ("step", "found", {"grad_norm": float("inf")}, verdicts.losses, "the gradient's norm is inf"),
        ("step", "expose", {"multiplied_in": "fp32"}, verdicts.precision, "stage 'expose' asks for bf16, and multiplied in bf16, fp32"),
        ("handoff", "refine", {"exact": True, "delta": {"0.5": 0.01}}, verdicts.handoffs, "the handoff to stage 'refine' changed the function by 1.00e-02"),
        ("handoff", "refine", {"delta": {"0.5": float("nan")}}, verdicts.handoffs, "the handoff to stage 'refine' changed the function by nan"),
        ("handoff", "refine", {"to": "another"}, verdicts.handoffs, "the handoff to stage 'refine' was not measured"),
        ("publish", "", {"max_difference": float("nan")}, verdicts.published, "outputs that differ by nan"),
        ("publish", "", {"event": "warning"}, verdicts.published, "no adapter was published"),
    ],
)
def test_what_the_log_shows_broken_is_named(rehearsed: Path, tmp_path: Path, event: str, stage: str, changes: dict[str, object], verdict: Any, names: str) -> None:
    plan, folder = small_plan(rehearsed), doctored(rehearsed, tmp_path)
    assert verdict(plan, folder).outcome == "proved"
    relogged(folder, event, stage, changes)
    found = verdict(plan, folder)
    assert found.outcome == "failed"
    assert names in found.found


@pytest.mark.launch
def test_source_that_gave_another_share_is_named(rehearsed: Path, tmp_path: Path) -> None:
    plan, folder = small_plan(rehearsed), doctored(rehearsed, tmp_path)
    ledger = json.loads((folder / "ledger.json").read_text())
    page = ledger["stages"][1]
    page["sources"]["edits"]["images"] += 9
    (folder / "ledger.json").write_text(json.dumps(ledger))
    found = verdicts.shares(plan, folder)
    assert found.outcome == "failed"
    assert "stage 'expose': source 'edits' gave" in found.found


@pytest.mark.launch
def test_layer_that_trains_though_it_must_not_and_layer_that_does_not_are_named(rehearsed: Path, tmp_path: Path, world: Path) -> None:
    plan, folder = small_plan(rehearsed), doctored(rehearsed, tmp_path)
    assert verdicts.trained(plan, folder, world / "model").outcome == "proved"
    fewer = plan.stages[2].model_copy(update={"train": [r"transformer_blocks\.0\.attn\.to_k"]})
    found = verdicts.trained(plan.model_copy(update={"stages": [*plan.stages[:2], fewer]}), folder, world / "model")
    assert found.outcome == "failed"
    assert "does not train and changed" in found.found
    more = plan.stages[2].model_copy(update={"train": "adapter"})
    found = verdicts.trained(plan.model_copy(update={"stages": [*plan.stages[:2], more]}), folder, world / "model")
    assert "single_transformer_blocks.0.attn.to_k trains and did not change" in str(found.numbers)
    # A weight of the full stage that stayed as it was in the model.
    stage = folder / "stages" / "1-found"
    checkpoint = read_checkpoint(stage / "step-000006")
    tensors = {name: checkpoint.tensors(name) for name in ("transformer", "optimizer")}
    tensors["transformer"]["proj_out.bias"] = trained._weights_of(world / "model" / "transformer")["proj_out.bias"]
    write_checkpoint(stage, 6, tensors, {name: value for name, value in checkpoint.state.items() if name not in ("format", "step")})
    assert "stage 'found': proj_out.bias trains and did not change" in verdicts.trained(plan, folder, world / "model").found
    (stage / "step-000006" / "state.json").write_text("{}")
    assert "the last checkpoint of stage 'found' is not whole" in verdicts.trained(plan, folder, world / "model").found


@pytest.mark.launch
def test_layer_whose_gradient_is_zero_is_no_failure_and_is_named_and_one_with_a_gradient_that_stays_is(rehearsed: Path, tmp_path: Path, world: Path) -> None:
    plan, folder, layer = small_plan(rehearsed), doctored(rehearsed, tmp_path), "transformer_blocks.0.attn.to_q"
    before = read_checkpoint(folder / "stages" / "2-expose" / "step-000006").tensors("adapter")
    stage = folder / "stages" / "3-refine"
    checkpoint = read_checkpoint(stage / "step-000006")
    state = {name: value for name, value in checkpoint.state.items() if name not in ("format", "step")}
    tensors = {name: checkpoint.tensors(name) for name in ("adapter", "optimizer", "ema")}
    tensors["adapter"] |= {name: value for name, value in before.items() if name.startswith(f"{layer}.")}
    write_checkpoint(stage, 6, tensors, state)
    found = verdicts.trained(plan, folder, world / "model")
    assert found.outcome == "failed"
    assert f"stage 'refine': {layer} trains and did not change" in found.found
    tensors["optimizer"][f"{layer}.lora_B.default.weight::exp_avg_sq"].zero_()
    write_checkpoint(stage, 6, tensors, state)
    found = verdicts.trained(plan, folder, world / "model")
    assert found.outcome == "proved"
    assert f"the gradient of {layer} is 0" in found.found


@pytest.mark.launch
def test_resumed_run_that_ends_otherwise_is_named(rehearsed: Path, tmp_path: Path) -> None:
    plan, straight, at = small_plan(rehearsed), rehearsed / "straight", Killed(**record(rehearsed)["killed"])

    def found(change: Any) -> str:
        folder = copy_run(rehearsed / "killed", tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder)
        verdict = verdicts.resumed(plan, straight, folder, at)
        return f"{verdict.outcome}: {verdict.found}"

    def other_byte(folder: Path) -> None:
        file = folder / "adapter" / "pytorch_lora_weights.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def other_checkpoint(folder: Path) -> None:
        file = folder / "stages" / "3-refine" / "step-000006" / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["files"]["ema.safetensors"]["sha256"] = "0"
        file.write_text(json.dumps(manifest))

    assert found(lambda folder: None).startswith("proved")
    assert "adapter/pytorch_lora_weights.safetensors differs" in found(other_byte)
    assert "trace.jsonl is missing in the run that was killed" in found(lambda folder: (folder / "trace.jsonl").unlink())
    assert "the log differs in stage 'refine' at step 6" in found(lambda folder: relogged(folder, "step", "refine", {"loss": 0.0}))
    assert "step-000006/ema.safetensors differs" in found(other_checkpoint)
    assert "it did not go on from step" in found(lambda folder: relogged(folder, "run", "", {"resumed_from": None}))
    assert verdicts.resumed(plan, straight, rehearsed / "killed", None).outcome == "failed"


@pytest.mark.launch
def test_missing_or_broken_files_of_what_is_published_are_named(rehearsed: Path, tmp_path: Path) -> None:
    plan, folder = small_plan(rehearsed), doctored(rehearsed, tmp_path)
    (folder / "adapter" / "comfyui.safetensors").write_bytes(b"nothing")
    (folder / "adapter" / "pytorch_lora_weights.safetensors").unlink()
    (folder / "model" / "model_index.json").unlink()
    found = verdicts.published(plan, folder)
    assert found.outcome == "failed"
    for words in ("no model was written", "adapter/comfyui.safetensors cannot be read", "adapter/pytorch_lora_weights.safetensors is missing"):
        assert words in str(found.numbers)


def test_run_is_killable_only_behind_a_checkpoint_inside_a_later_stage(tmp_path: Path) -> None:
    stage = {"steps": 6, "resolution": 8, "batch": 1, "lr": 1}
    plan = Plan.model_validate({"model": "a/b", "sources": {"s": {"path": "s"}}, "stages": [{**stage, "name": name} for name in "abc"]})

    def lines(*events: tuple[str, str, int]) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"event": event, "stage": name, "step": step}) + "\n" for event, name, step in events) + '{"event": "st')

    assert killable(plan, tmp_path / "nowhere") is None
    for events, expected in (
        ([("step", "a", 2), ("save", "a", 2), ("step", "a", 3)], None),  # in the first stage
        ([("step", "b", 2)], None),
        ([("step", "b", 2), ("save", "b", 2)], None),  # it may be half written
        ([("step", "b", 2), ("save", "b", 2), ("step", "b", 3)], Killed("b", 3, 2)),
        ([("step", "b", 2), ("save", "b", 2), ("step", "b", 6)], None),  # the stage is at its end
    ):
        lines(*events)
        assert killable(plan, tmp_path) == expected, events


def test_runs_know_nothing_of_a_launcher_and_of_a_gpu() -> None:
    own = _environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"})
    assert own["CUDA_VISIBLE_DEVICES"] == ""
    assert own["PATH"] == "/bin"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"} & own.keys()


# --- the plan in miniature --------------------------------------------------------------------------------------------------------------

LAYERS = tuple(f"{stack}.{number}.attn.{layer}" for stack, number in (("transformer_blocks", 0), ("transformer_blocks", 1), ("single_transformer_blocks", 0)) for layer in ("to_q", "to_k"))
HEAD = "model: black-forest-labs/FLUX.1-dev\nsources:\n  t2i: {path: data/t2i}\n  edit: {path: data/edit.jsonl, task: edit}\n"


def small(tmp_path: Path, text: str, *, made: bool = True, **changes: Any) -> tuple[Plan, Plan, list[str]]:
    """A plan, resolved; its miniature, written and read again as a rehearsal does; and what was left out."""
    file = tmp_path / "whole.yaml"
    file.write_text(text)
    plan = read_plan(file).plan
    tiny = Tiny(tmp_path / "model", False, 4, 8, False, LAYERS)
    tiny = Tiny(**{**tiny.__dict__, **changes})
    sources = {name: SmallSource(source, 24, int(source.task == "edit"), 0, is_made=made) for name, source in plan.sources.items()}
    found, notes = miniature(plan, tiny, sources, tmp_path)
    (tmp_path / "plan.yaml").write_text(to_yaml(found))
    again = read_plan(tmp_path / "plan.yaml")
    problems = [problem for problem in check_plan(again, tmp_path) if not problem.where.startswith(("sources", "model"))]
    assert not problems
    return resolved_plan(plan), resolved_plan(again.plan), notes


def test_nothing_of_a_rehearsal_goes_to_the_hub(tmp_path: Path) -> None:
    _, found, notes = small(tmp_path, HEAD + "stages:\n  - {name: one, steps: 2, resolution: 512, batch: 4, lr: 1e-4}\npublish: {repo: user/name, checkpoints: true}\n")
    assert found.publish is None
    assert "`publish` was left out: nothing of a rehearsal goes to the Hub" in notes


def test_miniature_keeps_all_that_a_stage_asks_for_but_its_size(tmp_path: Path) -> None:
    text = HEAD + """
seed: 7
adapter: {rank: 64, alpha: 32, targets: linear, variant: rslora, dropout: 0.1}
stages:
  - {name: one, steps: 2000, resolution: 512, batch: {images: 64, micro: 8}, mix: {power: 0.5}, precision: bf16, base: fp32, ema: 0.999, clip: 0.5,
     lr: {peak: 1e-3, warmup: 200, warmup_from: 4e-6, schedule: cosine, floor: 4e-6}, optimizer: {betas: [0.9, 0.95], weight_decay: 0.01},
     timesteps: {density: mode, scale: 0.5, shift: 3, stratified: true}, loss: {weighting: bell, per: token, sources: {edit: 0.5}}, dropout: {prompt: 0.1, mode: joint}}
  - {name: two, steps: 3, resolution: 1024, batch: 32, mix: {from: {t2i: 1}, to: {t2i: 1, edit: 3}}, precision: fp32, lr: 1e-4, ema: 0.9, handoff: {ema: keep, optimizer: keep_v}}
evaluate: {rows: 64, every: 500}
previews: {rows: 8, steps: 50, guidance: 4}
save_every: 100
"""
    whole, found, _ = small(tmp_path, text)
    for before, after in zip(whole.stages, found.stages, strict=True):
        for field in ("name", "mix", "precision", "base", "ema", "clip", "optimizer", "timesteps", "loss", "dropout", "train", "pyramid", "expert"):
            assert getattr(after, field) == getattr(before, field), field
    one, two = found.stages
    assert (one.steps, two.steps) == (6, 3)
    assert one.lr == LearningRate(peak=1e-3, warmup=1, warmup_from=4e-6, schedule="cosine", floor=4e-6)
    assert isinstance(one.batch, Batch)
    assert isinstance(one.batch.images, int)
    assert one.batch.images == 2 * one.batch.micro, "several micro-batches stay several"
    assert two.handoff.optimizer == "keep_v"
    assert two.handoff.ema == "keep"
    assert (found.adapter.rank, found.adapter.variant, found.adapter.dropout, found.seed) == (8, "rslora", 0.1, 7)
    assert found.adapter.alpha is not None
    assert found.adapter.alpha / 8**0.5 == pytest.approx(32 / 64**0.5), "the scale stays"
    assert found.evaluate.rows == 2
    assert found.evaluate.every == 2
    assert (found.previews.rows, found.previews.steps, found.previews.guidance) == (1, 2, 4)
    assert (found.save_every, found.log_every, found.workers, found.track) == (2, 1, 0, "none")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "plans").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_plan_has_a_sound_miniature_of_few_steps(tmp_path: Path, file: Path) -> None:
    whole, found, _ = small(tmp_path, file.read_text())
    assert [stage.name for stage in found.stages] == [stage.name for stage in whole.stages]
    assert sum(stage.steps for stage in found.stages) <= 6 * len(whole.stages)
    repo = whole.model if isinstance(whole.model, str) else whole.model.repo
    assert repo in KNOWN or repo == "data/digits/base", "a plan that is shipped rehearses where the Hub cannot be reached"


def test_different_resolutions_stay_different_and_fit_the_levels_of_a_pyramid(tmp_path: Path) -> None:
    text = HEAD + """
stages:
  - {name: a, steps: 9, resolution: 256, batch: 8, lr: 1}
  - {name: b, steps: 9, resolution: [{pixels: 512, share: 3}, {pixels: 1024, share: 1}], batch: 8, lr: 1, buckets: {references: [512, 256]}}
  - {name: c, steps: 9, resolution: 512, batch: {tokens: 60000}, lr: 1, pyramid: {levels: 3}}
"""
    _, found, _ = small(tmp_path, text)
    a, b, c = found.stages
    assert main_resolution(a) < main_resolution(c) < main_resolution(b)
    assert [level.share for level in resolved_levels(b)] == [3, 1]
    assert main_resolution(c) == resolved_levels(b)[0].pixels
    assert main_resolution(c) % (4 * 2**2) == 0
    assert b.buckets.references is not None
    assert main_resolution(b) > b.buckets.references[0] > b.buckets.references[1]


def test_small_resolutions_of_the_plans_own_model_stay() -> None:
    stage = {"name": "a", "steps": 1, "batch": 1, "lr": 1}
    plan = Plan.model_validate({"model": "m", "sources": {"s": {"path": "s"}}, "stages": [{**stage, "resolution": 8}]})
    assert small_sides(plan, 2, is_own=True) == {8: 8}
    assert small_sides(plan, 16, is_own=False) == {8: 64}


@pytest.mark.parametrize(
    ("ways", "ranks"),
    [
        (("grow, rank: 32", "shrink, rank: 4"), (16, 32, 4)),
        (("stack", "merge, rank: 128"), (16, 16, 128)),
        (("grow", "grow"), (16, 32, 64)),
    ],
)
def test_ranks_keep_their_order_and_pairs_their_scale(tmp_path: Path, ways: tuple[str, str], ranks: tuple[int, int, int]) -> None:
    stages = "".join(f"  - {{name: s{number}, steps: 9, resolution: 256, batch: 8, lr: 1, base: fp32, precision: fp32, handoff: {{adapter: {way}}}}}\n" for number, way in enumerate(ways))
    whole, found, _ = small(tmp_path, HEAD + "adapter: {rank: 16, alpha: 8}\nstages:\n  - {name: first, steps: 9, resolution: 256, batch: 8, lr: 1}\n" + stages)
    small_of = [found.adapter.rank, *(stage.handoff.rank for stage in found.stages[1:])]
    assert all(rank is not None and 2 <= rank <= 10 for rank in small_of)
    for one in range(3):
        for other in range(3):
            assert (ranks[one] < ranks[other]) == (small_of[one] < small_of[other])  # type: ignore[operator]
    for before, after in zip(whole.stages[1:], found.stages[1:], strict=True):
        assert before.handoff.alpha is not None
        assert after.handoff.alpha is not None
        assert after.handoff.alpha / after.handoff.rank == pytest.approx(before.handoff.alpha / before.handoff.rank)  # type: ignore[operator]


def test_ranks_are_small_whatever_they_were() -> None:
    stage = {"name": "a", "steps": 1, "batch": 1, "lr": 1, "resolution": 8}
    for rank in (1, 2, 3, 4096):
        plan = Plan.model_validate({"model": "m", "adapter": {"rank": rank}, "sources": {"s": {"path": "s"}}, "stages": [stage]})
        assert small_ranks(plan)[rank] == min(rank, 8)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ("1", "images"),
        ("{images: {from: 8, to: 64}}", "rises"),
        ("{images: {from: 64, to: 8}, micro: 4}", "falls"),
        ("{images: 32, micro: {tokens: 9000}}", "images"),
        ("{tokens: 65536}", "tokens"),
        ("{tokens: {from: 65536, to: 131072}, micro: {tokens: 16384}}", "rises"),
        ("{tokens: 65536, micro: 4}", "tokens"),
    ],
)
def test_batches_stay_what_they_are_in_small(tmp_path: Path, batch: str, expected: str) -> None:
    _, found, _ = small(tmp_path, HEAD + f"stages:\n  - {{name: a, steps: 900, resolution: 512, batch: {batch}, lr: 1}}\n")
    held = found.stages[0].batch
    assert isinstance(held, Batch)
    asked = held.images if held.images is not None else held.tokens
    if expected in ("rises", "falls"):
        assert isinstance(asked, Change)
        assert (asked.first < asked.last) == (expected == "rises")
    else:
        assert isinstance(getattr(held, expected), int)
    largest = 16 + 16 + 8  # tokens of an edit of 16 pixels
    if held.tokens is not None:
        assert (min(asked.first, asked.last) if isinstance(asked, Change) else asked) >= largest  # type: ignore[operator]
    else:
        assert (max(asked.first, asked.last) if isinstance(asked, Change) else asked) <= 12  # type: ignore[operator]


def test_every_source_with_a_share_is_drawn_where_a_dozen_images_a_step_allow_it(tmp_path: Path) -> None:
    _, found, _ = small(tmp_path, HEAD + "stages:\n  - {name: a, steps: 900, resolution: 512, batch: 64, lr: 1, mix: {t2i: 30, edit: 1}}\n")
    batch = found.stages[0].batch
    assert isinstance(batch, Batch)
    assert isinstance(batch.images, int)
    assert batch.images * 6 / 31 > 1


def test_sizes_keep_their_proportion_as_far_as_few_rows_can() -> None:
    assert small_numbers({"a": 600_000, "b": 300_000, "c": 10, "d": None}) == {"a": 60, "b": 30, "c": 10, "d": 24}
    assert small_numbers({"a": 25}) == {"a": 25}


def test_patterns_for_blocks_that_a_tiny_model_lacks_are_tried_on_those_that_it_has(tmp_path: Path) -> None:
    text = HEAD + r"""
adapters:
  early: {rank: 4, targets: ['transformer_blocks\.[0-5]\.attn\.to_[qk]', '.*to_q']}
  late: {rank: 4, targets: ['single_transformer_blocks\.3\d\.attn\.to_k']}
stages:
  - {name: a, steps: 9, resolution: 256, batch: 8, lr: 1, train: ['early:transformer_blocks\.4\..*to_q', late]}
"""
    _, found, notes = small(tmp_path, text)
    assert found.adapters["early"].targets == [r"transformer_blocks\.0\.attn\.to_q|transformer_blocks\.0\.attn\.to_k", ".*to_q"]
    assert found.adapters["late"].targets == [r"single_transformer_blocks\.0\.attn\.to_k"]
    assert found.stages[0].train == [r"early:transformer_blocks\.0\.attn\.to_q", "late"]
    assert len(notes) == 3
    assert any("adapters.late.targets" in note for note in notes)


def test_accuracy_and_start_are_left_out_where_they_cannot_be_and_that_is_said(tmp_path: Path) -> None:
    text = HEAD + """
start: runs/other
stages:
  - {name: a, steps: 9, resolution: 256, batch: 8, lr: 1, handoff: {adapter: grow, rank: 32}}
evaluate: {accuracy: {source: t2i, labelled: nowhere}}
"""
    _, found, notes = small(tmp_path, text)
    assert found.start is None
    assert found.evaluate.accuracy is None
    assert [note.split(" was")[0] for note in notes] == ["`start`", "`evaluate.accuracy`"]


def test_metrics_are_rehearsed_with_models_that_are_here_and_left_out_with_others(tmp_path: Path) -> None:
    stages = "stages: [{name: a, steps: 9, resolution: 256, batch: 8, lr: 1}]\n"
    _, found, notes = small(tmp_path, HEAD + stages + f"evaluate: {{samples: 40, metrics: {{clip_score: {{model: {tiny_clip(tmp_path / 'clip')}}}}}}}\n")
    assert list(found.evaluate.metrics) == ["clip_score"]
    assert found.evaluate.samples == 2
    assert not any("metrics" in note for note in notes)
    _, found, notes = small(tmp_path, HEAD + stages + "evaluate: {metrics: [clip_score, dino_similarity]}\n")
    assert not found.evaluate.metrics
    assert "`evaluate.metrics` was left out: the model of clip_score, dino_similarity is not in a folder here" in notes


# --- rows -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        {"path": "data/photos"},
        {"path": "data/photos", "captions": {"shuffle_tags": True}, "prompt": "a square"},
        {"path": "data/pairs", "task": "subject"},
        {"path": "data/photos", "where": 'style == "film" and width >= 512'},
        {"path": "x.jsonl", "task": "edit", "columns": {"target": "out", "reference": ["a", "b"], "prompt": "words"}},
        {"path": "x.json", "task": "control", "where": "score > 5.5 and has_face and not is_blurred"},
        {"path": "x.csv", "task": "other", "take": {"count": 213_000}},
        {"path": "x/*.parquet", "task": "edit", "take": {"fraction": 0.001, "by": "stratified", "column": "kind"}},
        {"path": "x.arrow", "where": "prompt contains 'red car' and aspect > 1"},
        {"path": "x-{000..063}.tar", "task": "control", "columns": {"reference": "pose.png"}},
        {"path": "x-{000..063}.tar", "where": "aesthetic >= 6"},
        {"path": "hub/user/name", "split": "validation", "columns": {"target": "image", "prompt": "text"}},
        {"path": "x.jsonl", "task": "entity"},
        {"path": "hub/user/name", "task": "entity", "columns": {"entity_masks": "masks", "entity_prompts": "parts"}},
        {"path": "x-{000..063}.tar", "stream": True},
        {"path": "x-{000..063}.tar", "stream": True, "task": "edit", "references": 2, "columns": {"reference": ["a.png", "b.png"]}},
        {"path": "hub/user/name", "stream": True, "task": "subject", "rows": 1_000_000},
    ],
    ids=lambda source: " ".join(map(str, source.values()))[:60],
)
def test_made_rows_open_as_the_source_asks(tmp_path: Path, source: dict[str, Any]) -> None:
    asked = Source.model_validate(source)
    made = make_rows("s", asked, tmp_path / "s", rows=24, side=16, several=True)
    assert (made.source.where, made.source.columns, made.source.task, made.source.stream) == (asked.where, asked.columns, asked.task, asked.stream)
    plan = Plan.model_validate({"model": "m", "sources": {"s": source}, "stages": [{"name": "a", "steps": 1, "batch": 1, "lr": 1, "resolution": 8}], "cache": "none", "evaluate": {"rows": 2}})
    selection = open_selections(plan.model_copy(update={"sources": {"s": made.source}}), tmp_path, {})["s"]
    assert not selection.source.bad
    assert len(selection.held_out) == 2
    assert selection.size in (22, 24) if made.source.rows is None and not asked.stream else selection.size
    assert max(len(each.references) for each in selection.training) == made.references
    assert max(each.regions for each in selection.training) == made.regions
    assert (made.references > 0) == (asked.task in ("subject", "edit", "control", "other"))
    example = selection.source.example(0)
    assert example.prompt


def test_large_source_gives_copies_of_its_first_rows(tmp_path: Path) -> None:
    make_data(tmp_path / "data", 30)
    (tmp_path / "data" / "photos" / "metadata").mkdir()
    photos = first_rows(Source(path="data/photos"), tmp_path / "a", tmp_path, 5)
    edits = first_rows(Source(path="data/edits/rows.jsonl", task="edit"), tmp_path / "b", tmp_path, 5)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{number:03d}.{suffix}" for number in range(5) for suffix in ("png", "txt")]
    plan = Plan.model_validate(
        {"model": "m", "sources": {"a": {"path": photos}, "b": {"path": edits, "task": "edit"}}, "stages": [{"name": "a", "steps": 1, "batch": 1, "lr": 1, "resolution": 8}], "cache": "none"}
    )
    selections = open_selections(plan, tmp_path, {})
    assert {name: (selection.size, len(selection.source.bad)) for name, selection in selections.items()} == {"a": (5, 0), "b": (5, 0)}
    assert first_rows(Source(path="data/x.parquet"), tmp_path / "c", tmp_path, 5) is None


def test_condition_that_no_made_row_fulfils_is_left_out_and_named(tmp_path: Path) -> None:
    where = "a > b and b > a"
    parse(where)
    made = make_rows("s", Source(path="x.jsonl", where=where), tmp_path / "s", rows=24, side=16, several=False)
    assert made.source.where is None
    assert made.notes == (f"sources.s.where was left out: no made row fulfils `{where}`",)


def test_what_is_here_is_told_from_what_is_not(tmp_path: Path) -> None:
    make_data(tmp_path / "data", 3)
    assert is_there(Source(path="data/photos"), tmp_path)
    assert is_there(Source(path="data/photos/*.png"), tmp_path)
    assert is_small(Source(path="data/photos"), tmp_path)
    for path in ("data/nothing", "data/x-{000..063}.tar", "hub/user/name"):
        assert not is_there(Source(path=path), tmp_path)


# --- models -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub does not answer, and nothing of it lies here."""
    monkeypatch.setattr(likeness_module, "_of_hub", lambda model, name: {})


def test_models_known_by_name_have_pipelines_that_can_be_trained() -> None:
    assert set(KNOWN.values()) <= PIPELINES.keys()
    assert {PIPELINES[pipeline] for pipeline in KNOWN.values()} == set(PIPELINES.values())


@pytest.mark.usefixtures("offline")
def test_model_that_is_not_known_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'black-forest-labs/FLUX.1-deV' is no folder here.*did you mean 'black-forest-labs/FLUX.1-dev'\?; type the command where the Hub"):
        likeness_of("black-forest-labs/FLUX.1-deV", tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(PlanError, match=r"has no model_index\.json that names a pipeline; what can be trained is"):
        likeness_of("model", tmp_path)
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(PlanError, match="is a StableDiffusionPipeline; what can be trained is"):
        likeness_of("model", tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("repo", "pipeline", "has"),
    [
        ("black-forest-labs/FLUX.1-dev", "FluxPipeline", {"guidance_embeds": True}),
        ("black-forest-labs/FLUX.1-schnell", "FluxPipeline", {"guidance_embeds": False}),
        ("black-forest-labs/FLUX.1-Kontext-dev", "FluxKontextPipeline", {"guidance_embeds": True}),
        ("stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline", {"qk_norm": "rms_norm"}),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "StableDiffusion3Pipeline", {"qk_norm": None}),
    ],
)
def test_tiny_model_has_what_its_name_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, pipeline: str, has: Mapping[str, object]) -> None:
    plan = Plan.model_validate({"model": repo, "sources": {"s": {"path": "s"}}, "stages": [{"name": "a", "steps": 1, "batch": 1, "lr": 1, "resolution": 8}]})
    likeness = likeness_of(Model(repo=repo), tmp_path)
    assert likeness.pipeline == pipeline
    assert likeness.own is None
    folder = build_likeness(likeness, plan, tmp_path / "model")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert {name: config[name] for name in has} == has
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == pipeline
    assert likeness_of(str(folder), tmp_path).own == folder
    monkeypatch.setattr(likeness_module, "LARGEST_OWN", 0)  # a folder too large to be used itself is read for what it has
    large = likeness_of(str(folder), tmp_path)
    assert (large.own, large.pipeline, large.source) == (None, pipeline, "its folder")
    again = build_likeness(large, plan, tmp_path / "again")
    assert json.loads((again / "transformer" / "config.json").read_text()) == config


# --- the plan that is rehearsed ---------------------------------------------------------------------------------------------------------


def test_places_that_are_not_here_are_no_problem_and_everything_else_is(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world, model="black-forest-labs/FLUX.1-dev")
    read = checked_but_for_places(write_plan(tmp_path / "p.yaml", plan), ["stages.found.steps=7"])
    assert read.plan.stages[0].steps == 7
    plan["stages"][1]["mix"] = {"edti": 1}
    plan["stages"][2]["base"] = "bf16"
    plan["sources"]["photos"]["columns"] = {"target": "image"}  # of data that is here
    with pytest.raises(PlanError) as caught:
        checked_but_for_places(write_plan(tmp_path / "q.yaml", plan), [])
    assert [problem.where for problem in caught.value.problems if problem.where.startswith("stages")] == ["stages[1].mix", "stages[2].base"]
    assert any(problem.where == "sources.photos.columns" for problem in caught.value.problems)


@pytest.mark.usefixtures("offline")
def test_what_the_models_family_cannot_do_is_refused_at_its_place_before_anything_is_built(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world, model="PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
    plan["stages"][1]["loss"] = {"weighting": "bell"}
    read = checked_but_for_places(write_plan(tmp_path / "p.yaml", plan), [])
    with pytest.raises(PlanError) as caught:
        rehearse(read, tmp_path / "out", Console(quiet=True))
    assert {problem.where for problem in caught.value.problems} == {"stages[1].loss.weighting", "sources.edits.task"}
    assert all(str(tmp_path / "p.yaml") in problem.place for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


def test_rates_of_the_miniature_are_the_plans_curve_in_few_steps(tmp_path: Path) -> None:
    for steps, warmup, schedule in ((1000, 100, "cosine"), (1000, 990, "linear"), (4, 4, "constant"), (2, 0, "linear"), (1, 1, "constant"), (3, 1, "cosine")):
        text = HEAD + f"stages:\n  - {{name: a, steps: {steps}, resolution: 256, batch: 8, lr: {{peak: 1e-3, warmup: {warmup}, schedule: {schedule}}}}}\n"
        _, found, _ = small(tmp_path, text)
        rate = resolved_rate(found.stages[0])
        assert rate.peak == 1e-3
        assert rate.schedule == schedule
        assert rate.warmup is not None
        assert rate.warmup <= found.stages[0].steps
        assert (rate.warmup > 0) == (warmup > 0 and (schedule == "constant" or steps > 2))


def test_shrunk_and_grown_pairs_are_told_from_changed_ones() -> None:
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    grown = {"lora_A.weight": torch.cat([down, torch.randn(2, 6)]), "lora_B.weight": torch.cat([up * 2, torch.zeros(4, 2)], dim=1)}
    old = {"lora_A.weight": down, "lora_B.weight": up}
    assert not trained._differs(grown, old)
    assert trained._differs({**grown, "lora_B.weight": grown["lora_B.weight"] + 0.1}, old)
    assert trained._differs({**grown, "lora_A.weight": grown["lora_A.weight"] + 0.1}, old)

"""After the last stage: publish the adapter, and the model where a stage trained its weights, and write the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from torch import nn

from mixing.batch import MicroBatch
from stages.adapter import adapter_weights
from stages.card import Told, model_card
from stages.card_facts import licence_of, samples_of
from stages.checkpoint import Checkpoint, read_checkpoint
from stages.disk import sync
from stages.handoff import build_model, carried, probe, probe_batches, read_baton
from stages.hub.start import began_from
from stages.layouts import ADAPTER_FILE, SECOND_FILE
from stages.model_mark import is_made_from, write_model_mark
from stages.objectives.windows import METADATA_KEY, write
from stages.peft_layout import WEIGHTS_FILE
from stages.plan import Stage
from stages.precision import StagePrecision
from stages.publish import Trained, clear_old, is_as_published, make_adapter, show_adapter
from stages.reader import to_yaml
from stages.report import first_table
from stages.resolved import plain_storage, quantised, windows_of

if TYPE_CHECKING:
    from stages.run import Run


def finish(run: Run) -> None:
    """After the last stage: publish what was trained, and write the report."""
    if run.accelerator.is_main_process:
        _publish(run, len(run.plan.stages) - 1)
        run.log.place()
    run.report(is_said=True)
    run.processes.wait()


def leave(run: Run) -> int:
    """After a signal: write the report of what there is. Returns the exit code."""
    run.report()
    return run.stop.exit_code


def publish_so_far(run: Run, index: int) -> None:
    """After a stage that others follow: publish what was trained so far, where the plan sends it to the Hub after each stage and the next one has not begun."""
    if run.plan.publish is None or run.plan.publish.when != "stage" or index + 1 == len(run.plan.stages):
        return
    if run.accelerator.is_main_process and run.checkpoints[index + 1] is None:
        _publish(run, index)
    run.processes.wait()


def _publish(run: Run, index: int) -> None:
    """Publish what was trained up to a stage, by its number, unless it is published already."""
    checkpoint, stage = run.last, run.plan.stages[index]
    assert checkpoint is not None
    model_folder = run.folder / "model"
    if run.baton.base is not None and not is_made_from(model_folder, _base_mark(run.baton.base, checkpoint)):
        transformer = run.family.load_transformer(torch.float32, run.baton.base, stage.expert)
        if stage.train == "full" and checkpoint.has("ema"):
            transformer.load_state_dict(checkpoint.tensors("ema"), strict=False)
        mark, card = _base_mark(run.baton.base, checkpoint), _card(run, index, [], has_adapter=False)[0] if run.baton.adapter is None else None
        run.room.must("the trained model", lambda: _write_model(run, model_folder, transformer, stage.expert, card, mark), size=sum(value.nbytes for value in transformer.parameters()))
        run.log.say(f"the trained model is in {escape(str(model_folder))}")
    place = run.folder / "adapter"
    if run.baton.adapter is None:
        shutil.rmtree(place, ignore_errors=True)  # of an earlier stage, whose weights this one has
    elif not run.last_is_new and is_published(run.folder, checkpoint):  # what was trained anew is the same again, and its line is not in the log
        clear_old(place)
    else:
        batches = probe_batches(run.selections, run.shapes(stage))
        notes = {"medley.plan": to_yaml(run.plan), "medley.ledger": json.dumps(run.ledger()), "medley.checkpoint": _mark(checkpoint) or "", "medley.model": run.fingerprint}
        if run.baton.base is not None:
            notes["medley.base"] = _base_mark(run.baton.base, checkpoint)
        if (windows := windows_of(stage)) is not None:
            notes[METADATA_KEY] = write(windows)
        trained = [_trained(run, number, batches) for number in _last_stages(run.plan.stages[: index + 1])]
        card, images = _card(run, index, trained, has_adapter=True)
        sheet = run.folder / "previews" / f"{index + 1}-{stage.name}.png"
        size = sum(value.nbytes for each in trained for value in each.weights.values())
        difference = run.room.must("the adapter to publish", lambda: make_adapter(place, run.family, run.plan, trained, batches, notes, card, sheet, images), size=size)
        # Once the adapter is in view nothing is published again, so its line is on the disk before: killed between the two, the run cuts it off and does both anew.
        run.log.write({"event": "publish", "folder": place.name, "max_difference": difference if batches else None})
        run.log.place()
        run.room.must("the adapter to publish", lambda: show_adapter(place))
        found = f"its outputs differ by at most {difference:.1g}" if batches else "its layers are as they were trained; there is no row to compare outputs on"
        run.log.say(f"published to {escape(str(place))}: loaded back by {run.family.pipeline_class}, {found}")
    if run.hub is not None:
        run.hub.put_trained(stage.name)


def _write_model(run: Run, folder: Path, transformer: nn.Module, expert: str | None, card: str | None, mark: str) -> None:
    """Write the trained model beside its place, and rename it into view. card, mark: of it; None where the adapter has the card."""
    partial = run.folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run.family.save_model(partial, transformer, expert)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        write_model_mark(partial, mark)
        for path in partial.rglob("*"):
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _card(run: Run, index: int, trained: Sequence[Trained], *, has_adapter: bool) -> tuple[str, dict[str, Path]]:
    """The card of what was trained up to a stage, and the pictures that it shows, by name."""
    plan = run.plan.model_copy(update={"stages": run.plan.stages[: index + 1]})
    samples = samples_of(run.folder, index, plan.stages[-1].name) if has_adapter else []
    repo, revision = (plan.model, None) if isinstance(plan.model, str) else (plan.model.repo, plan.model.revision)
    told = Told(
        table=first_table(run.folder),
        ledger=run.ledger(),
        versions=run.versions,
        samples=samples,
        licence=licence_of(repo, revision, may_ask=plan.publish is not None),
        base=None if run.baton.base is None else plan.publish.repo if plan.publish else str(run.folder / "model"),
        has_adapter=has_adapter,
        experts=tuple(each.expert for each in trained),
        start=began_from(plan.start, run.folder),
    )
    return model_card(plan, run.family, told), {sample.name: sample.file for sample in samples}


def _last_stages(stages: Sequence[Stage]) -> list[int]:
    """The number of the last of these stages that trained adapters of each transformer, in the order of the model's transformers."""
    last = {stage.expert: index for index, stage in enumerate(stages) if stage.train != "full"}
    return [last[expert] for expert in sorted(last, key=lambda expert: expert or "")]


def _trained(run: Run, index: int, batches: Mapping[str, MicroBatch]) -> Trained:
    """What a transformer has learnt by the end of the last stage that trained it, its moving average where it has one."""
    stage, checkpoint = run.plan.stages[index], run.checkpoints[index]
    assert checkpoint is not None
    baton = read_baton(checkpoint)
    assert baton.adapter is not None
    storage = plain_storage(stage)
    precision = StagePrecision("fp32" if storage == "fp32" else "bf16", run.accelerator.device)
    weights = baton.adapter
    model, trainable = build_model(run.family, run.plan, stage, f"stages[{index}]", baton)
    if checkpoint.has("ema"):
        for name, value in checkpoint.tensors("ema").items():
            trainable[name].data.copy_(value)
        weights = {**carried(run.plan, stage, baton.adapter), **adapter_weights(model)}
    saw = probe(run.family, model.eval(), batches, precision, run.plan.seed)
    return Trained(index, stage.expert, weights, baton.base, storage, precision, saw, quantised(stage))


def is_published(folder: Path, checkpoint: Checkpoint) -> bool:
    """Whether what a run folder has published is this checkpoint's adapter, or the model of a run that has none."""
    if not checkpoint.has("adapter"):
        return checkpoint.has("transformer") and is_made_from(folder / "model", _base_mark(checkpoint.file("transformer"), checkpoint))
    names = (ADAPTER_FILE, SECOND_FILE, WEIGHTS_FILE)  # which of them there are is the family's affair, and it is not open yet
    published = next((file for name in names if (file := folder / "adapter" / name).exists()), None)
    if published is None or not is_as_published(folder / "adapter"):
        return False
    try:
        with safe_open(published, framework="pt") as header:
            return (header.metadata() or {}).get("medley.checkpoint") == _mark(checkpoint)
    except (SafetensorError, OSError):
        return False


def _base_mark(base: Path, last: Checkpoint) -> str:
    """What a model made from these weights says: the hash of the weights, or of the average if the last stage itself trained them and keeps one."""
    own = read_checkpoint(base.parent)
    return str(own.hash_of("ema") if own.folder.resolve() == last.folder.resolve() and own.has("ema") else own.hash_of("transformer"))


def _mark(checkpoint: Checkpoint) -> str | None:
    """What an adapter's file says of the checkpoint it was made from."""
    return checkpoint.hash_of("ema" if checkpoint.has("ema") else "adapter")

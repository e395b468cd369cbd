"""A leg: one stage under way. Its model, optimizer and counts, and the duties around the loop in train.py: log, evaluate, save, finish."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from rich.table import Table
from torch import Tensor, nn

from mixing.bad_rows import BadRow
from mixing.keys import key
from mixing.mixture import MicroBatch, StageMixture
from stages.adapter import adapter_weights
from stages.checkpoint import Checkpoint, keep_newest, read_checkpoint, step_folder, write_checkpoint, write_whole
from stages.evaluate import Measured, evaluate
from stages.handoff import probe, probe_batches
from stages.ledger import ledger_entry
from stages.objectives.flow import Density
from stages.optim import Average, optimizer_state
from stages.plan import Stage, resolved_storage
from stages.precision import Multiplied, StagePrecision
from stages.problems import RunError
from stages.reader import PlanError
from stages.report import write_report
from stages.run import Run
from stages.sampling import previews, sheet

_MOST_BAD = 0.01


class TrainingError(RunError):
    """Training cannot go on: what was measured is not what the plan asks for, or is no number."""


@dataclass
class Window:
    """What has been counted on this process since the last line of the log."""

    began: float
    waited: float = 0.0
    steps: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)


@dataclass
class Leg:
    """One stage under way."""

    run: Run
    index: int
    stage: Stage
    mixture: StageMixture
    precision: StagePrecision
    density: Density
    model: nn.Module
    wrapped: nn.Module
    """The model as accelerate prepared it: inside DDP where there are several processes."""
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average | None
    key: int
    """Of (seed, stage): noise and timesteps are derived from it and the image's number."""
    step: int
    """Steps made."""
    images: dict[str, int]
    """Images of each source counted on this process; on the main one, with those from before a restart."""
    bad: dict[str, dict[str, str]]
    """Rows that turned out unreadable: source to key to reason."""
    seconds_before: float
    began: float
    window: Window
    base: Measured
    start: Measured | None
    first_step: int
    multiplied: str | None = None
    """What the first micro-batch was multiplied in; None until it was measured."""
    rows: list[tuple[int, str, str]] = field(default_factory=list)
    """Micro-batch, source and key of the images of the step under way."""
    named_rows: set[tuple[str, str]] = field(default_factory=set)
    """Unreadable rows that were warned of."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time that the loop waits for data."""
        began = time.monotonic()
        yield
        self.window.waited += time.monotonic() - began

    def noise_keys(self, batch: MicroBatch) -> list[int]:
        """What each image's noise is derived from."""
        return [key(self.key, "noise", position) for position in batch.positions]

    def check_multiplied(self, watch: Multiplied) -> None:
        """Compare the dtype of the matrix products that were made with the plan's. Raises TrainingError if they differ."""
        self.multiplied = watch.verdict()
        if self.multiplied != self.stage.precision:
            raise TrainingError(f"stage '{self.stage.name}' asks for precision {self.stage.precision}, and its matrix products were made: {self.multiplied}")

    def check_gradients(self) -> None:
        """After the first step of this launch: every trainable parameter must have a gradient. Raises TrainingError naming those that have none."""
        if self.step == self.first_step and (missing := [name for name, parameter in self.trainable.items() if parameter.grad is None]):
            raise TrainingError(f"stage '{self.stage.name}': {len(missing)} of {len(self.trainable)} trainable weights got no gradient, such as {missing[0]}; take them out of `train` or `adapter.targets`")

    def count(self, batch: MicroBatch, losses: Tensor) -> None:
        """Count what a micro-batch brought. losses: of each image, float32 [B]."""
        for place, source in enumerate(batch.sources):
            self.images[source] = self.images.get(source, 0) + 1
            self.window.images[source] = self.window.images.get(source, 0) + 1
            self.window.losses[source] = self.window.losses.get(source, losses.new_zeros(())) + losses[place]
        self.rows += [(batch.micro, source, row) for source, row in zip(batch.sources, batch.keys, strict=True)]
        for row in batch.bad:
            self.note_bad(row)

    def note_bad(self, row: BadRow) -> None:
        """Count a row that could not be decoded."""
        self.bad.setdefault(row.source, {})[row.key] = row.reason

    def stepped(self) -> None:
        """A step was made: count it, average the weights, write the trace."""
        if self.average:
            self.average.update(self.trainable)
        self.step += 1
        self.window.steps += 1
        self.run.log.advance()
        if self.run.tracing:
            rows = gather_object(self.rows) if self.run.accelerator.num_processes > 1 else self.rows
            if self.run.trace:
                self.run.trace.write(self.stage.name, self.step - 1, sorted(rows, key=lambda row: row[0]))
        self.rows = []

    def log_step(self, learning_rate: float, norm: Tensor) -> None:
        """One line in metrics.jsonl and on the console, from all processes' counts. Raises TrainingError if the loss is no number."""
        run, names = self.run, list(self.mixture.asked)
        device = run.accelerator.device
        sums = torch.stack([self.window.losses.get(name, torch.zeros((), device=device)).double() for name in names])
        counts = torch.tensor([[self.window.images.get(name, 0), self.images.get(name, 0)] for name in names], dtype=torch.float64, device=device)
        numbers = reduce(torch.cat([sums[:, None], counts], dim=1), reduction="sum").tolist() if run.accelerator.num_processes > 1 else torch.cat([sums[:, None], counts], dim=1).tolist()
        total, images = sum(row[0] for row in numbers), sum(row[1] for row in numbers)
        if not math.isfinite(total):
            raise TrainingError(f"stage '{self.stage.name}': the loss is {total} since a step at or before {self.step}; the last checkpoint stands. Lower the rate, or choose another precision")
        seconds = time.monotonic() - self.window.began
        record: dict[str, Any] = {
            "event": "step",
            "stage": self.stage.name,
            "step": self.step,
            "loss": total / images,
            "lr": learning_rate,
            "grad_norm": float(norm),
            "images_per_second": images / seconds,
            "data_wait": self.window.waited / seconds,
            "multiplied_in": self.multiplied,
            "losses": {name: row[0] / row[1] for name, row in zip(names, numbers, strict=True) if row[1]},
            "drawn": {name: int(row[2]) for name, row in zip(names, numbers, strict=True)},
        }
        if self.stage.precision == "fp16":
            record["loss_scale"] = self.precision.scaler.get_scale()
        if device.type == "cuda":
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        run.log.write(record)
        tracked = {name: record[name] for name in ("loss", "lr", "grad_norm", "images_per_second", "data_wait")}
        run.log.track({**tracked, "stage": self.index + 1, **{f"loss/{name}": loss for name, loss in record["losses"].items()}}, run.steps_before(self.index) + self.step)
        left = (self.stage.steps - self.step) * seconds / self.window.steps
        run.log.say(
            f"[bold]{self.stage.name}[/bold] {self.step:>{len(str(self.stage.steps))}}/{self.stage.steps}  loss {record['loss']:.4f}  lr {learning_rate:.2e}  "
            f"{record['images_per_second']:,.0f} images/s  data wait {record['data_wait']:.1%}  left {int(left) // 60}:{int(left) % 60:02d}"
        )
        self.window = Window(time.monotonic())
        self.check_rows()

    def check_rows(self) -> None:
        """Share among the processes which rows could not be read. Raises PlanError if a source has more of them than its plan lets pass."""
        if self.run.accelerator.num_processes > 1:
            for source, row, reason in gather_object([(source, row, reason) for source, rows in self.bad.items() for row, reason in rows.items()]):
                self.bad.setdefault(source, {})[row] = reason
        for name, rows in self.bad.items():
            source = self.run.selections[name].source
            for row, reason in rows.items():
                if (name, row) not in self.named_rows:
                    self.named_rows.add((name, row))
                    self.run.log.warn(f"source '{name}': {row}: {reason}; it is left out", self.stage.name, self.step)
            number, of = len(rows) + len(source.bad), len(source) + len(source.bad)
            if self.run.plan.sources[name].on_bad_row == "stop" or number > _MOST_BAD * of:
                raise PlanError.at(f"sources.{name}", f"{number} of {of} rows cannot be read, such as {next(iter(rows))}: {next(iter(rows.values()))}; repair or remove them")

    @contextmanager
    def averaged(self) -> Iterator[str]:
        """Inside, the model holds its moving average where it has one; gives the word for what it holds."""
        if not self.average:
            yield "raw"
            return
        self.average.swap(self.trainable)
        try:
            yield "ema"
        finally:
            self.average.swap(self.trainable)

    def evaluate(self, kind: str) -> Measured:
        """Measure the held-out rows and log them. kind: start, during or end."""
        began = time.monotonic()
        run = self.run
        with self.averaged() as weights:
            measured = evaluate(
                run.family,
                self.model,
                run.selections,
                resolution=self.stage.resolution,
                precision=self.precision,
                seed=run.plan.seed,
                accelerator=run.accelerator,
                unreadable=self.note_bad,
            )
        summary = measured.summary(self.base, self.start)
        run.log.write({"event": "eval", "stage": self.stage.name, "step": self.step, "kind": kind, "weights": weights, "seconds": round(time.monotonic() - began, 3), "sources": summary})
        run.log.track({f"held_out/{name}": entry["loss"] for name, entry in summary.items()}, run.steps_before(self.index) + self.step)
        if kind != "start" and summary:
            table = Table(box=None, header_style="dim")
            table.add_column("held-out loss")
            for column in (f"after step {self.step}", "since the stage began", "since the base"):
                table.add_column(column, justify="right")
            for name, entry in summary.items():
                changes = [f"{entry[since]:+.4f} ± {entry[f'{since}_error']:.4f}" if since in entry else "" for since in ("since_start", "since_base")]
                table.add_row(name, f"{entry['loss']:.4f}", *changes)
            run.log.show(table)
        self.window.began += time.monotonic() - began  # it is no time of training
        return measured

    def save(self, finished: bool = False, probed: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint of everything that resuming needs; every process takes part, the main one writes."""
        run, stage = self.run, self.stage
        names = list(self.mixture.asked)
        counted = torch.tensor([self.images.get(name, 0) for name in names], dtype=torch.int64, device=run.accelerator.device)
        counted = reduce(counted, reduction="sum") if run.accelerator.num_processes > 1 else counted
        self.check_rows()
        if run.accelerator.is_main_process:
            images = dict(zip(names, (int(count) for count in counted.tolist()), strict=True))
            folder = run.stage_folder(self.index)
            place = step_folder(folder, self.step)
            tokens = run.family.tokens(stage.resolution, stage.resolution)
            entry = ledger_entry(self.mixture, stage.name, self.step, images, tokens, {name: len(rows) for name, rows in self.bad.items()})
            run.log.write({"event": "save", "stage": stage.name, "step": self.step, "folder": str(place.relative_to(run.folder))})
            drawn: dict[str, dict[str, int]] = {}
            for (source, signature), count in {**run.drawn_before(), **self.mixture.drawn_after(self.step)}.items():
                drawn.setdefault(source, {})[signature] = count
            base = run.baton.base
            state = {
                "stage": stage.name,
                "index": self.index,
                "finished": finished,
                "plan": run.recorded(stage),
                "base": None if base is None or stage.train == "full" else os.path.relpath(base, place),
                "scaler": self.precision.scaler.state_dict(),
                "ema_updates": self.average.updates if self.average else None,
                "images": images,
                "bad": self.bad,
                "drawn": drawn,
                "ledger": entry,
                "seconds": self.seconds_before + time.monotonic() - self.began,
                "processes": run.accelerator.num_processes,
                "metrics_bytes": run.log.size(),
                "trace_bytes": run.trace.size() if run.trace else 0,
            }
            tensors = {"optimizer": optimizer_state(self.optimizer, self.trainable)}
            if stage.train == "full":
                tensors["transformer"] = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
            else:
                tensors["adapter"] = adapter_weights(self.model)
            if self.average:
                tensors["ema"] = {name: value.cpu() for name, value in self.average.values.items()}
            if probed is not None:
                tensors["probe"] = probed
            write_checkpoint(folder, self.step, tensors, state)
            keep_newest(folder, 1 if finished else run.plan.keep, self.step)
            write_whole(run.folder / "ledger.json", json.dumps(run.ledger(entry), indent=1))
        run.accelerator.wait_for_everyone()

    def finish(self) -> Checkpoint:
        """The stage's last duties: evaluate, sample, save, report, and let go of the model. Returns the last checkpoint."""
        run, stage, plan = self.run, self.stage, self.run.plan
        run.log.end_bar()
        self.evaluate("end")
        with self.averaged():
            if plan.previews.rows:
                shown = previews(
                    run.family,
                    self.model,
                    run.selections,
                    rows=plan.previews.rows,
                    steps=plan.previews.steps,
                    resolution=stage.resolution,
                    precision=self.precision,
                    seed=plan.seed,
                    accelerator=run.accelerator,
                )
                if run.accelerator.is_main_process and shown:
                    file = run.folder / "previews" / f"{self.index + 1}-{stage.name}.png"
                    file.parent.mkdir(exist_ok=True)
                    sheet(shown).save(file)
                    run.log.write({"event": "preview", "stage": stage.name, "step": self.step, "file": str(file.relative_to(run.folder))})
            judged = run.judged(self.model, stage, self.precision)
        if judged and plan.evaluate.accuracy:
            untrained = run.base(stage)[2]
            record = {"event": "accuracy", "stage": stage.name, "step": self.step, "source": plan.evaluate.accuracy.source, "samples": plan.evaluate.accuracy.samples, **judged, "untrained": untrained}
            run.log.write(record)
            run.log.say(
                f"  accuracy of {record['source']}: [bold]{judged['accuracy']:.1%}[/bold] of {record['samples']} samples "
                f"(judge on real images {judged['judge_on_real']:.1%}, shuffled captions {judged['shuffled_captions']:.1%}, untrained model {untrained or 0:.1%})"
            )
        probed = probe(run.family, self.model, probe_batches(run.selections, stage.resolution), self.precision, plan.seed)
        run.log.write({**stage_event(self), "state": "end", "seconds": round(self.seconds_before + time.monotonic() - self.began, 3)})
        self.save(finished=True, probed=probed)
        if run.accelerator.is_main_process:
            write_report(run.folder)
        run.accelerator.wait_for_everyone()
        run.accelerator.free_memory()
        return read_checkpoint(step_folder(run.stage_folder(self.index), stage.steps))


def stage_event(leg: Leg) -> dict[str, Any]:
    """What metrics.jsonl says of a stage at its start and end."""
    stage, order = leg.stage, leg.mixture.order
    return {
        "event": "stage",
        "index": leg.index,
        "stage": stage.name,
        "steps": stage.steps,
        "images": order.images,
        "micro": order.micro,
        "resolution": stage.resolution,
        "precision": stage.precision,
        "base": resolved_storage(stage),
        "train": stage.train,
        "trainable": sum(parameter.numel() for parameter in leg.trainable.values()),
        "parameters": sum(parameter.numel() for name, parameter in leg.model.named_parameters() if ".lora_" not in name),
        "mix": leg.mixture.asked,
        "tokens_per_step": order.images * leg.run.family.tokens(stage.resolution, stage.resolution),
    }

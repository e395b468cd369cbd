"""A leg: one stage under way. Its model, optimizer and counts, and the duties around the loop in train.py: log, evaluate, save, finish."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, reduce
from rich.table import Table
from torch import Tensor, nn

from mixing.bad_rows import BadRow
from mixing.batch import MicroBatch
from mixing.keys import key
from mixing.mixture import StageMixture
from mixing.rows import FEW, MOST_BAD
from stages.adapter import adapter_weights
from stages.checkpoint import keep_newest, step_folder, write_checkpoint, write_whole
from stages.dropout import Drawing
from stages.evaluate import Measured, evaluate
from stages.ledger import ledger_entry
from stages.memory import EncoderRest, Released
from stages.objective import Objective
from stages.objectives.parts import Part
from stages.optim import Average, found_step_size, optimizer_state, rate_at
from stages.placed import all_adapters
from stages.plan import LearningRate, Stage
from stages.precision import Multiplied, StagePrecision
from stages.problems import RunError
from stages.reader import PlanError
from stages.run import Run
from stages.shown import Shown, show

if TYPE_CHECKING:
    from mixing.lanes import State
    from stages.open_lanes import Lanes

MOST_SKIPPED = 50  # the loss scale is 1e15 times smaller by then; at the start some 10 are usual


class TrainingError(RunError):
    """Training cannot go on: what was measured is not what the plan asks for, or is no number."""


@dataclass
class Window:
    """What has been counted on this process since the last line of the log."""

    began: float
    waited: float = 0.0
    steps: int = 0
    tokens: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Sums of images' errors, by source."""
    images: dict[str, int] = field(default_factory=dict)
    loss: Tensor | float = 0.0
    """Sum of what is trained: the errors, weighted."""
    by_noise: Tensor = field(default_factory=lambda: torch.zeros(2, 10, dtype=torch.float64))
    """Sums of errors and numbers of images, by tenth of the noise level."""


@dataclass
class Leg:
    """One stage under way."""

    run: Run
    index: int
    stage: Stage
    base_file: Path | None
    """The weights of the transformer that the stage began with; None for the model as the plan names it."""
    carried: dict[str, Tensor]
    """Adapters of other experts, which the checkpoints carry along."""
    drawing: Drawing
    """What is told which images are computed, for the adapters' dropout."""
    mixture: StageMixture
    lanes: Lanes
    """The streams that this process reads."""
    precision: StagePrecision
    model: nn.Module
    wrapped: nn.Module
    """The model as accelerate prepared it: inside DDP where there are several processes."""
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average | None
    key: int
    """Of (seed, stage): noise and timesteps are derived from it and the image's number."""
    objective: Objective
    """What is asked of the transformer."""
    rest: EncoderRest
    """Lets go of the encoders while the steps do without them."""
    step: int
    """Steps made."""
    images: dict[str, int]
    """Images of each source counted on this process; on the main one, with those from before a restart."""
    tokens: dict[str, int]
    """The same of tokens, those of references among them and those of prompts not."""
    levels: list[int]
    """The same of images at each resolution."""
    bad: dict[str, dict[str, str]]
    """Rows that turned out unreadable: source to key to reason."""
    skipped: int
    """Steps that fp16 skipped. Their images count, for the data goes on; the learning rate and the average do not."""
    skipped_in_a_row: int
    """How many of them were the last ones, without a step between."""
    seconds_before: float
    began: float
    window: Window
    base: Measured
    start: Measured | None
    first_step: int
    multiplied: str | None = None
    """What the first micro-batch was multiplied in; None until it was measured."""
    rows: list[tuple[int, int, str, str]] = field(default_factory=list)
    """Position, micro-batch, source and key of the images of the step under way."""
    named_rows: set[tuple[str, str]] = field(default_factory=set)
    """Unreadable rows that were warned of."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time that the loop waits for data."""
        began = time.monotonic()
        yield
        self.window.waited += time.monotonic() - began

    def parts(self, batch: MicroBatch) -> tuple[Shown, list[Part]]:
        """What a micro-batch shows the transformer, and in which calls. Noise, noise levels and dropout come from the images' places in the stage."""
        left_out = self.objective.left_out(batch)
        prompts = ["" if gone else prompt for prompt, gone in zip(batch.prompts, left_out.prompts, strict=True)]
        of_regions = [["" if gone else prompt for prompt, gone in zip(region.prompts, left_out.prompts, strict=True)] for region in batch.regions]
        shown = show(self.run.family, batch, prompts, of_regions)
        first = self.mixture.images_before(batch.step) if self.stage.timesteps.stratified else 0  # it is a tenth of a millisecond
        return shown, self.objective.parts(batch, shown, left_out, first)

    def dropping(self, batch: MicroBatch, part: Part) -> AbstractContextManager[None]:
        """Inside, inputs of the adapters are dropped as the images ask for it; the forward and the backward pass of a part stand in it."""
        return self.drawing.of([key(self.key, "dropout", batch.positions[row]) for row in part.rows.tolist()])

    def check_multiplied(self, watch: Multiplied) -> None:
        """Compare the dtype of the matrix products that were made with the plan's. Raises TrainingError if they differ."""
        self.multiplied = watch.verdict()
        if self.multiplied != self.stage.precision:
            raise TrainingError(f"stage '{self.stage.name}' asks for precision {self.stage.precision}, and its matrix products were made: {self.multiplied}")

    def check_gradients(self) -> None:
        """After the first step of this launch: every trainable parameter must have a gradient. Raises TrainingError naming those that have none."""
        if self.step == self.first_step and (missing := [name for name, parameter in self.trainable.items() if parameter.grad is None]):
            raise TrainingError(f"stage '{self.stage.name}': {len(missing)} of {len(self.trainable)} trainable weights got no gradient, such as {missing[0]}; take them out of `train` or `adapter.targets`")

    def count_part(self, batch: MicroBatch, part: Part, errors: Tensor, losses: Tensor) -> None:
        """Count what a part of a micro-batch brought. errors: of each of its images, float32 [b]; losses: the same, weighted, which is what is trained."""
        window, family, tenths = self.window, self.run.family, (part.t * 10).long().clamp(max=9)
        of_references = sum(family.tokens(*reference.size) for reference in batch.references) if part.has_references else 0
        tokens = family.latent_tokens(part.noised) + of_references
        window.tokens += len(part.rows) * (tokens + family.text_tokens * (1 + len(batch.regions)))
        window.loss = window.loss + losses.sum()
        window.by_noise = window.by_noise.to(errors.device)
        window.by_noise[0].index_add_(0, tenths, errors.double())
        window.by_noise[1].index_add_(0, tenths, torch.ones_like(errors, dtype=torch.float64))
        for place, row in enumerate(part.rows.tolist()):
            source = batch.sources[row]
            window.losses[source] = window.losses.get(source, errors.new_zeros(())) + errors[place]
            self.tokens[source] = self.tokens.get(source, 0) + tokens

    def count(self, batch: MicroBatch) -> None:
        """Count what a micro-batch held."""
        self.levels[batch.level] += len(batch.sources)
        for source in batch.sources:
            self.images[source] = self.images.get(source, 0) + 1
            self.window.images[source] = self.window.images.get(source, 0) + 1
        self.rows += [(position, batch.micro, source, row) for position, source, row in zip(batch.positions, batch.sources, batch.keys, strict=True)]
        for row in (*batch.bad, *self.lanes.take_bad()):
            self.note_bad(row)

    def note_bad(self, row: BadRow) -> None:
        """Count a row that could not be decoded."""
        self.bad.setdefault(row.source, {})[row.key] = row.reason

    def learning_rate(self, rate: LearningRate) -> float:
        """The rate of the step under way, by the steps that were made and not by those that were skipped."""
        return rate_at(self.step - self.skipped, self.stage.steps, rate)

    def stepped(self, made: bool) -> None:
        """A step is over: count it, average the weights, write the trace. made: False if it was skipped; the weights are as they were.

        Raises TrainingError after too many skipped ones in a row.
        """
        if not made:
            self.skipped += 1
        elif self.average:
            self.average.update(self.trainable)
        self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"stage '{self.stage.name}': {self.skipped_in_a_row} steps in a row were skipped, the last of them step {self.step + 1}, for their gradients leave the range of fp16 "
                f"even with a loss scale of {self.precision.scaler.get_scale():.1e}; the last checkpoint stands. Write precision: bf16 or fp32, or look at what the rows since hold"
            )
        self.step += 1
        self.window.steps += 1
        self.run.log.advance()
        if self.run.tracing:
            rows = gather_object(self.rows) if self.run.accelerator.num_processes > 1 else self.rows
            if self.run.trace:
                self.run.trace.write(self.stage.name, self.step - 1, [row[1:] for row in sorted(rows)])
        self.rows = []
        self.note_released(self.rest.step())

    def note_released(self, released: Released | None) -> None:
        """Log that encoders were let go of, if they were."""
        if released:
            counts = {"bytes_before": released.bytes_before, "bytes_after": released.bytes_after}
            self.run.log.write({"event": "memory", "stage": self.stage.name, "step": self.step, "kind": "released", "parts": released.parts, **counts})

    def log_step(self, learning_rate: float, norm: Tensor) -> None:
        """One line in metrics.jsonl and on the console, from all processes' counts. Raises TrainingError if the loss is no number."""
        run, names = self.run, list(self.mixture.asked)
        device = run.accelerator.device
        sums = torch.stack([self.window.losses.get(name, torch.zeros((), device=device)).double() for name in names])
        counts = torch.tensor([[self.window.images.get(name, 0), self.images.get(name, 0)] for name in names], dtype=torch.float64, device=device)
        trained = torch.as_tensor(self.window.loss, dtype=torch.float64, device=device)
        flat = torch.cat([torch.cat([sums[:, None], counts], dim=1).flatten(), self.window.by_noise.to(device).flatten(), trained.reshape(1)])
        flat = reduce(flat, reduction="sum") if run.accelerator.num_processes > 1 else flat
        numbers, by_noise, total = flat[: 3 * len(names)].view(-1, 3).tolist(), flat[3 * len(names) : -1].view(2, 10).tolist(), float(flat[-1])
        images = sum(row[1] for row in numbers)
        tokens = float(self.summed([self.window.tokens])[0])
        if not math.isfinite(total):
            raise TrainingError(f"stage '{self.stage.name}': the loss is {total} since a step at or before {self.step}; the last checkpoint stands. Lower the rate, or choose another precision")
        seconds = time.monotonic() - self.window.began
        record: dict[str, Any] = {
            "event": "step",
            "stage": self.stage.name,
            "step": self.step,
            "loss": total / images,
            "lr": learning_rate,
            "grad_norm": length if math.isfinite(length := float(norm)) else None,
            "images": images / self.window.steps,
            "tokens": tokens / self.window.steps,
            "images_per_second": images / seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait": self.window.waited / seconds,
            "multiplied_in": self.multiplied,
            "loss_by_noise": [error / count if count else None for error, count in zip(*by_noise, strict=True)],
            "losses": {name: row[0] / row[1] for name, row in zip(names, numbers, strict=True) if row[1]},
            "drawn": {name: int(row[2]) for name, row in zip(names, numbers, strict=True)},
        }
        if self.stage.precision == "fp16":
            record |= {"loss_scale": self.precision.scaler.get_scale(), "skipped": self.skipped}
        if (step_size := found_step_size(self.optimizer)) is not None:
            record["step_size"] = step_size
        if device.type == "cuda":
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        run.log.write(record)
        tracked = {name: record[name] for name in ("loss", "lr", "grad_norm", "images_per_second", "data_wait", "skipped", "step_size") if record.get(name) is not None}
        run.log.track({**tracked, "stage": self.index + 1, **{f"loss/{name}": loss for name, loss in record["losses"].items()}}, run.steps_before(self.index) + self.step)
        left = (self.stage.steps - self.step) * seconds / self.window.steps
        run.log.say(
            f"[bold]{self.stage.name}[/bold] {self.step:>{len(str(self.stage.steps))}}/{self.stage.steps}  loss {record['loss']:.4f}  lr {learning_rate:.2e}  "
            + (f"step size {step_size:.2e}  " if step_size is not None else "")
            + (f"skipped {self.skipped}  " if self.skipped else "")
            + f"{record['images_per_second']:,.0f} images/s  data wait {record['data_wait']:.1%}  left {int(left) // 60}:{int(left) % 60:02d}"
        )
        self.warn_of_cache()
        for message in self.lanes.take_waits():
            run.log.write({"event": "warning", "stage": self.stage.name, "step": self.step, "message": message})
        self.window = Window(time.monotonic())
        self.check_rows()

    def warn_of_cache(self) -> None:
        """Name what went wrong with the cache; none of it stops a run."""
        for message in self.run.cache.take_warnings() if self.run.cache else ():
            self.run.log.warn(message, self.stage.name, self.step)

    def summed(self, counts: Sequence[int]) -> list[int]:
        """Counts added up over the processes; every process must ask."""
        own = torch.tensor(counts, dtype=torch.int64, device=self.run.accelerator.device)
        both = reduce(own, reduction="sum") if self.run.accelerator.num_processes > 1 else own
        return [int(count) for count in both.tolist()]

    def check_rows(self) -> None:
        """Share among the processes which rows could not be read. Raises PlanError if a source has more of them than its plan lets pass."""
        if self.run.accelerator.num_processes > 1:
            for source, row, reason in gather_object([(source, row, reason) for source, rows in self.bad.items() for row, reason in rows.items()]):
                self.bad.setdefault(source, {})[row] = reason
        drawn = self.mixture.order.drawn_after(self.step)
        for name, rows in self.bad.items():
            selection = self.run.selections[name]
            source = selection.source
            for row, reason in rows.items():
                if (name, row) not in self.named_rows:
                    self.named_rows.add((name, row))
                    self.run.log.warn(f"source '{name}': {row}: {reason}; it is left out", self.stage.name, self.step)
            number = len(rows) + len(source.bad)
            of = len(source) + len(source.bad) if selection.stream is None else sum(count for (drawn_of, _), count in drawn.items() if drawn_of == name)
            if self.run.plan.sources[name].on_bad_row == "stop" or number > MOST_BAD * (of if selection.stream is None else max(of, FEW)):
                raise PlanError.at(f"sources.{name}", f"{number} of {of} rows cannot be read, such as {next(iter(rows))}: {next(iter(rows.values()))}; repair or remove them")

    @contextmanager
    def averaged(self) -> Iterator[str]:
        """Inside, the model holds its moving average where it has one, and is in evaluation mode; gives the word for what it holds."""
        if self.average:
            self.average.swap(self.trainable)
        try:
            with self.still():
                yield "ema" if self.average else "raw"
        finally:
            if self.average:
                self.average.swap(self.trainable)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def evaluate(self, kind: str) -> Measured:
        """Measure the held-out rows and log them. kind: start, during or end."""
        began = time.monotonic()
        run = self.run
        with self.averaged() as weights:
            measured = evaluate(
                run.family,
                self.model,
                run.selections,
                shapes=run.shapes(self.stage),
                precision=self.precision,
                seed=run.plan.seed,
                accelerator=run.accelerator,
                unreadable=self.note_bad,
                windows=self.objective.windows,
                t_range=run.t_range(self.stage),
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
        self.note_released(self.rest.aside())
        self.window.began += time.monotonic() - began  # it is no time of training
        return measured

    def save(self, finished: bool = False, probed: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint of everything that resuming needs; every process takes part, the main one writes."""
        run, stage = self.run, self.stage
        names = list(self.mixture.asked)
        counted = self.summed([*(self.images.get(name, 0) for name in names), *(self.tokens.get(name, 0) for name in names), *self.levels])
        lanes = self.lanes.states(self.mixture, self.step)
        if run.accelerator.num_processes > 1 and self.lanes.readers:
            everywhere: list[dict[str, dict[str, State]]] = gather_object([lanes])
            lanes = {name: {lane: state for own in everywhere for lane, state in own[name].items()} for name in lanes}
        if run.cache:
            run.cache.flush()
            self.warn_of_cache()
        self.check_rows()
        if run.accelerator.is_main_process:
            images, tokens = (dict(zip(names, counted[first : first + len(names)], strict=True)) for first in (0, len(names)))
            levels = counted[2 * len(names) :]
            folder = run.stage_folder(self.index)
            place = step_folder(folder, self.step)
            entry = ledger_entry(self.mixture, stage.name, self.step, images, tokens, levels, {name: len(rows) for name, rows in self.bad.items()})
            run.log.write({"event": "save", "stage": stage.name, "step": self.step, "folder": str(place.relative_to(run.folder))})
            drawn: dict[str, dict[str, int]] = {}
            for (source, signature), count in {**run.drawn_before(), **self.mixture.order.drawn_after(self.step)}.items():
                drawn.setdefault(source, {})[signature] = count
            base = self.base_file
            state = {
                "stage": stage.name,
                "index": self.index,
                "finished": finished,
                "adapters": {name: placed.settings.model_dump(mode="json") for name, placed in all_adapters(run.plan, self.index).items()},
                "plan": run.recorded(stage),
                "base": None if base is None or stage.train == "full" else os.path.relpath(base, place),
                "scaler": self.precision.scaler.state_dict(),
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "ema_updates": self.average.updates if self.average else None,
                "images": images,
                "tokens": tokens,
                "levels": levels,
                "lanes": {**self.lanes.others, **lanes},
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
                tensors["adapter"] = {**self.carried, **adapter_weights(self.model)}
            if self.average:
                tensors["ema"] = {name: value.cpu() for name, value in self.average.values.items()}
            if probed is not None:
                tensors["probe"] = probed
            write_checkpoint(folder, self.step, tensors, state)
            keep_newest(folder, 1 if finished else run.plan.keep, self.step)
            write_whole(run.folder / "ledger.json", json.dumps(run.ledger(entry), indent=1))
        run.accelerator.wait_for_everyone()

    def encoded(self) -> dict[str, tuple[int, int]]:
        """Of images and of prompts, how many encodings were found in the cache in this launch, and how many were made, over all processes."""
        if self.run.cache is None:
            return {}
        hits, misses = self.run.cache.hits, self.run.cache.misses
        counts = self.summed([hits["latents"], misses["latents"], hits["text"], misses["text"]])
        return {"images": (counts[0], counts[1]), "prompts": (counts[2], counts[3])}

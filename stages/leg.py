"""A leg: one stage under way. Its model, optimizer and counts, and the duties around the loop in train.py: count, follow, evaluate."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from mixing.ahead import Ahead
from mixing.bad_rows import BadRow
from mixing.batch import MicroBatch
from mixing.buckets import Size
from mixing.keys import key
from mixing.mixture import StageMixture
from mixing.rows import FEW, MOST_BAD
from stages.aside import Stopped
from stages.compiled import uncompiled
from stages.dropout import Drawing
from stages.engine import Training
from stages.follower import Follower
from stages.guard import Guard
from stages.measured import Measured
from stages.memory import EncoderRest, Released, held_bytes, restart_peak
from stages.objective import Drawn, Objective
from stages.objectives.parts import Part
from stages.optim import Average, rate_at
from stages.plan import LearningRate, Stage
from stages.precision import Multiplied, StagePrecision
from stages.problems import RunError
from stages.reader import PlanError
from stages.run import Run
from stages.shown import Shown, show
from stages.weighed import Weighed
from stages.window import MOST_PARTS, CountedPart, Window

if TYPE_CHECKING:
    from stages.open_lanes import Lanes

_MOST_AT_ONCE = 8  # micro-batches read together
_BYTES_AT_ONCE = 2**20  # of their pixels
MOST_SKIPPED = 50  # the loss scale is 1e15 times smaller by then; at the start some 10 are usual


class TrainingError(RunError):
    """Training cannot go on: what was measured is not what the plan asks for, or is no number."""


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
    training: Training
    """The model and its optimizer, as the run's engine trains them."""
    average: Average | None
    key: int
    """Of (seed, stage): noise and timesteps are derived from it and the image's number."""
    objective: Objective
    """What is asked of the transformer."""
    follower: Follower | None
    """What changes the shares, where the mix is adaptive."""
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
    """Steps that were skipped, by fp16 or by the guard. Their images count, for the data goes on; the learning rate and the average do not."""
    skipped_in_a_row: int
    """How many of those of fp16 were the last ones, without a step between."""
    guard: Guard
    """What is asked before a step is made."""
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
    held_before: int = 0
    """Bytes that the process held before the stage's model was loaded, as `stages.memory.held_bytes`."""
    most_bytes: int = 0
    """On a GPU, the most that tensors took until `memory_bytes` was last asked."""
    evaluation_seconds: float | None = None
    """What the last evaluation in this launch took."""
    passed_limit: bool = False
    """Whether it was said that no more of the blocks' shapes are compiled."""
    to_evaluate: bool = False
    """Whether held-out rows are to be measured after the step just made, which a signal may have broken off."""
    weighed: Weighed = field(default_factory=Weighed)
    """What the losses of the step under way were."""
    step_images: int = 0
    """Images of the step under way, over all processes."""
    norm: float = math.nan
    """Of the last step's gradient, before it was clipped."""
    guard_said: int = 0
    """How often the guard had something to say in this launch."""
    named_rows: set[tuple[str, str]] = field(default_factory=set)
    """Unreadable rows that were warned of."""
    latents: dict[Size, torch.Size] = field(default_factory=dict)
    """Of targets of each size in pixels, the shape of their latents, once there were any."""

    def stretches(self) -> Generator[tuple[Ahead[tuple[MicroBatch, Drawn]], int], None, None]:
        """What is read of the stage, and until which step: all that is left, or as far as the shares are known, which is until the next evaluation that may change them."""
        run = self.run
        while self.step < self.stage.steps:
            until = self.follower.next_border(self.step, self.stage.steps) if self.follower else self.stage.steps
            reading = self.mixture.batches(
                self.step,
                until,
                rank=run.accelerator.process_index,
                processes=run.accelerator.num_processes,
                workers=run.plan.workers,
                pin_memory=run.accelerator.device.type == "cuda",
                lanes=self.lanes.readers,
            )
            with closing(reading), closing(Ahead(map(self.draw, reading), self.note_wait, self.read_at_once)) as batches:
                yield batches, until

    def note_wait(self, seconds: float) -> None:
        """Count time that the loop waited for data."""
        self.window.waited += seconds

    @property
    def read_at_once(self) -> int:
        """How many micro-batches are read together: several only where they are small."""
        budget, signatures = self.mixture.budget, self.mixture.signatures
        images = max(budget.first, budget.last) // min(cell.tokens if budget.unit == "tokens" else 1 for cell in self.mixture.order.cells)
        largest = images * max(3 * height * width for signature in signatures for height, width in (signature.target, *signature.references))
        return max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // largest))

    def draw(self, batch: MicroBatch) -> tuple[MicroBatch, Drawn]:
        """A micro-batch with what is drawn for it. Noise, noise levels and what is left out come from the images' places in the stage, and from nothing else."""
        first = self.mixture.images_before(batch.step) if self.stage.timesteps.stratified else 0  # it is a tenth of a millisecond
        drawn = self.objective.draw(batch, self.latents.get(batch.targets.size), first)
        return batch, drawn.pin_memory() if self.run.accelerator.device.type == "cuda" else drawn

    def parts(self, batch: MicroBatch, drawn: Drawn) -> tuple[Shown, list[Part]]:
        """What a micro-batch shows the transformer, and in which calls."""
        left_out = drawn.left_out.prompts
        prompts = ["" if gone else prompt for prompt, gone in zip(batch.prompts, left_out, strict=True)]
        of_regions = [["" if gone else prompt for prompt, gone in zip(region.prompts, left_out, strict=True)] for region in batch.regions]
        shown = show(self.run.family, batch, prompts, of_regions)
        self.latents[batch.targets.size] = shown.x.shape[1:]
        self.weighed.see(batch, shown)
        parts = self.objective.split(batch, shown, drawn)
        if self.stage.compile and self.multiplied is None:
            self.measure_multiplied(batch, shown, parts[0])
        return shown, parts

    def dropping(self, batch: MicroBatch, part: Part) -> AbstractContextManager[None]:
        """Inside, inputs of the adapters are dropped as the images ask for it; the forward and the backward pass of a part stand in it."""
        if not self.drawing.is_used:
            return nullcontext()
        return self.drawing.of([key(self.key, "dropout", batch.positions[row]) for row in part.rows.tolist()])

    def check_multiplied(self, watch: Multiplied) -> None:
        """Compare the dtype of the matrix products that were made with the plan's. Raises TrainingError if they differ."""
        self.multiplied = watch.verdict()
        if self.multiplied != self.stage.precision:
            raise TrainingError(f"stage '{self.stage.name}' asks for precision {self.stage.precision}, and its matrix products were made: {self.multiplied}")

    def measure_multiplied(self, batch: MicroBatch, shown: Shown, part: Part) -> None:
        """`check_multiplied` of a stage whose blocks are compiled, by a call of its own before they are, for a block that is called first while its products are counted
        is never compiled (torch 2.13)."""
        with uncompiled(), self.dropping(batch, part), torch.no_grad(), Multiplied() as watch, self.precision.autocast():
            shown.predict_part(self.run.family, self.model, part)
        self.check_multiplied(watch)

    def check_gradients(self) -> None:
        """After the first step of this launch: every trainable parameter must have a gradient. Raises TrainingError naming those that have none."""
        if self.step == self.first_step and (missing := self.training.without_gradient()):
            raise TrainingError(f"stage '{self.stage.name}': {len(missing)} of {len(self.training.trainable)} trainable weights got no gradient, such as {missing[0]}; take them out of `train` or `adapter.targets`")

    def count_part(self, batch: MicroBatch, part: Part, errors: Tensor, losses: Tensor) -> None:
        """Count what a part of a micro-batch brought. errors: of each of its images, float32 [b]; losses: the same, weighted, which is what is trained."""
        window, family, rows = self.window, self.run.family, part.rows.tolist()
        of_references = sum(family.tokens(*reference.size) for reference in batch.references) if part.has_references else 0
        tokens = family.latent_tokens(part.noised) + of_references
        window.tokens += len(rows) * (tokens + family.text_tokens * (1 + len(batch.regions)))
        sources = tuple(batch.sources[row] for row in rows)
        for source in sources:
            self.tokens[source] = self.tokens.get(source, 0) + tokens
        window.parts.append(CountedPart(sources, part.t, errors, losses))
        self.weighed.count(batch, rows, losses)
        if len(window.parts) >= MOST_PARTS:
            window.sum_up(list(self.mixture.sources), errors.device)

    def count(self, batch: MicroBatch) -> None:
        """Count what a micro-batch held."""
        self.step_images = batch.step_images
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

    def stepped(self, made: bool, *, is_sound: bool) -> None:
        """A step is over: count it, average the weights, write the trace. made: False if it was skipped; the weights are as they were. is_sound: False if it was the guard that skipped it.

        Raises TrainingError after too many in a row that fp16 skipped.
        """
        if not made:
            self.skipped += 1
        elif self.average:
            with self.training.gathered():
                self.average.update(self.training.trainable)
        if is_sound:
            self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"stage '{self.stage.name}': {self.skipped_in_a_row} steps in a row were skipped, the last of them step {self.step + 1}, for their gradients leave the range of fp16 "
                f"even with a loss scale of {self.precision.scaler.get_scale():.1e}; {self.run.room.standing()}. Write precision: bf16 or fp32, or look at what the rows since hold"
            )
        self.step += 1
        self.window.steps += 1
        self.run.log.stepped()
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

    def memory_bytes(self) -> int:
        """On a GPU the most that tensors have taken since this was last asked; on the CPU what the process holds."""
        device = self.run.accelerator.device
        if device.type != "cuda":
            return held_bytes(device)
        peak = torch.cuda.max_memory_allocated(device)
        self.most_bytes = max(self.most_bytes, peak)
        restart_peak(device)
        return peak

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
            for source, row, reason in gather_object([(source, row, reason) for source, rows in self.bad.items() for row, reason in rows.items() if (source, row) not in self.named_rows]):
                self.bad.setdefault(source, {})[row] = reason
        drawn = self.mixture.order.drawn_after(self.step) if self.bad else {}  # it takes half a millisecond
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
            with self.training.gathered(changing=True):
                self.average.swap(self.training.trainable)
        stopped: Stopped | None = None
        with self.still():
            try:
                yield "ema" if self.average else "raw"
            except Stopped as error:  # all processes have it at once
                stopped = error
        if self.average:  # not after another error, with which the leg ends: other processes may be where they take no part in it
            with self.training.gathered(changing=True):
                self.average.swap(self.training.trainable)
        if stopped:
            raise stopped

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode."""
        self.model.eval()
        try:
            with uncompiled() if self.stage.compile else nullcontext():
                yield
        finally:
            self.model.train()

    def encoded(self) -> dict[str, tuple[int, int]]:
        """Of images and of prompts, how many encodings were found in the cache in this launch, and how many were made, over all processes."""
        if self.run.cache is None:
            return {}
        hits, misses = self.run.cache.hits, self.run.cache.misses
        counts = self.summed([hits["latents"], misses["latents"], hits["text"], misses["text"]])
        return {"images": (counts[0], counts[1]), "prompts": (counts[2], counts[3])}

"""Live: the view at the foot of a terminal while a run goes on, and the line that stands for it where there is no terminal.

It is drawn between steps, by the loop's own thread, two or three times a second at most: data workers are forked, and a thread that draws might hold a lock just then.
The cursor stays visible, so a terminal is as it was however the process ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from stages.explain import byte_words
from stages.plan import Plan
from stages.time_left import Pace, duration, rounded, run_seconds, stage_seconds

_EVERY = 0.4  # seconds between drawings
_NAME, _GAP = 20, "    "
_BESIDE = 12  # lines of a terminal for what is printed above, and for the rest of the view
_BARS = "▁▂▃▄▅▆▇█"
_MOST_LOSSES = 240
_LONGEST = 120  # characters of a line where there is no view
_SURE = 3.0  # standard errors, from which on a change is one

PLAIN, DIM, BOLD = Style(), Style(dim=True), Style(bold=True)
BUSY, DONE, BETTER, WORSE = Style(color="cyan"), Style(color="green"), Style(color="green"), Style(color="red")
_Part = tuple[str, Style]


@dataclass
class Shown:
    """What is known of the stage under way."""

    index: int
    step: int
    multiple: int
    """Pixels along a token's side."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The last line of the log; empty before the first."""
    asked: Mapping[str, float] = field(default_factory=dict)
    """Shares of what was drawn until then."""
    pace: Pace | None = None
    losses: list[float] = field(default_factory=list)
    """Of the lines so far; of a long stage their means over equal parts."""
    together: int = 1
    """How many lines each of them stands for."""
    waiting: list[float] = field(default_factory=list)


class View:
    """The live view. Draws itself as rich asks for it."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._plan = console, plan
        self._words = ""
        self._stage: Shown | None = None
        self._held_out: dict[str, tuple[float, str]] = {}
        self._drawn = 0.0
        self._live = Live(self, console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._live.start()
        console.show_cursor(True)

    def begin(self, index: int, step: int, multiple: int) -> None:
        """A stage begins, or goes on after so many steps. multiple: pixels along a token's side."""
        self._stage, self._words = Shown(index, step, multiple), ""
        self.draw()

    def stepped(self) -> None:
        """A step was made."""
        self._words = ""
        if self._stage:
            self._stage.step += 1
        self._draw_if_due()

    def line(self, record: Mapping[str, Any], pace: Pace, asked: Mapping[str, float]) -> None:
        """Show a line of the log, an event "step". asked: of each source, the share of what was drawn until then."""
        if self._stage is None:
            return
        stage = self._stage
        stage.record, stage.pace, stage.asked = record, pace, asked
        stage.waiting += [] if record["loss"] is None else [record["loss"]]
        if len(stage.waiting) == stage.together:
            stage.losses.append(sum(stage.waiting) / stage.together)
            stage.waiting = []
        if len(stage.losses) >= _MOST_LOSSES:
            stage.losses, stage.together = [(first + second) / 2 for first, second in zip(stage.losses[::2], stage.losses[1::2], strict=True)], 2 * stage.together
        if pace.step_seconds >= _EVERY:  # the next drawing would be long in coming
            self.draw()
        else:
            self._draw_if_due()

    def measured(self, sources: Mapping[str, Mapping[str, Any]]) -> None:
        """Show what an evaluation found, the event's "sources"."""
        for name, entry in sources.items():
            change, error = entry.get("since_base"), entry.get("since_base_error")
            sure = change is not None and error is not None and abs(change) > _SURE * error
            self._held_out[name] = entry["loss"], ("▼" if change < 0 else "▲") if change is not None and sure else ""

    def now(self, words: str) -> None:
        """Say what is being done, until the next step."""
        self._words = words
        self.draw()

    def draw(self) -> None:
        """Draw it now."""
        self._live.refresh()
        self._drawn = time.monotonic()

    def _draw_if_due(self) -> None:
        if time.monotonic() - self._drawn >= _EVERY:
            self.draw()

    def close(self) -> None:
        """Take it away."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not console.encoding.startswith("utf")
        for parts in self._lines(options.max_width - 1, console.height):
            for text, style in parts:
                yield Segment(text.translate(_ASCII).encode("ascii", "replace").decode() if plain else text, style)
            yield Segment.line()

    def _lines(self, width: int, height: int) -> Iterator[Sequence[_Part]]:
        """The view's lines, each of at most `width` characters."""
        stages, stage = self._plan.stages, self._stage
        if stage is None:
            yield [(f"· {self._words} …"[:width] if self._words else "", BUSY)]
            return
        asked = stages[stage.index]
        steps = f"step {stage.step:,}/{asked.steps:,}  {stage.step / asked.steps:.0%}"
        name = _cut(f"stage {stage.index + 1}/{len(stages)} {asked.name}", max(10, width - len(steps) - 2))
        yield []
        yield [(name, BOLD), (" " * (width - len(name) - len(steps)), PLAIN), (steps, PLAIN)]
        filled = round(width * stage.step / asked.steps)
        yield [("━" * filled, DONE), ("━" * (width - filled), DIM)]
        yield [(_cut(f"now    {self._words} …", width), BUSY)] if self._words else _labelled(width, "left", self._left(stage))
        record = stage.record
        if not record:
            yield _labelled(width, "loss", "known after the first step" if not stage.step else "known at the next line of the log")
            return
        small = width < 96
        size = f"   step size {record['step_size']:.1e}" if "step_size" in record else ""
        skipped = f"   skipped {record['skipped']}" if record.get("skipped") else ""
        loss, bars = _loss(record), _bars(stage.losses, 16 if small else 40)
        yield [("loss   ", DIM), (loss, BOLD), (_cut(f"  {bars}   learning rate {record['lr']:.2e}{size}{skipped}", width - 7 - len(loss)), PLAIN)]
        memory = f"   memory {byte_words(record['memory_bytes'])}" if "memory_bytes" in record else ""
        yield _labelled(width, "speed", f"{_speed(record)} images/s   data wait {record['data_wait']:.1%}{memory}")
        yield from self._sources(stage, width, height)

    def _left(self, stage: Shown) -> str:
        if stage.pace is None:
            return "known after the first line of the log"
        here = stage_seconds(self._plan, stage.pace, stage.step)
        if stage.index + 1 == len(self._plan.stages):
            return duration(here)
        return f"{duration(here)} in this stage, about {rounded(run_seconds(self._plan, stage.pace, stage.step, stage.multiple))} in all"

    def _sources(self, stage: Shown, width: int, height: int) -> Iterator[Sequence[_Part]]:
        """A table of the sources, in several blocks side by side where they fit; of more than fit the first, and how many are left out."""
        drawn, losses = stage.record["drawn"], stage.record["losses"]
        total = sum(drawn.values()) or 1
        whole = bool(self._held_out)
        head = f"{'source':<{_NAME}} {'loss':>8} " + (f"{'held out':>10} " if whole else "") + f"{'asked':>7} {'drawn':>7}"
        blocks = max(1, min((width + len(_GAP)) // (len(head) + len(_GAP)), -(-len(drawn) // 4)))
        rows = max(3, height - _BESIDE)
        names = list(drawn)
        left_out = len(names) - rows * blocks
        if left_out > 0:
            rows -= 1
            left_out = len(names) - rows * blocks
        lines = min(rows, -(-len(names) // blocks))
        yield [(_GAP.join([head] * blocks)[:width], DIM)]
        for line in range(lines):
            parts: list[_Part] = []
            for name in (names[place] for place in range(line, min(len(names), rows * blocks), lines)):
                if parts:
                    parts.append((_GAP, PLAIN))
                loss = f"{losses[name]:.4f}" if name in losses else "·"
                parts.append((f"{_cut(name, _NAME):<{_NAME}} {loss:>8} ", PLAIN))
                if whole:
                    held_out, arrow = self._held_out.get(name, (None, ""))
                    parts.append((f"{arrow + ' ' if arrow else ''}{'' if held_out is None else f'{held_out:.4f}'}".rjust(10) + " ", BETTER if arrow == "▼" else WORSE if arrow else PLAIN))
                parts.append((f"{stage.asked.get(name, 0.0):>7.1%} {drawn[name] / total:>7.1%}", PLAIN))
            yield parts
        if left_out > 0:
            yield [(f"and {left_out} more", DIM)]


_ASCII = str.maketrans({"━": "-", "…": ".", "·": "-", "▼": "v", "▲": "^", **dict.fromkeys(_BARS, " ")})


def _labelled(width: int, label: str, text: str) -> list[_Part]:
    """A word and what belongs to it."""
    return [(f"{label:<7}", DIM), (_cut(text, width - 7), PLAIN)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _loss(record: Mapping[str, Any]) -> str:
    """The mean loss of a line; of one whose losses were all no numbers, that."""
    return "no number" if record["loss"] is None else f"{record['loss']:.4f}"


def _speed(record: Mapping[str, Any]) -> str:
    speed = record["images_per_second"]
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _bars(values: Sequence[float], most: int) -> str:
    """Numbers as a row of bars, at most so many, each the mean of an equal part of them."""
    if len(values) < 2:
        return ""
    number = min(most, len(values))
    parts = [values[len(values) * place // number : len(values) * (place + 1) // number] for place in range(number)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(_BARS[int((mean - low) / (high - low) * (len(_BARS) - 1) + 0.5) if high > low else 0] for mean in means)


def plain_line(plan: Plan, record: Mapping[str, Any], pace: Pace, multiple: int) -> str:
    """The line of the log where there is no view, in rich's markup; at most 120 characters are seen, for which what matters least is left out."""
    stage, step = plan.stages[pace.index], record["step"]
    left = duration(stage_seconds(plan, pace, step))
    parts = {
        "name": f"{_cut(stage.name, 16)} {step:>{len(str(stage.steps))}}/{stage.steps}",
        "loss": f"loss {_loss(record)}",
        "rate": f"lr {record['lr']:.2e}",
        "step size": f"step size {record['step_size']:.1e}" if "step_size" in record else "",
        "skipped": f"skipped {record['skipped']}" if record.get("skipped") else "",
        "speed": f"{_speed(record)} images/s",
        "wait": f"data wait {record['data_wait']:.1%}",
        "left": f"left {left}",
        "in all": f"in all about {rounded(run_seconds(plan, pace, step, multiple))}" if pace.index + 1 < len(plan.stages) else "",
    }
    for least in ("in all", "step size", "skipped"):
        if len("  ".join(filter(None, parts.values()))) > _LONGEST:
            parts[least] = ""
    name, *others = filter(None, parts.values())
    return "  ".join([f"[bold]{name.replace(' ', '[/bold] ', 1)}", *others])

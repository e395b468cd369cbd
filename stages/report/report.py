"""The report of a run: one HTML file that opens anywhere, needs no network and can be written at any moment of the run.

`write_report` reads the run folder alone, so that a report can be made again from any run. What a half-finished run has not written yet
is left out, with one line that says so. Numbers come first: which source got better, in which stage, and how sure that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path

from stages.report.accounts import launches, ledger, selections, warnings
from stages.report.advice import next_shares
from stages.report.curves import rates, throughput, training
from stages.report.glance import glance
from stages.report.guard import guard
from stages.report.handoffs import handoffs
from stages.report.held_out import by_timestep, held_out
from stages.report.memory import memory
from stages.report.mix import mixes
from stages.report.page import page
from stages.report.plan_text import plan
from stages.report.previews import previews
from stages.report.quality import quality
from stages.report.record import Record, read_record
from stages.report.results import accuracy, losses


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from what the run has written so far, and return its path."""
    record = read_record(folder)
    sections = [(name, anchor, write(record)) for name, anchor, write in _SECTIONS]
    present = [(name, anchor, body) for name, anchor, body in sections if body]
    absent = [name for name, anchor, body in sections if not body and anchor not in ("warnings", "selection", "accuracy", "quality", "advice", "guard")]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor, _ in present)
    footer = f"Written by Medley from {escape(record.folder.resolve().name)}/, with what the run had written by then."
    footer += f" Not in this report, because the run has not written it: {', '.join(absent).lower()}." if absent else ""
    body = glance(record) + (f'<nav aria-label="Sections">{links}</nav>' if present else "") + "".join(body for _, _, body in present)
    html = page(f"{record.name} · Medley", body + f"<footer><p>{footer}</p></footer>")
    path = folder / "report.html"
    part = path.with_suffix(".html.part")
    try:
        part.write_bytes(html.encode("utf-8", errors="replace"))
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)  # a full disk is not to be kept full by it
        raise
    return path


_SECTIONS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("Losses", "loss", losses),
    ("Accuracy", "accuracy", accuracy),
    ("Quality", "quality", quality),
    ("Previews", "previews", previews),
    ("Mix", "mix", mixes),
    ("Held-out loss", "held-out", held_out),
    ("Next shares", "advice", next_shares),
    ("Timesteps", "timesteps", by_timestep),
    ("Training loss", "training", training),
    ("Skipped steps and spikes", "guard", guard),
    ("Learning rate", "rate", rates),
    ("Throughput", "throughput", throughput),
    ("Memory", "memory", memory),
    ("Hand-offs", "handoffs", handoffs),
    ("Ledger", "ledger", ledger),
    ("Rows chosen", "selection", selections),
    ("Launches", "launches", launches),
    ("Warnings", "warnings", warnings),
    ("Plan", "plan", plan),
)

"""The report's page: how numbers are written, and the pieces of HTML that its sections are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from stages.report.style import STYLE

# Nothing may be fetched and nothing may run: whatever a caption or a warning holds, a browser is told so too.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

MOST_COLUMNS = 11
"""Columns of a table up to which a sheet of paper holds them in the usual size."""


def count(value: float | None) -> str:
    """A whole number with thousands separated: 19,200."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] in percent: 20.0 %."""
    return "–" if share is None or not math.isfinite(share) else f"{share * 100:.{digits}f} %"


def fixed(value: float | None, digits: int = 4) -> str:
    """A number with a real minus sign, exponential where its digits would all be zero."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value and (abs(value) < 0.5 * 10**-digits or abs(value) >= 1e6):
        return ("−" if value < 0 else "") + f"{abs(value):.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int) -> str:
    """A change, always with its sign."""
    rounded = f"{abs(value):.{digits}f}"
    return ("−" if value < 0 else "+") + rounded if float(rounded) else rounded


def shortest(value: float | None) -> str:
    """A number as a person would write it: 0.001, 4e-6, 467,000."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:g}".partition("e")
    return mantissa.replace("-", "−") + (f"e{int(exponent)}" if exponent else "")


def exact(value: float) -> str:
    """Two digits of a number, however small: 0.0040, 1.2e-7."""
    mantissa, _, exponent = f"{value:#.2g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if exponent else "")


def size(value: float | None) -> str:
    """Bytes in powers of 1000."""
    if value is None:
        return "–"
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB" if value < 1000 else f"{value:,.0f} TB"


def duration(seconds: float | None) -> str:
    """A length of time in its two largest units: 3 min 41 s."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, less, less_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // less} {less_name}"
    return f"{whole} s"


def moment(time: float | None) -> str:
    """A time stamp as a date in UTC; empty where there is none."""
    if time is None or not 0 <= time < 2**33:
        return ""
    at = datetime.fromtimestamp(time, UTC)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def section(anchor: str, heading: str, note: str, body: str) -> str:
    """A section of the page. `note` and `body` are HTML."""
    remark = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{anchor}"><h2>{escape(heading)}</h2>{remark}{body}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), first: Sequence[int] = (), name: str = "Table") -> str:
    """A table that scrolls in itself where the screen is narrow. Cells are HTML; `first` are the rows that begin a group; `name` is what a screen reader calls it."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f'<{tag} class="n">{cell}</{tag.split()[0]}>' if k in numeric else f"<{tag}>{cell}</{tag.split()[0]}>" for k, cell in enumerate(row))

    body = "".join(f"<tr{' class=first' if k in first else ''}>{cells('td', row)}</tr>" for k, row in enumerate(rows))
    kinds = " ".join(kind for kind, holds in (("grouped", first), ("columns", len(head) > MOST_COLUMNS)) if holds)
    thead = f"<thead><tr>{cells('th scope=col', head)}</tr></thead>"
    return region(name, f'<table class="{kinds}">{thead}<tbody>{body}</tbody></table>')


def region(name: str, body: str) -> str:
    """A card that scrolls in itself where the screen is narrow, for the keyboard too. `name` is what a screen reader calls it."""
    return f'<div class="card wide" role="region" aria-label="{escape(name)}" tabindex="0">{body}</div>'


def panel(heading: str, aside: str, body: str, colour: str = "", extra: str = "") -> str:
    """A card with a heading, a value at its right, and a chart or bars. `heading` is text, the others are HTML."""
    swatch = f'<i class="swatch" style="background:var({colour})"></i>' if colour else ""
    named = f"<h3><b>{swatch}{escape(heading)}</b><span>{aside}</span></h3>" if heading else ""
    return f'<div class="panel{extra}">{named}{body}</div>'


def folded(heading: str, body: str) -> str:
    """Something that is there for whoever opens it."""
    return f"<details><summary>{escape(heading)}</summary>{body}</details>"


def page(title: str, body: str) -> str:
    """The whole file: no script, nothing fetched."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )

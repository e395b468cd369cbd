"""The report's page: its style sheet, how numbers are written, and the pieces of HTML that its sections are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

COLOURS = 8
"""Colours of sources in the style sheet; further sources begin again, and every curve also carries its name."""

# Nothing may be fetched and nothing may run: whatever a caption or a warning holds, a browser is told so too.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --card: #ffffff; --ink: #1f2328; --soft: #646a73;
  --line: #e6e4df; --track: #eeece7;
  --good: #1a7350; --bad: #b23a1e; --c0: #2867ad; --c1: #b8501f; --c2: #1f7d5c; --c3: #7a55b3; --c4: #8f6a08;
    --c5: #b0406f; --c6: #187a8c;
  --c7: #5b6675; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1b1e23; --ink: #e8e7e3;
  --soft: #9da3ad; --line: #2d3138;
  --track: #2a2e35; --good: #5cc592; --bad: #f08a6c; --c0: #74aeea; --c1: #ee9468; --c2: #5cc2a0; --c3: #b79df0;
    --c4: #d8b04f; --c5: #ec8bb6;
  --c6: #5cc0d3; --c7: #a6b1c0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; overflow-wrap: break-word; background: var(--paper); color: var(--ink); font: 15px/1.55 -apple-system, BlinkMacSystemFont,
  "Segoe UI", Roboto, Inter,
  "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1204px; margin: 0 auto; padding: 52px 24px 72px; }
h1 { font-size: 38px; line-height: 1.15; letter-spacing: -.022em; font-weight: 650; margin: 2px 0 8px;
  overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; font-weight: 640; margin: 0 0 4px; }
h3 { font-size: 14px; font-weight: 620; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 92ch; }
.soft, .note { color: var(--soft); }
.note { font-size: 13.5px; max-width: 100ch; }
.over { font-size: 12px; letter-spacing: .09em; text-transform: uppercase; color: var(--soft); margin: 0; }
header .soft { margin-bottom: 0; overflow-wrap: anywhere; }
section { margin-top: 52px; }
section > .note { margin-bottom: 18px; }
section > h2 + :not(.note) { margin-top: 14px; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
nav { margin-top: 26px; padding: 10px 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line);
  font-size: 13.5px; display: flex;
  flex-wrap: wrap; gap: 2px 18px; color: var(--soft); }
nav a { text-decoration: none; }
nav a:hover { color: var(--ink); text-decoration: underline; }
.verdict { overflow-wrap: anywhere; font-size: 18px; line-height: 1.5; margin: 22px 0 0; max-width: 70ch; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 18px 24px;
  margin: 26px 0 0; }
.facts dt { font-size: 12.5px; color: var(--soft); }
.facts dd { margin: 0; font-size: 22px; line-height: 1.3; font-weight: 600; letter-spacing: -.01em; }
.facts dd small { font-size: 13px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.strip { display: flex; flex-wrap: wrap; gap: 14px; margin: 26px 0 0; padding: 0; list-style: none; }
.strip li { flex: 1 1 220px; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px 15px; }
.strip h3 { font-size: 16px; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 8px; margin-bottom: 8px; }
.strip h3 span { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
h3 b { font-weight: 620; min-width: 0; }
.strip p { font-size: 13.5px; margin: 0; line-height: 1.6; }
.strip .stacked { margin-top: 10px; }
.strip .legend { color: var(--soft); font-size: 12.5px; margin-top: 5px; }
.legend span { display: inline-block; max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  margin-right: 10px; vertical-align: bottom; }
.swatch { display: inline-block; width: 9px; height: 9px; border-radius: 2.5px; margin-right: 6px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 6px 18px; }
.card + .note, .wide + .note, .below { margin-top: 14px; }
.grid + .note { margin-top: 12px; }
.grid + details, .sheet + details { margin-top: 16px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 318px), 1fr)); gap: 14px; }
.grid.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.panel { padding: 13px 14px 8px; min-width: 0; break-inside: avoid; }
.panel.all { padding-top: 16px; }
.panel h3 { display: flex; justify-content: space-between; align-items: baseline; gap: 10px; margin-bottom: 8px; }
.panel h3 span { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
.chart { overflow: hidden; }
svg { display: block; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); }
svg .label { font-size: 11.5px; font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .border { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
svg path.line { stroke-width: 1.8; }
svg path.thin { stroke-width: 1; opacity: .8; }
svg path.faint { stroke-width: 1; opacity: .4; }
svg .tick.wide { display: none; }
svg path.dashed { stroke-width: 1.2; stroke-dasharray: 4 4; }
svg path.band { stroke: none; opacity: .24; }
svg circle { stroke: var(--card); stroke-width: 1; }
.stacked { border-radius: 3px; overflow: hidden; background: var(--track); }
.stacked rect { stroke: var(--card); stroke-width: 1; }
.bullet .track { fill: var(--track); }
.bullet .asked { fill: var(--ink); }
.wide { overflow-x: auto; position: relative; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { font-weight: 600; text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tbody tr:last-child > * { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: 12px; }
.grouped td { white-space: nowrap; border-bottom: 0; padding-top: 3px; padding-bottom: 3px; }
.grouped tr.first > * { border-top: 1px solid var(--line); padding-top: 9px; }
.grouped tbody tr.first:first-child > * { border-top: 0; }
.losses thead th:not(:first-child) b { color: var(--ink); font-size: 14px; font-weight: 620; }
.error { color: var(--soft); font-size: .88em; }
.cell { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0 6px; font-size: 13.5px; text-align: right;
  white-space: nowrap; align-items: baseline; }
.cell > * { min-width: calc((11.6 + var(--digits)) * 1ch); }
.cell > :first-child { min-width: 3.8em; flex: 1 0 auto; }
.losses th + *, .losses td { border-left: 1px solid var(--line); padding: 9px 10px; }
.losses th[scope=row] { min-width: 9em; max-width: 15em; overflow-wrap: anywhere; }
.losses td:last-child, .losses th:last-child { padding-right: 0; }
.losses thead .head { display: block; text-align: left; min-width: 9em; overflow-wrap: anywhere; margin-bottom: 2px; }
.cell b { font-size: 15px; font-weight: 640; }
.cell .raw { flex: 0 0 100%; grid-column: 1 / -1; font-size: 12.5px; color: var(--soft); }
.cell .lead { display: none; }
.many .cell { flex-direction: column; align-items: flex-end; }
.many .cell > :first-child { flex: none; }
.mark { display: inline-block; width: 1.25em; text-align: center; font-size: 11.5px; }
.better { color: var(--good); } .worse { color: var(--bad); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.mix { display: grid; grid-template-columns: minmax(0, max-content) minmax(60px, 1fr) max-content; gap: 5px 12px;
  align-items: center; font-size: 13px;
  padding-bottom: 6px; }
.mix > :first-child, .mix > :nth-child(3n + 1) { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.mix .n { text-align: right; }
.accuracy td:nth-child(2) { width: 38%; vertical-align: middle; }
.accuracy .card + .card { margin-top: 14px; }
.sheet { margin: 0 0 22px; break-inside: avoid; }
.handoffs p { font-size: 13.5px; margin: 0; }
.changes { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 14px; margin: 10px 0 6px;
  padding-top: 10px; font-size: 13px;
  border-top: 1px solid var(--line); }
.changes dt { color: var(--soft); }
.changes dd { margin: 0; overflow-wrap: anywhere; }
.sheet img { display: block; max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line);
  background: #fff; }
.sheet img.tiny { image-rendering: pixelated; }
.sheet figcaption { font-size: 13.5px; color: var(--soft); margin-bottom: 8px; }
#launches td:nth-child(-n + 2) { white-space: nowrap; }
ul.plain { margin: 0; padding: 0; list-style: none; }
ul.plain li { padding: 7px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
ul.plain li:last-child { border-bottom: 0; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; font-size: 14px; }
pre { margin: 0 0 14px; padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; tab-size: 2; }
footer { margin-top: 56px; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
@media (min-width: 900px) { .all svg .tick.wide { display: inline; } .all svg .tick.narrow { display: none; } }
@media (max-width: 1239px) { .cell { flex-direction: column; align-items: flex-end; } .cell > :first-child { flex: none; } }
@media (max-width: 680px) {
  main { padding: 30px 16px 48px; }
  h1 { font-size: 30px; }
  .verdict { font-size: 16.5px; }
  section { margin-top: 42px; }
  .facts { grid-template-columns: repeat(2, 1fr); gap: 14px 18px; }
  .card { padding: 4px 14px; }
  .wide table:not(.losses) { min-width: 560px; }
  .accuracy .wide table { min-width: 0; }
  .accuracy th, .accuracy td { padding-right: 10px; }
  .accuracy th:nth-child(2), .accuracy td:nth-child(2) { display: none; }
  .accuracy thead th { font-size: 11.5px; white-space: normal; }
  .sheet img { max-width: none; }
  .losses, .losses tbody, .losses tr, .losses td, .losses tbody th { display: block; width: 100%; }
  .losses thead { display: none; }
  .losses tr { padding: 10px 0; border-bottom: 1px solid var(--line); }
  .losses tr:last-child { border-bottom: 0; }
  .losses tbody th { padding: 0 0 4px; border: 0; font-size: 14.5px; }
  .losses th + *, .losses td { padding: 4px 0; border: 0; }
  .cell, .many .cell { display: grid; grid-template-columns: minmax(0, 1fr) auto auto; font-size: 12.5px; gap: 0 4px; }
  .cell .lead { display: block; font-size: 11.5px; color: var(--soft); font-weight: 400; overflow: hidden;
    text-overflow: ellipsis; }
  .cell > :first-child { text-align: left; min-width: 0; }
}
@media print {
  :root { --paper: #ffffff; }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { margin-top: 28px; }
  h2, .note { break-after: avoid; }
  tr, .strip li { break-inside: avoid; }
  .grid, .grid.two { grid-template-columns: repeat(2, 1fr); }
  .card { break-inside: avoid; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
}
"""


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


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), first: Sequence[int] = ()
) -> str:
    """A table that scrolls in itself where the screen is narrow. Cells are HTML; `first` are the rows that begin a group."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{cell}</{tag}>' if k in numeric else f"<{tag}>{cell}</{tag}>"
            for k, cell in enumerate(row)
        )

    body = "".join(f"<tr{' class=first' if k in first else ''}>{cells('td', row)}</tr>" for k, row in enumerate(rows))
    grouped = ' class="grouped"' if first else ""
    return f'<div class="card wide" tabindex="0"><table{grouped}><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


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

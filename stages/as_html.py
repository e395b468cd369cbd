"""What the console shows, as HTML for a notebook: rich's tables become tables, its lines paragraphs, and nothing in them is markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

_COLOURS = {"yellow": "color:#a15c00", "dim": "opacity:0.7", "bold": "font-weight:600", "red": "color:#b3261e"}
_CELL = "padding:2px 14px 2px 0;vertical-align:top"


def to_html(parts: Iterable[RenderableType]) -> str:
    """Lines and tables, in their order. Raises TypeError for what is neither."""
    return f'<div style="max-width:62em">{"".join(map(_part, parts))}</div>'


def _part(part: RenderableType) -> str:
    if isinstance(part, Padding):
        return f'<div style="margin-left:{part.left}em">{_part(part.renderable)}</div>'
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, str | Text):
        return f'<div style="min-height:0.8em;white-space:pre-wrap">{_inline(part)}</div>'
    raise TypeError(f"{type(part).__name__} has no HTML")


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col" style="{_CELL};{_align(column)};font-weight:normal;opacity:0.7">{_inline(column.header)}</th>' for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join("<tr>" + "".join(_cell(column, cell) for column, cell in zip(table.columns, row, strict=True)) + "</tr>" for row in rows)
    foot = "".join(f'<td style="{_CELL};{_align(column)};font-weight:600">{_inline(column.footer)}</td>' for column in table.columns)
    parts = [f"<thead><tr>{head}</tr></thead>" if table.show_header else "", f"<tbody>{body}</tbody>", f"<tfoot><tr>{foot}</tr></tfoot>" if table.show_footer else ""]
    return f'<table style="border-collapse:collapse;margin:4px 0">{"".join(parts)}</table>'


def _cell(column: Column, cell: RenderableType) -> str:
    return f'<td style="{_CELL};{_align(column)}{_style(str(column.style))}">{_inline(cell)}</td>'


def _align(column: Column) -> str:
    return f"text-align:{column.justify if column.justify in ('left', 'right', 'center') else 'left'}"


def _inline(text: RenderableType) -> str:
    """A line with the styles of its parts; a string is read as rich's markup, as the console reads it."""
    if isinstance(text, str):
        text = Text.from_markup(text)
    if not isinstance(text, Text):
        raise TypeError(f"{type(text).__name__} has no HTML inside a line")
    spans = sorted(text.spans, key=lambda span: span.start)
    written, place = "", 0
    for span in spans:
        if span.start >= place:
            written += escape(text.plain[place : span.start])
            written += f'<span style="{_style(str(span.style))[1:]}">{escape(text.plain[span.start : span.end])}</span>'
            place = span.end
    written += escape(text.plain[place:])
    around = _style(str(text.style))
    return f'<span style="{around[1:]}">{written}</span>' if around else written


def _style(style: str) -> str:
    """Rich's words for a style as CSS, each after a semicolon."""
    return "".join(f";{_COLOURS[word]}" for word in style.split() if word in _COLOURS)

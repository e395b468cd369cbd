"""Condition: what a `where` means once it is read, and for which rows it holds. `mixing.where` says how it is written.

Nothing here imports numpy or pyarrow before rows are looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

_AT_ONCE = 1_000_000  # rows that are looked at together, so that memory does not grow with the source

NUMBER, TEXT, TRUTH = "a number", "text", "true or false"
"""Kinds of values, as messages call them."""


class WhereError(ValueError):
    """A condition that cannot be read, or that does not fit the columns; the message begins with the character at fault."""

    def __init__(self, message: str, character: int) -> None:
        super().__init__(message, character)
        self.message = message
        self.character = character
        """Counted from 1."""

    def __str__(self) -> str:
        return f"character {self.character}: {self.message}"


@dataclass(frozen=True)
class Name:
    """A column."""

    name: str
    at: int
    """The character where it begins, counted from 1; so in the others."""


@dataclass(frozen=True)
class Constant:
    """A number, a text, true or false."""

    value: int | float | str | bool
    at: int


@dataclass(frozen=True)
class Arithmetic:
    """+ - or * / between numbers."""

    first: Value
    rest: tuple[tuple[str, Value], ...]
    """Sign and number, from left to right: one list and not a tree, so that a long sum is not a deep one."""
    at: int


@dataclass(frozen=True)
class Comparison:
    """< <= > >= == != between values, each compared with the next."""

    first: Value
    rest: tuple[tuple[str, Value], ...]
    at: int


@dataclass(frozen=True)
class Choice:
    """`in` and `not in`."""

    value: Value
    among: tuple[int | float, ...] | tuple[str, ...]
    is_negated: bool
    at: int


@dataclass(frozen=True)
class Words:
    """`contains` and `not contains`."""

    value: Value
    words: str
    is_negated: bool
    at: int


@dataclass(frozen=True)
class Missing:
    """`is none` and `is not none`."""

    value: Value
    is_negated: bool
    at: int


@dataclass(frozen=True)
class Flag:
    """A value of true or false that stands alone."""

    value: Name | Constant
    at: int


@dataclass(frozen=True)
class Not:
    """The opposite."""

    inner: Test
    at: int


@dataclass(frozen=True)
class Joined:
    """Conditions that must all hold, or of which one must."""

    by: Literal["and", "or"]
    parts: tuple[Test, ...]
    at: int


Value = Name | Constant | Arithmetic
Test = Comparison | Choice | Words | Missing | Flag | Not | Joined


@dataclass(frozen=True)
class Condition:
    """A condition that has been read."""

    text: str
    tree: Test
    used: tuple[tuple[str, int], ...]
    """The columns that stand in it, each with the character where it stands first."""

    @property
    def names(self) -> frozenset[str]:
        """The columns that it looks at."""
        return frozenset(name for name, _ in self.used)

    def check_names(self, known: Iterable[str]) -> None:
        """Raise WhereError if it looks at a column that is not among those known."""
        columns = list(known)
        for name, at in self.used:
            if name not in columns:
                shown = ", ".join(columns[:20]) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
                close = difflib.get_close_matches(name, columns, n=1)
                raise WhereError(f"no column {quoted(name)} (columns: {shown or 'none'})" + (f"; did you mean {quoted(close[0])}?" if close else "; text stands between quotes"), at)

    def holds(self, columns: Mapping[str, NDArray[Any] | pa.Array | pa.ChunkedArray], rows: int) -> NDArray[np.bool_]:
        """For which rows it holds, [rows].

        columns: at least those of `names`, each of `rows` values. With 0 rows only names and types are checked. Raises WhereError if a column is
        missing or is of another type than it is compared with; that depends on the columns' types and not on what stands in them (but for numpy
        arrays of objects, which have no type).
        """
        import numpy as np

        from mixing.where_rows import Rows

        self.check_names(columns)
        used = {name: columns[name] for name, _ in self.used}
        assert all(len(column) == rows for column in used.values())
        parts = [Rows({name: column[start : start + _AT_ONCE] for name, column in used.items()}, min(_AT_ONCE, rows - start)) for start in range(0, max(rows, 1), _AT_ONCE)]
        return np.concatenate([part.holds(self.tree) for part in parts])


def quoted(text: str) -> str:
    """A word between quotes, unprintable characters written out, a long one cut."""
    short = text if len(text) <= 40 else text[:37] + "..."
    return f"'{short}'" if short.isprintable() else repr(short)


def type_of(value: int | float | str | bool) -> str:
    """The kind of a constant, as messages call it."""
    return TRUTH if isinstance(value, bool) else TEXT if isinstance(value, str) else NUMBER


def phrase(value: Value) -> str:
    """What messages call a value."""
    match value:
        case Name(name):
            return f"column {quoted(name)}"
        case Constant(bool() as constant):
            return "true" if constant else "false"
        case Constant(str() as constant):
            return f'"{constant}"' if len(constant) <= 40 and constant.isprintable() else repr(constant[:40])
        case Constant(constant):
            return f"{constant}"
        case _:
            return "the sum" if value.rest[0][0] in "+-" else "the product"

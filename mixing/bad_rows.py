"""What is said about a row, or a whole source, that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, by name."""

    source: str
    """The source's name in the plan."""
    key: str
    """Which row: its key, or where it stands (`metadata.jsonl:7`)."""
    reason: str
    """What is wrong with it."""


def shown(name: str) -> str:
    """A name that a row gives, between quotes; of a long one its beginning, for it can be of any length."""
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}... ({len(name):,} characters)"


class RowError(ValueError):
    """A row lacks something that its task needs; the message is the reason."""


class UnreadableRow(ValueError):
    """A row that looked whole when its source was opened turned out to be broken when it was decoded."""

    def __init__(self, bad_row: BadRow) -> None:
        super().__init__(bad_row)
        self.bad_row = bad_row

    def __str__(self) -> str:
        return f"source '{self.bad_row.source}': {self.bad_row.key!r}: {self.bad_row.reason}"


class SourceError(ValueError):
    """A source as a whole cannot be used; the message says what was found, what is allowed and what to do."""

"""What is printed: names, captions and messages of others are text, and tell the terminal nothing. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters but tab and line feed; marks that turn the direction of what follows; halves of characters, as names of files that are not UTF-8 have them.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """A text in which what a terminal would act on is written out: `\\x1b]0;` in the place of what renames its window."""
    return _ACTIVE.sub(lambda found: ascii(found[0])[1:-1], str(text))


class PrintableConsole(Console):
    """A console that prints texts as `printable` has them. Its own colours and links stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The parts of what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control or segment.text.isprintable() else Segment(printable(segment.text), segment.style)

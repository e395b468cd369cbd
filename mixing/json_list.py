"""Lists in JSON: the values of one, read one after another in the memory that the largest of them takes."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

_BLOCK = 2**20  # bytes read together, at least
_NEAR = 64  # characters before the end of what has been read: an error there may be gone once more of it is
_MAY_GO_ON = "e+"  # what can stand behind a number and yet belong to it, and what is behind it is not read yet
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonListError(ValueError):
    """A file is no list of values; the message goes on behind the file's name."""


def list_values(file: BinaryIO, longest: int, of_pairs: Callable[[list[tuple[str, object]]], object]) -> Iterator[object]:
    """The values of the list that a file in UTF-8 is. longest: characters of the longest value that is read. of_pairs: makes an object of its pairs.

    Raises JsonListError where it turns out to be no list, or is no JSON; OSError.
    """
    text = _Text(file, longest, of_pairs)
    if text.next() != "[":
        with suppress(_TooLongError):
            text.value()
        raise JsonListError("is JSON, but not a list of objects [{...}, {...}]; write one, or a .jsonl")
    text.at += 1
    if text.next() != "]":
        yield text.value()
        while (mark := text.next()) == ",":
            text.at += 1
            text.next()
            yield text.value()
        if mark != "]":
            raise text.error("Expecting ',' delimiter", text.at)
    text.at += 1
    if text.next():
        raise text.error("Extra data", text.at)


class _TooLongError(JsonListError):
    """A value is longer than any that is read."""


class _Text:
    """The text of a file, of which a part is held."""

    def __init__(self, file: BinaryIO, longest: int, of_pairs: Callable[[list[tuple[str, object]]], object]) -> None:
        self._file = file
        self._longest = longest
        self._decoder = json.JSONDecoder(object_pairs_hook=of_pairs)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0  # that were read
        self._held = ""
        self._before = 0  # characters before those that are held
        self._lines = 0  # ends of lines among them
        self._line_start = 0  # characters before the line in which what is held begins
        self.at = 0
        """How much of what is held is done with."""

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self._held, self.at)
            assert found is not None  # it matches no character too
            self.at = found.end()
            if self.at < len(self._held):
                return self._held[self.at]
            if not self._more():
                return ""

    def value(self) -> object:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                may_go_on = error.pos > len(self._held) - _NEAR or error.msg.startswith("Unterminated string")  # of which the beginning is named
                if may_go_on and len(self._held) - self.at > self._longest:
                    raise _TooLongError(f"holds a value of more than {self._longest:,} characters (from line {self._place(self.at)[0]} on); leave out what is no row") from error
                said = self.error(error.msg, error.pos)
                if not may_go_on or not self._more():
                    raise said from error
            except (ValueError, RecursionError) as error:
                raise JsonListError(f"is not JSON: {error}; one object a line is a .jsonl") from error
            else:
                num_characters = end - self.at
                if len(self._held) - end > len(_MAY_GO_ON) or not self._more():
                    self.at += num_characters
                    return value

    def error(self, message: str, at: int) -> JsonListError:
        """What is wrong at a place of what is held."""
        line, column = self._place(at)
        return JsonListError(f"is not JSON: {message}: line {line} column {column} (char {self._before + at}); one object a line is a .jsonl")

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1."""
        start = self._held.rfind("\n", 0, at)
        column = at - start if start >= 0 else self._before + at - self._line_start + 1
        return self._lines + self._held.count("\n", 0, at) + 1, column

    def _more(self) -> bool:
        """Read on, let go of what is done with, and say whether there was more. What is held doubles, so that no value is tried too often."""
        left = len(self._held) - self.at
        block = self._file.read(max(_BLOCK, min(left, self._longest + 1 - left)))
        pending = len(self._utf8.getstate()[0])
        try:
            text = self._utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise JsonListError(f"is not UTF-8 ({error.reason} at byte {self._num_bytes - pending + error.start + 1}); save it as UTF-8") from error
        if not self._held and not self._before:
            text = text.removeprefix("\ufeff")
        self._num_bytes += len(block)
        done = self._held[: self.at]
        if (start := done.rfind("\n")) >= 0:
            self._line_start = self._before + start + 1
        self._lines += done.count("\n")
        self._before += len(done)
        self._held = self._held[self.at :] + text
        self.at = 0
        return bool(block)

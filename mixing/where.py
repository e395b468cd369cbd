"""Where: the condition that says which rows of a source are used, such as `width >= 512 and aspect < 2 and style in ["photo", "film"]`.

    comparison    < <= > >= == != between columns, numbers, texts, true and false, also in a chain: 512 <= width < 2048
    arithmetic    + - * / on numbers
    choice        style in ["photo", "film"], style not in ["drawing"]
    words         prompt contains "red car": these words, capitals aside, as whole words ("car" is not in "cargo"); also `not contains`; in a
                  list of texts, one of them contains the words
    missing       score is none, score is not none
    joined by     not, and, or (in this order) and parentheses; a column of true and false stands alone: has_face and not is_blurred

Text stands between " or ', a column whose name is not a word between backticks: `aesthetic score` > 5. There are no escapes in either.
A missing value (null or NaN, or what is divided by 0) makes a comparison, a choice and a search for words false, also `!=` and `not in`.

Nothing is evaluated as Python, nesting and length are limited, and each part of a condition costs one pass over the rows. Reading takes the
standard library alone; numpy and pyarrow are imported when rows are looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

from mixing.condition import Arithmetic, Choice, Comparison, Condition, Constant, Flag, Joined, Missing, Name, Not, Test, Value, WhereError, Words, phrase, quoted, type_of

__all__ = ["BUILT_IN", "Condition", "WhereError", "parse"]

BUILT_IN = ("width", "height", "pixels", "aspect", "references", "prompt")
"""Names that every source has: the target's width, height, pixels (width x height) and aspect (width / height), how many references a row has, and its prompt."""

_LONGEST = 10_000  # characters
_DEEPEST = 50
_LONGEST_WORDS = 200  # characters that are searched for


def parse(text: str) -> Condition:
    """Read a condition. Raises WhereError."""
    return _Reader(text).condition()


_TOKENS = re.compile(
    r"""(?P<space>\s+)
    | (?P<number>(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<word>[^\W\d]\w*)
    | (?P<text>"[^"]*"|'[^']*')
    | (?P<name>`[^`]*`)
    | (?P<sign><=|>=|==|!=|[<>+\-*/()\[\],])""",
    re.VERBOSE,
)
_KEYWORDS = frozenset({"and", "or", "not", "in", "contains", "is", "true", "false", "none"})
_MEANT = {"=<": "<=", "=>": ">=", "<>": "!=", "=": "==", "&&": "and", "||": "or", "&": "and", "|": "or", "!": "not", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"}
_COMPARES = ("<", "<=", ">", ">=", "==", "!=")
_VALUE = "a column, a number, text between quotes, true, false or '('"

_Kind = Literal["number", "keyword", "text", "name", "sign", "end"]


@dataclass(frozen=True)
class _Token:
    kind: _Kind
    text: str
    """As it stands in the condition; of a name and a text, what stands between the quotes."""
    at: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else quoted(self.text)


def _tokens(text: str) -> list[_Token]:
    if len(text) > _LONGEST:
        raise WhereError(f"the condition has {len(text):,} characters; at most {_LONGEST:,} are read", _LONGEST + 1)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WhereError("half of a surrogate pair, which is no valid Unicode; remove it", error.start + 1) from error
    tokens: list[_Token] = []
    place = 0
    while place < len(text):
        match = _TOKENS.match(text, place)
        if match is None or text[place : place + 2] in _MEANT:
            _refuse_character(text, place)
        found, at = match.group(), place + 1
        place = match.end()
        match match.lastgroup:
            case "number":
                if re.compile(r"[\w.]").match(text, place):
                    wrong = re.compile(r"[\w.]+").match(text, at - 1)
                    raise WhereError(f"{quoted(wrong.group() if wrong else found)} is not a number", at)
                tokens.append(_Token("number", found, at))
            case "word" if found in _KEYWORDS:
                tokens.append(_Token("keyword", found, at))
            case "word":
                meant = "none" if found.lower() in ("null", "nan") else found.lower()
                if meant in _KEYWORDS:
                    raise WhereError(f"{quoted(found)} is written '{meant}' (a column of that name: `{found}`, between backticks)", at)
                tokens.append(_Token("name", found, at))
            case "name" if found == "``":
                raise WhereError("a column without a name; write it between the backticks", at)
            case "name" | "text" as kind:
                tokens.append(_Token("name" if kind == "name" else "text", found[1:-1], at))
            case "sign":
                tokens.append(_Token("sign", found, at))
    tokens.append(_Token("end", "", len(text) + 1))
    return tokens


def _refuse_character(text: str, place: int) -> NoReturn:
    character = text[place]
    if character in "\"'`":
        what = "name" if character == "`" else "text"
        raise WhereError(f"the {what} that begins here does not end; close it with {character}", place + 1)
    for found, meant in _MEANT.items():
        if text.startswith(found, place):
            raise WhereError(f"'{found}' is written {meant}", place + 1)
    raise WhereError(
        f"{quoted(character)} has no meaning here (allowed: columns, numbers, \"text\", lists, {' '.join(_COMPARES)} + - * / ( ), {', '.join(sorted(_KEYWORDS))}; "
        "a column whose name is not a word stands between backticks)",
        place + 1,
    )


class _Reader:
    """Recursive descent: each method reads one kind of part, the loosest first."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.place, self.depth = text, _tokens(text), 0, 0
        self.used: dict[str, int] = {}

    def ahead(self) -> _Token:
        return self.tokens[self.place]

    def condition(self) -> Condition:
        if self.ahead().kind == "end":
            raise WhereError("the condition is empty; write one, such as width >= 512, or leave it out", 1)
        tree = self.test(self.any_of())
        if self.ahead().kind != "end":
            self.refuse("'and', 'or' or the end" + (" (no '(' is open)" if self.ahead().text == ")" else ""))
        return Condition(self.text, tree, tuple(self.used.items()))

    def refuse(self, wanted: str) -> NoReturn:
        raise WhereError(f"found {self.ahead()}; expected {wanted}", self.ahead().at)

    def taken(self, *texts: str) -> _Token | None:
        """The next token, gone past, if it is one of these signs or keywords."""
        token = self.ahead()
        if token.kind not in ("sign", "keyword") or token.text not in texts:
            return None
        self.place += 1
        return token

    def deeper(self, token: _Token) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise WhereError(f"more than {_DEEPEST} of parentheses, 'not' and signs inside one another; at most {_DEEPEST} are read", token.at)

    def any_of(self) -> Value | Test:
        return self.joined("or", self.all_of)

    def all_of(self) -> Value | Test:
        return self.joined("and", self.negated)

    def joined(self, by: Literal["and", "or"], read: Callable[[], Value | Test]) -> Value | Test:
        first = read()
        if not (self.ahead().kind == "keyword" and self.ahead().text == by):
            return first
        parts = [self.test(first)]
        while self.taken(by):
            parts.append(self.test(read()))
        return Joined(by, tuple(parts), first.at)

    def negated(self) -> Value | Test:
        token = self.taken("not")
        if token is None:
            return self.comparison()
        self.deeper(token)
        inner = self.test(self.negated())
        self.depth -= 1
        return Not(inner, token.at)

    def comparison(self) -> Value | Test:
        left = self.sum()
        after = self.tokens[self.place + 1] if self.ahead().kind == "keyword" and self.ahead().text == "not" else None
        is_negated = after is not None and after.kind == "keyword" and after.text in ("in", "contains")
        if is_negated:
            self.place += 1
        if self.taken("in"):
            return Choice(self.value(left), self.choices(), is_negated, left.at)
        if self.taken("contains"):
            return Words(self.value(left), self.words(), is_negated, left.at)
        if self.taken("is"):
            is_negated = self.taken("not") is not None
            if not self.taken("none"):
                self.refuse("'none' or 'not none' (other values are compared by ==)")
            return Missing(self.value(left), is_negated, left.at)
        rest = []
        while (sign := self.taken(*_COMPARES)) is not None:
            rest.append((sign.text, self.value(self.sum())))
        return Comparison(self.value(left), tuple(rest), left.at) if rest else left

    def sum(self) -> Value | Test:
        return self.arithmetic(("+", "-"), self.product)

    def product(self) -> Value | Test:
        return self.arithmetic(("*", "/"), self.signed)

    def arithmetic(self, signs: tuple[str, str], read: Callable[[], Value | Test]) -> Value | Test:
        first = read()
        rest = []
        while (sign := self.taken(*signs)) is not None:
            rest.append((sign.text, self.number(read())))
        return Arithmetic(self.number(first), tuple(rest), first.at) if rest else first

    def signed(self) -> Value | Test:
        token = self.taken("-", "+")
        if token is None:
            return self.single()
        self.deeper(token)
        inner = self.number(self.signed())
        self.depth -= 1
        if token.text == "+":
            return inner
        if isinstance(inner, Constant) and not isinstance(inner.value, str):
            return Constant(-inner.value, token.at)
        return Arithmetic(Constant(0, token.at), (("-", inner),), token.at)

    def single(self) -> Value | Test:
        token = self.ahead()
        if token.kind == "name":
            self.place += 1
            self.used.setdefault(token.text, token.at)
            return Name(token.text, token.at)
        if token.kind in ("number", "text"):
            self.place += 1
            return Constant(_number(token) if token.kind == "number" else token.text, token.at)
        if self.taken("true", "false"):
            return Constant(token.text == "true", token.at)
        if self.taken("none"):
            raise WhereError("'none' is compared by 'is none' and 'is not none' only", token.at)
        if token.text == "[" and token.kind == "sign":
            raise WhereError("a list stands after 'in' and 'not in' only", token.at)
        if not self.taken("("):
            self.refuse(_VALUE)
        self.deeper(token)
        inner = self.any_of()
        self.depth -= 1
        if not self.taken(")"):
            self.refuse(f"the ')' of the '(' at character {token.at}")
        return inner

    def choices(self) -> tuple[int | float, ...] | tuple[str, ...]:
        if not self.taken("["):
            self.refuse('a list, such as ["photo", "film"]')
        first = self.ahead()
        if self.taken("]"):
            raise WhereError("the list is empty; write what is allowed between '[' and ']'", first.at)
        numbers: list[int | float] = []
        texts: list[str] = []
        while True:
            minus, token = self.taken("-"), self.ahead()
            if token.kind == "number":
                numbers.append(-_number(token) if minus else _number(token))
            elif token.kind == "text" and minus is None:
                texts.append(token.text)
            else:
                self.refuse("a number or text between quotes (a missing value is found by 'is none')")
            if numbers and texts:
                raise WhereError("the list holds numbers and text; a column holds one or the other", token.at)
            self.place += 1
            if self.taken("]"):
                return tuple(numbers) or tuple(texts)
            if not self.taken(","):
                self.refuse("',' or ']'")
            if self.taken("]"):
                return tuple(numbers) or tuple(texts)

    def words(self) -> str:
        token = self.ahead()
        if token.kind != "text":
            self.refuse("text between quotes")
        if not token.text.strip():
            raise WhereError("there are no words between the quotes; write what to look for", token.at)
        if len(token.text) > _LONGEST_WORDS:
            raise WhereError(f"{len(token.text):,} characters to look for; at most {_LONGEST_WORDS}", token.at)
        self.place += 1
        return token.text.strip()

    def value(self, part: Value | Test) -> Value:
        if not isinstance(part, Value):
            raise WhereError("a condition stands where a value is expected; join conditions with 'and' and 'or'", part.at)
        return part

    def number(self, part: Value | Test) -> Value:
        value = self.value(part)
        if isinstance(value, Constant) and isinstance(value.value, str | bool):
            raise WhereError(f"{phrase(value)} is {type_of(value.value)}; + - * / take numbers", value.at)
        return value

    def test(self, part: Value | Test) -> Test:
        if isinstance(part, Name) or (isinstance(part, Constant) and isinstance(part.value, bool)):
            return Flag(part, part.at)
        if isinstance(part, Value):
            raise WhereError(f"{phrase(part)} is compared with nothing; write a condition, such as width >= 512", part.at)
        return part


def _number(token: _Token) -> int | float:
    digits = token.text.replace("_", "")
    number = float(digits)
    if not math.isfinite(number):
        raise WhereError(f"{token} is too large a number; the largest is about 1.8e308", token.at)
    return int(digits) if digits.isdigit() and len(digits) <= 20 and int(digits) < 2**64 else number  # beyond, no column holds whole numbers

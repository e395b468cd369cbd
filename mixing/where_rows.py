"""Where rows: what a condition's columns hold in each row, and for which rows each of its parts is true."""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types
from numpy.typing import NDArray

from mixing.condition import NUMBER, TEXT, TRUTH, Arithmetic, Choice, Comparison, Constant, Flag, Joined, Missing, Name, Not, Test, Value, WhereError, Words, phrase, type_of

TEXTS, NOTHING = "a list of texts", "nothing"
_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
_ON_TEXT = {"<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal", "==": "equal", "!=": "not_equal"}
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")  # scripts that leave no space between words


@dataclass(frozen=True)
class _Values:
    """What a value is in every row."""

    kind: str
    """NUMBER, TEXT, TRUTH, TEXTS, NOTHING (a column with no value in any row), or the name of a type that conditions do not know."""
    data: Any
    """Numbers and truths: an array; texts: a pyarrow ChunkedArray. Or, being the same in every row, one Python value."""
    missing: Any
    """An array, or one truth."""


class Rows:
    """Some rows, and what parts of a condition are in them."""

    def __init__(self, columns: Mapping[str, Any], count: int) -> None:
        self.columns, self.count = columns, count
        self._read: dict[str, _Values] = {}

    def holds(self, test: Test) -> NDArray[np.bool_]:
        result: NDArray[np.bool_]
        match test:
            case Not(inner):
                return ~self.holds(inner)
            case Joined(by, parts):
                result = self.holds(parts[0])
                for part in parts[1:]:
                    result = result & self.holds(part) if by == "and" else result | self.holds(part)
                return result
            case Comparison(first, rest):
                result = np.ones(self.count, dtype=bool)
                for left, (sign, right) in zip([first, *(value for _, value in rest)], rest, strict=False):
                    result &= self._compared(sign, left, right)
                return result
            case Flag(value):
                flag = self._of(value)
                if flag.kind not in (TRUTH, NOTHING):
                    raise WhereError(f"{phrase(value)} is {flag.kind} and is compared with nothing; only true or false stands alone", value.at)
                return self._everywhere(False if flag.kind == NOTHING else flag.data, flag.missing)
            case Missing(value, is_negated):
                result = self._everywhere(self._of(value).missing, False)
                return ~result if is_negated else result
            case Choice(value, among, is_negated):
                found = self._chosen(value, among)
            case Words(value, words, is_negated):
                found = self._with_words(value, words)
        return self._everywhere(~found if is_negated else found, self._of(value).missing)

    def _everywhere(self, truths: Any, missing: Any) -> NDArray[np.bool_]:
        """One truth for every row, false where the value is missing."""
        result: NDArray[np.bool_] = np.empty(self.count, dtype=bool)
        result[:] = truths
        result[np.broadcast_to(missing, result.shape)] = False
        return result

    def _compared(self, sign: str, left: Value, right: Value) -> NDArray[np.bool_]:
        one, other = self._of(left), self._of(right)
        kinds = {one.kind, other.kind} - {NOTHING}
        if len(kinds) > 1:
            raise WhereError(f"{phrase(left)} is {one.kind} and {phrase(right)} is {other.kind}; compare like with like", left.at)
        if kinds - {NUMBER, TEXT, TRUTH}:
            raise WhereError(f"{phrase(left)} is {one.kind}, which is not compared; numbers, text, true and false are", left.at)
        if kinds == {TRUTH} and sign not in ("==", "!="):
            raise WhereError(f"{phrase(left)} is true or false, which {sign} does not compare; == and != do", left.at)
        if NOTHING in (one.kind, other.kind):
            return np.zeros(self.count, dtype=bool)
        if kinds == {TEXT} and not (isinstance(one.data, str) and isinstance(other.data, str)):
            sides = [pa.scalar(each.data, pa.large_string()) if isinstance(each.data, str) else each.data for each in (one, other)]
            truths = _truths(pc.call_function(_ON_TEXT[sign], sides))
        else:
            with np.errstate(all="ignore"):
                truths = _OPERATORS[sign](one.data, other.data)
        return self._everywhere(truths, one.missing | other.missing)

    def _chosen(self, value: Value, among: Sequence[int | float | str]) -> Any:
        of = self._of(value)
        wanted = type_of(among[0])
        if of.kind not in (wanted, NOTHING):
            raise WhereError(f"{phrase(value)} is {of.kind} and the list holds {'numbers' if wanted == NUMBER else 'text'}; compare like with like", value.at)
        if of.kind == NOTHING:
            return np.zeros(self.count, dtype=bool)
        if not isinstance(of.data, pa.ChunkedArray | np.ndarray):
            return np.full(self.count, of.data in among)
        if of.kind == TEXT:
            return _truths(pc.is_in(of.data, value_set=pa.array(among, pa.large_string())))
        with np.errstate(all="ignore"):
            if of.data.dtype.kind not in "iu":
                return np.isin(of.data, np.asarray(among, dtype=np.float64).astype(of.data.dtype))
            limits = np.iinfo(of.data.dtype)  # whole numbers are compared as such: as float64, large ones would be taken for one another
            whole = [int(number) for number in among if not isinstance(number, str) and number == int(number) and limits.min <= number <= limits.max]
            return np.isin(of.data, np.asarray(whole, dtype=of.data.dtype))

    def _with_words(self, value: Value, words: str) -> Any:
        of = self._of(value)
        if of.kind not in (TEXT, TEXTS, NOTHING):
            raise WhereError(f"{phrase(value)} is {of.kind}; 'contains' looks for words in text", value.at)
        if of.kind == NOTHING:
            return np.zeros(self.count, dtype=bool)
        data = pa.chunked_array([pa.array([of.data], pa.large_string())]) if isinstance(of.data, str) else of.data
        if of.kind == TEXT:
            return _truths(pc.match_substring_regex(data, _pattern(words)))
        found = np.zeros(self.count, dtype=bool)
        start = 0
        for chunk in data.chunks:
            inside = _truths(pc.match_substring_regex(pa.chunked_array([pc.list_flatten(chunk).cast(pa.large_string())]), _pattern(words)))
            found[start + pc.list_parent_indices(chunk).to_numpy()[inside]] = True
            start += len(chunk)
        return found

    def _of(self, value: Value) -> _Values:
        match value:
            case Name(name):
                if name not in self._read:
                    self._read[name] = _read_column(self.columns[name])
                return self._read[name]
            case Constant(constant):
                return _Values(type_of(constant), constant, False)
            case _:
                return self._calculated(value)

    def _calculated(self, arithmetic: Arithmetic) -> _Values:
        total: Any = None
        missing: Any = False
        for sign, value in (("", arithmetic.first), *arithmetic.rest):
            of = self._of(value)
            if of.kind not in (NUMBER, NOTHING):
                raise WhereError(f"{phrase(value)} is {of.kind}; + - * / take numbers", value.at)
            missing = missing | of.missing
            number = np.nan if of.kind == NOTHING else np.asarray(of.data, dtype=np.float64)
            with np.errstate(all="ignore"):
                match sign:
                    case "":
                        total = number
                    case "+":
                        total = total + number
                    case "-":
                        total = total - number
                    case "*":
                        total = total * number
                    case "/":
                        total = total / number
                        missing = missing | (number == 0)
        return _Values(NUMBER, total, missing | np.isnan(total))


def _truths(found: Any) -> NDArray[np.bool_]:
    """A pyarrow ChunkedArray of truths as an array; null is false."""
    return np.asarray(found.fill_null(False).to_numpy(), dtype=bool)


def _read_column(column: Any) -> _Values:
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return _numbers(column, np.zeros(len(column), dtype=bool))
    if isinstance(column, np.ndarray):
        try:
            column = pa.array(column)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            return _Values(f"of no single type ({column.dtype})", None, np.zeros(len(column), dtype=bool))
    if not isinstance(column, pa.ChunkedArray):
        column = pa.chunked_array([column])
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    missing = np.asarray(column.is_null().to_numpy(), dtype=bool)
    if types.is_null(kind):
        return _Values(NOTHING, None, missing)
    if types.is_boolean(kind):
        return _numbers(np.asarray(column.fill_null(False).to_numpy(), dtype=bool), missing)
    if types.is_decimal(kind):
        column = column.cast(pa.float64())
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return _numbers(column.fill_null(0).to_numpy(), missing)
    if _is_text(kind):
        return _Values(TEXT, column.cast(pa.large_string()), missing)
    if (types.is_list(kind) or types.is_large_list(kind)) and (_is_text(kind.value_type) or types.is_null(kind.value_type)):
        return _Values(TEXTS, column, missing)
    return _Values(f"of type {kind}" if len(str(kind)) <= 40 else f"of type {str(kind)[:37]}...", None, missing)


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _numbers(data: NDArray[Any], missing: NDArray[np.bool_]) -> _Values:
    if data.dtype.kind == "f":
        missing = missing | np.isnan(data)
    return _Values(TRUTH if data.dtype.kind == "b" else NUMBER, data, missing)


def _pattern(words: str) -> str:
    """A regular expression (RE2, which takes time in proportion to the text, whatever the expression) for whole words, capitals aside."""
    edge = r"[^\pL\pM\pN_]"
    before = f"(?:^|{edge})" if _has_edge(words[0]) else ""
    after = f"(?:$|{edge})" if _has_edge(words[-1]) else ""
    return f"(?i){before}" + "".join(rf"\x{{{ord(character):X}}}" for character in words) + after


def _has_edge(character: str) -> bool:
    """Whether a word that begins or ends so has an edge to be looked for: punctuation has none, nor have scripts that write without spaces."""
    in_word = character == "_" or unicodedata.category(character)[0] in "LMN"
    return in_word and not unicodedata.name(character, "").startswith(_UNSPACED)

"""Where: conditions on columns mean what they say in every row, and what cannot be read is named with the character at fault."""

from __future__ import annotations

import operator
import random
import subprocess
import sys
import time
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mixing.where import BUILT_IN, Condition, WhereError, parse

COLUMNS: dict[str, Any] = {
    "width": np.array([256, 512, 1024, 2048, 4096], dtype=np.int32),
    "height": np.array([256, 1024, 512, 2048, 100], dtype=np.int32),
    "score": pa.array([0.5, None, float("nan"), 7.25, 3.0]),
    "style": pa.array(["photo", "film", None, "", "Photo"]),
    "prompt": pa.array(["A red car.", "cargo ship", "the RED  car", "red car's door", "wildcard"]),
    "tags": pa.array([["cat", "red car"], [], None, ["scarred"], [None, "a Cat, sitting"]]),
    "face": pa.array([True, False, None, True, False]),
    "zero": np.array([0, 1, 2, 0, 4]),
    "empty": pa.nulls(5),
    "mood": pa.array(["calm", "wild", "calm", None, "calm"]).dictionary_encode(),
    "aesthetic score": pa.array([Decimal("1.50"), Decimal("2.50"), None, Decimal("3.50"), Decimal("4.50")]),
}


def held(text: str) -> list[int]:
    """The rows of COLUMNS for which a condition holds."""
    truths = parse(text).holds(COLUMNS, 5)
    assert truths.dtype == bool
    return np.flatnonzero(truths).tolist()


def refused(text: str, columns: dict[str, Any] = COLUMNS, rows: int = 5) -> str:
    """What is said about a condition that cannot be read or does not fit the columns."""
    with pytest.raises(WhereError) as raised:
        parse(text).holds(columns, rows)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("width > 1024", [3, 4]),
        ("width >= 1024", [2, 3, 4]),
        ("width < 512", [0]),
        ("512 >= width", [0, 1]),
        ("width == 1_024", [2]),
        ("width != 1024.0", [0, 1, 3, 4]),
        ("width > height", [2, 4]),
        ("512 <= width < 2048", [1, 2]),
        ("height < width < 2000 < 2001", [2]),
        ("width > -1e3", [0, 1, 2, 3, 4]),
        ("width < 1e30", [0, 1, 2, 3, 4]),
        ("width > 99999999999999999999999", []),
        ("width > .5e3 and height > 5.", [1, 2, 3, 4]),
        ("1 < 2", [0, 1, 2, 3, 4]),
        ("1 > 2", []),
        ('"a" < "b"', [0, 1, 2, 3, 4]),
        ("true and not false", [0, 1, 2, 3, 4]),
        ("2 in [1, 2] and 'a' not in ['b']", [0, 1, 2, 3, 4]),
        ("'a cat' contains 'CAT'", [0, 1, 2, 3, 4]),
    ],
)
def test_numbers_compare_with_numbers_and_columns_also_in_chains(text: str, rows: list[int]) -> None:
    assert held(text) == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("width + height * 2 == 2560", [1]),
        ("(width + height) * 2 == 3072", [1, 2]),
        ("width - 256 - 256 == 0", [1]),
        ("width / height / 2 == 0.25", [1]),
        ("-width < -1024", [3, 4]),
        ("- - width == +256", [0]),
        ("width * 2 in [512, 1024]", [0, 1]),
        ("width / zero > 0", [1, 2, 4]),
        ("width / zero != 12345", [1, 2, 4]),
        ("width / zero is none", [0, 3]),
        ("not width / zero > 0", [0, 3]),
        ("zero / zero == 1", [1, 2, 4]),
        ("1 / 0 > 0", []),
        ("1e200 * 1e200 * width > 1e300", [0, 1, 2, 3, 4]),
        ("empty + width > 0", []),
        ("width * 1e300 * 1e300 - width * 1e300 * 1e300 != 1", []),
        ("width > " + "0" * 5000, [0, 1, 2, 3, 4]),
    ],
)
def test_arithmetic_binds_as_in_school_and_division_by_zero_makes_a_comparison_false(text: str, rows: list[int]) -> None:
    assert held(text) == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("score > 0", [0, 3, 4]),
        ("score <= 0", []),
        ("score != 3", [0, 3]),
        ("score == score", [0, 3, 4]),
        ("score in [3, 7.25]", [3, 4]),
        ("score not in [3, 7.25]", [0]),
        ("score + 1 > 0", [0, 3, 4]),
        ("style != 'photo'", [1, 3, 4]),
        ("style not in ['photo']", [1, 3, 4]),
        ("style not contains 'photo'", [1, 3]),
        ("tags not contains 'cat'", [1, 3]),
        ("face == false", [1, 4]),
        ("face != true", [1, 4]),
        ("face", [0, 3]),
        ("not face", [1, 2, 4]),
        ("score is none", [1, 2]),
        ("score is not none", [0, 3, 4]),
        ("style is none or face is none", [2]),
        ("empty is none", [0, 1, 2, 3, 4]),
        ("empty == 1 or empty != 'a' or empty in [1] or empty not in ['a'] or empty contains 'a' or empty", []),
        ("width is none", []),
        ("not (score > 0)", [1, 2]),
        ("tags is none", [2]),
    ],
)
def test_a_missing_value_makes_every_comparison_false_and_is_found_by_is_none(text: str, rows: list[int]) -> None:
    assert held(text) == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("style == 'photo'", [0]),
        ('style in ["photo", "film",]', [0, 1]),
        ("style == ''", [3]),
        ("style < 'photo'", [1, 3, 4]),
        ("style >= 'film'", [0, 1]),
        ("'film' == style", [1]),
        ("style == prompt", []),
        ("mood == 'calm'", [0, 2, 4]),
        ("mood is none", [3]),
        ("`aesthetic score` >= 2.5", [1, 3, 4]),
        ("prompt contains 'car'", [0, 2, 3]),
        ("prompt contains 'Red Car'", [0, 3]),
        ("prompt contains 'red car.'", [0]),
        ("prompt contains 'go'", []),
        ("tags contains 'cat'", [0, 4]),
        ("tags contains 'red car'", [0]),
    ],
)
def test_text_is_compared_chosen_and_searched_for_whole_words_capitals_aside(text: str, rows: list[int]) -> None:
    assert held(text) == rows


@pytest.mark.parametrize(
    ("words", "text", "is_found"),
    [
        ("café", "Un CAFÉ noir", True),
        ("caf", "Un CAFÉ noir", False),
        ("cafe", "un cafe\u0301", False),
        ("cafe\u0301", "les cafe\u0301s", False),
        ("猫", "一只猫在睡觉", True),
        ("ねこ", "かわいいねこです", True),
        ("кот", "Кот и пёс", True),
        ("кот", "который", False),
        ("c++", "learn C++, now", True),
        (".*", "abc", False),
        ("a.c", "abc", False),
        ("\\d", "7", False),
        ("50%", "at 50% off", True),
        ("cat", "one\ncat\ntwo", True),
        ("cat", "_cat_", False),
        ("🐈", "a 🐈 here", True),
        ("a  b", "A  B", True),
    ],
)
def test_contains_takes_its_text_as_it_stands_in_every_script(words: str, text: str, is_found: bool) -> None:
    assert parse(f'prompt contains "{words}"').holds({"prompt": pa.array([text])}, 1).tolist() == [is_found]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("width > 2000 or width < 300 and height > 1000", [3, 4]),
        ("(width > 2000 or width < 300) and height > 1000", [3]),
        ("not width > 300 and height > 100", [0]),
        ("not (width > 300 and height > 100)", [0, 4]),
        ("not not face", [0, 3]),
        ("((width)) > (1024)", [3, 4]),
        ("face and (not face) == face", None),
    ],
)
def test_not_binds_before_and_before_or(text: str, rows: list[int] | None) -> None:
    if rows is None:
        assert "a condition stands where a value is expected" in refused(text)
    else:
        assert held(text) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1: the condition is empty; write one, such as width >= 512, or leave it out"),
        (" \n ", "character 1: the condition is empty; write one, such as width >= 512, or leave it out"),
        ("width", "character 1: column 'width' is a number and is compared with nothing; only true or false stands alone"),
        ("width >", "character 8: found the end; expected a column, a number, text between quotes, true, false or '('"),
        ("width = 3", "character 7: '=' is written =="),
        ("width =< 3", "character 7: '=<' is written <="),
        ("width <> 3", "character 7: '<>' is written !="),
        ("face && face", "character 6: '&&' is written and"),
        ("face AND face", "character 6: 'AND' is written 'and' (a column of that name: `AND`, between backticks)"),
        ("style == NULL", "character 10: 'NULL' is written 'none' (a column of that name: `NULL`, between backticks)"),
        ("face == True", "character 9: 'True' is written 'true' (a column of that name: `True`, between backticks)"),
        ("(width > 3", "character 11: found the end; expected the ')' of the '(' at character 1"),
        ("width > 3)", "character 10: found ')'; expected 'and', 'or' or the end (no '(' is open)"),
        ("width > 3 height", "character 11: found 'height'; expected 'and', 'or' or the end"),
        ("width(3) > 3", "character 6: found '('; expected 'and', 'or' or the end"),
        ("style == 'photo", "character 10: the text that begins here does not end; close it with '"),
        ('style == "photo\' and face', 'character 10: the text that begins here does not end; close it with "'),
        ("style == “photo”", "character 10: '“' is written \""),
        ("`a b > 3", "character 1: the name that begins here does not end; close it with `"),
        ("`` > 3", "character 1: a column without a name; write it between the backticks"),
        ("style in []", "character 11: the list is empty; write what is allowed between '[' and ']'"),
        ("style in [1, 'a']", "character 14: the list holds numbers and text; a column holds one or the other"),
        ("style in ['a' 'b']", "character 15: found 'b'; expected ',' or ']'"),
        ("style in [none]", "character 11: found 'none'; expected a number or text between quotes (a missing value is found by 'is none')"),
        ("style in photo", "character 10: found 'photo'; expected a list, such as [\"photo\", \"film\"]"),
        ("style == ['a']", "character 10: a list stands after 'in' and 'not in' only"),
        ("style == none", "character 10: 'none' is compared by 'is none' and 'is not none' only"),
        ("style is 'photo'", "character 10: found 'photo'; expected 'none' or 'not none' (other values are compared by ==)"),
        ("width > 1e400", "character 9: '1e400' is too large a number; the largest is about 1.8e308"),
        ("width > 512px", "character 9: '512px' is not a number"),
        ("width > 1.2.3", "character 9: '1.2.3' is not a number"),
        ("prompt contains ' '", "character 17: there are no words between the quotes; write what to look for"),
        ("prompt contains style", "character 17: found 'style'; expected text between quotes"),
        ("prompt contains 'a" + "b" * 200 + "'", "character 17: 201 characters to look for; at most 200"),
        ("width + 'a' > 3", 'character 9: "a" is text; + - * / take numbers'),
        ("(width > 3) + 1 > 2", "character 2: a condition stands where a value is expected; join conditions with 'and' and 'or'"),
        ("width - 3", "character 1: the sum is compared with nothing; write a condition, such as width >= 512"),
        ("width > 1 or 2", "character 14: 2 is compared with nothing; write a condition, such as width >= 512"),
        ("width > \ud800", "character 9: half of a surrogate pair, which is no valid Unicode; remove it"),
        (
            "width % 2 == 0",
            "character 7: '%' has no meaning here (allowed: columns, numbers, \"text\", lists, < <= > >= == != + - * / ( ), and, contains, false, in, is, none, not, or, "
            "true; a column whose name is not a word stands between backticks)",
        ),
        ("(" * 51 + "face" + ")" * 51, "character 51: more than 50 of parentheses, 'not' and signs inside one another; at most 50 are read"),
        ("not " * 51 + "face", "character 201: more than 50 of parentheses, 'not' and signs inside one another; at most 50 are read"),
        ("-" * 51 + "1 < width", "character 51: more than 50 of parentheses, 'not' and signs inside one another; at most 50 are read"),
        ("face or " * 1300 + "face", "character 10001: the condition has 10,404 characters; at most 10,000 are read"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_character_and_the_cure(text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("face and widht > 3", "character 10: no column 'widht' (columns: width, height, score, style, prompt, tags, face, zero, empty, mood, aesthetic score); did you mean 'width'?"),
        ("style == photograph", "character 10: no column 'photograph' (columns: width, height, score, style, prompt, tags, face, zero, empty, mood, aesthetic score); text stands between quotes"),
        ("style > 5", "character 1: column 'style' is text and 5 is a number; compare like with like"),
        ("width == '512'", "character 1: column 'width' is a number and \"512\" is text; compare like with like"),
        ("width == true", "character 1: column 'width' is a number and true is true or false; compare like with like"),
        ("1 < width < style", "character 5: column 'width' is a number and column 'style' is text; compare like with like"),
        ("face > false", "character 1: column 'face' is true or false, which > does not compare; == and != do"),
        ("style in [1, 2]", "character 1: column 'style' is text and the list holds numbers; compare like with like"),
        ("width in ['a']", "character 1: column 'width' is a number and the list holds text; compare like with like"),
        ("width contains 'a'", "character 1: column 'width' is a number; 'contains' looks for words in text"),
        ("style + 1 > 2", "character 1: column 'style' is text; + - * / take numbers"),
        ("-face > 2", "character 2: column 'face' is true or false; + - * / take numbers"),
        ("style", "character 1: column 'style' is text and is compared with nothing; only true or false stands alone"),
        ("tags == 'a'", "character 1: column 'tags' is a list of texts and \"a\" is text; compare like with like"),
        ("tags == tags", "character 1: column 'tags' is a list of texts, which is not compared; numbers, text, true and false are"),
    ],
)
def test_columns_that_do_not_fit_are_named_with_both_types(text: str, message: str) -> None:
    assert refused(text) == message
    no_rows = {name: column[:0] for name, column in COLUMNS.items()}
    assert refused(text, no_rows, 0) == message, "types are checked without a row"


def test_a_column_of_an_unknown_type_is_named_and_may_still_be_missing() -> None:
    columns = {
        "image": pa.array([{"bytes": b"a"}, None]),
        "when": pa.array([0, None], pa.timestamp("us")),
        "boxes": pa.array([[1, 2], None]),
        "mixed": np.array([1, "a"], dtype=object),
        "odd": np.array(["a", None], dtype=object),
    }
    assert "column 'image' is of type struct<bytes: binary> and 1 is a number" in refused("image == 1", columns, 2)
    assert "column 'when' is of type timestamp[us] and" in refused("when > 1", columns, 2)
    assert "column 'boxes' is of type list<" in refused("boxes contains 'a'", columns, 2)
    assert "column 'mixed' is of no single type (object) and 1 is a number" in refused("mixed == 1", columns, 2)
    for name in ("image", "when", "boxes", "odd"):
        assert parse(f"{name} is none").holds(columns, 2).tolist() == [False, True]
    assert parse("odd == 'a'").holds(columns, 2).tolist() == [True, False]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()])
def test_every_type_of_number_compares_with_numbers_that_it_cannot_hold(kind: pa.DataType) -> None:
    columns = {"x": pa.array(np.array([0, 1, 100], dtype=kind.to_pandas_dtype()), kind)}
    assert parse("x < 1e300").holds(columns, 3).all()
    assert parse("x < 70000 and x > -70000 and x != 70000").holds(columns, 3).all()
    assert parse("x in [100, 300, -1, 0.5, 1e300]").holds(columns, 3).tolist() == [False, False, True]
    assert parse("x in [0.5]").holds(columns, 3).tolist() == [False, False, False]
    assert parse("x - 200 < 0").holds(columns, 3).all(), "arithmetic does not wrap around"
    assert parse("x == 0.1").holds({"x": pa.array([0.1, 0.2], pa.float32())}, 2).tolist() == [True, False]
    assert parse("x in [0.1]").holds({"x": pa.array([0.1, 0.2], pa.float32())}, 2).tolist() == [True, False]


def test_large_whole_numbers_are_told_apart() -> None:
    columns = {"x": np.array([2**53, 2**53 + 1], dtype=np.int64)}
    assert parse(f"x == {2**53 + 1}").holds(columns, 2).tolist() == [False, True]
    assert parse(f"x in [{2**53 + 1}]").holds(columns, 2).tolist() == [False, True]
    columns = {"x": np.array([2**64 - 1, 2**64 - 2], dtype=np.uint64)}
    assert parse(f"x == {2**64 - 1}").holds(columns, 2).tolist() == [True, False]
    assert parse(f"x not in [{2**64 - 1}, -1]").holds(columns, 2).tolist() == [False, True]


def test_numpy_arrow_and_chunked_columns_say_the_same() -> None:
    texts, numbers = ["cat", "dog", "a cat"], [1.5, 2.5, 3.5]
    for columns in (
        {"t": np.array(texts), "n": np.array(numbers)},
        {"t": np.array(texts, dtype=object), "n": np.array(numbers, dtype=object)},
        {"t": pa.array(texts), "n": pa.array(numbers)},
        {"t": pa.array(texts, pa.large_string()), "n": pa.array(numbers)},
        {"t": pa.array(texts, pa.string_view()), "n": pa.array(numbers)},
        {"t": pa.chunked_array([texts[:1], [], texts[1:]], pa.string()), "n": pa.chunked_array([numbers[:2], numbers[2:]])},
        {"t": pa.array(["x", *texts])[1:], "n": pa.array([9.0, *numbers])[1:]},
    ):
        assert parse("t contains 'cat' and n < 3").holds(columns, 3).tolist() == [True, False, False]
    lists = pa.chunked_array([[["a"], ["cat"]], [], [None, ["b", "cat"], ["c"]]], pa.list_(pa.string()))
    assert parse("t contains 'cat'").holds({"t": lists[1:]}, 4).tolist() == [True, False, True, False]


def test_rows_are_looked_at_in_parts_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixing.condition._AT_ONCE", 7)
    numbers = np.arange(100)
    texts = pa.chunked_array([[f"row {number}" for number in part] for part in np.split(numbers, [10, 11, 60])])
    lists = pa.array([[str(number)] for number in numbers])
    columns = {"n": numbers, "t": texts, "l": lists}
    assert np.flatnonzero(parse("n / 3 > 20 and n < 70 or t contains '5' or l contains '99'").holds(columns, 100)).tolist() == [5, *range(61, 70), 99]
    assert parse("n > 3").holds({"n": numbers[:0]}, 0).tolist() == []


def test_random_conditions_agree_with_python() -> None:
    draw = random.Random(0)
    values: dict[str, list[int | None]] = {name: [draw.choice([None, *range(-3, 4)]) for _ in range(50)] for name in "abc"}
    columns = {name: pa.array(column, pa.int32()) for name, column in values.items()}
    compares = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}

    def value(depth: int) -> tuple[str, Any]:
        if depth == 0 or draw.random() < 0.4:
            if draw.random() < 0.5:
                number = draw.randint(-3, 3)
                return str(number), lambda row: number
            name = draw.choice("abc")
            return name, lambda row: values[name][row]
        sign, (left, of_left), (right, of_right) = draw.choice("+-*/"), value(depth - 1), value(depth - 1)

        def calculate(row: int) -> Any:
            one, other = of_left(row), of_right(row)
            if one is None or other is None or (sign == "/" and other == 0):
                return None
            return {"+": lambda: one + other, "-": lambda: one - other, "*": lambda: one * other, "/": lambda: one / other}[sign]()

        return f"({left} {sign} {right})", calculate

    def test(depth: int) -> tuple[str, Any]:
        if depth == 0 or draw.random() < 0.3:
            sign, (left, of_left), (right, of_right) = draw.choice(list(compares)), value(2), value(2)

            def compare(row: int) -> bool:
                one, other = of_left(row), of_right(row)
                return one is not None and other is not None and bool(compares[sign](one, other))

            return f"{left} {sign} {right}", compare
        if draw.random() < 0.3:
            inner, of_inner = test(depth - 1)
            return f"not ({inner})", lambda row: not of_inner(row)
        by, (left, of_left), (right, of_right) = draw.choice(["and", "or"]), test(depth - 1), test(depth - 1)
        return f"({left}) {by} ({right})", lambda row: (of_left(row) and of_right(row)) if by == "and" else (of_left(row) or of_right(row))

    for _ in range(300):
        text, of = test(3)
        assert parse(text).holds(columns, 50).tolist() == [of(row) for row in range(50)], text


def test_what_is_not_a_condition_is_refused_and_nothing_else_happens() -> None:
    draw = random.Random(1)
    pieces = ["width", "and", "or", "not", "(", ")", "[", "]", "<", "==", "=", "1", "1e5", "'a'", '"', "`x`", "in", "is", "none", "contains", ",", "-", "/", "__class__", ".", "é", "\0", "\n", "{"]
    read = outside = 0
    for _ in range(5000):
        text = draw.choice(["", " "]).join(draw.choices(pieces, k=draw.randint(1, 8)))
        try:
            read += isinstance(parse(text), Condition)
        except WhereError as error:
            outside += not 1 <= error.character <= len(text) + 1
    assert read > 10
    assert outside == 0


def test_a_condition_says_which_columns_it_uses_before_any_row_is_read() -> None:
    condition = parse("width >= 512 and (`my column` is none or not face) and width < 9 and prompt contains 'style'")
    assert condition.names == {"width", "my column", "face", "prompt"}
    assert condition == parse(condition.text)
    condition.check_names(["face", *BUILT_IN, "my column"])
    with pytest.raises(WhereError, match=r"character 19: no column 'my column' \(columns: width, height, pixels, aspect, references, prompt\)"):
        condition.check_names(BUILT_IN)


def test_the_longest_and_deepest_conditions_are_evaluated_without_recursion_errors() -> None:
    columns = {"a": np.arange(3), "b": np.array([True, False, True])}
    assert parse("(" * 50 + "a < 2" + ")" * 50).holds(columns, 3).tolist() == [True, True, False]
    assert parse("not " * 50 + "b").holds(columns, 3).tolist() == [True, False, True]
    assert parse("a" + "+1" * 4000 + " > 4000").holds(columns, 3).tolist() == [False, True, True]
    assert parse("b" + " or b" * 1900).holds(columns, 3).tolist() == [True, False, True]
    assert parse(" or ".join(["(not -a < -1)"] * 100)).holds(columns, 3).tolist() == [True, True, False], "what stands side by side is not deep"
    assert parse("0" + " < a" * 1900).holds(columns, 3).tolist() == [False, False, False]


def test_reading_a_condition_imports_neither_torch_nor_numpy_nor_pyarrow() -> None:
    code = "import sys; from mixing.where import parse; parse('width > 3'); print([name for name in ('torch', 'numpy', 'pyarrow', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_million_rows_take_well_under_a_second() -> None:
    rows = 1_000_000
    sizes = np.random.default_rng(0).integers(64, 4096, (2, rows), dtype=np.int32)
    prompts = pa.array(["a photo of a cat on a mountain, golden hour", "oil painting of the sea"] * (rows // 2))
    condition = parse("width >= 512 and width / height < 2 and style in ['photo', 'film'] and prompt contains 'cat' and not (score is none)")
    columns = {"width": sizes[0], "height": sizes[1], "prompt": prompts, "style": pa.array(["photo", "drawing"] * (rows // 2)), "score": pa.array([1.0, None] * (rows // 2))}
    start = time.process_time()  # of the processor: what else the machine does is not counted
    truths = condition.holds(columns, rows)
    assert time.process_time() - start < 1.5, "about 0.2 s on one idle core"
    assert truths.sum() == ((sizes[0] >= 512) & (sizes[0] / sizes[1] < 2) & (np.arange(rows) % 2 == 0)).sum()

"""Tricks that are known: plans by what is wrong with them, each made by a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BASE = """\
model: model
sources:
  photos: {path: data/photos}
stages:
  - {name: first, steps: 10, resolution: 16, batch: 4, lr: 1e-4}
"""


def _with(line: str, instead: str) -> Callable[[], bytes]:
    assert line in BASE
    return lambda: BASE.replace(line, instead).encode()


def _sources(lines: Sequence[str]) -> bytes:
    return BASE.replace("  photos: {path: data/photos}\n", "".join(f"  {line}\n" for line in lines)).encode()


def _stages(lines: Sequence[str]) -> bytes:
    return (BASE.partition("  - {")[0] + "".join(f"  - {line}\n" for line in lines)).encode()


def _laughs() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    return ("\n".join(lines) + "\n" + BASE).encode()


def _merging_laughs() -> bytes:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{level}: &a{level} {{<<: [*a{level - 1}, *a{level - 1}], b{level}: *a{level - 1}, c{level}: *a{level - 1}}}" for level in range(1, 40)]
    return ("\n".join(lines) + "\n" + BASE).encode()


def _long(field: str) -> Callable[[], bytes]:
    """A plan with one field that is very long: at the top, of the source, or of the stage."""
    line = f"{field}: {'x' * 200_000}"
    if field in ("path", "task", "prompt", "where", "columns", "split", "take"):
        return _with("{path: data/photos}", f"{{path: data/photos, {line}}}" if field != "path" else f"{{{line}}}")
    if field in ("precision", "base", "mix", "train", "objective", "handoff", "optimizer"):
        return _with("lr: 1e-4", f"lr: 1e-4, {line}")
    return lambda: f"{line}\n{BASE.replace('model: model', '') if field == 'model' else BASE}".encode()


_STAGE = "{{name: s{0}, steps: 10, resolution: 16, batch: 4, lr: 1e-4{1}}}"
TRICKS: tuple[tuple[str, Callable[[], bytes]], ...] = (
    ("sound", lambda: BASE.encode()),
    ("empty", lambda: b""),
    ("a zero byte", lambda: b"\0"),
    ("a mebibyte of zero bytes", lambda: bytes(2**20)),
    ("two mebibytes of spaces", lambda: b" " * 2**21),
    ("a mebibyte of brackets", lambda: b"[" * (2**20 - 1)),
    ("a mebibyte of braces with names", lambda: b"{a: " * (2**18 - 1)),
    ("a mebibyte of dashes", lambda: b"- " * (2**19 - 1)),
    ("a mebibyte of question marks", lambda: b"? " * (2**19 - 1)),
    ("a mebibyte of one word", lambda: b"a" * (2**20 - 1)),
    ("a mebibyte of a quoted word never closed", lambda: b"'" + b"a " * (2**19 - 2)),
    ("a mebibyte of comments", lambda: b"#\n" * (2**19 - 1)),
    ("a mebibyte of tags", lambda: b"!!x " * (2**18 - 1)),
    ("a mebibyte of anchors", lambda: b"".join(b"- &a%d x\n" % number for number in range(60_000))),
    ("a mebibyte of fields of the plan", lambda: b"".join(b"a%d: 1\n" % number for number in range(90_000))),
    ("forty thousand unknown fields", lambda: BASE.encode() + b"".join(b"step%d: 1\n" % number for number in range(40_000))),
    ("the same field forty thousand times", lambda: BASE.encode() + b"seed: 1\n" * 40_000),
    ("aliases that multiply", _laughs),
    ("merges that multiply", _merging_laughs),
    ("an alias in its own anchor", lambda: b"a: &a {b: *a}\n" + BASE.encode()),
    ("steps: 1e30", _with("steps: 10", "steps: 1e30")),
    ("steps of a thousand digits", _with("steps: 10", "steps: " + "9" * 1000)),
    ("a million million million steps", _with("steps: 10", "steps: 1_000_000_000_000_000_000")),
    ("a thousand million steps of a thousand million images", _with("steps: 10, resolution: 16, batch: 4", "steps: 1_000_000_000, resolution: 16, batch: 1_000_000_000")),
    ("ten thousand stages", lambda: _stages([_STAGE.format(number, "") for number in range(10_000)])),
    ("a thousand stages", lambda: _stages([_STAGE.format(number, "") for number in range(1_000)])),
    ("a thousand stages that stack", lambda: _stages([_STAGE.format(number, ", handoff: {adapter: stack}" if number else "") for number in range(1_000)])),
    ("a thousand stages that train one of sixteen adapters", lambda: b"adapters: {%s}\n" % b", ".join(b"a%d: {}" % n for n in range(16)) + _stages([_STAGE.format(n, f", expert: {'high' if n % 2 else 'low'}, train: [a{n % 16}]") for n in range(1_000)])),
    ("a thousand stages, each of an unknown source", lambda: _stages([_STAGE.format(number, f", mix: {{photo{number}: 1}}") for number in range(1_000)])),
    ("a thousand stages of one name", lambda: _stages([_STAGE.format(0, "")] * 1_000)),
    ("ten thousand stages by one alias", lambda: _stages(["&s " + _STAGE.format(0, "")] + ["*s"] * 9_999)),
    ("ten thousand sources", lambda: _sources([f"s{number}: {{path: data/photos}}" for number in range(10_000)])),
    ("ten thousand sources that are not there", lambda: _sources([f"s{number}: {{path: data/photo{number}}}" for number in range(10_000)])),
    ("ten thousand names in a mix that no source has", lambda: BASE.replace("lr: 1e-4", "lr: 1e-4, mix: {" + ", ".join(f"photo{number}: 1" for number in range(10_000)) + "}").encode()),
    ("a thousand sources and thirty thousand unknown names", lambda: _sources([f"s{number}: {{path: data/photos}}" for number in range(1_000)]).replace(b"lr: 1e-4", b"lr: 1e-4, mix: {" + b", ".join(b"t%d: 1" % number for number in range(30_000)) + b"}")),
    ("fifty thousand unknown fields in a thousand stages", lambda: _stages([_STAGE.format(number, "".join(f", x{field}: 1" for field in range(40))) for number in range(1_000)])),
    ("hundreds of thousands of files as a source", _with("data/photos", "/usr")),
    ("all tables of a large part of the disk", _with("data/photos", "'/usr/**/*.parquet'")),
    ("processes as a source", _with("data/photos", "/proc")),
    ("a device as a table", _with("data/photos", "/dev/zero")),
    ("a pipe that nobody writes to", _with("data/photos", "data/pipe.jsonl")),
    ("a folder that is its own folder", _with("data/photos", "data/loop")),
    ("two thousand million million files in braces", _with("data/photos", '"data/{0..999999}{0..999999}{0..999}.tar"')),
    ("a file named two to the thirtieth times", _with("data/photos", '"' + "{,}" * 30 + 'data/rows.parquet"')),
    ("a file named a million times", _with("data/photos", '"' + "{,}" * 20 + 'data/rows.parquet"')),
    ("braces in five thousand braces", _with("data/photos", '"' + "{a," * 5_000 + "}" * 5_000 + '.tar"')),
    ("a hundred thousand commas in a brace that does not close", _with("data/photos", '"{' + "," * 100_000 + 'x.parquet"')),
    ("four thousand commas in a brace that does not close", _with("data/photos", '"{' + "," * 4_000 + 'x.parquet"')),
    ("braces of one number each", _with("data/photos", '"' + "{0..0}" * 600 + '.parquet"')),
    ("a path of a hundred thousand characters", _with("data/photos", "a/" * 50_000)),
    ("a path of stars", _with("data/photos", '"data/' + "*" * 5_000 + '.parquet"')),
    ("a path of many folders of any depth", _with("data/photos", '"' + "**/" * 200 + '*.parquet"')),
    ("a home that nobody has", _with("data/photos", '"~nobody-of-this-name/x"')),
    ("a condition nested five thousand deep", _with("{path: data/photos}", "{path: data/photos, where: '" + "(" * 4_000 + "1" + ")" * 4_000 + " == 1'}")),
    ("a condition of nine thousand characters", _with("{path: data/photos}", "{path: data/photos, where: '" + "1+" * 4_500 + "1 == 1'}")),
    ("a pattern nested five thousand deep", _with("lr: 1e-4", "lr: 1e-4, train: ['" + "(" * 5_000 + ")" * 5_000 + "']")),
    ("a pattern that takes for ever on a wrong name", _with("lr: 1e-4", "lr: 1e-4, train: ['(a+)+b']")),
    ("a pattern of half a million ways", _with("lr: 1e-4", "lr: 1e-4, train: ['" + "a|b" * 150_000 + "']")),
    ("a pattern of many repetitions", _with("lr: 1e-4", "lr: 1e-4, train: ['((a{1,9999}){1,9999}){1,9999}']")),
    ("forty thousand patterns", _with("lr: 1e-4", "lr: 1e-4, train: [" + ", ".join(f"a{number}" for number in range(40_000)) + "]")),
    ("forty thousand resolutions", _with("resolution: 16", "resolution: [" + "{pixels: 16, share: 1}, " * 12_000 + "]")),
    ("shares beyond all numbers", _with("lr: 1e-4", "lr: 1e-4, mix: {photos: 1e308}")),
    ("a share of next to nothing", _with("lr: 1e-4", "lr: 1e-4, mix: {photos: 5e-324}")),
    ("a share of minus nothing", _with("lr: 1e-4", "lr: 1e-4, mix: {photos: -0.0}")),
    ("a rate of minus nothing", _with("lr: 1e-4", "lr: -0")),
    ("an object of Python's", _with("model: model", "model: !!python/object/apply:os.system [touch canary]")),
    ("a date and a time of day", _with("name: first", "name: 2026-11-29")),
    ("a number with sixties in it", _with("steps: 10", "steps: 1:30")),
    ("a whole number with a base", _with("steps: 10", "steps: 0x10")),
    *((f"a {kind} of Python's", _with("model: model", f"model: !!python/{kind}:os.system [touch canary]")) for kind in ("object/new", "name", "module", "tuple")),
    ("tags of YAML 1.1", _with("name: first", "name: !!binary Zmlyc3Q=")),
    ("a set, an ordered mapping and pairs", lambda: BASE.encode() + b"evaluate: !!set {rows, steps}\npreviews: !!omap [rows: 1]\nadapter: !!pairs [rank: 1]\n"),
    *((f"steps: {value}", _with("steps: 10", f"steps: {value}")) for value in (".nan", ".inf", "-.INF", "'10'", "010", "0o12", "0b11", "1_0", "+10", "10.0", "1e1", "10 ", "\uff11\uff10", "\u0661\u0660", "!!float 10", "!!str 10", "2026-11-30", "10:00", "true", "~")),
    *((f"a rate of {value}", _with("lr: 1e-4", f"lr: {value}")) for value in (".nan", ".inf", "-.inf", "'1e-4'", "1e-400", "1e400", "0x1p-3", "1e-4f", "1,5", "{peak: .nan}", "{peak: 1e-4, floor: .inf}")),
    ("shares that are no numbers", _with("lr: 1e-4", "lr: 1e-4, mix: {photos: .nan}")),
    ("a merged mapping", lambda: b"x: &x {steps: 3}\n" + BASE.replace("- {name", "- {<<: *x, name").encode()),
    ("merged fields that are told twice", _with("{name: first, ", "{<<: {name: x, steps: 3}, <<: {steps: 4}, name: first, ")),
    ("a merge of a list, of a word, and of nothing", lambda: _stages(["{<<: [1, 2], name: a}", "{<<: word, name: b}", "{<<: , name: c}", "{<<: *gone, name: d}"])),
    ("a merge at the top", lambda: b"<<: {seed: 1, model: other}\n" + BASE.encode()),
    ("an alias before its anchor", lambda: b"name: *late\nx: &late y\n" + BASE.encode()),
    ("an anchor given twice", lambda: b"name: &a x\nseed: &a 1\n" + BASE.encode()),
    ("a key given twice in braces", _with("steps: 10", "steps: 10, steps: 11")),
    ("a key given twice, once between quotes", _with("steps: 10", "steps: 10, 'steps': 11")),
    ("a key given twice, once by its escapes", _with("steps: 10", 'steps: 10, "\\x73teps": 11')),
    ("keys that are mappings, lists, numbers and nothing", lambda: BASE.encode() + b"{a: 1}: 1\n[a]: 2\n1: 3\n~: 4\n? \n: 5\n"),
    *((f"a name with {called}", _with("name: first", f'name: "{text}"')) for called, text in (("a bell and an escape", "a\\e]0;x\\a"), ("a turned direction", "a\u202eb"), ("a width of nothing", "a\u200bb"), ("a Cyrillic letter", "f\u0456rst"), ("a mark of its own", "a\u0301"), ("a line separator", "a\u2028b"), ("markup", "[/bold][red]x"), ("half a pair", "\\udfff"))),
    ("a field with a width of nothing in it", _with("steps: 10", "st\u200beps: 10")),
    ("a field in wide letters", _with("steps: 10", "\uff53teps: 10")),
    ("spaces that do not break", _with("  photos", "\u00a0\u00a0photos")),
    ("line ends of other kinds", lambda: BASE.replace("\n", "\u2028").encode() + BASE.replace("\n", "\x85").encode()),
    *((f"a {field} of two hundred thousand characters", _long(field)) for field in ("name", "model", "start", "seed", "cache", "track", "path", "task", "prompt", "where", "columns", "split", "take", "precision", "base", "mix", "train", "objective", "handoff", "optimizer")),
    ("UTF-16 without a mark", lambda: BASE.encode("utf-16-le")),
    ("UTF-7", lambda: BASE.replace("first", "+AGY-").encode()),
    ("tabs in braces and behind colons", _with("steps: 10", "\tsteps:\t10\t")),
    ("half a character", _with("name: first", 'name: "\\ud800"')),
    ("tabs", _with("  photos", "\tphotos")),
    ("carriage returns", lambda: BASE.replace("\n", "\r\n").encode()),
    ("a byte order mark", lambda: b"\xef\xbb\xbf" + BASE.encode()),
    ("UTF-16", lambda: BASE.encode("utf-16")),
    ("UTF-32", lambda: BASE.encode("utf-32")),
    ("not UTF-8", lambda: BASE.encode().replace(b"first", b"f\xff")),
    ("two documents", lambda: BASE.encode() + b"---\n" + BASE.encode()),
    ("directives", lambda: b"%YAML 9.9\n%TAG ! tag:x,2000:\n---\n" + BASE.encode()),
    ("a plan that is a list", lambda: b"- 1\n"),
    ("a plan that is a word", lambda: b"plan\n"),
    ("another kind of file", lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20),
    ("a start outside", lambda: b"start: ../../../../etc/passwd\n" + BASE.encode()),
    ("a name that leads outside", lambda: b"name: ../../x\n" + BASE.encode()),
    ("a stage that leads outside", _with("name: first", "name: ../../x")),
    ("a stage called ..", _with("name: first", 'name: ".."')),
)

"""What others have written is text wherever it is printed: a terminal acts on none of it, and brackets in it are no markup."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import train
from stages.console import EnduringConsole
from stages.printable import PrintableConsole, printable
from stages.track import Log

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202edetrevni\udcff[/red].png"
ACTIVE = ("\x1b", "\x07", "\x9b", "\r", "\u202e", "\udcff")


def test_text_that_a_terminal_acts_on_is_written_out_and_other_text_stays() -> None:
    assert printable(EVIL) == r"\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202edetrevni\udcff[/red].png"
    for text in ("一只猫 🐈‍⬛", "a\tb\nc", "é ä́ ß [bold]", "مرحبا"):
        assert printable(text) == text


@pytest.mark.parametrize("kind", [PrintableConsole, EnduringConsole])
def test_console_prints_no_control_character_of_others_and_keeps_its_own_colours(kind: type[Console]) -> None:
    written = io.StringIO()
    console = kind(file=written, force_terminal=True, color_system="standard", width=200)
    table = Table(EVIL.replace("[/red]", ""))
    table.add_row(Text(EVIL, "green"))
    console.print(Text(EVIL, "green"), table, {"caption": EVIL}, sep="\n")
    said = written.getvalue()
    assert said.count(r"\x1b]0;owned") >= 3
    assert "\x1b[32m" in said
    assert not any(mark in said.replace("\x1b[", "") for mark in ACTIVE)
    said.encode("utf-8")


def test_warning_that_names_a_file_called_like_markup_is_printed_as_it_stands_and_ends_nothing() -> None:
    written = io.StringIO()
    log = cast("Any", SimpleNamespace(main=True, _in_terminal=False, console=EnduringConsole(file=written, width=200)))
    events: list[Any] = []
    log.write = events.append
    log.say = lambda message: Log.say(log, message)
    for name in ("[/red].png", "[bold]a[/bold].png", "a[link=http://x]b", "[", "\\[red]"):
        Log.warn(log, f"source 'photos': {name}: broken", "first", 3)
        assert f"warning: source 'photos': {name}: broken" in written.getvalue()
        assert events[-1]["message"] == f"source 'photos': {name}: broken"


def test_problem_of_a_plan_under_a_name_with_escapes_is_told_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = EVIL.replace("/", "")
    Path(name).write_text("model: 1\n")
    assert train.main([name, "--check"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(r"\x1b]0;owned\x07")
    assert not any(mark in said for mark in ACTIVE)

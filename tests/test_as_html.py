"""What a notebook shows: tables as tables, and nothing that a user wrote as markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stages.as_html import to_html
from stages.plan import Plan

STAGE = {"name": "learn", "steps": 1200, "lr": {"peak": 1e-4, "schedule": "cosine"}, "batch": 4, "resolution": 512}


def plan_with(sources: dict[str, dict[str, object]], **stage: object) -> Plan:
    return Plan.model_validate({"name": "two", "model": "models/tiny", "sources": sources, "stages": [{**STAGE, **stage}]})


def test_a_plan_is_shown_as_a_table_of_sources_and_one_of_stages() -> None:
    sources = {"photos": {"path": "data/photos", "where": "width >= 512"}, "edits": {"path": "edits.jsonl", "task": "edit", "take": {"count": 10}}}
    html = plan_with(sources, mix={"photos": 3, "edits": 1}, loss={"weighting": "bell"})._repr_html_()
    assert html.count("<table") == 2
    for said in ("data/photos", "width &gt;= 512", "count&quot;:10", "1,200", "photos 75.0%, edits 25.0%", "0.0001, cosine to 0", "bf16", "bell weighting"):
        assert said in html
    assert "asks" not in plan_with(sources)._repr_html_()  # a column that says nothing is left out


def test_mixes_that_change_are_told_by_their_ends() -> None:
    sources = {"a": {"path": "x"}, "b": {"path": "y"}}
    assert "from natural to a 50.0%, b 50.0%" in plan_with(sources, mix={"from": "natural", "to": {"a": 1, "b": 1}})._repr_html_()
    assert "by size to the power 0.5, following progress" in plan_with(sources, mix={"adaptive": {"power": 0.5}})._repr_html_()


def test_what_a_user_wrote_is_text_and_never_markup() -> None:
    hostile = "<script>alert(1)</script> [bold]x[/bold]"
    table = Table("source")
    table.add_row(Text(hostile))
    html = to_html([Text(hostile, style="yellow"), Padding(table, (0, 0, 0, 3))])
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt; [bold]x[/bold]") == 2
    assert "<script" not in plan_with({"a": {"path": hostile}})._repr_html_()


def test_styles_headers_and_footers_are_kept() -> None:
    table = Table(show_footer=True)
    table.add_column("name", "sum")
    table.add_column("images", "7", justify="right")
    table.add_row("[dim]a[/dim]", Text.assemble(("3", "yellow"), " of 4"))
    html = to_html([table])
    assert '<span style="opacity:0.7">a</span>' in html
    assert '<span style="color:#a15c00">3</span> of 4' in html
    assert html.index("images") < html.index(" of 4") < html.index(">7</td>")
    assert html.count("text-align:right") == 3


def test_what_has_no_html_is_refused() -> None:
    with pytest.raises(TypeError, match="Plain has no HTML"):
        to_html([type("Plain", (), {})()])


def test_a_plan_is_shown_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom stages.plan import Plan\n"
        "plan = Plan.model_validate({'model': 'm', 'sources': {'a': {'path': 'x'}}, 'stages': [{'name': 's', 'steps': 1, 'lr': 1, 'batch': 1, 'resolution': 64}]})\n"
        "assert '<table' in plan._repr_html_()\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)

"""The report's previews: grids of rows by stages, and the sheets of former versions."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from report_runs import CAPTION, SOURCES, Elements, preview_rows, report_of, without_tiles, write_quickstart_run
from stages.report.previews import LARGEST_TILE, MOST_TILES
from stages.report.sheets import LARGE_SHEET


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quickstart_run(tmp_path_factory.mktemp("runs") / "quickstart")


def test_sheets_of_previews_are_inside_the_page_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    folder = without_tiles(write_quickstart_run(tmp_path / "run"))
    large = Image.effect_noise((1800, 1500), 60).convert("RGB")
    large.save(folder / "previews/3-refine.png")
    assert (folder / "previews/3-refine.png").stat().st_size > LARGE_SHEET
    tiny = Image.effect_noise((24, 8), 60).convert("RGB")
    tiny.save(folder / "previews/2-expose.png")
    images = [attributes for tag, attributes in Elements(report_of(folder)[0]).found if tag == "img"]
    assert len(images) == 3
    assert str(images[0]["src"]).startswith("data:image/jpeg;base64,")
    assert images[0]["width"] == "1400"
    assert len(str(images[0]["src"])) < 1_500_000
    assert (images[1]["class"], images[1]["width"], images[1]["height"]) == ("tiny", "480", "160")
    assert all(attributes["alt"] for attributes in images)


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hostname", "previews/none.png", "", "plan.yaml", "previews", "a\x00b"])
def test_preview_that_is_no_picture_of_the_run_is_named_and_left_out(tmp_path: Path, file: str) -> None:
    folder = write_quickstart_run(tmp_path / "run", 5)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"event": "preview", "stage": "expose", "step": 1, "file": file}) + "\n")
    html, words = report_of(folder)
    assert "<img" not in html
    assert "After expose, step 1" in words


def test_torn_large_preview_is_named_and_left_out(tmp_path: Path) -> None:
    folder = without_tiles(write_quickstart_run(tmp_path / "run"))
    path = folder / "previews/3-refine.png"
    Image.effect_noise((1800, 1500), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: LARGE_SHEET + 1000])
    assert "previews/3-refine.png cannot be read." in report_of(folder)[1]


def grids_of(html: str) -> dict[str, list[list[str]]]:
    """The grids of previews: source to rows of captions and alternative texts; the first row is the head."""
    found = {}
    for source, body in re.findall(r'<h3><i class="swatch"[^>]*></i>([^<]*)</h3><div[^>]*><table class="tiles"[^>]*>(.*?)</table>', html):
        rows = [re.findall(r"<t[hd][^>]*>(?:<b>)?(.*?)(?:</b>)?</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
        found[source] = [[alt[1] if (alt := re.search(r'alt="([^"]*)"', cell)) else cell for cell in row] for row in rows]
    return found


def test_previews_are_a_grid_of_held_out_rows_by_stages_with_references_target_and_base_beside(run: Path) -> None:
    html, _ = report_of(run)
    grids = grids_of(html)
    assert list(grids) == list(SOURCES)
    assert grids["text_to_image"][0] == ["Caption", "Target", "Base", "foundation", "expose", "refine"]
    assert grids["subject"][0][:3] == ["Caption", "Reference", "Target"]
    assert grids["edit"][0] == ["Caption", "Reference 1", "Reference 2", "Target", "Base", "foundation", "expose", "refine"]
    assert grids["control"][2] == ["a handwritten 2", *(f"control, row 2: {what}" for what in ("reference", "target", "base", "after foundation", "after expose", "after refine"))]
    assert grids["edit"][1][0] == escape(CAPTION)
    images = [attributes for tag, attributes in Elements(html).found if tag == "img"]
    assert len(images) == 2 * (5 + 6 + 6 + 7 + 6)
    assert {str(image["src"])[:22] for image in images} == {"data:image/png;base64,", "data:image/jpeg;base64"}
    assert [image.get("class") == "tiny" for image in images] == [str(image["src"]).startswith("data:image/png") for image in images]  # eight pixels are enlarged as they are


@pytest.mark.parametrize("file", ["../secret.jpg", "/etc/hostname", "previews/none.jpg", "", "plan.yaml", "previews", "a" * 5000, "previews/large.jpg"])
def test_tile_that_is_no_small_picture_of_the_run_is_a_dash(tmp_path: Path, file: str) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    Image.effect_noise((900, 900), 90).convert("RGB").save(folder / "previews/large.jpg", quality=95)
    assert (folder / "previews/large.jpg").stat().st_size > LARGEST_TILE
    rows = [row | {"output": file} for row in preview_rows("3-refine") if row["source"] == "other"]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"event": "preview", "stage": "refine", "step": 300, "file": "", "rows": rows}) + "\n")
    grids = grids_of(report_of(folder)[0])
    assert list(grids) == ["other"]
    assert [row[-1] for row in grids["other"][1:]] == ['<span class="soft">–</span>'] * 2
    assert grids["other"][1][-2] == "other, row 1: after expose"


@pytest.mark.parametrize(("num_sources", "num_rows", "num_stages", "said"), [(50, 4, 7, "The first 24 sources are here."), (5, 60, 4, "The first 5 of each source are here.")])
def test_grids_of_previews_stay_bounded(tmp_path: Path, num_sources: int, num_rows: int, num_stages: int, said: str) -> None:
    Image.effect_noise((224, 224), 60).convert("RGB").save(tmp_path / "tile.jpg")
    row = {"references": ["tile.jpg"] * (2 if num_sources == 50 else 9), "target": "tile.jpg", "output": "tile.jpg", "prompt": "word " * 2000}
    rows = [row | {"source": f"source{k}", "row": n + 1} for k in range(num_sources) for n in range(num_rows)]
    lines = [json.dumps({"event": "preview", "stage": f"stage{k}", "step": 5, "rows": rows}) for k in range(num_stages)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    html, words = report_of(tmp_path)
    assert MOST_TILES / 2 < html.count("<img") <= MOST_TILES
    assert said in words
    assert len(html) < 10_000_000

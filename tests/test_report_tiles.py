"""Tiles: what a run writes for the report's grids of previews."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from runs import carry_out, events, make_world, plan_of
from stages.report import write_report
from stages.report.previews import LARGEST_TILE
from stages.sampling import Preview
from stages.tiles import LONGEST_SIDE, write_tiles


def picture(width: int, height: int) -> Image.Image:
    """Noise, which a JPEG holds worst."""
    return Image.effect_noise((width, height), 80).convert("RGB")


def test_outputs_are_kept_whole_and_tiles_are_small_in_their_own_aspect(tmp_path: Path) -> None:
    output = picture(512, 256)
    shown = [Preview("edits", "a", (picture(40, 64), picture(65, 30)), output, picture(300, 300)), Preview("photos", "b", (), picture(8, 8), picture(8, 8)), Preview("edits", "c", (), output, output)]
    rows = write_tiles(tmp_path, "2-refine", shown)
    assert [(row["source"], row["row"], row["prompt"]) for row in rows] == [("edits", 1, "a"), ("photos", 1, "b"), ("edits", 2, "c")]
    tiles = "previews/2-refine/tiles"
    assert rows[0]["references"] == [f"{tiles}/edits-1-reference-1.png", f"{tiles}/edits-1-reference-2.jpg"]
    assert (rows[0]["output"], rows[1]["target"], rows[2]["output"]) == (f"{tiles}/edits-1-output.jpg", f"{tiles}/photos-1-target.png", f"{tiles}/edits-2-output.jpg")
    assert Image.open(tmp_path / "previews/2-refine/edits-1.png").tobytes() == output.tobytes()
    assert Image.open(tmp_path / rows[0]["output"]).size == (LONGEST_SIDE, LONGEST_SIDE // 2)
    assert Image.open(tmp_path / rows[0]["references"][0]).tobytes() == shown[0].references[0].tobytes()  # small ones are kept exactly
    for row in rows:
        for file in (*row["references"], row["target"], row["output"]):
            assert (tmp_path / file).stat().st_size <= LARGEST_TILE


def test_a_row_names_the_base_sample_that_was_written_for_it_and_none_that_was_not(tmp_path: Path) -> None:
    shown = [Preview("photos", "a", (), picture(8, 8), picture(8, 8)), Preview("photos", "b", (), picture(8, 8), picture(8, 8))]
    write_tiles(tmp_path, "base-8", shown[:1])
    rows = write_tiles(tmp_path, "1-learn", shown, base="base-8")
    assert [row.get("base") for row in rows] == ["previews/base-8/tiles/photos-1-output.png", None]
    assert all("base" not in row for row in write_tiles(tmp_path, "1-learn", shown, base="base-16"))


@pytest.mark.launch
def test_a_run_shows_the_same_rows_after_every_stage_beside_the_base(tmp_path: Path) -> None:
    carry_out(tmp_path / "run", plan_of(make_world(tmp_path / "world"), previews={"rows": 2, "steps": 1}))
    shown = events(tmp_path / "run", "preview")
    assert [event["stage"] for event in shown] == ["found", "expose", "refine"]
    places = [[(row["source"], row["row"], row["prompt"]) for row in event["rows"]] for event in shown]
    assert places[0] == places[1]
    assert {(source, row) for source, row, _ in places[0]} >= {("photos", 1), ("photos", 2), ("edits", 1), ("edits", 2)}
    assert [len(row["references"]) for row in shown[0]["rows"]] == [int(row["source"] == "edits") for row in shown[0]["rows"]]
    for event in shown:
        for row in event["rows"]:
            assert all((tmp_path / "run" / file).is_file() for file in (*row["references"], row["target"], row["output"], row["base"]))
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert html.count("<img") == sum(2 + len(row["references"]) + len(shown) for row in shown[0]["rows"])

"""The corpus of broken and odd data: every kind once, each with what must come of it. Made by code, without a network; the same bytes each time."""

from __future__ import annotations

from pathlib import Path

from faults.corpus_case import Case
from faults.corpus_folders import folder_cases
from faults.corpus_images import image_cases
from faults.corpus_records import record_cases
from faults.corpus_tables import table_cases
from faults.corpus_tars import tar_cases

__all__ = ["Case", "cases", "make"]


def cases() -> tuple[Case, ...]:
    """All kinds. Their names are all different."""
    return (*image_cases(), *folder_cases(), *record_cases(), *table_cases(), *tar_cases())


def make(case: Case, folder: Path) -> None:
    """Write a kind into a new folder."""
    folder.mkdir(parents=True)
    case.write(folder)

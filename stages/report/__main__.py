"""Write a run's report anew, from what the run has written so far: `python -m stages.report runs/NAME`, also while it runs, or after it failed."""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.log_files import log_files
from stages.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.report", description="Write the report of a run anew, from what it has written so far.")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="such as runs/quickstart")
    folder: Path = parser.parse_args().folder
    if not log_files(folder, "metrics"):
        parser.error(f"{folder}: no metrics.jsonl is there; name the folder of a run, such as runs/quickstart")
    print(write_report(folder))


if __name__ == "__main__":
    main()

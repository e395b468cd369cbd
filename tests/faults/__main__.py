"""Every fault that there is a script for, one script after the other, and one table of them all.

    cd tests && ../.venv/bin/python -m faults            # a short form of each, in minutes
    cd tests && ../.venv/bin/python -m faults --whole    # all of it, in one to three hours; or some of it: --whole kills storage
    cd tests && ../.venv/bin/python -m faults --write    # runs nothing: the last whole results of each script into the table of docs/reliability.md
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from faults.document import write
from faults.table import FOLDER, Done, as_text

SCRIPTS = {
    "kills": "runs that are killed, told to stop, or robbed of a process",
    "storage": "disks that are full, read-only or lie, damaged checkpoints, two launches at once",
    "numbers": "numbers that are none, and losses that leap",
    "data": "broken and odd images, records, tables and folders",
    "plans": "plans nobody would write",
    "security": "files that mean harm, and secrets",
    "soak": "long runs",
}
"""The scripts of this folder, and what they do faults in."""
_MOST_SAID = 4000  # characters of what a script that broke off has printed


def main() -> int:
    """Run them, each in a process of its own. Returns 1 if anything was lost or a script failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"one of {', '.join(SCRIPTS)}; left out, all of them")
    parser.add_argument("--whole", action="store_true", help="the whole matrix; left out, a short one in minutes")
    parser.add_argument("--write", action="store_true", help="write the last whole results into docs/reliability.md")
    given = parser.parse_args()
    if unknown := [name for name in given.scripts if name not in SCRIPTS]:
        parser.error(f"no script '{unknown[0]}' (scripts: {', '.join(SCRIPTS)})")
    if given.write:
        return write(SCRIPTS)
    failed, asked = [], given.scripts or list(SCRIPTS)
    for name in asked:
        print(f"{name}: {SCRIPTS[name]}", flush=True)
        began, file = time.monotonic(), FOLDER / f"{name}.json"
        file.unlink(missing_ok=True)
        ended = subprocess.run([sys.executable, "-m", f"faults.{name}", *(["--whole"] if given.whole else [])], capture_output=True, check=False)
        code = ended.returncode
        print(f"  {'all survived' if code == 0 else f'ended with {code}'}, {time.monotonic() - began:.0f} s", flush=True)
        if code != 0 and not file.is_file():
            print(ended.stderr.decode(errors="replace")[-_MOST_SAID:], flush=True)
        failed += [name] if code != 0 or not file.is_file() else []
    done = [Done.read(file) for name in asked if (file := FOLDER / f"{name}.json").is_file()]
    print(as_text([fault for each in done for fault in each.faults]))
    if failed:
        print(f"not all survived: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

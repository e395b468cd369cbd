"""Looks up the known holes of what Medley stands on: pip-audit, in an environment of its own, over every requirements file.

    python tests/audit.py

Ends with 1 where a hole is known. Where pip-audit cannot be installed, or its database not be asked, that is said, and it ends with 0: pip-audit itself says
"no known vulnerabilities" of packages that it was told nothing about.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP_AUDIT = "pip-audit==2.10.1"
_SECONDS = 120.0  # for each of both steps, after which it is given up


def judged(said: str) -> tuple[int, list[str]]:
    """The exit code, and lines to print, for what `pip-audit --format json` said. Raises ValueError if that is no such JSON."""
    try:
        packages = json.loads(said)["dependencies"]
        asked = [package for package in packages if "skip_reason" not in package]
        holes = [
            f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}" for package in asked for hole in package["vulns"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what pip-audit writes: {said[:200]!r}") from error
    if holes:
        return 1, holes
    if len(asked) < len(packages):
        left = [package["name"] for package in packages if "skip_reason" in package]
        return 0, [f"of {len(left)} of {len(packages)} packages nothing is known, for the database could not be asked or has none of them: {', '.join(left)}"]
    return 0, [f"{len(asked)} packages, no hole is known"]


def main() -> int:
    """Install, ask, judge, print."""
    files = [argument for file in sorted(ROOT.glob("requirements*.txt")) for argument in ("--requirement", str(file))]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        try:
            _ran([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIP_AUDIT])
            said = _ran([python, "-m", "pip_audit", *files, "--no-deps", "--disable-pip", "--timeout", "15", "--progress-spinner", "off", "--format", "json"], (0, 1))
            code, lines = judged(said)
        except (subprocess.SubprocessError, ValueError) as error:
            code, lines = 0, [f"not looked up: {' '.join(str(error).split())[:300]}"]
    print(*lines, sep="\n")
    return code


def _ran(command: Sequence[str], codes: Sequence[int] = (0,)) -> str:
    """What a command prints. Raises SubprocessError if it takes too long, or ends with another code than these."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if ended.returncode not in codes:
        raise subprocess.SubprocessError(f"{' '.join(command[1:4])} ended with {ended.returncode}: {ended.stderr.strip()[-200:]}")
    return ended.stdout


if __name__ == "__main__":
    sys.exit(main())

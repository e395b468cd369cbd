"""The page of what Medley stands on: `python tests/dependencies.py` writes docs/dependencies.md from the requirements files and from the packages' own metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent

FILES: Mapping[str, str] = MappingProxyType(
    {
        "requirements.txt": "To train",
        "requirements-deepspeed.txt": "To shard by ZeRO, besides",
        "requirements-dev.txt": "To develop, besides",
    }
)
WHY: Mapping[str, str] = MappingProxyType(
    {
        "torch": "tensors, gradients, processes",
        "accelerate": "one launch for one process or many",
        "bitsandbytes": "nf4 and int8 storage, 8-bit AdamW",
        "datasets": "rows in memory-mapped tables; the Hub's datasets",
        "diffusers": "the models, and the pipelines that published adapters are compared in",
        "httpx2": "the errors of huggingface_hub's connections, told from others",
        "huggingface_hub": "models and datasets from the Hub, publishing",
        "matplotlib": "pictures in notebooks",
        "numpy": "the order of rows; images",
        "peft": "low-rank pairs in the layers of a model",
        "pillow": "reads and scales images",
        "prodigyopt": "the optimizer that finds its own step size",
        "psutil": "what a process holds of memory",
        "pydantic": "the plan's types",
        "rich": "tables on the console",
        "ruamel.yaml": "YAML 1.2 with the place of every value",
        "safetensors": "the only format that weights are read and written in",
        "scikit-learn": "the quickstart's scans, and the classifier that judges samples of them",
        "trackio": "curves, in a file on this machine",
        "transformers": "text encoders and tokenizers; CLIP and DINOv2 as judges",
        "deepspeed": "ZeRO-2 and ZeRO-3",
        "hypothesis": "tests of what holds for every input",
        "ipykernel": "runs the notebooks in the tests",
        "mypy": "checks types",
        "nbclient": "runs the notebooks in the tests",
        "nbformat": "reads notebooks",
        "pytest": "runs the tests",
        "pytest-xdist": "runs the tests in two processes",
        "ruff": "lint",
        "tensorboard": "`track: tensorboard` in the tests; install it where you ask for it",
        "wandb": "`track: wandb` in the tests; install it where you ask for it",
    }
)
LICENCES: Mapping[str, str] = MappingProxyType({"deepspeed": "Apache-2.0"})
"""Of what is not installed where this page is made."""
_MEANT = ((r"apache", "Apache-2.0"), (r"^bsd$|3-clause|bsd license", "BSD-3-Clause"), (r"\bmit\b", "MIT"), (r"mozilla|mpl", "MPL-2.0"), (r"python software|psf", "PSF-2.0"))

HEAD = """\
# What Medley stands on

Written by `python tests/dependencies.py`; a test fails when it is out of date. Every version is pinned to one, so what was tested is what is installed; what these
packages bring along is chosen by pip. Licences are those of the packages' own metadata.

None of them is given anything to execute: models are made by classes of diffusers and transformers and nothing else, weights are read from safetensors alone,
`trust_remote_code` is nowhere, and telemetry is off ([tests/test_security.py](../tests/test_security.py)).

Known holes are looked up by `pip-audit`, in an environment of its own and over every file of requirements; it asks a database on the network, and of what that
does not know it is said that nothing is known:

    .venv/bin/python tests/audit.py
"""


def pinned(file: Path) -> list[tuple[str, str]]:
    """Name and version of each requirement of a file, in its order."""
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;#]+)", line) for line in file.read_text(encoding="utf-8").splitlines())
    return [(match[1], match[2]) for match in found if match]


def licence(name: str) -> str:
    """The licence of an installed package, by its SPDX name where it can be told."""
    if name in LICENCES:
        return LICENCES[name]
    try:
        facts = metadata(name)
    except PackageNotFoundError:
        return "not installed here"
    if expression := facts.get("License-Expression"):
        return str(expression)
    classified = [line.rsplit("::", 1)[1].strip() for line in facts.get_all("Classifier") or () if line.startswith("License ::")]
    said = (str(facts.get("License") or "").strip().splitlines() or [""])[0] or ", ".join(classified)
    for text in (said, *classified):
        for pattern, known in _MEANT:
            if re.search(pattern, text, re.IGNORECASE):
                return known
    return said[:60] or "not said"


def page(root: Path = ROOT) -> str:
    """The whole page. Raises KeyError for a requirement of which nobody has written why it is here."""
    return "\n".join([HEAD, *_tables(root)])


def _tables(root: Path) -> Iterator[str]:
    for name, title in FILES.items():
        yield f"## {title} (`{name}`)\n"
        yield "| package | version | licence | why |"
        yield "|---|---|---|---|"
        for package, version in sorted(pinned(root / name), key=lambda entry: entry[0].lower()):
            yield f"| [{package}](https://pypi.org/project/{package}/) | {version} | {licence(package)} | {WHY[package]} |"
        yield ""


if __name__ == "__main__":
    (ROOT / "docs" / "dependencies.md").write_text(page(), encoding="utf-8")

"""Card facts: what a card tells that lies elsewhere: the pictures of a stage, and the licence of the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.hub.errors import FAILURES
from stages.hub.words import is_repo
from stages.report.record import read_record

_MOST_SAMPLES = 12
_LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Sample:
    """A picture that the published model made of a held-out row."""

    prompt: str
    file: Path
    name: str
    """Where it lies beside the card."""


def samples_of(run_folder: Path, index: int, stage: str) -> list[Sample]:
    """The previews that a stage made, as many of each source; at most a dozen."""
    shown = [event for event in read_record(run_folder).events.get("preview", ()) if event.get("stage") == stage]
    rows = shown[-1].get("rows") if shown else None
    found = []
    for row in rows if isinstance(rows, list) else ():
        name = f"{row['source']}-{row['row']}.png"
        if (file := run_folder / "previews" / f"{index + 1}-{stage}" / name).is_file():
            found.append((int(row["row"]), Sample(str(row["prompt"]), file, f"images/{name}")))
    return [sample for _, sample in sorted(found, key=lambda entry: entry[0])[:_MOST_SAMPLES]]


def licence_of(repo: str, revision: str | None, *, may_ask: bool) -> dict[str, str] | None:
    """The licence that a model's card names, as the Hub's metadata has it; None if that is not known.

    repo: a Hub id or a folder. may_ask: whether the Hub may be asked for a card that is not in huggingface_hub's cache.
    """
    card: Path | None = Path(repo) / constants.REPOCARD_NAME
    if not Path(repo).is_dir():
        kept = try_to_load_from_cache(repo, constants.REPOCARD_NAME, revision=revision) if is_repo(repo) else None
        card = Path(kept) if isinstance(kept, str) else None
        if card is None and may_ask and is_repo(repo):
            try:
                card = Path(hf_hub_download(repo, constants.REPOCARD_NAME, revision=revision))
            except FAILURES:
                return None
    if card is None or not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0].removeprefix("---")
    try:
        fields = YAML(typ="safe").load(head)
    except YAMLError:
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("license"), str):
        return None
    found = {name: fields[name] for name in _LICENCE_FIELDS if isinstance(fields.get(name), str)}
    if (link := found.get("license_link")) and "://" not in link:
        if Path(repo).is_dir():
            del found["license_link"]
        else:
            found["license_link"] = f"https://huggingface.co/{repo}/blob/main/{link}"
    return found

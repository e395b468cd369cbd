"""Datasets that `save_to_disk` wrote: whether what they name lies in them. Imports neither torch nor `datasets`."""

from __future__ import annotations

import json
import os

from mixing.plain_file import read_plain


def outside_of_saved(place: str) -> str | None:
    """A file that a saved dataset says it consists of, and that is not in its folder or below by name; None if all are.

    place: the folder of one split. `datasets` 5.2 joins what state.json names to it, and so maps whatever file of this machine it leads to. Links inside of
    the folder are followed, for that is how the Hub's cache keeps files. What cannot be read is left to who loads it.
    """
    try:
        state = json.loads(read_plain(os.path.join(place, "state.json")))
        names = [file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return next((name for name in names if isinstance(name, str) and (os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir)), None)

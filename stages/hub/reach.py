"""Reach: whether the Hub answers, asked before a download, which otherwise tries again for half a minute (huggingface_hub 1.x and 2.x). Imports no torch."""

from __future__ import annotations

import urllib.error
import urllib.request
from functools import cache

SECONDS = 5.0
"""That the Hub may take to answer."""


def hub_answers() -> bool:
    """Whether the Hub can be reached. Of one address it is asked once."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@cache
def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False

"""Hub errors: what goes wrong between here and the Hub, in words, and whether another try would help."""

from __future__ import annotations

import re

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

# What huggingface_hub 2.4 and hf_xet raise where something cannot be sent. The errors of the connection are httpx2's, and no OSErrors.
FAILURES = (OSError, httpx2.HTTPError, ValueError, RuntimeError)
_LATER = (408, 409, 412, 425, 429)  # of the statuses 4xx, those that another try may not meet


class Refused(RuntimeError):
    """What trying again would not mend."""


def words_of(error: BaseException) -> str:
    """What an error says, on one line, without the token and without what signs an address."""
    answered = _answered(error)
    status = status_of(error)
    if isinstance(error, Refused):
        said = str(error)
    elif isinstance(error, OfflineModeIsEnabled):
        said = "HF_HUB_OFFLINE is set, so the Hub is not asked"
    elif status == 401:
        said = "the Hub does not accept the token (401); set HF_TOKEN, or type: hf auth login"
    elif status == 403:
        said = "the token may not do this (403); give it write access to the repository, at huggingface.co/settings/tokens"
    elif status is not None:
        said = f"the Hub answers {status}: {getattr(answered, 'server_message', None) or ''}".rstrip(": ")
    else:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        said = f"{type(cause).__name__}: {cause}".rstrip(": ")
    return _clean(said)


def _clean(said: str) -> str:
    said = re.sub(r"(?<=://)[^/\s@]+@", "", re.sub(r"\?\S+", "", " ".join(said.split())))  # nor a password before an address
    said = re.sub(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )\S+", "(token)", said)
    token = get_token()
    return (said.replace(token, "(token)") if token else said)[:300]


def _answered(error: BaseException | None) -> BaseException | None:
    """The error that holds the Hub's answer: this one, or what caused it."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The status that the Hub answered with."""
    status = getattr(getattr(_answered(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_final(error: BaseException) -> bool:
    """Whether trying again would not help."""
    status = status_of(error)
    refused = status is not None and 400 <= status < 500 and status not in _LATER
    invalid = isinstance(error, ValueError) and not isinstance(error, OSError)  # a card or a name that the Hub does not take
    return refused or invalid or isinstance(error, (Refused, OfflineModeIsEnabled, LocalTokenNotFoundError))

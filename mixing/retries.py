"""Retries: what cannot be reached is tried again, after growing waits, where the reading stood."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from http.client import HTTPException
from typing import TypeVar

import httpx2
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from mixing.bad_rows import SourceError
from mixing.columns import Columns
from mixing.lanes import Waiting
from mixing.shards import Row, Shards, Values

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[60.0] * 9)
"""Seconds waited before each further try: about ten minutes in all."""

# A network's fault, as long as it is not final. The errors of requests, huggingface_hub 2.4 and fsspec are OSErrors; httpx2's, which it lets through, are not.
_PASSING = (OSError, httpx2.TransportError, httpx2.HTTPStatusError, HTTPException)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, OfflineModeIsEnabled, LocalTokenNotFoundError)
_LATER = (408, 425, 429)  # of the statuses 4xx, those that ask to come again

Looked = TypeVar("Looked")


def read_on(
    shards: Shards,
    shard: int,
    row: int,
    at: Values | None,
    columns: Columns | None,
    look: Callable[[Row], Looked],
    waits: Sequence[float],
    wait: Waiting,
) -> Generator[tuple[Row, Looked], None, None]:
    """The rows of a shard from one on, each with what `look` gives for it, until the shard ends, whatever the network does.

    shard, row, at, columns: as `Shards.read` takes them. waits: seconds before each further try, which begins at the row where the last one
    stood; a row that is read starts them anew. wait: is called before every row too. Raises SourceError if the waits are used up,
    and at once where trying again would not help.
    """
    doing = f"shard {shards.names[shard]}"
    failures = 0
    while True:
        try:
            wait(0.0, doing)
            for each in shards.read(shard, row, at, columns):
                looked = look(each)
                row, at, failures = each.number + 1, each.after, 0
                wait(0.0, doing)
                yield each, looked
            return
        except _PASSING as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            if is_final(error) or failures == len(waits):
                tried = f"; tried {failures + 1} times in {sum(waits[:failures]):.0f} seconds" if failures else ""
                raise SourceError(
                    f"{doing} cannot be read: {said}{tried}; once it can be, the same command goes on where it stopped"
                ) from error
        wait(waits[failures], f"{doing}, which cannot be reached: {said}")
        failures += 1


def is_final(error: BaseException) -> bool:
    """Whether trying again would not help: the file is not there, or the server refuses it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _LATER
    return refused or isinstance(error, _FINAL)

"""train.py with a fault: `python faulty.py PLACE RANK NOTE PLAN ...` fails at a place on one process only, and notes in a file when it did.

Launched in the place of train.py, so that production code has no hooks for it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before torch is imported, for a launcher puts this folder in its place

import train

PLACES = ("opening", "encoding", "step", "killed", "evaluation", "saving", "publishing")
SAYS = "the fault that was asked for"


def break_at(place: str, note: Path) -> None:
    """Make this process fail at a place. note: the file in which it writes when."""
    from torch import optim

    from stages import evaluate_leg, finish, open_run, save_leg
    from stages.families.family import Family

    def fails(error: Callable[[], BaseException | None], skip: int = 0, instead: Callable[..., Any] | None = None) -> Callable[..., Any]:
        calls = 0

        def failing(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls <= skip and instead is not None:
                return instead(*arguments, **named)
            note.write_text(str(time.time()))
            found = error()
            assert found is not None
            raise found

        return failing

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "opening":
        open_run.open_selections = fails(lambda: OSError(errno.EIO, SAYS))  # type: ignore[assignment]
    elif place == "encoding":
        Family.encode_prompts = fails(lambda: ValueError(SAYS))  # type: ignore[method-assign]
    elif place == "step":
        optim.AdamW.step = fails(lambda: ZeroDivisionError(SAYS), 2, optim.AdamW.step)  # type: ignore[method-assign]
    elif place == "killed":
        optim.AdamW.step = fails(killed, 2, optim.AdamW.step)  # type: ignore[method-assign]
    elif place == "evaluation":
        evaluate_leg.evaluate = fails(lambda: RuntimeError(SAYS), 1, evaluate_leg.evaluate)  # type: ignore[assignment]
    elif place == "saving":
        save_leg.write_checkpoint = fails(lambda: OSError(SAYS))  # type: ignore[assignment]
    elif place == "publishing":
        finish.make_adapter = fails(lambda: RuntimeError(SAYS))  # type: ignore[assignment]
    else:
        raise ValueError(f"no place '{place}' (places: {', '.join(PLACES)})")


if __name__ == "__main__":
    where, rank, written, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        break_at(where, Path(written))
    sys.exit(train.main(arguments))

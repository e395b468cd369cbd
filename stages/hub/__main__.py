"""The Hub from the command line.

    python -m stages.hub push RUN_FOLDER user/name      send what the run has published: the adapter, and the model where its weights were trained
    python -m stages.hub fetch user/name --out runs/x   fetch the newest checkpoint of a run that was published with `checkpoints: true`, to go on with it here

`push` makes a private repository if there is none, unless --public is given, and sends checkpoints too with --checkpoints. What a training run could not send goes first.
Exit code: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stages.hub.words import WAITS
from stages.printable import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stages.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{push,fetch}")
    push = commands.add_parser("push", help="send what a run has published")
    serve = commands.add_parser("serve")
    for command in (push, serve):
        command.add_argument("folder", type=Path, metavar="RUN_FOLDER")
        command.add_argument("repo", metavar="USER/NAME")
        command.add_argument("--private", action="store_true", help="make a private repository if there is none, as is usual")
        command.add_argument("--public", action="store_true", help="make a public one")
    push.add_argument("--checkpoints", action="store_true", help="send the newest checkpoint too")
    serve.add_argument("--waits", default=",".join(map(str, WAITS)))
    fetch = commands.add_parser("fetch", help="fetch a run's newest checkpoint")
    fetch.add_argument("repo", metavar="USER/NAME")
    fetch.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the run's folder, which must hold no checkpoint yet")
    given = parser.parse_args(arguments)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):  # before huggingface_hub is imported
        os.environ.setdefault(name, "1")
    from stages.hub.send import serve as serve_run
    from stages.hub.send import set_up

    set_up()
    if given.command == "serve":
        serve_run(given.folder, given.repo, [float(wait) for wait in given.waits.split(",")], private=not given.public)
    if given.command == "fetch":
        from stages.hub.fetch import FetchError, fetch_run

        try:
            print(fetch_run(given.repo, given.out))
            return 0
        except FetchError as error:
            print(printable(f"failed: {error}"), file=sys.stderr)
            return 1
    if given.private and given.public:
        parser.error("--private and --public contradict each other; give one")
    from stages.hub.push import push_run

    return push_run(given.folder, given.repo, private=not given.public, checkpoints=given.checkpoints)


if __name__ == "__main__":
    sys.exit(main())

"""Training loops that make their steps in turns: each in a thread of its own, which waits after every optimizer step until the next is asked for.

So loops that were never written for it, such as the one in train.py, are timed step by step beside each other while the machine's speed drifts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class LoopEnded(RuntimeError):
    """A loop was asked for a step and had ended."""


class _Left(BaseException):
    """Ends a loop that is no longer wanted; nothing that the loop catches."""


class Loop:
    """A loop that stands still between its steps. From one optimizer step to the next is one step."""

    def __init__(self, name: str, body: Callable[[], object]) -> None:
        """body: makes all steps; it is called in a thread, at the first step."""
        self.name = name
        self._body, self._failed, self._left = body, None, False
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    _failed: BaseException | None

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._left:
                self._body()
        except _Left:
            pass
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits
            self._failed = error
        finally:
            self._ended = True
            self._stands.release()

    def stand(self) -> None:
        """Called in the loop's own thread: wait until the next step is asked for."""
        self._stands.release()
        self._go.acquire()
        if self._left:
            raise _Left

    def step(self) -> None:
        """Let it go on to its next optimizer step. Raises what the loop raised, and LoopEnded if it ended instead."""
        if not self.thread.is_alive() and not self._ended:
            self.thread.start()
        self._go_on()
        if self._ended:
            raise LoopEnded(f"'{self.name}' ended before the step that was asked for; ask for fewer, or let it make more")

    def finish(self) -> None:
        """Let it go on to its end, whatever it does after its last step. Raises what the loop raised, and RuntimeError if it makes another step."""
        if not self._ended:
            self._go_on()
        if not self._ended:
            raise RuntimeError(f"'{self.name}' was to finish and made another step")

    def _go_on(self) -> None:
        if self._ended:
            return
        self._go.release()
        self._stands.acquire()
        if self._failed is not None:
            raise self._failed

    def leave(self) -> None:
        """End it where it stands."""
        if self.thread.is_alive():
            self._left = True
            self._go.release()
            self.thread.join()


@contextmanager
def in_turns(bodies: Mapping[str, Callable[[], object]]) -> Iterator[dict[str, Loop]]:
    """Loops by name. Inside, they stand still after each of their optimizer steps; after it they are ended."""
    loops = {name: Loop(name, body) for name, body in bodies.items()}

    def made(optimizer: Optimizer, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        for loop in loops.values():
            if loop.thread is threading.current_thread():
                loop.stand()

    hook = register_optimizer_step_post_hook(made)
    try:
        yield loops
    finally:
        for loop in loops.values():
            loop.leave()
        hook.remove()

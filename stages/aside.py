"""Aside: what is done between steps, such as evaluating and sampling, which a signal breaks off. Nothing of it is kept, and all of it is done again when the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from accelerate import Accelerator
from torch import nn

from stages.engine import Engine
from stages.stop import Stop


class Stopped(Exception):
    """All processes have agreed that one of them was told to stop, between two steps."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(f"stopped by {stop.name}")
        self.name, self.exit_code = stop.name, stop.exit_code


class _Told(Exception):
    """This process was told to stop. It has done its part then, and the others learn of it once they have done theirs."""


@contextmanager
def aside(model: nn.Module, stop: Stop, accelerator: Accelerator, engine: Engine) -> Iterator[None]:
    """Inside, processes call a placed model as often as each of them likes, as in `Engine.shared_out`, until a signal comes: then the next call ends what is inside.

    Every process must take part. Raises Stopped at the end, on all processes, if any of them was told to stop.
    """

    def look(module: nn.Module, inputs: object) -> None:
        if stop.look():
            raise _Told

    with engine.shared_out(model), suppress(_Told):
        hook = model.register_forward_pre_hook(look, prepend=True)  # before that of the engine, which announces a call
        try:
            yield
        finally:
            hook.remove()
    heed(stop, accelerator)


def heed(stop: Stop, accelerator: Accelerator) -> None:
    """Raises Stopped, on all processes, if any of them was told to stop. Every process must ask at the same point."""
    if stop.agreed(accelerator):
        raise Stopped(stop)

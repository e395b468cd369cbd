"""Open the engine that the launcher was told of."""

from __future__ import annotations

from accelerate import Accelerator

from stages.engine import Engine, Whole
from stages.fsdp import Sharded
from stages.launched import Launched


def open_engine(told: Launched, accelerator: Accelerator) -> Engine:
    """The engine by which an accelerator's processes train. Raises LaunchError if it is not for them."""
    if told.engine == "fsdp2":
        return Sharded(told, accelerator)
    if told.engine in ("zero2", "zero3"):
        from stages.zero import Zero  # only here, for DeepSpeed's sake

        return Zero(told, accelerator)
    return Whole(accelerator)

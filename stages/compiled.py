"""Compiled: the blocks of a transformer as code made for them by torch.compile, each block by itself, so that all of one kind share what is compiled.

Steps run compiled; whatever a stage measures (evaluation, probes, previews, the dtype of its products) runs the blocks as they are. Two traps of torch 2.13: a
module that is called first beneath a TorchDispatchMode is never compiled again, and nothing says so; and compiled code stays with Python's code of a block, for
all models of its class, until it is reset.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from stages.dropout import KeyedDropout
from stages.plan import Compile

_MOST_GRAPHS = 64
"""Of a kind of block. torch's own limit, 8, is for one function: a stage of five shapes with frozen and training blocks passes it."""
_PASSED = "recompile limit exceeded"  # in what torch counts of it (2.13, _dynamo/convert_frame.py)


@dataclass(frozen=True)
class Counted:
    """What was compiled since `compile_blocks`."""

    graphs: int
    """One for each kind of block, with and without gradients for its input, and for each shape until sizes are seen to vary."""
    passed_limit: bool
    """Whether a block had so many that it now runs uncompiled wherever no graph fits."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the items of the lists that stand on the model itself, as `stages.storage.block_layers` has them."""
    return [block for children in model.children() if isinstance(children, nn.ModuleList) for block in children]


def compile_blocks(model: nn.Module, asked: Compile) -> int:
    """Let a model's blocks be compiled at their first call; names of weights stay as they are. Gives the number of blocks, 0 if it is not asked for.

    Neither weights nor function change but by rounding; `aot_eager` changes no bit.
    """
    if not asked:
        return 0
    from torch._dynamo.utils import counters  # takes a second to import, which stages that do not compile are spared

    counters.clear()
    backend = "inductor" if asked is True else asked
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            # Its keys are Python's numbers and new at every step: compiled, each would be a reason to compile again.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
    found = blocks(model)
    for block in found:
        block.compile(backend=backend, recompile_limit=_MOST_GRAPHS)
    return len(found)


def uncompiled() -> AbstractContextManager[object]:
    """Inside, blocks run as they are, and nothing is compiled."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def counted() -> Counted:
    """What was compiled so far."""
    from torch._dynamo.utils import counters

    return Counted(counters["stats"]["unique_graphs"], any(_PASSED in reason for reason in counters["unimplemented"]))


def forget_compiled() -> None:
    """Drop all compiled code of the process, so that no later model of the same class meets it."""
    torch.compiler.reset()

"""Engine: how the processes train one model together. One process, or DDP: each has the whole model, and gradients are exchanged.

What needs every process at once, a forward pass over a sharded model, is kept in step here: processes with less to do make calls that count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stages.objectives.parts import Part
from stages.optim import load_optimizer_state, optimizer_state
from stages.pace import Pace
from stages.plan import Plan
from stages.precision import StagePrecision
from stages.sharing import part_of, plain

MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Gives an optimizer over named parameters."""


ALONE: AbstractContextManager[None] = nullcontext()
"""What `Engine.shared_out` gives where processes need nothing of one another."""


class Training(Protocol):
    """A stage's model and optimizer, as an engine trains them."""

    wrapped: nn.Module
    """What forward passes go through that gradients are taken of."""
    trainable: dict[str, nn.Parameter]
    """What trains, by name; a sharded engine may have put parts of parameters in the place of whole ones."""
    optimizer: torch.optim.Optimizer
    """Its rate is set before each step."""

    def paced(self, parts: Sequence[Part], is_last: bool) -> Iterator[tuple[Part, bool, bool]]:
        """A micro-batch's parts, one for each forward and backward pass: the part, whether it counts, and whether it is this process's last of the step.

        is_last: whether no micro-batch of the step comes after. Where passes need every process, a process with fewer parts repeats one that does not count.
        """

    def held_back(self) -> AbstractContextManager[None]:
        """Inside, gradients are added up on their process and not exchanged."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, which is divided by nothing but the step's own count."""

    def without_gradient(self) -> list[str]:
        """Names of what trains and got no gradient in the first step; to be asked before the step is made."""

    def gathered(self, *, changing: bool = False) -> AbstractContextManager[None]:
        """Inside, what belongs into a checkpoint can be read on this process, or gathered tensor by tensor with `stages.sharing.whole`; every process must take part.

        changing: what is written into it, by all processes alike, stays.
        """

    def optimizer_state(self) -> dict[str, Tensor]:
        """As `stages.optim.optimizer_state`. Where the engine is sharded every process must ask."""

    def load_optimizer_state(self, state: Mapping[str, Tensor], *, zero_first: bool = False) -> list[str]:
        """As `stages.optim.load_optimizer_state`."""

    def clip(self, most: float | None) -> Tensor:
        """Clip the gradients to a norm, None for none. Gives their norm before, over all processes; nan or infinite where it is no number. `step` or `skip` must follow."""

    def step(self) -> bool:
        """Make the step, and forget the gradients. Gives whether it was made: fp16 skips one whose gradients left its range."""

    def skip(self) -> bool:
        """Forget the gradients, and leave all else as it is. Gives False, for no step is made."""

    def held(self) -> dict[str, list[Tensor]]:
        """What this process has of the weights that train, under `weights`, and of what the optimizer keeps of each, under `moments`."""


class Engine(Protocol):
    """How the processes train one model together."""

    words: str
    """`DDP`, `FSDP2`; empty for one process."""
    is_sharded: bool
    """Whether each process has a part of a model, so that its weights are gathered, and its forward passes made, by all processes at once."""
    loads_on: torch.device
    """Where models are loaded before they are placed."""

    def refuse(self, plan: Plan) -> None:
        """Raises PlanError if the plan asks for something that this engine cannot do."""

    def place(self, model: nn.Module) -> nn.Module:
        """The frozen model where it computes, for forward passes without gradients; it may be changed in place."""

    def train(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], make: MakeOptimizer, precision: StagePrecision) -> Training:
        """Place a model that trains, in place, and make its optimizer. make: gives the optimizer over what trains."""

    def release(self, model: nn.Module) -> None:
        """Let go of a placed model, or one that was trained, after its last use."""

    def held_share(self, model: nn.Module) -> float:
        """What of a placed model's numbers this process has between steps, in (0, 1]; counted, not reckoned."""

    def shared_out(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, processes may call the placed model as often as each of them likes, and exchange nothing else; all leave together."""


class TorchTraining:
    """Training by torch's own optimizer, after a backward pass that leaves gradients at the parameters."""

    def __init__(
        self,
        wrapped: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        precision: StagePrecision,
        held_back: Callable[[], AbstractContextManager[None]],
        pace: Pace | None = None,
    ) -> None:
        """pace: where every pass needs every process."""
        self.wrapped, self.trainable, self.optimizer = wrapped, dict(trainable), optimizer
        self.held_back = held_back
        self._precision, self._pace = precision, pace

    def paced(self, parts: Sequence[Part], is_last: bool) -> Iterator[tuple[Part, bool, bool]]:
        """As `Training.paced`."""
        if self._pace is not None:
            return self._pace.paced(parts, is_last)
        return ((part, True, is_last and part is parts[-1]) for part in parts)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled up where the stage computes in fp16."""
        self._precision.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def without_gradient(self) -> list[str]:
        """Names of what trains and has no gradient."""
        return [name for name, parameter in self.trainable.items() if parameter.grad is None]

    def gathered(self, *, changing: bool = False) -> AbstractContextManager[None]:
        """What is sharded is so as tensors that know it."""
        return ALONE

    def optimizer_state(self) -> dict[str, Tensor]:
        """All that the optimizer knows, by name."""
        return optimizer_state(self.optimizer, self.trainable)

    def load_optimizer_state(self, state: Mapping[str, Tensor], *, zero_first: bool = False) -> list[str]:
        """Put it back; gives the names of what got none."""
        return load_optimizer_state(self.optimizer, self.trainable, state, zero_first=zero_first)

    def clip(self, most: float | None) -> Tensor:
        """As `Training.clip`."""
        self._precision.scaler.unscale_(self.optimizer)
        return plain(torch.nn.utils.clip_grad_norm_(self.trainable.values(), most or float("inf")))

    def step(self) -> bool:
        """As `Training.step`."""
        self._precision.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return self._precision.update_scale()

    def skip(self) -> bool:
        """As `Training.skip`."""
        self.optimizer.zero_grad(set_to_none=True)
        self._precision.leave_scale()
        return False

    def held(self) -> dict[str, list[Tensor]]:
        """As `Training.held`."""
        moments = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return {"weights": [part_of(parameter.detach()) for parameter in self.trainable.values()], "moments": [part_of(value) for value in moments]}


class Whole:
    """The engine of one process, or of several of which each has the whole model: DDP."""

    is_sharded = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.words = "DDP" if accelerator.num_processes > 1 else ""
        self.loads_on = accelerator.device
        self._accelerator = accelerator

    def refuse(self, plan: Plan) -> None:
        """It does all that a plan can ask for."""

    def place(self, model: nn.Module) -> nn.Module:
        """The model, which is where it was loaded."""
        return model

    def train(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], make: MakeOptimizer, precision: StagePrecision) -> TorchTraining:
        """The model inside DDP where there are several processes."""
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        return TorchTraining(wrapped, trainable, make(trainable), precision, lambda: self._accelerator.no_sync(wrapped))

    def release(self, model: nn.Module) -> None:
        """Nothing but its user holds it."""

    def held_share(self, model: nn.Module) -> float:
        """All of it."""
        return 1.0

    def shared_out(self, model: nn.Module) -> AbstractContextManager[None]:
        """Processes need nothing of one another."""
        return ALONE

"""ZeRO: the engine of DeepSpeed. ZeRO-2 parts gradients and the optimizer's moments among the processes, ZeRO-3 the weights too.

accelerate's own use of DeepSpeed is left aside, for it fixes one precision for the whole launch: each stage has a DeepSpeed engine of its own, without its `bf16` and
`fp16` sections, which would cast the weights that train. Products are in the dtype that autocast gives, weights that train, their gradients and moments are float32.
A checkpoint holds whole tensors by name, so another engine and another number of processes can go on with it. Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from stages.engine import ALONE, MakeOptimizer
from stages.launched import Launched
from stages.objectives.parts import Part
from stages.optim import AVERAGED, by_name
from stages.pace import Pace
from stages.plan import Plan, Stage
from stages.precision import StagePrecision
from stages.problems import LaunchError, PlanError, Problem
from stages.sharing import numbers

_UNPARTED = 100_000  # numbers; smaller weights are kept whole by ZeRO-3, as DeepSpeed advises: to fetch them would take longer than to use them
_BUCKET = 50_000_000  # numbers whose gradients are exchanged at once; DeepSpeed would set aside memory for ten times as many


def deepspeed(device: str) -> ModuleType:
    """DeepSpeed, which is no part of requirements.txt. device: `cuda` or `cpu`. Raises LaunchError if it is not there."""
    warnings.filterwarnings("ignore", message="`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", category=FutureWarning)  # DeepSpeed's affair
    os.environ.setdefault("DS_ACCELERATOR", device)  # else it looks for itself, and warns where it finds no GPU
    try:
        found: ModuleType = importlib.import_module("deepspeed")
    except ImportError as error:
        raise LaunchError(f"the launcher is told to use DeepSpeed, which cannot be imported ({error}); pip install -r requirements-deepspeed.txt, or use accelerate_configs/fsdp2.yaml") from None
    return found


def refused(place: str, stage: Stage, words: str) -> list[Problem]:
    """What a stage asks for and ZeRO cannot do. place: of the stage in the plan. words: `ZeRO-2` or `ZeRO-3`."""
    found = []
    if stage.precision == "fp8":
        found.append(("precision", f"'fp8' was not tried with {words}; write bf16, or launch with accelerate_configs/ddp.yaml"))
    elif stage.precision not in ("fp32", "bf16"):
        found.append(("precision", f"'{stage.precision}' needs a loss scale that goes on from a checkpoint, which {words} keeps to itself; write bf16, or launch with accelerate_configs/ddp.yaml"))
    if stage.optimizer.name != "adamw":
        found.append(("optimizer", f"'{stage.optimizer.name}' takes whole weights, and {words} gives each process a part of them; write adamw, or launch with accelerate_configs/ddp.yaml"))
    if words == "ZeRO-3" and stage.compile:
        found.append(("compile", "blocks are not compiled where ZeRO-3 fetches their weights; remove it, or launch with accelerate_configs/fsdp2.yaml"))
    if words == "ZeRO-3" and stage.ema is not None and stage.train == "full":
        found.append(("ema", "the average of every weight would be whole on each process, which ZeRO-3 is there to avoid; remove it, or launch with accelerate_configs/fsdp2.yaml"))
    return [Problem(f"{place}.{field}", "", message) for field, message in found]


class Zero:
    """The engine of ZeRO-2 and ZeRO-3."""

    is_sharded = True

    def __init__(self, told: Launched, accelerator: Accelerator) -> None:
        """Raises LaunchError if DeepSpeed is not there, or there is one process."""
        self._parts_weights = told.engine == "zero3"
        self.words = "ZeRO-3" if self._parts_weights else "ZeRO-2"
        self._deepspeed = deepspeed(accelerator.device.type)
        if not dist.is_initialized():
            raise LaunchError(f"{self.words} shares a model out among processes, and one was started; write num_processes: 2 or more, or use accelerate_configs/single_gpu.yaml")
        self._device = accelerator.device
        self.loads_on = torch.device("cpu") if self._parts_weights else accelerator.device
        self._pace = Pace()
        self._engines: dict[nn.Module, Any] = {}

    def refuse(self, plan: Plan) -> None:
        """Raises PlanError, with all that was found, where a stage asks for what needs whole weights or a loss scale of its own."""
        if problems := [problem for index, stage in enumerate(plan.stages) for problem in refused(f"stages[{index}]", stage, self.words)]:
            raise PlanError(problems)

    def place(self, model: nn.Module) -> nn.Module:
        """The model; by ZeRO-3 with its weights parted."""
        if self._parts_weights:
            self._part(model)
            self._engines[model] = self._deepspeed.initialize(model=model, config=self._config(0, 0), dist_init_required=False)[0]
        return model

    def train(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], make: MakeOptimizer, precision: StagePrecision) -> ZeroTraining:
        """The model inside an engine of DeepSpeed."""
        sizes = [parameter.numel() for parameter in trainable.values()]
        kept = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name} or dict(model.named_parameters())
        if self._parts_weights:
            self._part(model)
        if precision.mode != "fp32":
            # On a GPU the engine turns off whatever autocast stands around its call.
            model.forward = torch.autocast(self._device.type, dtype=precision.dtype)(model.forward)
        engine = self._deepspeed.initialize(model=model, optimizer=make(trainable), config=self._config(max(sizes), sum(sizes)), dist_init_required=False)[0]
        self._engines[model] = engine
        return ZeroTraining(engine, trainable, kept if self._parts_weights else {}, self._pace, parts_weights=self._parts_weights)

    def release(self, model: nn.Module) -> None:
        """Let go of it; else DeepSpeed's hooks would hold it as long as the process lives."""
        if model not in self._engines:  # by ZeRO-2 a placed model has none
            return
        engine = self._engines.pop(model)
        engine.destroy()
        if self._parts_weights:
            # Functions of torch's that ZeRO-3 makes for each module hold the modules, and with them all else, until the process ends (0.19.8,
            # parameter_offload.py:466). So the numbers are taken out of what stays.
            vars(engine.optimizer).clear()
            if engine.basic_optimizer is not None:
                engine.basic_optimizer.state.clear()
                engine.basic_optimizer.param_groups.clear()
            parameters: list[Any] = list(model.parameters())
            for parameter in parameters:
                for held in (parameter, parameter.ds_tensor):
                    held.data, held.grad = held.data.new_empty(0), None

    def held_share(self, model: nn.Module) -> float:
        """What of a model's numbers this process has."""
        held = [(max(parameter.numel(), parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0), numbers(parameter)) for parameter in model.parameters()]
        return sum(own for own, _ in held) / sum(of_all for _, of_all in held)

    def shared_out(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, processes call the model as often as each likes; by ZeRO-3 those that are done repeat a call for the others at its end, until all are."""
        return Helping(model, self._device, self._pace).until_all_are_done() if self._parts_weights else ALONE

    def _part(self, model: nn.Module) -> None:
        """Bring the weights to the device one by one, each process keeping its part: no device holds them all at once."""
        self._deepspeed.zero.Init(module=model, config_dict_or_path=self._config(0, 0), mem_efficient_linear=False)
        for name, buffer in list(model.named_buffers()):
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.to(self._device)

    def _config(self, largest: int, total: int) -> dict[str, Any]:
        """What DeepSpeed is told. largest, total: numbers of the largest weight that trains, and of all."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # it has to be said, and nothing follows from it
            "gradient_accumulation_steps": 1,  # where a step ends is said at each pass
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,  # torch's AdamW is not on its list; tests/test_zero.py compares it with DDP
            "zero_optimization": {
                "stage": 3 if self._parts_weights else 2,
                "reduce_bucket_size": max(largest, min(total, _BUCKET), 1),
                "stage3_param_persistence_threshold": _UNPARTED,
                "memory_efficient_linear": False,  # it would put another function in the place of torch's own, for the whole process and beside autocast
            },
        }


@dataclass(frozen=True)
class Call:
    """A call of a model, as it can be made again."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    autocast: torch.dtype | None
    """What it multiplies in, where that is not the dtype of weights and inputs."""

    def again(self, model: nn.Module, device: torch.device) -> None:
        """Make it for nothing but the others' sake."""
        with torch.no_grad(), torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            model(*(_on(device, each) for each in self.arguments), **{name: _on(device, each) for name, each in self.named.items()})


def _on(device: torch.device, value: Any) -> Any:
    """An argument of a call with its tensors on a device, for those that another process has sent come with the device that they had there."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _on(device, each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on(device, each) for each in value)
    return value


class Helping:
    """Calls of a model that need every process, made by each as often as by the one with the most of them."""

    def __init__(self, model: nn.Module, device: torch.device, pace: Pace) -> None:
        self._model, self._device, self._pace = model, device, pace
        self._call: Call | None = None

    @contextmanager
    def until_all_are_done(self) -> Iterator[None]:
        """Inside, call the model; at its end the calls of others are waited for."""
        handle = self._model.register_forward_pre_hook(self._announce, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        while self._pace.any(False):
            self._exchange(None).again(self._model, self._device)

    def _announce(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._pace.any(True)
        device = self._device.type
        self._exchange(Call(arguments, named, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None))

    def _exchange(self, mine: Call | None) -> Call:
        """The last call of this process; where it has made none yet, that which another is about to make. All ask at once."""
        self._call = mine or self._call
        if self._pace.any(self._call is None):
            made = [call for call in gather_object([mine]) if call is not None]
            self._call = self._call or made[0]
        assert self._call is not None
        return self._call


class ZeroTraining:
    """Training by an engine of DeepSpeed, one step at a time for all weights together."""

    def __init__(self, engine: Any, trainable: Mapping[str, nn.Parameter], kept: Mapping[str, nn.Parameter], pace: Pace, *, parts_weights: bool) -> None:
        """engine: DeepSpeed's. kept: what is parted and belongs into a checkpoint. parts_weights: whether it is ZeRO-3."""
        self.wrapped: nn.Module = engine
        self.trainable = dict(trainable)
        self.optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self._engine, self._kept, self._pace, self._parts_weights = engine, list(kept.values()), pace, parts_weights
        self._norms: list[Tensor] = []
        self._seen: set[str] = set()
        self._handles = [parameter.register_hook(self._see(name)) for name, parameter in trainable.items()]  # type: ignore[no-untyped-call]
        engine.set_gradient_accumulation_boundary(True)

    def _see(self, name: str) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            self._seen.add(name)

        return see

    def paced(self, parts: Sequence[Part], is_last: bool) -> Iterator[tuple[Part, bool, bool]]:
        """As `Training.paced`."""
        return self._pace.paced(parts, is_last)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Inside, gradients are added up, each process keeping its part of the sum."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self._engine.backward(loss)

    def without_gradient(self) -> list[str]:
        """Names of what trains and got no gradient since the stage was opened."""
        for handle in self._handles:
            handle.remove()
        return [name for name in self.trainable if name not in self._seen]

    def clip(self, most: float | None) -> Tensor:
        """As `Training.clip`; the clipping itself is done within the step."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine.optimizer
        zero.clip_grad = most or 0.0
        # The step asks for the norm once more, by the same function, and is then told what is found here.
        self._norms = zero._get_norm_groups() if self._parts_weights else [zero.scaled_global_norm()]
        norm = combine_grad_norm_groups(self._norms) if self._parts_weights else self._norms[0]
        return torch.where(norm < 0, torch.nan, norm)  # -1 stands for a norm that is no number

    def step(self) -> bool:
        """As `Training.step`. Every step is made."""
        self._step(self._norms)
        return True

    def skip(self) -> bool:
        """As `Training.skip`: DeepSpeed is told that the norm is no number, with which it makes no step and forgets the gradients."""
        self._step([torch.full_like(norm, -1.0) for norm in self._norms])
        return False

    def _step(self, norms: Sequence[Tensor]) -> None:
        zero = self._engine.optimizer
        name = "_get_norm_groups" if self._parts_weights else "scaled_global_norm"
        setattr(zero, name, lambda: list(norms) if self._parts_weights else norms[0])
        try:
            self._engine.step()
        finally:
            delattr(zero, name)  # the class has its own

    def held(self) -> dict[str, list[Tensor]]:
        """As `Training.held`: parts of many weights each."""
        moments = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return {"weights": [flat.detach() for flat in self._flats()], "moments": moments}

    def gathered(self, *, changing: bool = False) -> AbstractContextManager[None]:
        """Inside, what belongs into a checkpoint is whole on every process."""
        if not self._kept:
            return ALONE
        from deepspeed.runtime.zero import GatheredParameters

        found: AbstractContextManager[None] = GatheredParameters(self._kept, modifier_rank=0 if changing else None)
        return found

    def optimizer_state(self) -> dict[str, Tensor]:
        """As `stages.optim.optimizer_state`, whole and on the CPU. Every process must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.optimizer.state:
            return {}
        step = next(iter(self.optimizer.state.values()))["step"].detach().cpu()
        return {
            f"{name}::{field}": step.clone() if field == "step" else safe_get_full_optimizer_state(parameter, field).detach().cpu()
            for name, parameter in self.trainable.items()
            for field in (*AVERAGED, "step")
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor], *, zero_first: bool = False) -> list[str]:
        """As `stages.optim.load_optimizer_state`. Raises PlanError where weights stand at different steps, which DeepSpeed counts for all together."""
        shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in self.trainable.items()}
        saved = {name: values for name, values in by_name(state).items() if name in shapes and tuple(values["exp_avg_sq"].shape) == shapes[name]}
        fresh = [name for name in shapes if name not in saved]
        if not saved:
            return fresh
        steps = {float(values["step"]) for values in saved.values()}
        if fresh or len(steps) > 1:
            found = f"finds the moments of {len(saved)} of {len(shapes)} weights" if fresh else f"finds moments after {', '.join(f'{step:g}' for step in sorted(steps))} steps"
            raise PlanError.at("handoff.optimizer", f"{found}, and ZeRO counts the steps of all together; write reset, or launch with accelerate_configs/ddp.yaml")
        for flat in self._flats():
            zeros = {field: torch.zeros_like(flat) for field in AVERAGED}
            self.optimizer.state[flat] = {"step": torch.tensor(steps.copy().pop(), device=flat.device if self.optimizer.param_groups[0].get("fused") else "cpu"), **zeros}
        if hasattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # of ZeRO-2: else the parts are tied to the weights after its first step
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, values in saved.items():
            for field in AVERAGED:
                self._set(self.trainable[name], field, values[field] * 0 if zero_first and field == "exp_avg" else values[field])
        return fresh

    def _flats(self) -> list[Tensor]:
        """This process's parts, one tensor for many weights, that the optimizer steps."""
        zero = self._engine.optimizer
        found: list[Tensor] = zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else zero.single_partition_of_fp32_groups
        return found

    def _set(self, parameter: nn.Parameter, field: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not hasattr(parameter, "ds_tensor"):
            safe_set_full_optimizer_state(parameter, value, field)
            return
        # DeepSpeed's own function for whole values reads past the end of those that the processes cannot share evenly.
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[size * dist.get_rank() :][:size], field)

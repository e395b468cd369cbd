"""FSDP2: the engine that shards a model's weights over the processes, by torch's `fully_shard` itself.

Frozen weights are sharded, block by block, in the dtype that they are stored in. Adapters stay whole on every process and are trained by DDP: they are small, and so every optimizer, average and
checkpoint is what it is without sharding. A stage that trains the whole model shards that too, with its gradients and its optimizer's moments.

Autocast makes the products' dtype, so gradients are exchanged in float32, that of the weights that train. A forward pass gathers blocks from every process,
so processes must make as many; where they have not as many to make, those that are done help: by gathering what the others gather, and in training, where
gradients are gathered too, by a part that counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from stages.engine import MakeOptimizer, TorchTraining
from stages.launched import Launched
from stages.pace import Pace
from stages.plan import Plan
from stages.precision import StagePrecision
from stages.problems import LaunchError, PlanError, Problem
from stages.sharing import part_of


class Sharded:
    """The engine of FSDP2."""

    words = "FSDP2"
    is_sharded = True
    loads_on = torch.device("cpu")

    def __init__(self, told: Launched, accelerator: Accelerator) -> None:
        """Raises LaunchError if the processes cannot be grouped as the launcher was told."""
        processes = accelerator.num_processes
        if processes % told.replicas:
            raise LaunchError(f"the launcher is told parallelism_config_dp_replicate_size: {told.replicas}, and {processes} processes are no multiple of it")
        if not dist.is_initialized():
            raise LaunchError("FSDP2 shares a model out among processes, and one was started; write num_processes: 2 or more, or use accelerate_configs/single_gpu.yaml")
        self._device, self._told = accelerator.device, told
        self._mesh = _mesh(accelerator.device.type, processes, told.replicas)
        self._pace = Pace()

    def refuse(self, plan: Plan) -> None:
        """Raises PlanError where a stage trains every weight by an optimizer that takes whole ones."""
        problems = [
            Problem(
                f"stages[{index}].optimizer",
                "",
                f"'{stage.optimizer.name}' takes whole weights, and train: full is sharded by FSDP2; write adamw, train the adapter, or launch with accelerate_configs/ddp.yaml",
            )
            for index, stage in enumerate(plan.stages)
            if stage.train == "full" and stage.optimizer.name != "adamw"
        ]
        if problems:
            raise PlanError(problems)

    def place(self, model: nn.Module) -> nn.Module:
        """The model, sharded block by block."""
        return self._shard(model, set())

    def train(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], make: MakeOptimizer, precision: StagePrecision) -> TorchTraining:
        """The model with its frozen weights sharded and its adapters inside DDP; or, where it trains whole, sharded with all that trains."""
        adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
        if not adapters:
            self._shard(model, set())
            held = {name: parameter for name, parameter in model.named_parameters() if name in trainable}
            return TorchTraining(model, held, make(held), precision, lambda: _unsynchronised(model), self._pace)
        for parameter in adapters.values():
            parameter.data = parameter.data.to(self._device)
        self._shard(model, set(adapters.values()))
        ignored = [name for name, _ in model.named_parameters() if name not in trainable] + [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(model, device_ids=None)
        return TorchTraining(wrapped, trainable, make(trainable), precision, wrapped.no_sync, self._pace)

    def release(self, model: nn.Module) -> None:
        """Nothing but its user holds it."""

    def held_share(self, model: nn.Module) -> float:
        """What of a sharded model's numbers this process has."""
        held = [(part_of(parameter).numel(), parameter.numel()) for parameter in model.parameters()]
        return sum(own for own, _ in held) / sum(of_all for _, of_all in held)

    @contextmanager
    def shared_out(self, model: nn.Module) -> Iterator[None]:
        """Inside, processes call the model as often as each likes; at its end those that are done gather for the others, until all are."""
        handle = model.register_forward_pre_hook(lambda module, inputs: self._announce(True), prepend=True)
        try:
            yield
        finally:
            handle.remove()
        while self._announce(False):
            self._gather(model)

    def _announce(self, calls: bool) -> bool | None:
        going_on = self._pace.any(calls)
        return None if calls else going_on  # what a hook gives would take the place of the inputs

    def _gather(self, model: nn.Module) -> None:
        """Take part in a forward pass of others."""
        assert isinstance(model, FSDPModule)
        model._get_fsdp_state()._lazy_init()  # as the first forward pass does, which this process may not have had
        model.unshard()
        for module in _sharded_blocks(model):
            module.unshard()
            if self._told.reshard:
                module.reshard()

    def _shard(self, model: nn.Module, kept: set[nn.Parameter]) -> nn.Module:
        for block in self._blocks(model):
            fully_shard(block, mesh=self._mesh, reshard_after_forward=self._told.reshard, ignored_params=kept)
        fully_shard(model, mesh=self._mesh, ignored_params=kept)
        return model

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        """What is sharded one by one: the items of the lists that stand on the model, or modules of the classes that the launcher names. Raises LaunchError if there are none of a class."""
        if not self._told.blocks:
            return [block for blocks in model.children() if isinstance(blocks, nn.ModuleList) for block in blocks if any(True for _ in block.parameters())]
        found = [module for module in model.modules() if type(module).__name__ in self._told.blocks]
        if missing := set(self._told.blocks) - {type(module).__name__ for module in found}:
            raise LaunchError(
                f"the launcher is told fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(missing))}, and {type(model).__name__} has no such module; leave it out, and its own blocks are sharded"
            )
        return found


def _mesh(device: str, processes: int, replicas: int) -> DeviceMesh:
    if replicas > 1:
        return init_device_mesh(device, (replicas, processes // replicas), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (processes,), mesh_dim_names=("shard",))


def _sharded_blocks(model: nn.Module) -> list[Any]:
    """What was sharded inside a model, in the order of its forward pass."""
    return [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]


@contextmanager
def _unsynchronised(model: nn.Module) -> Iterator[None]:
    """Inside, gradients are added up where they are."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)

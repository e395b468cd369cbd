"""Launched: what `accelerate launch` was told about the engine, read from the variables that it sets. Imports no torch.

accelerate's own plugins are not used: its FSDP2 wants the optimizer prepared with the model and is silently DDP on a CPU, its DeepSpeed fixes one precision
for the whole launch (1.15). So accelerate gives processes and device, and a stage is sharded by the library itself. transformers, seeing these variables,
would load text encoders on the first process only; so they are taken away while a run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from stages.problems import LaunchError

EngineName = Literal["ddp", "fsdp2", "zero2", "zero3"]
_PREFIXES = ("FSDP_", "ACCELERATE_DEEPSPEED_", "PARALLELISM_CONFIG_")
_NAMES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_PARALLELISM_CONFIG")


@dataclass(frozen=True)
class Launched:
    """What the launcher was told."""

    engine: EngineName = "ddp"
    """Where there are several processes: whole models that exchange gradients, or models of which each process has a part."""
    reshard: bool = True
    """FSDP2: whether a block's weights are let go of after its forward pass, and fetched again for the backward one."""
    blocks: tuple[str, ...] = ()
    """FSDP2: the classes of the modules that are sharded one by one; none for the model's own blocks."""
    replicas: int = 1
    """FSDP2: groups of processes of which each has a whole model, sharded inside."""


@contextmanager
def launched(environment: MutableMapping[str, str]) -> Iterator[Launched]:
    """What the launcher was told; inside, its variables are gone. Raises LaunchError, naming it, for anything that would be ignored."""
    told = read_launched(environment)
    taken = {name: environment.pop(name) for name in list(environment) if name.startswith(_PREFIXES) or name in _NAMES}
    try:
        yield told
    finally:
        environment.update(taken)


def read_launched(environment: MutableMapping[str, str]) -> Launched:
    """What the launcher was told. Raises LaunchError, naming it, for anything that would be ignored."""
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()) != "NO":
        raise LaunchError(f"the launcher is told dynamo_backend: {backend}, and what is compiled is the plan's; leave it out, and write compile: true into the stages")
    if environment.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        raise LaunchError("the launcher is told to use Megatron-LM, which trains no diffusion transformers; use accelerate_configs/fsdp2.yaml or ddp.yaml")
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return _fsdp(environment)
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return _deepspeed(environment)
    return Launched()


def _fsdp(environment: MutableMapping[str, str]) -> Launched:
    if (found := environment.get("FSDP_VERSION", "1")) != "2":
        raise LaunchError(f"the launcher is told fsdp_version: {found}; write 2 (1 cannot mix frozen and trained weights)")
    wanted = {
        "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "blocks are what is sharded"),
        "fsdp_offload_params": ("false", "write offload: true into the plan's stages, and launch without FSDP"),
        "fsdp_activation_checkpointing": ("false", "write checkpointing: full into the plan's stages"),
        "fsdp_activation_checkpointing_offload": ("false", "write checkpointing: full into the plan's stages"),
        "fsdp_ignored_modules": ("none", "what is frozen and what trains follows from the plan"),
    }
    for name, (value, reason) in wanted.items():
        if (said := environment.get(name.upper(), value)).lower() not in (value.lower(), ""):
            raise LaunchError(f"the launcher is told {name}: {said}, which is not heeded; {reason}, and write {name}: {value}, or leave it out")
    for size in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if (said := environment.get(f"PARALLELISM_CONFIG_{size}", "1")) != "1":
            raise LaunchError(f"the launcher is told parallelism_config_{size.lower()}: {said}, which is not heeded; shard by parallelism_config_dp_shard_size")
    classes = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise LaunchError(f"the launcher is told fsdp_reshard_after_forward: {reshard}; write true or false")
    return Launched(
        "fsdp2", reshard == "true", tuple(filter(None, (name.strip() for name in classes.split(",")))), int(environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    )


def _deepspeed(environment: MutableMapping[str, str]) -> Launched:
    if file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise LaunchError(f"the launcher is told deepspeed_config_file: {file}, which is not heeded, for the plan says what stands in it; write zero_stage: 2 or 3, as in accelerate_configs/deepspeed_zero2.yaml")
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage not in ("2", "3"):
        raise LaunchError(f"the launcher is told zero_stage: {stage or 'nothing'}; write 2 or 3, or use accelerate_configs/ddp.yaml")
    wanted = {
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", ("none", "auto"), "write clip into the plan's stages"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", ("1", "auto"), "write batch: {images: ..., micro: ...} into the plan's stages"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("offload_optimizer_device", ("none",), "moments stay on the device, parted among the processes"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", ("none",), "write offload: true into the plan's stages, and launch without DeepSpeed"),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": ("zero3_init_flag", ("false",), "weights are parted as they come to the device"),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": ("zero3_save_16bit_model", ("false",), "checkpoints hold what the stage trains, in float32"),
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": ("deepspeed_moe_layer_cls_names", ("none", ""), "no model of diffusers is told apart by it"),
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", ("no",), "write precision into the plan's stages"),
    }
    for name, (field, values, reason) in wanted.items():
        if (said := environment.get(name, values[0])).lower() not in values:
            raise LaunchError(f"the launcher is told {field}: {said}, which is not heeded; {reason}, and write {field}: {values[0]}, or leave it out")
    return Launched("zero2" if stage == "2" else "zero3")

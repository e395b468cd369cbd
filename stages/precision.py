"""Precision: the one place that touches accelerate's state, and what each stage multiplies in.

One `Accelerator(mixed_precision="no")` serves the whole launch, and each stage owns its autocast and its loss scaling. A second Accelerator
with another precision raises, a reset one leaves models prepared in the old precision as they were, and accelerate's own fp16 on a CPU is
silently fp32 (accelerate 1.15). Optimizer, schedule and loader are not prepared: its scheduler steps once for each process.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils._python_dispatch import TorchDispatchMode

from stages.plan import Plan
from stages.problems import LaunchError, PlanError
from stages.processes import COLLECTIVE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What a stage of each precision computes in; with fp8 the products of frozen layers aside."""
_FP8_SINCE = (8, 9)


def choose_device() -> torch.device:
    """The GPU where there is one; else the CPU, with one thread for this process, or as many as the environment variable MEDLEY_THREADS says."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    # More threads than idle cores make small steps ten times slower, and another number of threads adds up in another order, so it is not left to
    # OMP_NUM_THREADS, which `accelerate launch` sets to the number of cores.
    torch.set_num_threads(int(os.environ.get("MEDLEY_THREADS", "1")))
    return torch.device("cpu")


def start_accelerator() -> Accelerator:
    """The launch's Accelerator, on the device of `choose_device`.

    Raises LaunchError if the launcher started another number of processes than take part.
    """
    on_cpu = choose_device().type == "cpu"
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE)])
    # `accelerate launch --cpu --num_processes 2` starts one, and leaves only an address for the two to meet at (accelerate 1.15).
    lost = on_cpu and "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if lost or accelerator.num_processes != started:
        found = "the launcher was asked for several processes and started one" if lost else f"the launcher started {started} processes and accelerate sees {accelerator.num_processes}"
        raise LaunchError(
            f"{found}; start them with `accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml`" + ("" if lost else ", or set ACCELERATE_USE_CPU=true")
        )
    return accelerator


class StagePrecision:
    """What one stage computes in: its autocast and its gradient scaler."""

    def __init__(self, mode: str, device: torch.device) -> None:
        """mode: fp32, bf16, fp16 or fp8."""
        self.mode, self.dtype, self.device = mode, DTYPES[mode], device
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode == "fp16")
        self._scale: float | None = None

    def update_scale(self) -> bool:
        """Adapt the loss scale after a step; returns whether the step was made. fp16 skips one whose gradients are not all finite, on all processes alike.

        To know costs fp16 one wait for the device a step. In other modes every step is made, and nothing is waited for.
        """
        if self.mode != "fp16":
            return True
        before = self._scale if self._scale is not None else self.scaler.get_scale()
        self.scaler.update()
        self._scale = self.scaler.get_scale()
        return 0 < before <= self._scale  # it falls with every skipped step; at 0 there is nothing left to fall, and no step is made

    def leave_scale(self) -> None:
        """In the place of `update_scale` where no step was tried: the loss scale stays."""
        if self.mode == "fp16":
            self._scale = self._scale if self._scale is not None else self.scaler.get_scale()
            self.scaler.update(self._scale)  # which besides forgets that the gradients were unscaled

    def load_scale(self, state: Mapping[str, Any]) -> None:
        """Go on with the loss scale of a checkpoint, what `scaler.state_dict()` gave."""
        if self.mode == "fp16":
            self.scaler.load_state_dict(dict(state))
            self._scale = float(state["scale"])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass; gradients are taken outside."""
        return contextlib.nullcontext() if self.mode == "fp32" else torch.autocast(self.device.type, dtype=self.dtype)


def check_fp8(plan: Plan, device: torch.device) -> None:
    """Raises PlanError if a stage asks for fp8 and a device is not made for it."""
    for index, stage in enumerate(plan.stages):
        if stage.precision == "fp8" and (reason := why_no_fp8(device)):
            raise PlanError.at(f"stages[{index}].precision", f"'fp8' needs a GPU of compute capability {_FP8_SINCE[0]}.{_FP8_SINCE[1]} or later, and {reason}; choose bf16")


def why_no_fp8(device: torch.device) -> str:
    """Why a device is not made for fp8; empty if it is. A CPU multiplies in it all the same, and slowly."""
    if device.type != "cuda":
        return f"this device is a {device.type.upper()}"
    found = torch.cuda.get_device_capability(device)
    return "" if found >= _FP8_SINCE else f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"


class Multiplied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products made inside it, by the dtype of their operands as they reach the device: beneath autocast, so what it says is what happened."""

    _PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_dot_product", "_scaled_mm")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name.split(".")[0].startswith(self._PRODUCTS):
            # addmm(bias, a, b): the operands that are multiplied are the last two tensors; of a product with scales, the first two.
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            operands = tensors[:2] if name.startswith("_scaled_mm") else tensors[-2:]
            # A product over one number each, such as positions by frequencies, is no sum: what accuracy it needs is the model's own affair.
            if name.split(".")[0] in ("mm", "bmm") and operands[0].shape[-1] == 1:
                return func(*args, **(kwargs or {}))
            for dtype in {operand.dtype for operand in operands}:
                self.dtypes[str(dtype).removeprefix("torch.")] += 1
        return func(*args, **(kwargs or {}))

    def verdict(self) -> str:
        """The dtype of all products, as a plan names it: fp8 if some were made in it and all others in bf16. Where there are several otherwise, each with its number."""
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}
        if self.dtypes.keys() == {"float8_e4m3fn", "bfloat16"}:
            return "fp8"
        found = [(names.get(dtype, dtype), number) for dtype, number in self.dtypes.most_common()]
        return found[0][0] if len(found) == 1 else " and ".join(f"{number} in {name}" for name, number in found) or "none"

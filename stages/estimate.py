"""Estimate: the memory that a stage's step takes, found by making the step without numbers.

Weights and activations are torch's fake tensors, which have shapes and dtypes and no memory; every storage that the step makes is counted from its making to
its end, so what autograd keeps, what recomputation frees and what a product needs on the way are those of the step itself. No weights are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mixing.keys import key
from mixing.mixture import StageMixture
from stages.adapter import choose_trainable, place_adapters, without_input_casts
from stages.dropout import add_dropout
from stages.explain import byte_words
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.largest import Largest, largest_micro_batch, made_up
from stages.objective import LeftOut, Objective
from stages.objectives.parts import losses
from stages.offload import off_device_bytes
from stages.placed import placed_adapters
from stages.plan import Plan, Stage
from stages.precision import DTYPES
from stages.recomputation import recompute
from stages.resolved import resolved_batch
from stages.storage import keep_off, quantise, stored

Kind = Literal["cpu", "cuda"]
"""Of device: the CPU, or a GPU."""
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # of each parameter, beside its float32 weight and gradient
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device that a stage's steps take."""

    base: int
    """Weights that do not train."""
    off_device: int
    """Those of them that are kept on the CPU, which `base` leaves out; on the CPU itself none is."""
    trained: int
    """Weights that train, optimizer and moving average."""
    step: int
    """Gradients, activations and what products need on the way, at the step's peak."""
    encoders: int
    """VAE and text encoders, while any of what comes is not in the cache."""

    @property
    def peak(self) -> int:
        """Of a step, once the encoders have gone."""
        return self.base + self.trained + self.step


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what is made inside it and lives still. Those of a model, and what is made of real numbers alone, are computed as they are.

    Fake and real tensors mix: where a model asks for the numbers of a mask or of positions, they are there.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        """known: what was there before."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary({each.untyped_storage(): True for each in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        given = [each for each in tree_leaves((args, named)) if isinstance(each, Tensor)]
        # What is made of nothing, such as positions, is real: families remember some of it for the steps to come. Random masks as large as activations are not.
        is_real = not any(isinstance(each, FakeTensor) for each in given) and not (func.name().startswith("aten::rand") and not given)
        with _disable_current_modes() if is_real else nullcontext():
            out = func(*args, **named)
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


class _AsOnAGpu(TorchFunctionMode):
    """Computes in float32 what autocast computes in float32 on a GPU and not on a CPU (torch 2.13)."""

    _IN_FLOAT32 = frozenset({"layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "sum", "cumsum", "norm"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") in self._IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, named = tuple(_raised(each) for each in args), {name: _raised(each) for name, each in named.items()}
        return func(*args, **named)


def _as_on_a_gpu(model: nn.Module) -> None:
    """Let a model's parts compute like that, block by block: a mode around the whole step is left in the backward pass, and what is computed again there is not in it."""

    def inside(forward: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            with _AsOnAGpu():
                return forward(*given, **named)

        return called

    for part in model.children():
        for module in part.children() if isinstance(part, nn.ModuleList) else (part,):
            module.forward = inside(module.forward)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


class _Clones:
    """A way to the device that copies at once; the next layer's copy is there beside the one in use, as on a GPU."""

    sets_out_early = True

    def send(self, tensors: Sequence[Tensor]) -> _There:
        return _There([each.clone() for each in tensors])


class _There:
    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[Tensor]:
        return self._tensors


def estimate(family: Family, plan: Plan, index: int, largest: Largest, kind: Kind, *, processes: int = 1) -> Estimate:
    """The memory of a stage's largest micro-batch on a kind of device. family: of the plan's model; neither encoders nor weights are loaded for it.

    What a device's own kernels take beside their inputs and outputs, and what its allocator rounds up, is not in it; a test compares it with what processes take.
    Raises TargetError if a pattern of the plan matches nothing in the model.
    """
    stage, fake = plan.stages[index], FakeTensorMode(allow_non_fake_inputs=True)
    wanted = stored(stage)
    model = _laid_out(family, wanted.dtype, fake)
    placed = placed_adapters(plan, index)
    if stage.train != "full":
        place_adapters(model, placed, family.target_patterns, plan.seed)
    is_away = wanted.is_offloaded and kind == "cuda"
    with fake:
        _replace(model, lambda name, each: torch.empty(each.shape, dtype=each.dtype, device=_CPU))
        if wanted.is_offloaded:
            keep_off(model, wanted.blocks, _CPU, _Clones() if is_away else None)
        elif wanted.blocks is not None:
            quantise(model, wanted.blocks, _CPU)
    if stage.train != "full" and stage.precision != "fp32":
        without_input_casts(model)
    trainable = choose_trainable(model, stage.train, f"stages[{index}].train", frozen=[name for name, each in placed.items() if each.frozen], unread=family.unread)
    model.train()
    drawing = add_dropout(model, placed, trainable.values())
    recompute(model, stage.checkpointing, torch.device(kind))
    if kind == "cuda":
        _as_on_a_gpu(model)

    dtype, stage_key = DTYPES[stage.precision], key(plan.seed, "estimate", stage.name)
    text = _text(family, largest, torch.float32 if kind == "cpu" else torch.bfloat16, fake)
    batch, shown = made_up(family, largest, stage_key, latent_channels(family), text)
    none = (False,) * largest.images
    counted = Counted([*model.parameters(), *model.buffers()])
    with fake, counted:
        for _ in range(1 if _is_one_micro_batch(stage) else 2):  # the second one finds the gradients of the first
            for part in Objective(family, stage, stage_key, dtype, largest.images).parts(batch, shown, LeftOut(none, none), 0):
                with drawing.of([key(stage_key, row) for row in part.rows.tolist()]):
                    with torch.autocast("cpu", dtype=dtype) if stage.precision != "fp32" else nullcontext():
                        predicted = shown.predict_part(family, model, part)
                    losses(predicted, part).sum().backward()  # type: ignore[no-untyped-call]

    numbers, training = sum(parameter.numel() for parameter in trainable.values()), {id(parameter) for parameter in trainable.values()}
    frozen = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in training) + sum(buffer.nbytes for buffer in model.buffers())
    away = off_device_bytes(model) if is_away else 0
    trained = numbers * (4 + STATE_BYTES[stage.optimizer.name] + (4 if stage.ema is not None else 0))
    return Estimate(frozen - away, away, trained, counted.peak + (4 * numbers if processes > 1 else 0), encoder_bytes(family, kind))


def memory_words(family: Family, plan: Plan, index: int, mixture: StageMixture) -> str:
    """What a stage's steps take, in words: on the GPU that there is; where there is none, on the CPU and on a GPU. For one process. family: on the CPU.

    Raises ValueError if a pattern of the plan matches nothing in the model.
    """
    kinds: dict[Kind, str] = {"cuda": "on a GPU"} if torch.cuda.is_available() else {"cpu": "on this CPU", "cuda": "on a GPU"}
    largest = largest_micro_batch(mixture, 1)
    return "; ".join(f"{where} {estimate_words(estimate(family, plan, index, largest, kind))}" for kind, where in kinds.items())


def run_estimate(plan: Plan, index: int, mixture: StageMixture, device: torch.device, processes: int) -> Estimate:
    """The estimate for a stage of a run on its device. mixture: the stage's."""
    family = open_family(plan.model, _CPU)  # one whose made-up images are on the CPU, as the fake weights are
    return estimate(family, plan, index, largest_micro_batch(mixture, processes), "cuda" if device.type == "cuda" else "cpu", processes=processes)


def estimate_words(found: Estimate) -> str:
    """An estimate in words: its peak, and of what it is the sum."""
    parts = {"the frozen weights": found.base, "what trains, with its optimizer": found.trained, "gradients and activations": found.step}
    said = f"{byte_words(found.peak)} at a step's peak ({', '.join(f'{byte_words(size)} {name}' for name, size in parts.items() if size)})"
    if found.off_device:
        said += f", {byte_words(found.off_device)} of weights beside it on the CPU"
    return said + f", and {byte_words(found.encoders)} more while images and prompts are encoded"


def _laid_out(family: Family, storage: torch.dtype, fake: FakeTensorMode) -> nn.Module:
    """The transformer in a storage, its weights on the meta device, where peft leaves what it puts beside them."""
    of_class = family.architecture.transformer_class
    with fake:
        model: nn.Module = of_class.from_config(family.model.transformer)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    _replace(model, lambda name, each: torch.empty(each.shape, dtype=torch.float32 if kept & set(name.split(".")) else storage, device="meta"))
    with fake:
        for module in model.modules():
            for own, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and own not in module._non_persistent_buffers_set:
                    module._buffers[own] = torch.empty(buffer.shape, dtype=storage)  # what is saved is stored as weights are
    return model.requires_grad_(False)


def _replace(model: nn.Module, make: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Put others in the place of a model's parameters, by their full names; they are frozen."""
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[own] = nn.Parameter(make(f"{name}.{own}" if name else own, parameter), requires_grad=False)


def _text(family: Family, largest: Largest, dtype: torch.dtype, fake: FakeTensorMode) -> Text:
    """The longest prompts that the transformer takes, as fake tensors; masks and whole numbers are real, for it reads them."""
    config, facts, images = family.model.transformer, family.facts, largest.images
    length = max(1, family.text_tokens) + facts.further_tokens
    mask = torch.ones(images, length, dtype=torch.bool)
    if not facts.text_width:
        words = torch.tensor([[*range(1, length), *(-1 - number for number in range(len(largest.signature.references)))]] * images)
        return Text(words, mask=torch.ones_like(words, dtype=torch.bool))
    width, pooled = int(config[facts.text_width]), config.get("pooled_projection_dim")
    with fake:
        return Text(torch.empty(images, length, width, dtype=dtype), torch.empty(images, int(pooled), dtype=dtype) if pooled else None, mask if facts.tells_mask else None)


def _is_one_micro_batch(stage: Stage) -> bool:
    batch = resolved_batch(stage)
    return isinstance(batch.images, int) and batch.micro == batch.images


def latent_channels(family: Family) -> int:
    """How many numbers a latent has, from the VAE's config."""
    if not family.encodes_images:
        return 3
    side = 2 * family.pixel_multiple
    with FakeTensorMode(), torch.no_grad():
        vae = family.architecture.vae_class.from_config(family.model.vae)
        return int(family.architecture.encode_image(vae, torch.zeros(1, 3, side, side)).shape[1])


def encoder_bytes(family: Family, kind: Kind) -> int:
    """Bytes of the VAE and of the text encoders, as they are loaded on a kind of device, from their configs."""
    total = 0
    with torch.device("meta"):
        if family.encodes_images:
            vae = family.architecture.vae_class.from_config(family.model.vae)
            total += 4 * sum(parameter.numel() for parameter in vae.parameters())
        for part in family.architecture.prompt_parts:
            library, name = family.model.index.get(part) or (None, None)
            of_class = getattr(transformers, str(name), None) if library == "transformers" else None
            if isinstance(of_class, type) and issubclass(of_class, transformers.PreTrainedModel):
                config = transformers.AutoConfig.from_pretrained(family.repo, subfolder=part, revision=family.revision)
                total += (4 if kind == "cpu" else 2) * sum(parameter.numel() for parameter in of_class(config).parameters())
    return total

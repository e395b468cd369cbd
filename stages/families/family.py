"""A model of some family, without its transformer: loads its parts when they are needed, and knows which weights they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path as File
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixing.content import content_hash
from mixing.tasks import without_placeholders
from stages.digests import file_digest, folders_digest
from stages.families.base import Architecture, Configs, Inputs, RegionTexts, Text, TextCache, targets_in, unread_in
from stages.families.facts import FAMILIES, Config, FamilyFacts, UnsuitableModel
from stages.objectives.path import Path
from stages.problems import RunError
from stages.sent import sent

if TYPE_CHECKING:
    from stages.cache import Cache

_EXPERT_PARTS = ("transformer", "transformer_2")
_NONE: Mapping[str, nn.Module] = MappingProxyType({})

_MOST_OF_EXPERTS = 5.0


class Family:
    """A model in the diffusers layout, its transformer apart, and what is done with the transformer.

    Latents are [B, C, h, w], images [B, 3, H, W] in [-1, 1]. A model whose VAE is null trains on pixels.
    """

    def __init__(
        self,
        architecture: Architecture,
        repo: str,
        revision: str | None,
        guidance: float | None,
        device: torch.device,
        digest: Callable[[File], str] = file_digest,
    ) -> None:
        """Read the model's configs; the VAE and the text encoders are loaded at their first use.

        repo, revision: a Hub id or folder. guidance: what a guidance-distilled transformer is told; 1.0 if None. digest: SHA-256 of a file, such as
        one that remembers (`stages.digests.FileDigests`); it is asked for the encoders' files once an identity is.
        """
        index, commit = DiffusionPipeline.load_config(repo, revision=revision, return_commit_hash=True)
        self._is_folder = File(repo).is_dir()
        # The encoders may be loaded hours later: by the commit that the name stands for now.
        self.architecture, self.repo, self.revision, self.device = architecture, repo, revision if self._is_folder else commit or revision, device
        self.name = architecture.name
        self.pipeline_class = str(index["_class_name"])
        """The diffusers pipeline that loads the published adapter."""
        self.encodes_images = bool((index.get("vae") or [None])[0])
        """Whether `encode_images` changes anything: False for a model that trains on pixels, whose latents are not worth keeping."""
        self._digest = digest
        self._encoder_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._vae: Any = None
        self._prompter: Any = None
        self.encoder_uses = 0
        """How often the VAE or what encodes prompts was asked for."""
        transformer = dict(self._read("transformer/config.json", ""))
        scheduler = getattr(diffusers, str(index["scheduler"][1]), None)
        if scheduler is None:
            raise UnsuitableModel(f"has a scheduler that diffusers does not know ({index['scheduler'][1]})")
        sizes = self.facts.sizes(self._read)
        self.model = Configs(
            index=index,
            transformer=transformer,
            vae=dict(self._read("vae/config.json", "")) if self.encodes_images else {},
            scheduler=scheduler.from_pretrained(repo, subfolder="scheduler", revision=self.revision),
            sizes=sizes,
            guidance=(guidance if guidance is not None else 1.0) if sizes.takes_guidance else None,
        )
        self.path: Path = architecture.path(self.model)
        self.texts = TextCache(device=device)
        """The encoded prompts at hand; its `stored` is where more are kept."""
        self.cache: Cache | None = None
        """Where latents are kept; None keeps none."""

    @property
    def facts(self) -> FamilyFacts:
        """What is known of the family."""
        return FAMILIES[self.name]

    @property
    def prompts_see_references(self) -> bool:
        """Whether the text encoder looks at the references too."""
        return self.pipeline_class in self.facts.prompts_see_references

    @property
    def target_patterns(self) -> Mapping[str, tuple[str, ...]]:
        """What the words of `adapter.targets` stand for."""
        return targets_in(self.architecture, self.model.transformer)

    @property
    def unread(self) -> tuple[str, ...]:
        """Patterns of the weights whose output nothing reads."""
        return unread_in(self.architecture, self.model.transformer)

    @property
    def factor(self) -> int:
        """A latent is as wide as so many pixels."""
        return self.model.sizes.factor

    @property
    def pixel_multiple(self) -> int:
        """Sides of images in pixels are multiples of this."""
        return self.model.sizes.pixel_multiple

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt."""
        return self.model.sizes.text_tokens

    # --- parts ---------------------------------------------------------------------------------------------------------------------------

    @property
    def vae(self) -> Any:
        """The VAE in float32, loaded if it is not; None in pixel space."""
        self.encoder_uses += self.encodes_images
        if self.encodes_images and self._vae is None:
            with self._loading("VAE"):
                vae = self.architecture.vae_class.from_pretrained(self.repo, subfolder="vae", revision=self.revision, dtype=torch.float32, use_safetensors=True)
            self._vae = vae.requires_grad_(False).to(self.device)
        return self._vae

    @property
    def prompter(self) -> Any:
        """The stock pipeline with what encodes prompts, loaded if it is not, and without VAE and transformer."""
        self.encoder_uses += 1
        if self._prompter is None:
            self._prompter = self._pipeline(self._encoder_dtype, keep=(*self.architecture.prompt_parts, "scheduler"))
            for part in self._prompter.components.values():
                if isinstance(part, nn.Module):
                    part.requires_grad_(False).to(self.device)
        return self._prompter

    def _pipeline(self, dtype: torch.dtype, keep: Sequence[str], **parts: Any) -> Any:
        """The stock pipeline with some of its parts from disk, some given, and without the others."""
        names = [name for name, entry in self.model.index.items() if isinstance(entry, list) and len(entry) == 2]
        given = {name: parts.get(name) for name in names if name not in keep}
        with self._loading("pipeline"):
            return getattr(diffusers, self.pipeline_class).from_pretrained(self.repo, revision=self.revision, dtype=dtype, use_safetensors=True, **given)

    @contextmanager
    def _loading(self, part: str) -> Iterator[None]:
        """Inside, what cannot be loaded is a RunError."""
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"{self.repo}: its {part} cannot be loaded; weights are read from safetensors alone, and no code of a model is executed: {' '.join(str(error).split())[:300]}") from error

    @property
    def held_encoders(self) -> tuple[str, ...]:
        """What of them is in memory: `vae`, `text encoders`."""
        return tuple(name for name, part in (("vae", self._vae), ("text encoders", self._prompter)) if part is not None)

    def release_encoders(self) -> None:
        """Drop the VAE and the text encoders from memory; they come back at their next use."""
        self._vae = self._prompter = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def latents_identity(self) -> str:
        """What `encode_images` gives depends on the image and on this: the VAE's weights, the dtype, the kind of device, and Medley's own way of encoding."""
        if not self.encodes_images:
            return f"{self.name} pixels {self.architecture.version}"
        return f"{self.name} latents {self.architecture.version}: {self._weights('vae')} float32 {self.device.type}"

    @cached_property
    def text_identity(self) -> str:
        """What `encode_prompts` gives depends on the prompt and on this."""
        weights = self._weights(*self.architecture.prompt_parts)
        return f"{self.name} text {self.architecture.version}: {weights} {self.text_tokens} tokens {str(self._encoder_dtype).removeprefix('torch.')} {self.device.type}"

    def _weights(self, *folders: str) -> str:
        """The model's commit on the Hub; of a folder, SHA-256 over these sub-folders. Raises RunError if the commit is not known."""
        if self._is_folder:
            return f"sha256 {folders_digest(File(self.repo), folders, self._digest)}"
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise RunError(f"{self.repo}: '{self.revision or 'main'}' cannot be resolved to a commit, so it is not known what its cache holds; give the commit as model.revision")
        return f"{self.repo}@{self.revision}"

    def _read(self, name: str, otherwise: str) -> Config:
        """A JSON file of the model."""
        file = File(self.repo, name) if self._is_folder else File(hf_hub_download(self.repo, name, revision=self.revision))
        if not file.is_file():
            raise UnsuitableModel(f"{self.repo} has no {name}, {otherwise}")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    @property
    def experts(self) -> tuple[str, ...]:
        """The transformers of this model that share the noise levels among them; empty where it has one for all."""
        return self.facts.experts if (self.model.index.get(_EXPERT_PARTS[1]) or [None])[0] else ()

    def expert_part(self, expert: str | None) -> str:
        """The pipeline's part, which is its sub-folder, that an expert is; None is the only one, or the first. Raises RunError if the model has no such expert."""
        if expert is None:
            return _EXPERT_PARTS[0]
        if expert not in self.experts:
            found = f"its experts are {', '.join(self.experts)}" if self.experts else "it has one transformer for all noise levels; leave the expert out"
            raise RunError(f"{self.repo} has no expert '{expert}': {found}")
        return _EXPERT_PARTS[self.experts.index(expert)]

    def load_transformer(self, storage: torch.dtype, weights: File | None, expert: str | None = None, *, device: torch.device | None = None) -> nn.Module:
        """A frozen transformer in evaluation mode, stored in `storage`, from the model's folder or with the weights of a safetensors file.

        expert: which of several; None is the only one, or the first. device: where it is put; None is the family's own. What its class keeps in float32
        stays so.
        """
        of_class, part = self.architecture.transformer_class, self.expert_part(expert)
        if weights is None:
            with self._loading(part):
                model = of_class.from_pretrained(self.repo, subfolder=part, revision=self.revision, dtype=storage, use_safetensors=True)
        else:
            model = of_class.from_config(of_class.load_config(self.repo, subfolder=part, revision=self.revision))
            model.load_state_dict(load_file(weights))
            _store(model, storage)
        module: nn.Module = model.requires_grad_(False).eval().to(device or self.device)
        return module

    def stock_pipeline(self, transformer: nn.Module, *, encoders: bool = True, expert: str | None = None, others: Mapping[str, nn.Module] = _NONE) -> Any:
        """The diffusers pipeline itself, `pipeline_class`, around a transformer. encoders: whether with VAE and text encoders, which are loaded for it.

        expert: which of several the transformer is; None is the only one, or the first. others: further ones by name. An expert that is neither is left out;
        WanPipeline loads an adapter, and samples, only where it has both (diffusers 0.42.1).
        """
        parts = {**self.prompter.components, "vae": self.vae} if encoders else {}
        transformers = {self.expert_part(name): other for name, other in others.items()} | {self.expert_part(expert): transformer}
        return self._pipeline(self._encoder_dtype, ("scheduler",), **{**parts, **transformers})

    def save_model(self, folder: File, transformer: nn.Module, expert: str | None = None) -> None:
        """Write the whole pipeline with this transformer in the place of its own, as a diffusers folder; other experts as the model has them, in the same dtype.

        expert: which of several the transformer is; None is the only one, or the first.
        """
        mine, storage = self.expert_part(expert), next(transformer.parameters()).dtype
        others = {name: self.load_transformer(storage, None, name) for name in self.experts if self.expert_part(name) != mine}
        self.stock_pipeline(transformer, expert=expert, others=others).save_pretrained(folder)

    # --- images and prompts --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised latents of images, float32; the images themselves in pixel space.

        One image at a time: the bits of its latents do not depend on the others, so a run with half a cache is the run without one.
        """
        images = sent(images, self.device).to(torch.float32)
        if (vae := self.vae) is None:
            return images
        return torch.cat([self.architecture.encode_image(vae, image[None]).float() for image in images])

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images of normalised latents, float32, clipped to [-1, 1]."""
        if (vae := self.vae) is None:
            return latents.float().clamp(-1, 1)
        return self.architecture.decode_latents(vae, latents.float()).float().clamp(-1, 1)

    def said(self, prompt: str) -> str:
        """A prompt as the family is told it: its own word for none, and `image 1` for `<|image_1|>` unless that means something to it."""
        return (prompt if self.facts.names_images else without_placeholders(prompt)) or self.architecture.empty_prompt

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] = ()) -> Text:
        """Encoded prompts, one at a time: each one's own, bit for bit, whatever else is in the batch.

        references: images, each [B, 3, H, W]; looked at where `prompts_see_references`.
        """
        said = [self.said(prompt) for prompt in prompts]
        seen = references if self.prompts_see_references else ()
        names = [_name(prompt, [reference[place] for reference in seen]) for place, prompt in enumerate(said)] if seen else said

        def encode(place: int) -> Text:
            images = [sent(reference[place : place + 1], self.device).to(torch.float32) for reference in seen]
            return self.architecture.encode_prompt(self.prompter, said[place], images, self.model, self.device)

        return self.texts.encode(names, encode)

    # --- the transformer -----------------------------------------------------------------------------------------------------------------

    def predict(
        self,
        transformer: nn.Module,
        noised: Tensor,
        t: Tensor,
        text: Text,
        references: Sequence[Tensor] = (),
        *,
        regions: RegionTexts | None = None,
        scale: float = 1.0,
        guidance: float | None = None,
    ) -> Tensor:
        """What the transformer predicts, as `path` says, float32, shape as `noised`; the arguments are those of `stages.families.base.Inputs`.

        guidance: what a guidance-distilled transformer is told in the place of the plan's.
        """
        model = self.model if guidance is None else replace(self.model, guidance=guidance)
        return self.architecture.predict(transformer, Inputs(noised, t, text, references, regions, scale), model).float().contiguous()

    @property
    def usual_guidance(self) -> float:
        """The guidance that the family is usually sampled with; 1 is none."""
        return self.facts.guidance if self.model.sizes.takes_guidance or not self.facts.guidance_is_told else 1.0

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """The t that the transformer's embedding really sees when it computes in this dtype: noise with this one."""
        return self.architecture.seen_timestep(t, compute)

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of so many pixels."""
        return (height // self.pixel_multiple) * (width // self.pixel_multiple)

    def latent_tokens(self, latents: Tensor) -> int:
        """Tokens of each of these latents."""
        return (latents.shape[-2] // self.model.sizes.patch) * (latents.shape[-1] // self.model.sizes.patch)

    def shift(self, tokens: int) -> float:
        """The shift s that training draws noise levels with at this number of target tokens: t becomes s t / (1 + (s - 1) t).

        The sampler's, or what is known to be better (`FamilyFacts.training_shift`); of a model with two experts at most 5, for its sampler's 12 leaves
        one of them hardly a level.
        """
        asked = self.facts.training_shift
        if asked == "by_tokens":
            return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
        own = self.architecture.shift(self.model, tokens)
        return asked if asked is not None else min(own, _MOST_OF_EXPERTS) if self.experts else own

    def expert_range(self, expert: str | None) -> tuple[float, float]:
        """The noise levels, [low, high], that one of several transformers is for; None is the only one, or the first."""
        self.expert_part(expert)
        return self.architecture.t_range(self.model, expert)

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """Noise levels that the model's own sampler visits, from the noisiest to 0, float32 [steps + 1]."""
        return self.architecture.sigmas(self.model, steps, tokens).to(self.device, torch.float32)


def _store(model: nn.Module, storage: torch.dtype) -> None:
    """Store a model's weights in a dtype, as from_pretrained does: what its class keeps in float32 stays so, and so do buffers that are not saved, such as angles of
    positions; `.to(storage)` would round both (diffusers 0.42.1)."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and not kept & set(name.split(".")):
            value.data = value.data.to(storage)


def _name(prompt: str, references: Sequence[Tensor]) -> str:
    """What an encoded prompt is known by: the prompt, and the pixels of the images that were looked at for it."""
    if not references:
        return prompt
    seen = [content_hash(((image.cpu().float() + 1) * 127.5).round().to(torch.uint8).contiguous().numpy().tobytes()).hex() for image in references]
    return json.dumps([prompt, [[*image.shape, seen_as] for image, seen_as in zip(references, seen, strict=True)]])

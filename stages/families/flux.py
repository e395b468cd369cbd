"""Flux (dev, schnell, Kontext): rectified flow over packed 2 x 2 latent patches; references are further tokens, as in Flux Kontext.

Works with any folder that diffusers' FluxPipeline reads. A folder whose VAE is null trains on pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.cache import Cache
from stages.digests import file_digest, folders_digest
from stages.families.base import Text, TextCache
from stages.problems import RunError

# Full module names, matched whole. Attention of both streams, feed-forward of both, and the modulation that DiffSynth's EliGen recipe trains too.
_ATTENTION = (
    r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
)
_FEED_FORWARD = (
    r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",
)
_MODULATION = (r"(single_)?transformer_blocks\.\d+\.(norm|norm1|norm1_context)\.linear",)


class Flux:
    """A Flux model without its transformer. Implements `stages.families.base.Family`."""

    name = "flux"
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION + _FEED_FORWARD,
        "linear": _ATTENTION + _FEED_FORWARD + _MODULATION,
    }

    def __init__(
        self,
        repo: str,
        revision: str | None,
        guidance: float | None,
        device: torch.device,
        digest: Callable[[Path], str] = file_digest,
    ) -> None:
        """Read the model's configs; the VAE and the text encoders are loaded at their first use.

        repo, revision: a Hub id or folder. guidance: what a guidance-distilled transformer is told; 1.0 if None. digest: SHA-256 of a file, such as
        one that remembers (`stages.digests.FileDigests`); it is asked for the encoders' files once an identity is.
        """
        config, commit = FluxPipeline.load_config(repo, revision=revision, return_commit_hash=True)
        self._is_folder = Path(repo).is_dir()
        # The encoders may be loaded hours later: by the commit that the name stands for now.
        self.repo, self.revision, self.device = repo, revision if self._is_folder else commit or revision, device
        self.pipeline_class = str(config["_class_name"])
        self.encodes_images = bool((config.get("vae") or [None])[0])
        self._digest = digest
        self._encoder_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._vae: AutoencoderKL | None = None
        self._prompter: FluxPipeline | None = None
        blocks = AutoencoderKL.load_config(repo, subfolder="vae", revision=self.revision).get("block_out_channels") if self.encodes_images else None
        # AutoencoderKL has one block unless its config says otherwise.
        self.factor = 2 ** (len(blocks) - 1) if blocks else 1
        self.pixel_multiple = 2 * self.factor
        # FluxPipeline asks for 512 T5 tokens unless told otherwise; a tokenizer that allows fewer says so itself.
        self.text_tokens = min(512, int(self._read("tokenizer_2", "tokenizer_config.json").get("model_max_length", 512)))
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(repo, subfolder="scheduler", revision=self.revision)
        transformer = FluxTransformer2DModel.load_config(repo, subfolder="transformer", revision=self.revision)
        self.guidance = (guidance if guidance is not None else 1.0) if transformer.get("guidance_embeds") else None
        self.texts = TextCache(device=device)
        self.cache: Cache | None = None

    @property
    def vae(self) -> AutoencoderKL | None:
        """The VAE in float32, loaded if it is not; None in pixel space."""
        if self.encodes_images and self._vae is None:
            vae = AutoencoderKL.from_pretrained(self.repo, subfolder="vae", revision=self.revision, dtype=torch.float32)
            self._vae = vae.requires_grad_(False).to(self.device)
        return self._vae

    @property
    def prompter(self) -> FluxPipeline:
        """FluxPipeline with its text encoders, loaded if they are not, and without VAE and transformer."""
        if self._prompter is None:
            self._prompter = FluxPipeline.from_pretrained(self.repo, revision=self.revision, transformer=None, vae=None, dtype=self._encoder_dtype)
            for encoder in (self._prompter.text_encoder, self._prompter.text_encoder_2):
                encoder.requires_grad_(False).to(self.device)
        return self._prompter

    @property
    def pipeline(self) -> FluxPipeline:
        """FluxPipeline with everything but its transformer."""
        return FluxPipeline(**{**self.prompter.components, "vae": self.vae})

    def release_encoders(self) -> None:
        """Drop the VAE and the text encoders from memory; they come back at their next use."""
        self._vae = self._prompter = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def latents_identity(self) -> str:
        """Which weights encode images, in which dtype, on which kind of device, in which version of `encode_images`."""
        if not self.encodes_images:
            return "flux pixels 1"
        return f"flux latents 1: {self._weights('vae')} float32 {self.device.type}"

    @cached_property
    def text_identity(self) -> str:
        """Which weights and tokenizers encode prompts, to how many tokens, in which dtype, on which kind of device, in which version of `encode_prompts`."""
        weights = self._weights("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return f"flux text 1: {weights} {self.text_tokens} tokens {str(self._encoder_dtype).removeprefix('torch.')} {self.device.type}"

    def _weights(self, *folders: str) -> str:
        """The model's commit on the Hub; of a folder, SHA-256 over these sub-folders. Raises RunError if the commit is not known."""
        if self._is_folder:
            return f"sha256 {folders_digest(Path(self.repo), folders, self._digest)}"
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise RunError(f"{self.repo}: '{self.revision or 'main'}' cannot be resolved to a commit, so it is not known what its cache holds; give the commit as model.revision")
        return f"{self.repo}@{self.revision}"

    def _read(self, folder: str, name: str) -> dict[str, Any]:
        path = Path(self.repo, folder, name) if self._is_folder else hf_hub_download(self.repo, f"{folder}/{name}", revision=self.revision)
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return content

    def load_transformer(self, storage: torch.dtype, weights: Path | None) -> nn.Module:
        """A frozen transformer in evaluation mode, stored in `storage`, from the model's folder or with the weights of a safetensors file."""
        if weights is None:
            model = FluxTransformer2DModel.from_pretrained(self.repo, subfolder="transformer", revision=self.revision, dtype=storage)
        else:
            config = FluxTransformer2DModel.load_config(self.repo, subfolder="transformer", revision=self.revision)
            model = FluxTransformer2DModel.from_config(config)
            model.load_state_dict(load_file(weights))
            model = model if storage == torch.float32 else model.to(storage)
        module: nn.Module = model.requires_grad_(False).eval().to(self.device)
        return module

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """The mode of the VAE's distribution, shifted and scaled, [B, C, H / f, W / f]; the images themselves in pixel space.

        One image at a time: the bits of its latents do not depend on the others, so a run with half a cache is the run without one.
        """
        images = images.to(self.device, torch.float32)
        if (vae := self.vae) is None:
            return images
        mode = torch.cat([vae.encode(image[None]).latent_dist.mode() for image in images])
        latents: Tensor = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse, clipped to [-1, 1]."""
        if (vae := self.vae) is None:
            return latents.float().clamp(-1, 1)
        decoded: Tensor = vae.decode(latents.float() / vae.config.scaling_factor + vae.config.shift_factor).sample
        return decoded.float().clamp(-1, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """T5's tokens [B, L, D] and CLIP's pooled vector [B, P], one prompt at a time."""
        return self.texts.encode(prompts, self._encode)

    def _encode(self, prompts: Sequence[str]) -> Text:
        embeds, pooled, _ = self.prompter.encode_prompt(list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.text_tokens)
        return Text(embeds, pooled)

    def predict(self, transformer: nn.Module, noised: Tensor, t: Tensor, text: Text, references: Sequence[Tensor]) -> Tensor:
        """The predicted velocity, float32 [B, C, h, w]. Reference k's tokens follow the target's and carry k as first position id."""
        batch, channels, height, width = noised.shape
        images = [noised, *references]
        hidden = torch.cat([_pack(image) for image in images], dim=1)
        positions = torch.cat([_positions(number, image.shape[2] // 2, image.shape[3] // 2, noised.device) for number, image in enumerate(images)])
        out = transformer(
            hidden_states=hidden,
            timestep=t,
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance),
            pooled_projections=text.pooled.float(),
            encoder_hidden_states=text.embeds.float(),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=noised.device),
            img_ids=positions,
            return_dict=False,
        )[0]
        own = out[:, : (height // 2) * (width // 2)].float()
        unpacked: Tensor = own.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
        return unpacked

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """FluxTransformer2DModel computes t x 1000 in its activations' dtype (diffusers 0.42.1): in bf16 a thousand timesteps become 500."""
        return t if compute == torch.float32 else (t.to(compute) * 1000).float() / 1000

    def tokens(self, height: int, width: int) -> int:
        """A token is 2 x 2 latents."""
        return (height // self.pixel_multiple) * (width // self.pixel_multiple)

    def latent_tokens(self, latents: Tensor) -> int:
        """As `tokens`, of latents [B, C, h, w]."""
        return latents.shape[2] * latents.shape[3] // 4

    def shift(self, tokens: int) -> float:
        """exp(mu) where the scheduler shifts by the number of tokens (dev, Kontext), else its fixed shift (schnell: 1)."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return float(torch.exp(torch.tensor(self._mu(tokens), dtype=torch.float64)))

    def _mu(self, tokens: int) -> float:
        config = self.scheduler.config
        return float(calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift))

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """As FluxPipeline: evenly from 1 to 1 / steps, then shifted by its scheduler."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu=self._mu(tokens))
        sigmas: Tensor = scheduler.sigmas
        return sigmas.to(self.device, torch.float32)

    def stock_pipeline(self, transformer: nn.Module, *, encoders: bool = True) -> Any:
        """FluxPipeline or FluxKontextPipeline, as model_index.json says, around a transformer. encoders: whether with VAE and text encoders."""
        of_class = getattr(diffusers, self.pipeline_class)
        if encoders:
            return of_class(**{**self.pipeline.components, "transformer": transformer})
        none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return of_class(scheduler=self.scheduler, transformer=transformer, **none)

    def save_model(self, folder: Path, transformer: nn.Module) -> None:
        """The whole pipeline with this transformer in the place of its own, as a diffusers folder."""
        pipeline = self.pipeline
        pipeline.register_modules(transformer=transformer)
        pipeline.save_pretrained(folder)


def _pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h/2 x w/2, 4 C]: each token is a 2 x 2 patch."""
    batch, channels, height, width = latents.shape
    return latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def _positions(number: int, height: int, width: int, device: torch.device) -> Tensor:
    """Position ids float32 [height x width, 3]: which image, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns], dim=-1).reshape(-1, 3).to(device, torch.float32)

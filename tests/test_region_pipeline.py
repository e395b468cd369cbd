"""Sampling with regions by the stock pipeline: one step with what `region_inputs` gives is the step that training knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from families import CPU, noise, pipelines_first_step
from stages.families.base import RegionTexts
from stages.families.open import open_family
from stages.families.patches import pack
from stages.families.tiny import flux, qwen_image, sd3
from stages.region_pipeline import region_inputs


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_one_step_with_regions_equals_the_pipelines_own_step(name: str, tmp_path: Path) -> None:
    folder = flux.build(tmp_path / "m", guidance=True) if name == "flux" else qwen_image.build(tmp_path / "m")
    family = open_family(str(folder), CPU)
    model = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(model)
    side = 8 * family.pixel_multiple
    height, width = side, side + 4 * family.pixel_multiple
    left, right = np.zeros((height, width), dtype=np.uint8), np.zeros((height, width), dtype=np.uint8)
    left[: height // 2, : width // 2] = 255
    right[height // 4 :, width // 2 :] = 255
    regions = [("a red disc", Image.fromarray(left)), ("make it a blue square", Image.fromarray(right))]
    inputs = region_inputs(pipe, "a green disc", regions, height=height, width=width, max_sequence_length=family.text_tokens)
    channels = family.encode_images(torch.zeros(1, 3, height, width)).shape[1]
    x = noise(1, channels, height // family.factor, width // family.factor)
    packed = pack(x)
    told = {"guidance_scale": 2.5} if name == "flux" else {}
    after = pipelines_first_step(pipe, lambda note: pipe(**inputs, **told, latents=packed, num_inference_steps=4, output_type="latent", callback_on_step_end=note))
    masks = torch.from_numpy(np.stack([left, right]) > 127)[None]
    shown = RegionTexts(tuple(family.encode_prompts([prompt]) for prompt, _ in regions), masks)
    sigmas = family.sigmas(4, family.latent_tokens(x))
    with torch.no_grad():
        v = family.predict(model, x, sigmas[:1], family.encode_prompts(["a green disc"]), (), regions=shown, guidance=2.5 if name == "flux" else None)
        plain = family.predict(model, x, sigmas[:1], family.encode_prompts(["a green disc"]), (), guidance=2.5 if name == "flux" else None)
    ours = pack(x + (sigmas[1] - sigmas[0]) * v)
    assert float((ours - after).abs().max()) <= 1e-5
    assert float((v - plain).abs().max()) > 1e-2, "the regions count"


def test_a_pipeline_without_regions_is_refused(tmp_path: Path) -> None:
    family = open_family(str(sd3.build(tmp_path / "m")), CPU)
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline takes no regions; FluxPipeline and QwenImagePipeline do"):
        region_inputs(pipe, "a", [("b", Image.new("L", (8, 8)))], height=16, width=16)

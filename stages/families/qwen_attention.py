"""Attention of Qwen-Image's blocks under a mask of one's own, which regions need: diffusers' processor refuses any (0.42.1, transformer_qwenimage.py, line 500).

test_diffusers_own_processor_still_refuses_a_mask fails once it no longer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class MaskedAttention:
    """A processor of diffusers' Attention: diffusers' own as long as there is no mask."""

    def __init__(self, own: Any) -> None:
        """own: what it stands in the place of."""
        self.own = own

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        prompt_lengths: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """What attention gives to the image's tokens and to the text's.

        attention_mask: bool [B, 1, L, L], text first. prompt_lengths: tokens of each of the prompts that the text is made of, whose positions all begin anew.
        """
        if attention_mask is None:
            found: tuple[Tensor, Tensor] = self.own(attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, None, image_rotary_emb)
            return found
        assert image_rotary_emb is not None
        image_angles, text_angles = image_rotary_emb
        text_angles = torch.cat([text_angles[:length] for length in prompt_lengths])
        size = attn.inner_dim // attn.heads
        image, text = (
            [linear(states).unflatten(-1, (-1, size)) for linear in linears]
            for states, linears in ((hidden_states, (attn.to_q, attn.to_k, attn.to_v)), (encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)))
        )
        for parts, norms, angles in ((image, (attn.norm_q, attn.norm_k), image_angles), (text, (attn.norm_added_q, attn.norm_added_k), text_angles)):
            for place, norm in enumerate(norms):
                parts[place] = apply_rotary_emb_qwen(norm(parts[place]), angles, use_real=False)
        query, key, value = (torch.cat([of_text, of_image], dim=1).transpose(1, 2) for of_text, of_image in zip(text, image, strict=True))
        joint = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask).transpose(1, 2).flatten(2).to(query.dtype)
        words = encoder_hidden_states.shape[1]
        of_text, of_image = joint[:, :words], joint[:, words:]
        for layer in attn.to_out:
            of_image = layer(of_image)
        return of_image, attn.to_add_out(of_text)


def take_masks(transformer: nn.Module) -> None:
    """Let the blocks of a transformer, which may be wrapped, take a mask. It stays so, for checkpointed activations are computed again after the call."""
    for module in transformer.modules():
        if isinstance(own := getattr(module, "processor", None), QwenDoubleStreamAttnProcessor2_0):
            module.processor = MaskedAttention(own)  # type: ignore[assignment]

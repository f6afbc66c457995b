"""Tiny random models that always run padded, by their own forwards, and prompts with images for them."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from gspo_lightning.types import Prompt
from tests.vision.models import END, IMAGE, START, VOCABULARY

PADDED = ("smolvlm", "gemma3", "paligemma")

SIZE, PATCH, PLACES = 8, 2, 4
"""Pixels along a side of an image and of a patch, and placeholders of an image: 16 patches, four to a placeholder."""

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip


def padded_model(kind: str) -> Any:
    """Weights are large enough for context and images to matter; those of Gemma's norms are their distance from 1."""
    torch.manual_seed(0)
    model = _model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                embeds = kind != "smolvlm" and "embed_tokens" in name  # Gemma's are multiplied by the root of the width
                parameter.normal_(std=0.3 if embeds else parameter[0].numel() ** -0.5)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _model(kind: str) -> Any:
    if kind == "smolvlm":
        return SmolVLMForConditionalGeneration(
            SmolVLMConfig(vision_config=_TOWER, text_config=_TEXT, image_token_id=IMAGE, pad_token_id=2, scale_factor=2)
        )
    if kind == "gemma3":
        # Windows shorter than most prompts, in the first of the two layers.
        text = {**_TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                vision_config=_TOWER, text_config=text, mm_tokens_per_image=PLACES, image_token_index=IMAGE,
                boi_token_index=START, eoi_token_index=END,
            )
        )  # fmt: skip
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config={**_TOWER, "patch_size": 2 * PATCH, "projection_dim": 32},
            text_config={**_TEXT, "model_type": "gemma"}, image_token_index=IMAGE, projection_dim=32, hidden_size=32,
            pad_token_id=2,
        )
    )  # fmt: skip


def padded_prompt(kind: str, uid: str, random: Random) -> Prompt:
    """With no image, one or several, as the processor of the family makes them."""
    images, text = random.choice([0, 1, 1, 2, 3]), [random.choice([1, 3]) for _ in range(4)]
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    around = (START, END) if kind == "gemma3" else ()
    ids: list[int] = []
    for number in range(images):
        if kind != "paligemma":  # whose images come before any text
            ids += _text(text[number], generator)
        ids += [*around[:1], *[IMAGE] * PLACES, *around[1:]]
    if not images or kind == "paligemma" or random.random() < 0.8:  # else the prompt ends with an image
        ids += _text(text[-1], generator)
    tokens = torch.tensor(ids)
    return Prompt(uid, "", tokens, {}, _inputs(kind, tokens, images, generator) if images else {})


def _text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (count,), generator=generator).tolist()


def _inputs(kind: str, ids: Tensor, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    if kind == "smolvlm":
        mask = torch.ones(1, images, SIZE, SIZE, dtype=torch.long)
        mask[0, -1, :, SIZE // 2 :] = 0  # the last image is narrower, and filled up
        return {"pixel_values": pixels[None], "pixel_attention_mask": mask}
    types = (ids == IMAGE).long() if kind == "gemma3" else torch.zeros_like(ids)  # in PaliGemma all is prefix
    return {"pixel_values": pixels, "token_type_ids": types[None]}

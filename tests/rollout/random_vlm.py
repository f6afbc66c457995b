"""A random Qwen2.5-VL with SmolLM2's tokenizer, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor
from tests.vision.models import small_config


def save_random_vlm(folder: Path, smollm2: Path, scratch: Path) -> Path:
    """One whose attention vLLM has a kernel for."""
    model = Qwen2_5_VLForConditionalGeneration(small_config(SPECIAL_IDS, tower=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed_tokens" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    build_processor(smollm2, scratch).save_pretrained(folder)
    return folder

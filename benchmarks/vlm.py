"""A random model of the Qwen2.5-VL architecture with about 100 million parameters, for the vision scenario."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

SIDE = 448
"""Pixels: 32 x 32 patches, 256 visual tokens."""


def folder(smollm2: str) -> str:
    """The model's folder, made on first use. Its tokenizer is that of SmolLM2, its weights are random (seed 0)."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from gspo_lightning.policy.bundled import cache_dir
    from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor

    target = cache_dir() / "benchmark-vlm-v1"
    if target.exists():
        return str(target)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 49152, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 14,
            "num_attention_heads": 10, "num_key_value_heads": 5, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        },
        vision_config={
            "depth": 8, "hidden_size": 384, "intermediate_size": 1024, "num_heads": 6, "out_hidden_size": 640,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [3, 7],
        },
        image_token_id=SPECIAL_IDS["<|image_pad|>"], video_token_id=SPECIAL_IDS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_IDS["<|vision_start|>"], vision_end_token_id=SPECIAL_IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        processor = build_processor(Path(smollm2), made)
        processor.image_processor.size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
        model.save_pretrained(made)
        processor.save_pretrained(made)
        os.rename(made, target)
    return str(target)


def image(index: int) -> Any:
    """Coloured noise in blocks, of the size that needs no resizing."""
    from PIL import Image

    small = Image.frombytes("RGB", (16, 16), random.Random(index).randbytes(16 * 16 * 3))
    return small.resize((SIDE, SIDE))

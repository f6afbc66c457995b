"""Randomly initialised models of well-known sizes, made on the device: nothing is loaded, nothing is downloaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2Config

from gspo_lightning.policy.attention import attention_implementation, register
from gspo_lightning.policy.load import DTYPES, PolicyLoader
from gspo_lightning.policy.micro import character_tokenizer
from gspo_lightning.policy.processor import ImageTextProcessor
from gspo_lightning.policy.reading import load_config
from gspo_lightning.policy.tiny_vlm import CHAT_TEMPLATE
from gspo_lightning.policy.vision import packs_images

SPECIAL = (
    "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Ids 0 to 6; after them a token per character. The other ids of the large vocabularies have no text."""

IMAGE_SIDE = 448


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model and how it is trained in the table."""

    text: dict[str, Any]
    vision: dict[str, Any] | None = None
    lora: bool = False
    """A bfloat16 base with an adapter; else all weights of the language half, in float32, with bfloat16 products."""
    checkpointing: bool = False


def _qwen(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


_TOWER_3B = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip

MODELS = {
    "Qwen2.5-0.5B": Architecture(_qwen(896, 4864, 24, 14, 2, 151936, True)),
    "Qwen2.5-3B": Architecture(_qwen(2048, 11008, 36, 16, 2, 151936, True), checkpointing=True),
    "Qwen2.5-7B": Architecture(_qwen(3584, 18944, 28, 28, 4, 152064, False), lora=True, checkpointing=True),
    "Qwen2.5-VL-3B": Architecture(_qwen(2048, 11008, 36, 16, 2, 151936, True), _TOWER_3B, checkpointing=True),
    "tiny": Architecture(_qwen(64, 128, 2, 4, 2, 200, True)),
    "tiny-vl": Architecture(
        _qwen(64, 128, 2, 2, 1, 200, True),
        {**_TOWER_3B, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
         "fullatt_block_indexes": [1]},
    ),
}  # fmt: skip
"""The two tiny ones try the program out on a CPU."""


def write_folder(name: str) -> str:
    """A folder with the config, the tokenizer and, for models that see, the processor of ``name``; no weights."""
    architecture = MODELS[name]
    folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
    (folder / "model.safetensors").touch()  # a folder without weights is refused when it is named
    tokenizer = character_tokenizer(
        SPECIAL, CHAT_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_tokens(list(SPECIAL[3:]), special_tokens=True)
    if architecture.vision is None:
        Qwen2Config(**architecture.text).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = architecture.text["hidden_size"] // architecture.text["num_attention_heads"]
    sections = [size // 2 - 2 * (3 * size // 16), 3 * size // 16, 3 * size // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    Qwen2_5_VLConfig(
        text_config={**architecture.text, "rope_parameters": rope}, vision_config=architecture.vision,
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6,
        tie_word_embeddings=architecture.text["tie_word_embeddings"],
    ).save_pretrained(folder)  # fmt: skip
    pixels = IMAGE_SIDE**2
    images = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
    ImageTextProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return str(folder)


def random_model(folder: str, dtype: torch.dtype, device: str, attention: Any) -> Any:
    """The model of a folder with random weights, its tower frozen; made where it will compute."""
    config = load_config(folder)
    kind: Any = AutoModelForImageTextToText if packs_images(config) else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = kind.from_config(config, dtype=dtype, attn_implementation=attention)
    if packs_images(config):
        model.model.visual.requires_grad_(False)
    return model


@dataclass(frozen=True)
class RandomLoader(PolicyLoader):
    """`PolicyLoader` of a folder without weights."""

    device: str = "cuda"

    def load_model(self) -> Any:
        """The bare model with our attention."""
        register()
        attention = attention_implementation(self.attention, packs_images(load_config(self.path)))
        model = random_model(self.path, DTYPES[self.dtype], self.device, attention)
        self.change_layers(model)
        return model.train()

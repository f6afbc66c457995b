"""Architectures of two layers, by their configs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)

from tests.fake_gpu.machine import fake_policy

_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 200, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_IDS = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_OF_IMAGES = {**_TEXT, "rope_parameters": _ROPE}

GRAPHED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_TEXT),
    "mistral": MistralConfig(**_TEXT, sliding_window=None),
    "qwen2": Qwen2Config(**_TEXT, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_TEXT),
    "qwen2_vl": Qwen2VLConfig(
        text_config=_OF_IMAGES, **_IDS,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=_OF_IMAGES, vision_config={**_TOWER, "fullatt_block_indexes": [1]}, **_IDS
    ),
    "qwen3_vl": Qwen3VLConfig(
        text_config=_OF_IMAGES, vision_config={**_TOWER, "deepstack_visual_indexes": [0, 1]}, **_IDS
    ),
}  # fmt: skip
"""Those whose decoding step is a CUDA graph."""

GPT_OSS = GptOssConfig(
    **{**_TEXT, "head_dim": 32}, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attention_dropout=0.0,
)  # fmt: skip


def llama_layer(dtype: torch.dtype) -> Any:
    """A layer of a Llama on the GPU; to be called within `fake_gpu`."""
    layers: Any = fake_policy(GRAPHED["llama"], dtype).base_model.get_decoder().layers
    return layers[0]

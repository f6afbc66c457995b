"""Which models have the parts that packing works on: a body ``model`` whose decoder has ``layers``."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from gspo_lightning.policy.vision import has_vision, packs_images


def may_pack(config: Any) -> bool:
    """Whether the class for a config calls its body ``model`` and takes our attention; checked before loading."""
    if has_vision(config):
        return packs_images(config)
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        return True
    kind = mapping[type(config)]
    return bool(kind.base_model_prefix == "model" and kind._can_set_attn_implementation())


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a loaded model has these parts."""
    return may_pack(model.config) and hasattr(model, "model") and hasattr(model.get_decoder(), "layers")

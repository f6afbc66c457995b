"""Decoder layers that we know, those of the Llama family, by the names of their classes in transformers."""

from __future__ import annotations

from typing import Any

KNOWN_LAYERS = frozenset(
    f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VLText")
)
"""Their two norms feed only linear layers, so that the norms' output may have the dtype of the products; they attend
without sinks, and without windows but for the ``sliding_window`` of the config."""


def is_known(layer: Any) -> bool:
    """Whether a decoder layer is one of `KNOWN_LAYERS`."""
    return type(layer).__name__ in KNOWN_LAYERS

"""What transformers computes in float32 whatever a model's dtype, in float64: norms, routers, rotations, softmax."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

NORMS = {
    "llama": "LlamaRMSNorm",
    "qwen2_vl": "Qwen2VLRMSNorm",
    "qwen2_5_vl": "Qwen2_5_VLRMSNorm",
    "qwen3_vl": "Qwen3VLTextRMSNorm",
    "qwen3_moe": "Qwen3MoeRMSNorm",
    "mixtral": "MixtralRMSNorm",
    "gpt_oss": "GptOssRMSNorm",
}
GEMMA_NORMS = {"gemma": "GemmaRMSNorm", "gemma3": "Gemma3RMSNorm"}
ROUTERS = {"qwen3_moe": "Qwen3MoeTopKRouter", "mixtral": "MixtralTopKRouter"}
TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@contextmanager
def float64_layers() -> Iterator[None]:
    """Within it these layers stay in float64, on both sides."""
    with ExitStack() as stack:
        for family, name in NORMS.items():
            stack.enter_context(patch.object(getattr(_module(family), name), "forward", _norm))
        for family, name in GEMMA_NORMS.items():
            stack.enter_context(patch.object(getattr(_module(family), name), "forward", _gemma_norm))
        for family, name in ROUTERS.items():
            stack.enter_context(patch.object(getattr(_module(family), name), "forward", _router))
        for family in TOWERS:
            stack.enter_context(patch.object(_module(family), "apply_rotary_pos_emb_vision", _rotated))
        stack.enter_context(patch.object(nn.functional, "softmax", _softmax))
        yield


def _module(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return (1 + self.weight) * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of "eager" attention, which asks for float32."""
    return torch.softmax(x, dim)


def _router(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    values, indices = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):  # Mixtral has no choice
        values = values / values.sum(dim=-1, keepdim=True)
    return logits, values, indices


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return turned(query), turned(key)

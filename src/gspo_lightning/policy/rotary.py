"""Rotary position embeddings (RoFormer, arXiv 2104.09864) of queries and keys at once.

transformers rotates each of them by itself, in the dtype that type promotion arrives at, and its backward fills a
tensor with zeros per half. A rotation's backward is the rotation back: the same few operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the pairs ``(x[i], x[i + D / 2])`` of every head; in float32 or wider, rounded once.

    Args:
        query: ``(B, T, heads, D)``.
        key: ``(B, T, kv_heads, D)`` in the same dtype.
        cos: ``(B, T, D)`` or ``(1, T, D)``, of the positions' angles.
        sin: in the shape of ``cos``.

    Returns:
        both, turned, in their shapes and dtype.
    """
    if not torch.is_grad_enabled():
        return _turn(query, key, cos, sin, back=False)
    return _Rotation.apply(query, key, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(query, key, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turn(grad_query, grad_key, cos, sin, back=True), None, None


def _turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    heads, half = [query.shape[2], key.shape[2]], query.shape[3] // 2
    shape = (*query.shape[:2], sum(heads), query.shape[3])
    both = query.new_empty(shape, dtype=torch.promote_types(torch.promote_types(query.dtype, cos.dtype), torch.float32))
    for part, source in zip(both.split(heads, dim=2), (query, key), strict=True):
        part.copy_(source)
    cos, sin, sign = cos[:, :, None], sin[:, :, None], 1 if back else -1
    turned = both * cos
    turned[..., :half].addcmul_(both[..., half:], sin[..., half:] if back else sin[..., :half], value=sign)
    turned[..., half:].addcmul_(both[..., :half], sin[..., :half] if back else sin[..., half:], value=-sign)
    # Tensors of their own: a cache that keeps the keys must not keep the queries with them.
    query, key = (part.to(query.dtype, copy=True) for part in turned.split(heads, dim=2))
    return query, key

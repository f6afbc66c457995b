"""Rotary position embeddings (RoFormer, arXiv 2104.09864) of queries and keys at once.

transformers rotates each of them separately, in the dtype that type promotion gives, and its backward fills a tensor
with zeros per half. The backward of a rotation is the inverse rotation: the same few operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs ``(x[i], x[i + D / 2])`` of every head; in float32 or wider, rounded once.

    Args:
        query: ``(B, T, heads, D)``.
        key: ``(B, T, kv_heads, D)`` in the same dtype.
        cos: ``(B, T, D)`` or ``(1, T, D)`` cosines of the positions' angles.
        sin: their sines, in the same shape.

    Returns:
        both, rotated, in their shapes and dtype.
    """
    if not torch.is_grad_enabled():
        return _turn(query, key, cos, sin, back=False)
    return _Rotation.apply(query, key, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        # Separate copies: attention splits their rows, and again in its backward.
        query, key = (x.contiguous() for x in _turn(query, key, cos, sin, back=False))
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turn(grad_query, grad_key, cos, sin, back=True), None, None


def _turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    half, sign = query.shape[3] // 2, 1 if back else -1
    wide = torch.promote_types(torch.promote_types(query.dtype, cos.dtype), torch.float32)
    both = _side_by_side(query, key, wide)
    turned = both * cos[:, :, None]
    (first, second), (sin_first, sin_second) = both.split(half, dim=-1), sin[:, :, None].split(half, dim=-1)
    turned_first, turned_second = turned.split(half, dim=-1)
    turned_first.addcmul_(second, sin_second if back else sin_first, value=sign)
    turned_second.addcmul_(first, sin_first if back else sin_second, value=-sign)
    query, key = (part.to(query.dtype) for part in turned.split([query.shape[2], key.shape[2]], dim=2))
    return query, key


def _side_by_side(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, T, heads + kv_heads, D)`` in this dtype; a view if one product gave both and the dtype fits."""
    heads, size = query.shape[2:]
    shape = (*query.shape[:2], heads + key.shape[2], size)
    is_one = key.untyped_storage()._cdata == query.untyped_storage()._cdata
    behind = key.storage_offset() - query.storage_offset() == heads * size
    if is_one and behind and query.stride() == key.stride() == (*query.stride()[:2], size, 1):
        return query.as_strided(shape, query.stride()).to(dtype)
    both = query.new_empty(shape, dtype=dtype)
    for part, source in zip(both.split([heads, key.shape[2]], dim=2), (query, key), strict=True):
        part.copy_(source)
    return both

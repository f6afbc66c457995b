"""Rotary position embeddings (RoFormer, arXiv 2104.09864) of queries and keys at once.

transformers rotates each of them by itself, in the dtype that type promotion arrives at, and its backward fills a
tensor with zeros per half. A rotation's backward is the rotation back: the same few operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW = 2**16
"""Elements of queries and keys up to which the number of calls decides, as in a decoding step."""


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
    if not torch.is_grad_enabled() and query.numel() + key.numel() <= FEW:
        return _turn_few(query, cos, sin), _turn_few(key, cos, sin)
    return _Rotation.apply(query, key, cos, sin)


def _turn_few(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    wide = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos[:, :, None].to(wide), sin[:, :, None].to(wide)
    # Rounded as in `_turn`, which passes with gradient take: their log-probabilities are compared bit by bit.
    return (x * cos).addcmul_(torch.cat([-b, a], dim=-1), sin).to(x.dtype)


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
    heads = [query.shape[2], key.shape[2]]
    shape = (*query.shape[:2], sum(heads), query.shape[3])
    both = query.new_empty(shape, dtype=torch.promote_types(torch.promote_types(query.dtype, cos.dtype), torch.float32))
    for part, source in zip(both.split(heads, dim=2), (query, key), strict=True):
        part.copy_(source)
    a, b = both.chunk(2, -1)
    (cos_a, cos_b), (sin_a, sin_b) = (x[:, :, None].chunk(2, -1) for x in (cos, sin))
    turned_a = (a * cos_a).addcmul_(b, sin_b if back else sin_a, value=1 if back else -1)
    turned_b = (b * cos_b).addcmul_(a, sin_a if back else sin_b, value=-1 if back else 1)
    # Tensors of their own: a cache that keeps the keys must not keep the queries with them.
    turned = query.new_empty(query.shape), key.new_empty(key.shape)
    for out, *halves in zip(turned, turned_a.split(heads, dim=2), turned_b.split(heads, dim=2), strict=True):
        for target, half in zip(out.chunk(2, -1), halves, strict=True):
            target.copy_(half)
    return turned

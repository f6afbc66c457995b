"""Attention over a shared-prefix row: plain functions of tensors, no framework.

The result for every token is what ordinary causal attention over its own, unpacked sequence gives. Attention
sinks (a learnt logit per head that takes part in the softmax and contributes no value, as gpt-oss uses) and
sliding windows are covered because models that have them would be wrong without, silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from gspo_lightning.packing.layout import SharedPrefixLayout

DENSE_SCORES = 512 * 512
"""Blocks of up to this many scores per head take the dense backward on CPUs."""


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefixLayout,
    *,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one packed row.

    Args:
        query: ``(1, heads, T, D)``.
        key: ``(1, kv_heads, T, D)``; ``heads`` is a multiple of ``kv_heads``.
        value: ``(1, kv_heads, T, D)``.
        layout: which token may look at which.
        scaling: factor on the scores, usually ``D ** -0.5``.
        window: sliding-window width in positions, None for full attention.
        sinks: ``(heads,)`` sink logits, or None.

    Returns:
        ``(1, heads, T, D)``.
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    boundaries = _boundaries(layout)
    sizes = [end - start for start, end in zip(boundaries, boundaries[1:], strict=False)]
    # One split per tensor: its backward is a single concatenation, where slicing would zero-fill a whole row per slice.
    at = dict(zip(boundaries, zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True), strict=False))
    outputs = []
    for number, block in enumerate(layout.blocks):
        q = at[block.query[0]][0]
        k, v = (_concatenate([at[span[0]][part] for span in block.key_spans]) for part in (1, 2))
        plain = block.causal and (window is None or q.shape[2] <= window)
        mask = None if plain and sinks is None else layout.mask(number, window)
        outputs.append(attend(q, k, v, mask, scaling=scaling, sinks=sinks))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, sinks: Tensor | None
) -> Tensor:
    """One attention call with equal head counts; ``mask=None`` means causal. All ``(..., heads, tokens, D)``."""
    if sinks is None:
        if mask is not None and query.device.type == "cpu" and torch.is_grad_enabled() and mask.numel() <= DENSE_SCORES:
            return _DenseBackward.apply(query, key, value, mask, scaling)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    assert mask is not None
    scores = (query @ key.transpose(-1, -2)) * scaling
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    column = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.softmax(
        torch.cat([scores, column], dim=-1).to(torch.promote_types(scores.dtype, torch.float32)), -1
    )
    return weights[..., :-1].to(value.dtype) @ value


class _DenseBackward(torch.autograd.Function):
    """The fused forward, and a backward of plain batched products.

    The backward of the fused CPU kernel runs small blocks at a tenth of the matrix-product rate (166 queries of 9
    heads in bfloat16: 4.0 ms against 1.4 ms). The forward stays fused because it keeps its scores in float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            scores = (query * ctx.scaling) @ key.transpose(-1, -2)
            weights = torch.softmax(scores.masked_fill_(~mask, -torch.inf), dim=-1)
            grad_weights = grad @ value.transpose(-1, -2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(ctx.scaling)
            return (
                grad_scores @ key,
                grad_scores.transpose(-1, -2) @ query,
                weights.transpose(-1, -2) @ grad,
                None,
                None,
            )


def autocast_dtype(x: Tensor) -> Tensor:
    """Casts to the autocast dtype where autocast is on: once per row, not once per block."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``(1, kv_heads, T, D)`` -> ``(1, heads, T, D)``, each key/value head serving consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _boundaries(layout: SharedPrefixLayout) -> list[int]:
    """Where any block's queries or keys begin or end; every block is a run between neighbours."""
    spans = [span for block in layout.blocks for span in (block.query, *block.key_spans)]
    return sorted({edge for span in spans for edge in span})


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

"""Attention over a shared-prefix row: plain functions of tensors, no framework.

The result for every token is what ordinary causal attention over its own, unpacked sequence gives. Attention
sinks (a learnt logit per head that takes part in the softmax and contributes no value, as gpt-oss uses) and
sliding windows are covered because models that have them would silently give wrong results without them.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from gspo_lightning.packing.blocks import BlockBatch, GatheredBlocks, gather_blocks
from gspo_lightning.packing.layout import AttentionBlock, SharedPrefixLayout
from gspo_lightning.packing.products import product_dtype


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
    """Attention of one packed row. Filler tokens after those of the layout get zeros.

    Args:
        query: ``(1, heads, T, D)``.
        key: ``(1, kv_heads, T, D)``; ``heads`` is a multiple of ``kv_heads``.
        value: ``(1, kv_heads, T, D)``.
        layout: which token may attend to which.
        scaling: factor on the scores, usually ``D ** -0.5``.
        window: sliding-window width in positions, None for full attention.
        sinks: ``(heads,)`` sink logits, or None.

    Returns:
        ``(1, heads, T, D)``.
    """
    if query.device.type == "cpu" and sinks is None:
        query, key, value = (x.to(product_dtype(query)) for x in (query, key, value))
        return _GatheredAttention.apply(query, key, value, _gathered(layout, query, key, window), scaling)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    q_of, k_of, v_of = (_Runs(x, layout) for x in (query, key, value))
    outputs = []
    for number, block in enumerate(layout.blocks):
        q, k, v = q_of(block.query), k_of(*block.key_spans), v_of(*block.key_spans)
        mask = None if sinks is None and _is_causal(block, window) else layout.mask(number, window)
        outputs.append(attend(q, k, v, mask, scaling=scaling, sinks=sinks))
    if layout.num_tokens < query.shape[2]:
        outputs.append(torch.zeros_like(query[:, :, layout.num_tokens :]))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, sinks: Tensor | None
) -> Tensor:
    """One attention call with equal head counts; ``mask=None`` means causal. All ``(..., heads, tokens, D)``.

    Scores are in float32 or wider, as torch's own are.
    """
    if sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    assert mask is not None
    narrow = product_dtype(query)
    query, key, value = (x.to(narrow) for x in (query, key, value))
    wide = torch.promote_types(narrow, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scaling
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
        column = sinks.to(wide).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), -1)
        return weights[..., :-1].to(narrow) @ value


class _GatheredAttention(torch.autograd.Function):
    """A row on a CPU: plain batched products over batches of blocks, forward and backward.

    The fused CPU kernel runs small blocks at a tenth of the matrix-product rate.
    Only the row itself is kept in between: blocks are gathered again. Queries, keys and values have one dtype.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: GatheredBlocks, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scaling = plan, scaling
        queries, keys, values = (_rows(x) for x in (query, key, value))
        parts, size = [], query.shape[3]
        with torch.autocast(query.device.type, enabled=False):
            for batch in plan.batches:
                q = queries.index_select(0, batch.query_rows).view(batch.shape[0], -1, size)
                k, v = (x.index_select(0, batch.key_rows).view(batch.shape[0], -1, size) for x in (keys, values))
                parts.append((_weights(q, k, batch, scaling) @ v).view(-1, size))
        return _scatter(parts, plan, query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        plan, size = ctx.plan, query.shape[3]
        queries, keys, values, grads = (_rows(x) for x in (query, key, value, grad))
        parts: list[tuple[Tensor, ...]] = []
        with torch.autocast(query.device.type, enabled=False):
            for batch in plan.batches:
                q, g = (x.index_select(0, batch.query_rows) for x in (queries, grads))
                g.index_fill_(0, batch.no_query, 0)
                k, v = (x.index_select(0, batch.key_rows).view(batch.shape[0], -1, size) for x in (keys, values))
                q, g = (x.view(batch.shape[0], -1, size) for x in (q, g))
                parts.append(_batch_backward(q, k, v, g, batch, ctx.scaling))
        of_queries, of_keys, of_values = ([x.view(-1, size) for x in some] for some in zip(*parts, strict=True))
        return (
            _scatter(of_queries, plan, query),
            _summed(of_keys, plan, key),
            _summed(of_values, plan, value),
            None,
            None,
        )


def _batch_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, batch: BlockBatch, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a batch: queries ``(B * kv_heads, repeats * Q, D)`` and keys ``(B * kv_heads, K, D)``."""
    weights = _weights(query, key, batch, scaling)
    grad_weights = grad @ value.transpose(1, 2)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scaling)
    return grad_scores @ key, grad_scores.transpose(1, 2) @ query, weights.transpose(1, 2) @ grad


def _weights(query: Tensor, key: Tensor, batch: BlockBatch, scaling: float) -> Tensor:
    """Attention weights ``(B * kv_heads, repeats * Q, K)`` of a batch, in the dtype of its queries.

    Scores and their softmax are in float32 or wider whatever that dtype, as in torch's fused kernel: a score of 40 that
    is rounded to bfloat16 is off by up to an eighth, and so is its weight.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.new_empty(batch.shape, dtype=wide)
    scores = torch.baddbmm(scores, query.to(wide), key.to(wide).transpose(1, 2), beta=0, alpha=scaling)
    blocks, queries, keys = batch.bias.shape
    scores.view(blocks, -1, queries, keys).add_(batch.bias[:, None])
    return torch.softmax(scores, dim=-1).to(query.dtype)


def _gathered(layout: SharedPrefixLayout, query: Tensor, key: Tensor, window: int | None) -> GatheredBlocks:
    kind = query.shape[2], query.shape[1], key.shape[1], window, query.dtype
    if kind not in layout.gathered:
        layout.gathered[kind] = gather_blocks(layout, *kind)
    return layout.gathered[kind]


def _rows(x: Tensor) -> Tensor:
    """``(1, heads, T, D)`` -> ``(T * heads, D)``, a view of the projection's output."""
    return x[0].transpose(0, 1).reshape(-1, x.shape[3])


def _scatter(parts: list[Tensor], plan: GatheredBlocks, like: Tensor) -> Tensor:
    """Rows of all batches -> ``(1, heads, T, D)``, in the memory order that the next projection reads."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = rows.index_select(0, plan.place).view(like.shape[2], like.shape[1], like.shape[3])
    out[plan.num_tokens :] = 0
    return out.transpose(0, 1)[None]


def _summed(parts: list[Tensor], plan: GatheredBlocks, like: Tensor) -> Tensor:
    """Rows of all batches -> ``(1, kv_heads, T, D)``: a prompt's keys sum over every block of its completions."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    # Sums over bags of rows, in float32 or wider.
    total = embedding_bag(plan.members, rows, plan.starts, mode="sum")
    return total.view(like.shape[2], like.shape[1], like.shape[3]).transpose(0, 1)[None]


def _is_causal(block: AttentionBlock, window: int | None) -> bool:
    """Whether the mask is plain causal, which the fused kernels apply without a mask tensor."""
    return block.causal and (window is None or block.query[1] - block.query[0] <= window)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``(1, kv_heads, T, D)`` -> ``(1, heads, T, D)``, each key/value head serving consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class _Runs:
    """A row, split where any block's queries or keys begin or end.

    The backward of the one split is a single concatenation; slicing would zero-fill a whole row per slice.
    """

    def __init__(self, x: Tensor, layout: SharedPrefixLayout) -> None:
        spans = [span for block in layout.blocks for span in (block.query, *block.key_spans)]
        self.edges = sorted({edge for span in spans for edge in span} | {x.shape[2]})
        self.runs = x.split([end - start for start, end in pairwise(self.edges)], dim=2)

    def __call__(self, *spans: tuple[int, int]) -> Tensor:
        parts: list[Tensor] = []
        for start, end in spans:
            parts += self.runs[bisect_left(self.edges, start) : bisect_left(self.edges, end)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

"""Attention over a shared-prefix row: plain functions of tensors, no framework.

The result for every token is what ordinary causal attention over its own, unpacked sequence gives. Attention
sinks (a learnt logit per head that takes part in the softmax and contributes no value, as gpt-oss uses) and
sliding windows are covered because models that have them would be wrong without, silently.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from gspo_lightning.packing.layout import AttentionBlock, SharedPrefixLayout


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
    """Attention of one packed row. Tokens behind those of the layout, which fill it up, get zeros.

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
    if query.device.type == "cpu" and sinks is None:
        return _GroupedHeads.apply(query, key, value, layout, scaling, window)
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
    """One attention call with equal head counts; ``mask=None`` means causal. All ``(..., heads, tokens, D)``."""
    if sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    assert mask is not None
    scores = (query @ key.transpose(-1, -2)) * scaling
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    column = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.softmax(
        torch.cat([scores, column], dim=-1).to(torch.promote_types(scores.dtype, torch.float32)), -1
    )
    return weights[..., :-1].to(value.dtype) @ value


class _GroupedHeads(torch.autograd.Function):
    """The blocks of a row on a CPU: fused forwards, and a backward of plain batched products.

    The backward of the fused CPU kernel runs small blocks at a tenth of the matrix-product rate (166 queries of 9
    heads in bfloat16: 4.0 ms against 1.4 ms). The forward stays fused because it keeps its scores in float32; those of
    the backward are in the dtype of the products, whose rounding reaches gradients but no ratio. Nothing but the row
    itself is kept in between: the query heads that share a key head are rows of one product with it, so that keys are
    never repeated, and a block's keys are gathered again for its backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SharedPrefixLayout,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scaling, ctx.window = layout, scaling, window
        _, heads, tokens, size = query.shape
        # The order in memory that the projection behind it reads.
        out = query.new_empty(1, tokens, heads, size).transpose(1, 2)
        out[:, :, layout.num_tokens :] = 0
        grouped, result = _by_key_head(query, key), _by_key_head(out, key)
        for number, block in enumerate(layout.blocks):
            span = slice(*block.query)
            q = grouped[:, :, span]
            k, v = (_gather(x, block).expand(-1, q.shape[1], -1, -1) for x in (key, value))
            mask = None if _is_causal(block, window) else layout.mask(number, window)
            result[:, :, span] = attend(q, k, v, mask, scaling=scaling, sinks=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_query[:, :, ctx.layout.num_tokens :] = 0
        # Float32: a prompt's keys collect from every block of its completions.
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros_like(x[0], dtype=wide) for x in (key, value))
        grouped, incoming, outgoing = (_by_key_head(x, key) for x in (query, grad, grad_query))
        with torch.autocast(query.device.type, enabled=False):
            for number, block in enumerate(ctx.layout.blocks):
                span = slice(*block.query)
                q, g = grouped[:, :, span], incoming[:, :, span]
                k, v = (_gather(x, block)[:, 0] for x in (key, value))
                mask = ctx.layout.mask(number, ctx.window)
                grads = _dense_backward(q.flatten(1, 2), k, v, g.flatten(1, 2), mask, ctx.scaling)
                outgoing[:, :, span] = grads[0].view_as(q)
                start = 0
                for first, end in block.key_spans:
                    part = slice(start, start := start + end - first)
                    grad_key[:, first:end] += grads[1][:, part]
                    grad_value[:, first:end] += grads[2][:, part]
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None, None, None


def _dense_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block: ``query`` and ``grad`` ``(kv_heads, repeats * Q, D)``, keys ``(kv_heads, K, D)``."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    scores.view(len(scores), -1, *mask.shape).masked_fill_(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    grad_weights = grad @ value.transpose(-1, -2)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scaling)
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """``(1, heads, T, D)`` -> ``(kv_heads, repeats, T, D)``, a view."""
    return x[0].unflatten(0, (key.shape[1], -1))


def _gather(x: Tensor, block: AttentionBlock) -> Tensor:
    """The keys of a block, ``(1, kv_heads, T, D)`` -> ``(kv_heads, 1, K, D)``."""
    return _concatenate([x[:, :, slice(*span)] for span in block.key_spans]).transpose(0, 1)


def _is_causal(block: AttentionBlock, window: int | None) -> bool:
    """Whether the fused kernels know the mask by name."""
    return block.causal and (window is None or block.query[1] - block.query[0] <= window)


def autocast_dtype(x: Tensor) -> Tensor:
    """Casts to the autocast dtype where autocast is on: once per row, not once per block."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``(1, kv_heads, T, D)`` -> ``(1, heads, T, D)``, each key/value head serving consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class _Runs:
    """A row, split where any block's queries or keys begin or end.

    One split: its backward is a single concatenation, where slicing would zero-fill a whole row per slice.
    """

    def __init__(self, x: Tensor, layout: SharedPrefixLayout) -> None:
        spans = [span for block in layout.blocks for span in (block.query, *block.key_spans)]
        self.edges = sorted({edge for span in spans for edge in span} | {x.shape[2]})
        self.runs = x.split([end - start for start, end in pairwise(self.edges)], dim=2)

    def __call__(self, *spans: tuple[int, int]) -> Tensor:
        parts: list[Tensor] = []
        for start, end in spans:
            parts += self.runs[bisect_left(self.edges, start) : bisect_left(self.edges, end)]
        return _concatenate(parts)


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

"""Attention in parts: over a prompt that many rows share, and over what each row has drawn.

A softmax over two sets of keys is the mean of the softmaxes over each, weighted by the sums of their exponentials
(the online softmax of arXiv 1805.02867; for shared prefixes, "cascade" or "Hydragen" attention, arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]
"""``(..., Q, D)`` attention over some of the keys, and ``(..., Q)`` the logarithm of the sum of their exponentials."""


def partial_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Partial:
    """Attention over these keys alone by torch's fused kernel for CPUs; every query sees one of them at least.

    Args:
        query: ``(B, heads, Q, D)``.
        key: ``(B, heads, K, D)``.
        value: ``(B, heads, K, D)``.
        bias: added to the scores, broadcast to ``(B, heads, Q, K)``; None for nothing.
        scaling: factor on the scores before that.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = flash(query, key, value, attn_mask=bias, scale=scaling)
    return out, total


def combine(parts: Sequence[Partial], sinks: Tensor | None = None) -> Tensor:
    """The attention over all keys of one or two parts, in float32 or wider.

    Args:
        parts: over disjoint keys, ``(B, kv_heads, repeats, D)``.
        sinks: ``(kv_heads * repeats,)`` logits that take part in the softmax and contribute no value, or None.
    """
    (out, total), *others = parts
    out = out.to(total.dtype)
    for other, its_total in others:
        out = torch.lerp(out, other.to(total.dtype), torch.sigmoid(its_total - total)[..., None])
        total = torch.logaddexp(total, its_total)
    if sinks is None:
        return out
    return out * torch.sigmoid(total - sinks.to(total.dtype).view(total.shape[1:]))[..., None]

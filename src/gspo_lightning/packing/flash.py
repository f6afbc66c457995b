"""Attention over a shared-prefix row by FlashAttention (arXiv 2307.08691), for GPUs: two calls, nothing to compile.

Every prompt and every completion attends to itself, causally: rows of varying lengths, which the kernel knows. Then
the completions of a group, one after the other, attend to their prompt, all of it. A softmax over both sets of keys
is the mean of the two, weighted by the sums of their exponentials (the online softmax, arXiv 1805.02867), and with
these sums and the mean in place of its own, the kernel's backward gives the gradients of either part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo_lightning.packing.layout import SharedPrefixLayout

OLDEST = (8, 0)
"""Compute capability of the first cards with these kernels."""

LARGEST_HEAD = 128
"""Wider heads have a backward on some cards alone."""

Part = tuple[Tensor, Tensor]
"""``(T, heads, D)`` attention to some keys, and ``(heads, T)`` float32 logarithms of the sums of exponentials."""


def can_flash(query: Tensor, window: int | None, sinks: Tensor | None) -> bool:
    """Whether the kernel knows this attention: bfloat16 or float16 on a GPU, without windows and sinks."""
    return (
        query.is_cuda
        and torch.version.hip is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and window is None
        and sinks is None
        and query.shape[-1] <= LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= OLDEST
    )


def flash_shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefixLayout,
    *,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`shared_prefix_attention` in two calls of a kernel; the same arguments and result, where `can_flash` says so."""
    assert window is None and sinks is None and query.shape[2] == layout.num_tokens
    if layout.flash_calls is None:
        layout.flash_calls = flash_calls(layout)
    # The kernel reads (tokens, heads, D), which is how the projections wrote it.
    by_token = (x[0].transpose(0, 1) for x in (query, key, value))
    return _SharedPrefix.apply(*by_token, layout.flash_calls, scaling).transpose(0, 1)[None]


@dataclass(frozen=True)
class Spans:
    """One call: the queries of every span attend to the keys of the span with its number."""

    query_ends: Tensor
    """``(spans + 1,)`` int32, from 0."""
    key_ends: Tensor
    longest_query: int
    """A bound, as the next one. At least 2: at 1 the kernel of decoding answers, in another shape."""
    longest_key: int
    causal: bool
    keys_used: Tensor | None = None
    """``(spans,)`` int32: so many keys of each span are looked at; None for all."""


@dataclass(frozen=True)
class FlashCalls:
    """What a row's attention is made of."""

    own: Spans
    """All tokens: every prompt and completion by itself."""
    prompts: Spans | None
    """The tokens of completions to those of their prompts; None if there are no completions."""
    completion_tokens: Tensor
    """Where the row has them."""
    prompt_tokens: Tensor


def flash_calls(layout: SharedPrefixLayout) -> FlashCalls:
    """The two calls for a layout."""
    starts = list(accumulate((group.num_tokens for group in layout.groups), initial=0))
    groups = [pair for pair in zip(starts, layout.groups, strict=False) if any(pair[1].completion_lengths)]
    prompts = [range(start, start + group.prompt_length) for start, group in groups]
    completions = [range(start + group.prompt_length, start + group.num_tokens) for start, group in groups]
    lengths = [n for group in layout.groups for n in (group.prompt_length, *group.completion_lengths)]
    own = _spans(lengths, lengths, layout.device, causal=True)
    shared = _spans([len(r) for r in completions], [len(r) for r in prompts], layout.device, causal=False)
    return FlashCalls(
        own, shared if groups else None, _tokens(completions, layout.device), _tokens(prompts, layout.device)
    )


def _spans(queries: Sequence[int], keys: Sequence[int], device: torch.device, *, causal: bool) -> Spans:
    def ends(lengths: Sequence[int]) -> Tensor:
        return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)

    return Spans(ends(queries), ends(keys), max([2, *queries]), max([2, *keys]), causal)


def _tokens(ranges: Sequence[range], device: torch.device) -> Tensor:
    return torch.tensor([token for tokens in ranges for token in tokens], dtype=torch.long, device=device)


class _SharedPrefix(torch.autograd.Function):
    """``(T, heads, D)`` queries, ``(T, kv_heads, D)`` keys and values -> ``(T, heads, D)``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: FlashCalls, scaling: float) -> Tensor:
        own = flash_forward(query, key, value, calls.own, scaling)
        if calls.prompts is not None:
            at, prompt = calls.completion_tokens, calls.prompt_tokens
            add_part(own, flash_forward(query[at], key[prompt], value[prompt], calls.prompts, scaling), at)
        out, total = own
        ctx.save_for_backward(query, key, value, out, total)
        ctx.calls, ctx.scaling = calls, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        calls, scaling, grad = ctx.calls, ctx.scaling, grad.contiguous()
        grads = flash_backward(grad, query, key, value, out, total, calls.own, scaling)
        if calls.prompts is not None:
            at, prompt = calls.completion_tokens, calls.prompt_tokens
            others = flash_backward(
                grad[at], query[at], key[prompt], value[prompt], out[at], total[:, at].contiguous(),
                calls.prompts, scaling,
            )  # fmt: skip
            for mine, other, place in zip(grads, others, (at, prompt, prompt), strict=True):
                mine[place] += other  # every place once
        return *grads, None, None


def add_part(own: Part, other: Part, at: Tensor) -> None:
    """Makes of the attention to some keys that to these and others.

    Args:
        own: of all tokens; overwritten.
        other: of the tokens ``at``, each of them once, to other keys.
        at: tokens.
    """
    (out, total), (addend, its_total) = own, other
    before = total[:, at]
    share = torch.sigmoid(its_total - before).t()[..., None]
    out[at] = torch.lerp(out[at].to(share.dtype), addend.to(share.dtype), share).to(out.dtype)
    total[:, at] = torch.logaddexp(before, its_total)


def flash_forward(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float) -> Part:
    """One call."""
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, spans.query_ends, spans.key_ends, spans.longest_query, spans.longest_key,
        0.0, spans.causal, False, scale=scaling, seqused_k=spans.keys_used,
    )  # fmt: skip
    return out, total


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, spans: Spans, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, as far as they come from the scores of this call.

    ``out`` and ``total`` may be those of an attention to more keys, of which these are some.
    """
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # of a dropout that there is not
    with _one_order():
        grads = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, total, spans.query_ends, spans.key_ends, spans.longest_query,
            spans.longest_key, 0.0, spans.causal, seed, seed, scale=scaling,
        )  # fmt: skip
    return grads[0], grads[1], grads[2]


@contextmanager
def _one_order() -> Iterator[None]:
    """The kernel adds up in the same order every time, or a resumed run would have other bits."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(enabled, warn_only=warns_only)
        settings.fill_uninitialized_memory = fills

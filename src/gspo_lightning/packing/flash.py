"""Attention over a shared-prefix row by FlashAttention (arXiv 2307.08691), for GPUs: few calls, nothing to compile.

Every prompt and every completion attends to itself, causally: sequences of varying lengths, which the kernel supports.
Then the concatenated completions of a group attend to their prompt and, in a third call if all prompts begin with the
same tokens, everything after those attends to them. A softmax over two sets of keys is the mean of the two, weighted by
the sums of their exponentials (the online softmax, arXiv 1805.02867). Given the combined sums and mean in place of its
own, the kernel's backward gives the gradients of each part.
"""

from __future__ import annotations

import threading
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
"""Wider heads have a backward on some cards only."""

SWITCH = threading.Lock()
"""Held while torch is told to add in one order, and by products in other threads: that setting is global, and
torch refuses the products that it meets meanwhile, since cuBLAS promises no order."""

Part = tuple[Tensor, Tensor]
"""``(T, heads, D)`` attention to some keys, and ``(heads, T)`` float32 logarithms of the sums of exponentials."""


def can_flash(query: Tensor, window: int | None, sinks: Tensor | None) -> bool:
    """Whether the kernel supports this attention: bfloat16 or float16 on a GPU, without windows and sinks."""
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
    """`shared_prefix_attention` in a few kernel calls, for what `can_flash` allows; same arguments and result."""
    assert window is None and sinks is None and query.shape[2] == layout.num_tokens
    if layout.flash_calls is None:
        layout.flash_calls = flash_calls(layout)
    # The kernel reads (tokens, heads, D), which is how the projections wrote them.
    by_token = (x[0].transpose(0, 1) for x in (query, key, value))
    return _SharedPrefix.apply(*by_token, layout.flash_calls, scaling).transpose(0, 1)[None]


@dataclass(frozen=True)
class Spans:
    """One kernel call: the queries of every span attend to the keys of the key span with the same number."""

    query_ends: Tensor
    """``(spans + 1,)`` int32, beginning with 0; likewise ``key_ends``."""
    key_ends: Tensor
    longest_query: int
    """An upper bound, like ``longest_key``. At least 2: 1 selects the decoding kernel, whose output shape differs."""
    longest_key: int
    causal: bool
    keys_used: Tensor | None = None
    """``(spans,)`` int32: how many keys of each span are attended to; None for all."""


@dataclass(frozen=True)
class Crossing:
    """A kernel call of some tokens to what comes before them in their sequences."""

    spans: Spans
    queries: Tensor
    """Row positions of the call's queries, each once; likewise ``keys``."""
    keys: Tensor


@dataclass(frozen=True)
class FlashCalls:
    """The kernel calls that make up a row's attention."""

    own: Spans
    """All tokens: every prompt and completion to itself."""
    crossings: tuple[Crossing, ...]
    """The tokens of completions to those of their prompts, and all tokens after the common ones to these."""


def flash_calls(layout: SharedPrefixLayout) -> FlashCalls:
    """The calls for a layout."""
    common, device = layout.common, layout.device
    groups = [pair for pair in zip(layout.starts(), layout.groups, strict=True) if any(pair[1].completion_lengths)]
    ends = [start + group.prompt_length - common for start, group in groups]
    prompts = [range(start, end) for (start, _), end in zip(groups, ends, strict=True)]
    completions = [
        range(end, end + sum(group.completion_lengths)) for (_, group), end in zip(groups, ends, strict=True)
    ]
    lengths = [n for group in layout.groups for n in (group.prompt_length - common, *group.completion_lengths)]
    lengths = [common, *lengths] if common else lengths
    crossings = [_crossing(completions, prompts, device)] if groups else []
    if common:
        crossings.append(_crossing([range(common, layout.num_tokens)], [range(common)], device))
    return FlashCalls(_spans(lengths, lengths, device, causal=True), tuple(crossings))


def _crossing(queries: Sequence[range], keys: Sequence[range], device: torch.device) -> Crossing:
    spans = _spans([len(r) for r in queries], [len(r) for r in keys], device, causal=False)
    return Crossing(spans, _tokens(queries, device), _tokens(keys, device))


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
        for call in calls.crossings:
            keys, values = key[call.keys], value[call.keys]
            add_part(own, flash_forward(query[call.queries], keys, values, call.spans, scaling), call.queries)
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
        for call in calls.crossings:
            at, keys = call.queries, call.keys
            others = flash_backward(
                grad[at], query[at], key[keys], value[keys], out[at], total[:, at].contiguous(), call.spans, scaling
            )
            for mine, other, place in zip(grads, others, (at, keys, keys), strict=True):
                mine[place] += other  # every place once
        return *grads, None, None


def add_part(own: Part, other: Part, at: Tensor) -> None:
    """Extends an attention to some keys by the attention to others, in place.

    Args:
        own: attention of all tokens to some keys; overwritten by that to both.
        other: attention of the tokens ``at`` to other keys.
        at: tokens, each once.
    """
    (out, total), (addend, its_total) = own, other
    before = total[:, at]
    share = torch.sigmoid(its_total - before).t()[..., None]
    out[at] = torch.lerp(out[at].to(share.dtype), addend.to(share.dtype), share).to(out.dtype)
    total[:, at] = torch.logaddexp(before, its_total)


def flash_forward(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float) -> Part:
    """The forward of one kernel call."""
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, spans.query_ends, spans.key_ends, spans.longest_query, spans.longest_key,
        0.0, spans.causal, False, scale=scaling, seqused_k=spans.keys_used,
    )  # fmt: skip
    return out, total


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, spans: Spans, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values that come from the scores of this call.

    ``out`` and ``total`` may be those of an attention to more keys that includes these.
    """
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # for dropout, which is off
    with _one_order():
        grads = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, total, spans.query_ends, spans.key_ends, spans.longest_query,
            spans.longest_key, 0.0, spans.causal, seed, seed, scale=scaling,
        )  # fmt: skip
    return grads[0], grads[1], grads[2]


@contextmanager
def _one_order() -> Iterator[None]:
    """Makes the kernel add in the same order every time; else a resumed run would differ in its last bits."""
    settings: Any = torch.utils.deterministic
    with SWITCH:
        enabled = torch.are_deterministic_algorithms_enabled()
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(enabled, warn_only=warns_only)
            settings.fill_uninitialized_memory = fills

"""Attention over a shared-prefix row as one block-sparse kernel: torch's FlexAttention, for GPUs.

`gspo_lightning.packing.attention` calls a fused kernel once per block of the row, which suits a CPU; on a GPU that is
hundreds of small launches per layer. Here the row is one launch, and blocks of scores that are masked throughout are
never computed. Both forms give the same numbers (`tests/packing/test_flex.py`, `tests/gpu`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils._triton import has_triton

from gspo_lightning.packing.compiling import allow_graphs
from gspo_lightning.packing.layout import SharedPrefixLayout

BLOCK = 128
"""Queries, and keys, of a block of scores; blocks that are masked throughout are skipped."""

NO_WINDOW = 2**62

ROWS_AT_A_TIME = 2**26
"""Entries of the token mask that are evaluated at a time while its blocks are found."""


def flex_shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefixLayout,
    *,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`shared_prefix_attention` in one kernel; same arguments and result.

    On a GPU the kernel is compiled on first use (Triton, some seconds), for all lengths at once. Elsewhere
    FlexAttention computes all scores and gives no gradients.
    """
    for x in (query, key, value):
        # Else a number of blocks that happens to equal the number of heads is taken for it and compiled in.
        torch._dynamo.mark_static(x, [0, 1, 3])
    kernel: Any = _compiled() if query.is_cuda else flex_attention
    out, aux = kernel(
        query,
        key,
        value,
        block_mask=block_mask(layout, window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
        kernel_options={"BACKEND": "TRITON"},  # rows of fewer than 128 tokens would get another kernel, for decoding
    )
    if sinks is None:
        return out
    # A sink of logit s adds exp(s) to the softmax's denominator: the rest is scaled by exp(lse) / (exp(lse) + exp(s)).
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1))
    return out * share.unsqueeze(-1).to(out.dtype)


FLOAT32_SHARED_MEMORY = 160 * 1024
"""Shared memory per block, in bytes, that a card must offer for the kernel to be compiled for float32."""


def can_flex(query: Tensor) -> bool:
    """Whether the kernel can be compiled for these queries: on a GPU with Triton, and not in float64."""
    if not query.is_cuda or query.dtype == torch.float64 or not has_triton():
        return False
    # The tiles of wide heads in float32 do not fit into the shared memory of smaller cards.
    properties = torch.cuda.get_device_properties(query.device)
    room: int = getattr(properties, "shared_memory_per_block_optin", 0)
    return query.dtype != torch.float32 or room >= FLOAT32_SHARED_MEMORY


def block_mask(layout: SharedPrefixLayout, window: int | None) -> BlockMask:
    """Which blocks of a row's scores are masked, partly allowed or wholly allowed; made once per row and window."""
    masks = layout.block_masks
    if window not in masks:
        masks[window] = _build(layout, window)
    return masks[window]


def _build(layout: SharedPrefixLayout, window: int | None) -> BlockMask:
    (owner, prompt), positions = layout.owners(), layout.positions
    # Tensors, not numbers: numbers are compiled in, and every window would need its own kernel.
    reach = torch.tensor(NO_WINDOW if window is None else window, device=layout.device)
    common = torch.tensor(layout.common, device=layout.device)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether key k precedes query q in q's own sequence (its prompt and its completion), within the window."""
        mine = (owner[k] == owner[q]) | (owner[k] == prompt[q]) | (k < common)
        distance = positions[q] - positions[k]
        return mine & (distance >= 0) & (distance < reach)

    some, every = _summary(layout.num_tokens, layout.device, allowed)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(every), BLOCK_SIZE=BLOCK, mask_mod=allowed,
        seq_lengths=(layout.num_tokens, layout.num_tokens),
    )  # fmt: skip


def _summary(tokens: int, device: torch.device, allowed: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Per block of scores ``(blocks, blocks)``: whether some of it is allowed, and whether all of it is."""
    # At least two: a dimension of one is compiled in, and short rows would need their own kernel.
    count = max(2, -(-tokens // BLOCK))
    keys = torch.arange(count * BLOCK, device=device)
    inside = keys < tokens
    keys = keys.clamp(max=tokens - 1)
    step = max(1, ROWS_AT_A_TIME // (BLOCK * len(keys)))
    some, every = [], []
    for start in range(0, count, step):
        rows = slice(start * BLOCK, min(start + step, count) * BLOCK)
        unused = torch.zeros((), dtype=torch.long, device=device)
        seen = allowed(unused, unused, keys[rows, None], keys[None, :]) & inside[rows, None] & inside[None, :]
        blocks = seen.view(-1, BLOCK, count, BLOCK)
        some.append(blocks.any(dim=3).any(dim=1))
        every.append(blocks.all(dim=3).all(dim=1))
    return torch.cat(some), torch.cat(every)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows, columns)`` bool -> each row's number of True columns ``(1, 1, rows)``, and its columns, True first."""
    columns = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None, None], columns.int()[None, None]


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Each dtype, gradient mode, autocast state and head size is a graph; beyond the default 8 all scores are computed.
    allow_graphs()
    return torch.compile(flex_attention, dynamic=True)

"""Attention blocks of a row, gathered into batches of equal shape, for CPUs.

A group of the quickstart has 45 + 8 x 16 tokens. Its attention as one block computes three times the scores that are
looked at, and block by block every product is too small for two cores. Here each prompt and each few completions are
a block of their own, filled up to common lengths, and all blocks of a shape are one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_lightning.packing.layout import AttentionBlock, SharedPrefixLayout

QUANTUM = 16
"""Queries and keys of a block are filled up to a multiple of it."""

MOST_SCORES = 2**20
"""Of a batch: they are written and read a few times, from a cache where they fit."""


@dataclass(frozen=True)
class BlockBatch:
    """B blocks with Q queries and K keys each.

    Rows of queries are those of ``(T * heads, D)``, rows of keys those of ``(T * kv_heads, D)``.
    """

    shape: tuple[int, int, int]
    """``(B * kv_heads, repeats * Q, K)``: the query heads that share a key head are rows of one product with it."""
    query_rows: Tensor
    """``(B * heads * Q,)``; the first row where there is no query."""
    key_rows: Tensor
    """``(B * kv_heads * K,)``."""
    no_query: Tensor
    """Places in ``query_rows`` that hold none."""
    bias: Tensor
    """``(B, Q, K)``: 0 where a query looks, else -inf; what is no query looks everywhere."""

    def bias_of(self, kv_heads: int) -> Tensor:
        """``(B, kv_heads, repeats * Q, K)``; made for every use, because it is as large as the scores."""
        blocks, queries, keys = self.bias.shape
        repeats = self.shape[1] // queries
        bias = self.bias[:, None, None].expand(blocks, kv_heads, repeats, queries, keys)
        return bias.reshape(blocks, kv_heads, repeats * queries, keys)


@dataclass(frozen=True)
class GatheredBlocks:
    """All blocks of a row, and how what they give is put together."""

    batches: tuple[BlockBatch, ...]
    place: Tensor
    """``(T * heads,)``: where each query lies in all batches, one after another; 0 for tokens behind the layout's."""
    members: Tensor
    """Where each key lies in all batches, key by key: ``(T * kv_heads, D)`` gradients are sums over these."""
    num_tokens: int
    """Of the layout."""
    starts: Tensor
    """``(T * kv_heads,)``: where each key's begin in ``members``; tokens behind the layout's have none."""


def gather_blocks(
    layout: SharedPrefixLayout, tokens: int, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype
) -> GatheredBlocks:
    """Made once per row and kind of layer.

    Args:
        layout: of the row.
        tokens: T, of the row with what fills it up.
        heads: of queries.
        kv_heads: of keys and values.
        window: sliding-window width in positions, None for full attention.
        dtype: of the bias.
    """
    by_shape: dict[tuple[int, int], list[AttentionBlock]] = {}
    for block in layout.fine_blocks():
        by_shape.setdefault((_filled(_length(block.query)), _filled(sum(map(_length, block.key_spans)))), []).append(
            block
        )
    batches = []
    place = torch.zeros(tokens, heads, dtype=torch.int64)
    key_tokens, key_places = [], []
    queries_before = keys_before = 0
    for (length, key_length), alike in by_shape.items():
        for blocks in _cut(alike, heads * length * key_length):
            query, is_query = _indices([[block.query] for block in blocks], length)
            key, is_key = _indices([block.key_spans for block in blocks], key_length)
            allowed = layout.allowed(query, key, window) & is_key[:, None] | ~is_query[:, :, None]
            batches.append(_batch(query, is_query, key, allowed, heads, kv_heads, dtype))
            # In the order of the rows of a batch: block, head, token.
            numbers = torch.arange(len(blocks) * heads * length).view(len(blocks), heads, length).transpose(1, 2)
            place[query[is_query]] = queries_before + numbers[is_query]
            numbers = torch.arange(len(blocks) * kv_heads * key_length).view(len(blocks), kv_heads, key_length)
            key_tokens.append(key[is_key])
            key_places.append(keys_before + numbers.transpose(1, 2)[is_key])
            queries_before += len(blocks) * heads * length
            keys_before += len(blocks) * kv_heads * key_length
    # Of each token and key head, in the order of the blocks: sums do not depend on anything else.
    keys = (torch.cat(key_tokens)[:, None] * kv_heads + torch.arange(kv_heads)).flatten()
    members = torch.cat(key_places).flatten()[keys.argsort(stable=True)]
    counts = torch.bincount(keys, minlength=tokens * kv_heads)
    return GatheredBlocks(tuple(batches), place.flatten(), members, layout.num_tokens, counts.cumsum(0) - counts)


def _batch(
    query: Tensor, is_query: Tensor, key: Tensor, allowed: Tensor, heads: int, kv_heads: int, dtype: torch.dtype
) -> BlockBatch:
    repeats, (blocks, length), key_length = heads // kv_heads, query.shape, key.shape[1]
    bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return BlockBatch(
        shape=(blocks * kv_heads, repeats * length, key_length),
        query_rows=(query[:, None] * heads + torch.arange(heads)[:, None]).flatten(),
        key_rows=(key[:, None] * kv_heads + torch.arange(kv_heads)[:, None]).flatten(),
        no_query=(~is_query)[:, None].expand(-1, heads, -1).flatten().nonzero().squeeze(1),
        bias=bias,
    )


def _indices(spans: Sequence[Sequence[tuple[int, int]]], length: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, length)`` of each block's spans, 0 behind them; and which are theirs."""
    tokens = torch.zeros(len(spans), length, dtype=torch.int64)
    theirs = torch.zeros(len(spans), length, dtype=torch.bool)
    for number, some in enumerate(spans):
        run = torch.cat([torch.arange(*span) for span in some])
        tokens[number, : len(run)] = run
        theirs[number, : len(run)] = True
    return tokens, theirs


def _cut(blocks: list[AttentionBlock], scores: int) -> list[list[AttentionBlock]]:
    """Batches of about the same size with at most `MOST_SCORES`, or one block."""
    count = -(-len(blocks) // max(1, MOST_SCORES // scores))
    edges = [len(blocks) * number // count for number in range(count + 1)]
    return [blocks[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _filled(length: int) -> int:
    return length + -length % QUANTUM

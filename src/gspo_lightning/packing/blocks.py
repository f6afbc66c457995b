"""Attention blocks of a row, gathered into batches of equal shape, for CPUs.

A group of the quickstart has 45 + 8 x 16 tokens. Attending to it as one block computes three times as many scores as
are used, and block by block every product is too small for two cores. Here each prompt and every few completions form
a block, padded to common lengths, and all blocks of one shape form one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo_lightning.packing.layout import AttentionBlock, SharedPrefixLayout, may_look

Array = np.ndarray[Any, Any]

QUANTUM = 16
"""The queries and the keys of a block are padded to a multiple of this; many keys, to one of a power of two that is
between an eighth and a quarter of them."""

MOST_SCORES = 2**20
"""Most scores of a batch: they are written and read a few times, from the cache if they fit."""


@dataclass(frozen=True)
class BlockBatch:
    """B blocks with Q queries and K keys each.

    Query rows index ``(T * heads, D)``, key rows index ``(T * kv_heads, D)``.
    """

    shape: tuple[int, int, int]
    """``(B * kv_heads, repeats * Q, K)``: the query heads that share a key head are rows of one product with it."""
    query_rows: Tensor
    """``(B * heads * Q,)``; the first row where there is no query."""
    key_rows: Tensor
    """``(B * kv_heads * K,)``."""
    no_query: Tensor
    """Places in ``query_rows`` that hold no query."""
    bias: Tensor
    """``(B, Q, K)``: 0 where a query may attend, else -inf; 0 throughout for rows that hold no query."""


@dataclass(frozen=True)
class GatheredBlocks:
    """All blocks of a row, and how their results are put together."""

    batches: tuple[BlockBatch, ...]
    place: Tensor
    """``(T * heads,)``: where each query lies in the concatenated batches; 0 for tokens after the layout's."""
    members: Tensor
    """Places of each key in the concatenated batches, key by key: ``(T * kv_heads, D)`` gradients sum over these."""
    num_tokens: int
    """Tokens of the layout."""
    starts: Tensor
    """``(T * kv_heads,)``: where each key's places begin in ``members``; tokens after the layout's have none."""


def gather_blocks(
    layout: SharedPrefixLayout, tokens: int, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype
) -> GatheredBlocks:
    """Gathers the blocks of a row, once per row and kind of layer; from lengths alone, in NumPy, so that it works for
    fake tensors too.

    Args:
        layout: layout of the row.
        tokens: T, the tokens of the row including its filler.
        heads: query heads.
        kv_heads: key/value heads.
        window: sliding-window width in positions, None for full attention.
        dtype: dtype of the bias.
    """
    by_shape: dict[tuple[int, int], list[AttentionBlock]] = {}
    for block in layout.fine_blocks():
        shape = _filled(_length(block.query), QUANTUM), _filled_keys(sum(map(_length, block.key_spans)))
        by_shape.setdefault(shape, []).append(block)
    positions, segments = np.array(layout.position_list()), np.array(layout.segment_list())
    batches = []
    place = np.zeros((tokens, heads), dtype=np.int64)
    key_tokens, key_places = [], []
    queries_before = keys_before = 0
    for (length, key_length), alike in by_shape.items():
        for blocks in _cut(alike, heads * length * key_length):
            query, is_query = _indices([[block.query] for block in blocks], length)
            key, is_key = _indices([block.key_spans for block in blocks], key_length)
            looks = may_look(positions, segments, query, key, window)
            allowed = looks & is_key[:, None] | ~is_query[:, :, None]
            batches.append(_batch(query, is_query, key, allowed, heads, kv_heads, dtype))
            # In the order of the rows of a batch: block, head, token.
            numbers = np.arange(len(blocks) * heads * length).reshape(len(blocks), heads, length)
            place[query[is_query]] = queries_before + numbers.swapaxes(1, 2)[is_query]
            numbers = np.arange(len(blocks) * kv_heads * key_length).reshape(len(blocks), kv_heads, key_length)
            key_tokens.append(key[is_key])
            key_places.append(keys_before + numbers.swapaxes(1, 2)[is_key])
            queries_before += len(blocks) * heads * length
            keys_before += len(blocks) * kv_heads * key_length
    # The places of each token and key head, in the order of the blocks: sums depend on nothing else.
    keys = (np.concatenate(key_tokens)[:, None] * kv_heads + np.arange(kv_heads)).ravel()
    members = np.concatenate(key_places).ravel()[keys.argsort(kind="stable")]
    counts = np.bincount(keys, minlength=tokens * kv_heads)
    return GatheredBlocks(
        tuple(batches),
        torch.from_numpy(place.ravel()),
        torch.from_numpy(members),
        layout.num_tokens,
        torch.from_numpy(counts.cumsum() - counts),
    )


def _batch(
    query: Array, is_query: Array, key: Array, allowed: Array, heads: int, kv_heads: int, dtype: torch.dtype
) -> BlockBatch:
    repeats, (blocks, length), key_length = heads // kv_heads, query.shape, key.shape[1]
    is_head = np.repeat(is_query[:, None], heads, axis=1)
    return BlockBatch(
        shape=(blocks * kv_heads, repeats * length, key_length),
        query_rows=torch.from_numpy((query[:, None] * heads + np.arange(heads)[:, None]).ravel()),
        key_rows=torch.from_numpy((key[:, None] * kv_heads + np.arange(kv_heads)[:, None]).ravel()),
        no_query=torch.from_numpy(np.flatnonzero(~is_head)),
        bias=torch.from_numpy(np.where(allowed, np.float32(0), np.float32(-np.inf))).to(dtype),
    )


def _indices(spans: Sequence[Sequence[tuple[int, int]]], length: int) -> tuple[Array, Array]:
    """Tokens ``(B, length)`` of each block's spans, 0 after them; and a mask of the tokens that are theirs."""
    tokens = np.zeros((len(spans), length), dtype=np.int64)
    theirs = np.zeros((len(spans), length), dtype=bool)
    for number, some in enumerate(spans):
        run = np.concatenate([np.arange(*span) for span in some])
        tokens[number, : len(run)] = run
        theirs[number, : len(run)] = True
    return tokens, theirs


def _cut(blocks: list[AttentionBlock], scores: int) -> list[list[AttentionBlock]]:
    """Batches of about the same size, each with at most `MOST_SCORES` or of one block."""
    count = -(-len(blocks) // max(1, MOST_SCORES // scores))
    edges = [len(blocks) * number // count for number in range(count + 1)]
    return [blocks[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _filled(length: int, quantum: int) -> int:
    return length + -length % quantum


def _filled_keys(length: int) -> int:
    """The keys that a block of so many is padded to. Few of them, since oneDNN keeps a kernel of 0.6 MB per shape."""
    return _filled(length, max(QUANTUM, 2 ** (length.bit_length() - 3)))

"""The shared-prefix layout: one row that holds each prompt once, followed by its completions.

A micro-batch is the row ``[prompt_1, c_11 ... c_1G, prompt_2, c_21 ...]`` without padding. The tokens that all its
prompts begin with, such as a system message, may be in it once too: the row then begins with them, and each prompt
with what follows them. Everything in a transformer but attention works token by token, so only attention has to know
the layout:

* prompt tokens attend causally to their own prompt;
* completion tokens attend to their whole prompt and causally to their own completion.

Masks are derived from lengths alone, never from token values, and are built once per row, not per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from gspo_lightning.packing.blocks import GatheredBlocks
    from gspo_lightning.packing.flash import FlashCalls

WHOLE_GROUP_TOKENS = 256
"""Groups of up to this many tokens take one call; at that size a quadratic mask is cheaper than many calls."""

TILE_QUERIES = 64
"""Longer groups are cut into tiles of whole completions, each with at least this many queries if enough are left."""

FINE_TILE_QUERIES = 32
"""The same for blocks that are gathered into batches: fewer wasted scores, more copies of a prompt's keys."""

WHOLE_PROMPT_TOKENS = 192
"""On CPUs longer prompts are cut into chunks: half of a whole prompt's scores are wasted."""


@dataclass(frozen=True)
class GroupLayout:
    """One prompt and the completions that share it, as token counts."""

    prompt_length: int
    completion_lengths: tuple[int, ...]
    """Forwarded tokens per completion. The last token of a completion predicts nothing and is not among them."""

    @property
    def num_tokens(self) -> int:
        return self.prompt_length + sum(self.completion_lengths)

    def local_positions(self) -> list[int]:
        """Position of every token of the group inside its own sequence."""
        positions = list(range(self.prompt_length))
        for length in self.completion_lengths:
            positions.extend(range(self.prompt_length, self.prompt_length + length))
        return positions

    def segments(self) -> list[int]:
        """0 for prompt tokens, 1..G for the tokens of each completion."""
        ids = [0] * self.prompt_length
        for number, length in enumerate(self.completion_lengths, start=1):
            ids.extend([number] * length)
        return ids


@dataclass(frozen=True)
class AttentionBlock:
    """One attention call: the queries ``query`` of the row against the keys ``key_spans`` of the row."""

    query: tuple[int, int]
    key_spans: tuple[tuple[int, int], ...]
    """Half-open spans; several are concatenated."""
    causal: bool
    """True for a plain causal prompt, which needs no mask."""


@dataclass
class SharedPrefixLayout:
    """The attention blocks of one packed row and, made on first use, their masks."""

    groups: tuple[GroupLayout, ...]
    """Each with its whole prompt."""
    device: torch.device
    common: int = 0
    """Tokens that all prompts begin with and that are in the row once, at its beginning; fewer than any prompt has."""
    may_compile: bool = True
    """False for a row that is used once: no kernel is compiled for it unless the model was told to compile one."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)
    """Masks of the one-kernel form (`gspo_lightning.packing.flex`), by sliding window."""
    flash_calls: FlashCalls | None = field(default=None, repr=False)
    """The kernel calls of `gspo_lightning.packing.flash`."""
    gathered: dict[tuple[Any, ...], GatheredBlocks] = field(default_factory=dict, repr=False)
    """The gathered blocks of `gspo_lightning.packing.blocks`, by tokens, heads, window and dtype."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.blocks = tuple(self._blocks())
        self.positions = torch.tensor(self.position_list(), device=self.device)
        """``(T,)`` position of every token inside its own sequence; every completion continues from its prompt."""
        self._segments = torch.tensor(self.segment_list(), device=self.device)

    @property
    def num_tokens(self) -> int:
        return self.common + sum(group.num_tokens - self.common for group in self.groups)

    def position_list(self) -> list[int]:
        """`positions` as a list of numbers."""
        own = (position for group in self.groups for position in group.local_positions()[self.common :])
        return [*range(self.common), *own]

    def segment_list(self) -> list[int]:
        """0 for every token of a prompt, 1..G for the tokens of its group's completions."""
        own = (segment for group in self.groups for segment in group.segments()[self.common :])
        return [*[0] * self.common, *own]

    def starts(self) -> list[int]:
        """Row position of each group's first token after the common ones."""
        sizes = [group.num_tokens - self.common for group in self.groups]
        return list(accumulate(sizes, initial=self.common))[:-1]

    def prompt_places(self) -> list[Tensor]:
        """For each group ``(P,)``: the row positions of its whole prompt."""
        common, places = torch.arange(self.common), []
        for start, group in zip(self.starts(), self.groups, strict=True):
            own = torch.arange(start, start + group.prompt_length - self.common)
            places.append(torch.cat([common, own]))
        return places

    def owners(self) -> tuple[Tensor, Tensor]:
        """Two ``(T,)`` tensors: the number of each token's prompt or completion, and the number of its prompt.

        The common tokens count as a prompt of their own, with number 0.
        """
        lengths, prompts = [self.common], [0]
        for group in self.groups:
            prompts += [len(prompts)] * (1 + len(group.completion_lengths))
            lengths += [group.prompt_length - self.common, *group.completion_lengths]
        counts = torch.tensor(lengths)
        numbers = torch.arange(len(lengths)).repeat_interleave(counts)
        return numbers.to(self.device), torch.tensor(prompts).repeat_interleave(counts).to(self.device)

    def fine_blocks(self) -> tuple[AttentionBlock, ...]:
        """Blocks to be gathered into batches (`gspo_lightning.packing.blocks`): even small groups are split."""
        return tuple(self._blocks(whole_group=0, tile=FINE_TILE_QUERIES))

    def _blocks(self, whole_group: int = WHOLE_GROUP_TOKENS, tile: int = TILE_QUERIES) -> Iterator[AttentionBlock]:
        before: tuple[tuple[int, int], ...] = ()
        if self.common:
            yield from self._prompt((0, self.common), before)
            before = ((0, self.common),)
        for start, group in zip(self.starts(), self.groups, strict=True):
            end = start + group.num_tokens - self.common
            prompt = (start, start + group.prompt_length - self.common)
            if end == prompt[1]:
                yield from self._prompt(prompt, before)
            elif group.num_tokens <= whole_group:
                yield AttentionBlock((start, end), (*before, (start, end)), causal=False)
            else:
                yield from self._prompt(prompt, before)
                for span in _tiles(prompt[1], group.completion_lengths, tile):
                    for chunk in _chunks(span):
                        yield AttentionBlock(chunk, (*before, prompt, (span[0], chunk[1])), causal=False)

    def _prompt(self, span: tuple[int, int], before: tuple[tuple[int, int], ...]) -> Iterator[AttentionBlock]:
        # The fused kernels of GPUs skip the masked half by themselves.
        is_long = self.device.type == "cpu" and span[1] - span[0] > WHOLE_PROMPT_TOKENS
        for start, end in _chunks(span) if is_long else [span]:
            yield AttentionBlock((start, end), (*before, (span[0], end)), causal=start == span[0] and not before)

    def mask(self, number: int, window: int | None = None) -> Tensor:
        """Boolean ``(queries, keys)`` mask of block ``number``, True where a query may attend to a key.

        ``window`` keeps only keys less than that many positions before their query (sliding-window attention).
        """
        if (number, window) not in self._masks:
            self._masks[number, window] = self._build_mask(self.blocks[number], window)
        return self._masks[number, window]

    def _build_mask(self, block: AttentionBlock, window: int | None) -> Tensor:
        keys = torch.cat([torch.arange(*span, device=self.device) for span in block.key_spans])
        queries = torch.arange(*block.query, device=self.device)
        return may_look(self.positions, self._segments, queries, keys, window)


def may_look(positions: Any, segments: Any, queries: Any, keys: Any, window: int | None) -> Any:
    """Tokens ``(..., Q)`` and ``(..., K)`` of the same groups -> ``(..., Q, K)``, True where a query may attend.

    All arguments are tensors, or all are NumPy arrays; positions and segments are those of the row's tokens.
    """
    segment_q, segment_k = segments[queries][..., None], segments[keys][..., None, :]
    distance = positions[queries][..., None] - positions[keys][..., None, :]
    allowed = ((segment_k == segment_q) | (segment_k == 0)) & (distance >= 0)
    return allowed if window is None else allowed & (distance < window)


def _chunks(tile: tuple[int, int]) -> list[tuple[int, int]]:
    """Spans of a tile from front to back, each of at least ``TILE_QUERIES`` tokens if the tile is that long.

    Keys after the end of a chunk are left out for its queries: half of a long completion's scores are never computed.
    """
    start, end = tile
    count = max(1, (end - start) // TILE_QUERIES)
    edges = [start + (end - start) * number // count for number in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


def _tiles(start: int, lengths: tuple[int, ...], least: int) -> Iterator[tuple[int, int]]:
    """Spans of whole consecutive completions, each closed once it holds at least ``least`` tokens."""
    tile_start = start
    for end in accumulate(lengths, initial=start):
        if end - tile_start >= least:
            yield tile_start, end
            tile_start = end
    end = start + sum(lengths)
    if end > tile_start:
        yield tile_start, end

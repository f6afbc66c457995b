"""The decoding cache of CPUs: rows of a prompt form blocks, and a layer's attention over all blocks is one fused call.

An operation on few numbers takes as long to start as it runs, and attention row by row is many of them. In a block all
rows attend to all keys, and a bias hides from a row what the others have drawn: more products than are needed, but in a
fifth of the operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gspo_lightning.rollout.cache import PrefillCache, align

MOST_ROWS = 8
"""Most rows of a block; half of it if completions may be longer than prompts: most of its keys are then other rows'."""


def rows_per_block(rows: float, prompt_length: int, new_tokens: int) -> int:
    """How many rows share a copy of their prompt.

    Args:
        rows: average number of rows per prompt.
        prompt_length: length of the longest prompt.
        new_tokens: most tokens that a row may draw.
    """
    most = MOST_ROWS if new_tokens <= prompt_length else MOST_ROWS // 2
    return math.ceil(rows / math.ceil(rows / most))


@dataclass(frozen=True)
class _Blocks:
    """The blocks, and the place of each of the R rows in them."""

    width: int
    """Places per block."""
    prompt_of_block: Tensor
    places: Tensor
    """``(R,)``: block times width plus the place in the block; ascending."""

    @property
    def count(self) -> int:
        return len(self.prompt_of_block)

    @property
    def is_full(self) -> bool:
        return len(self.places) == self.count * self.width

    def of_rows(self, x: Tensor) -> Tensor:
        """``(R, ...)`` -> ``(blocks, width, ...)``, zeros in places without a row."""
        if not self.is_full:
            x = x.new_zeros(self.count * self.width, *x.shape[1:]).index_copy_(0, self.places, x)
        return x.unflatten(0, (self.count, self.width))

    def to_rows(self, x: Tensor) -> Tensor:
        """The inverse of `of_rows`: ``(blocks, width, ...)`` -> ``(R, ...)``."""
        x = x.flatten(0, 1)
        return x if self.is_full else x[self.places]

    def prompt_of_row(self) -> Tensor:
        return self.prompt_of_block[self.places // self.width]


def _arranged(prompt_of_row: Tensor, width: int) -> _Blocks:
    """Blocks with rows of one prompt each, filled one after another, in the order of the prompts."""
    counts = torch.bincount(prompt_of_row)
    blocks = counts.add(width - 1).div(width, rounding_mode="floor")
    number = torch.arange(len(prompt_of_row)) - (counts.cumsum(0) - counts)[prompt_of_row]
    first = blocks.cumsum(0) - blocks
    return _Blocks(width, torch.arange(len(counts)).repeat_interleave(blocks), first[prompt_of_row] * width + number)


class BlockCache(Cache):
    """Keys and values of R rows that continue n prompts.

    ``states[layer]`` is ``(2, blocks, kv_heads, P + slots * width, D)`` in the dtype of the products: the prompt of a
    block's rows, right-aligned, and after it, slot by slot, what they have drawn. Rows that end leave holes; once half
    of the places are holes, the remaining rows are compacted. A row with NaNs makes the others of its block NaN too.

    Args:
        prefill: the filled cache of the prompts; emptied here.
        prompt_lengths: lengths of the n prompts.
        repeats: rows per prompt, which are adjacent.
        new_tokens: number of slots.
    """

    def __init__(self, prefill: PrefillCache, prompt_lengths: Sequence[int], repeats: int, new_tokens: int) -> None:
        super().__init__(layers=[])
        self.slots, self.slots_filled = new_tokens, 0
        self._lengths = torch.tensor(prompt_lengths)
        self._longest = max(prompt_lengths)
        prompt_of_row = torch.arange(len(prompt_lengths)).repeat_interleave(repeats)
        self._blocks = _arranged(prompt_of_row, rows_per_block(repeats, self._longest, new_tokens))
        self.states: list[Tensor] = []
        while prefill.states:
            prompts = torch.stack([align(x, prompt_lengths) for x in prefill.states.pop(0)])
            self.states.append(self._with_slots(prompts[:, self._blocks.prompt_of_block]))
        self._layer = 0
        """The layer whose keys were written last, which is the one that attends."""
        self._biases: dict[int, Tensor] = {}

    @property
    def rows(self) -> int:
        """Number of active rows."""
        return len(self._blocks.places)

    @torch.compiler.disable  # slots and rows change with every token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes ``(R, kv_heads, 1, D)`` into the current slot and returns them."""
        self._layer, slot = layer_idx, slice(self._end() - self._blocks.width, self._end())
        for drawn, states in zip(self.states[layer_idx], (key_states, value_states), strict=True):
            drawn[:, :, slot] = self._blocks.of_rows(states[:, :, 0]).transpose(1, 2)
        return key_states, value_states

    def advance(self) -> None:
        """Moves to the next slot; called after the forward of one token."""
        self.slots_filled += 1

    def keep(self, alive: Tensor) -> Tensor:
        """Drops rows where ``alive`` ``(R,)`` is False; returns the old row number of each remaining row."""
        kept = alive.nonzero().squeeze(1)
        now = self._blocks
        self._blocks = _Blocks(now.width, now.prompt_of_block, now.places[kept])
        if 0 < 2 * len(kept) <= now.count * now.width:
            self._move_together()
        return kept

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of ``query`` ``(R, heads, 1, D)`` to all keys of the layer written last, in the same shape."""
        states, blocks = self.states[self._layer], self._blocks
        kv_heads, repeats = states.shape[2], query.shape[1] // states.shape[2]
        by_head = blocks.of_rows(query[:, :, 0]).unflatten(2, (kv_heads, repeats)).transpose(1, 2)
        asked = torch.empty(by_head.shape, dtype=states.dtype).copy_(by_head).flatten(2, 3)
        seen = slice(self._first_seen(window), self._end())
        keys, values = states[:, :, :, seen]
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asked, keys, values, attn_mask=self._bias_for(repeats)[..., seen], scale=scaling
        )
        if sinks is not None:
            logits = sinks.to(total.dtype).view(kv_heads, 1, repeats).expand(-1, blocks.width, -1)
            out = out * torch.sigmoid(total - logits.flatten(1)).unsqueeze(-1)
        out = out.unflatten(2, (blocks.width, repeats)).transpose(1, 2)
        return blocks.to_rows(out).to(query.dtype).reshape(query.shape)

    def _end(self) -> int:
        """End of the keys, those of the current slot included."""
        return self._longest + (self.slots_filled + 1) * self._blocks.width

    def _first_seen(self, window: int | None) -> int:
        """Index of the first key that a window of ``window`` positions shows."""
        if window is None:
            return 0
        slots = min(window, self.slots_filled + 1)
        return self._end() - slots * self._blocks.width - min(window - slots, self._longest)

    def _bias_for(self, repeats: int) -> Tensor:
        """``(blocks, 1, width * repeats, P + slots * width)``: -inf where a query may not attend."""
        if repeats not in self._biases:  # layers may differ in their number of heads
            blocks = self._blocks
            prompt = torch.arange(self._longest) >= (self._longest - self._lengths)[blocks.prompt_of_block, None]
            if prompt.all():
                prompt = prompt[:1]
            own = torch.eye(blocks.width, dtype=torch.bool).repeat_interleave(repeats, 0).repeat(1, self.slots)
            looks = torch.cat([prompt[:, None].expand(-1, len(own), -1), own.expand(len(prompt), -1, -1)], dim=-1)
            bias = torch.zeros(looks.shape, dtype=self.states[0].dtype).masked_fill_(~looks, -torch.inf)
            self._biases[repeats] = bias[:, None].expand(blocks.count, -1, -1, -1)
        return self._biases[repeats]

    def _with_slots(self, prompts: Tensor) -> Tensor:
        """``(2, blocks, kv_heads, P, D)`` -> the same with room for the drawn tokens."""
        room = prompts.new_empty(*prompts.shape[:3], self._longest + self.slots * self._blocks.width, prompts.shape[4])
        room[:, :, :, : self._longest] = prompts
        return room

    def _move_together(self) -> None:
        old = self._blocks
        self._biases.clear()
        prompt_of_row = old.prompt_of_row()
        mean = len(prompt_of_row) / len(prompt_of_row.unique())
        new = self._blocks = _arranged(prompt_of_row, rows_per_block(mean, self._longest, self.slots))
        # Holes hold copies of the first row, which are never read.
        source = old.places.new_zeros(new.count * new.width).index_copy_(0, new.places, old.places)
        block, place = source // old.width, source % old.width
        for layer, states in enumerate(self.states):
            moved = self._with_slots(states[:, block[:: new.width], :, : self._longest])
            drawn = states[:, :, :, self._longest :].unflatten(3, (self.slots, old.width))[:, :, :, : self.slots_filled]
            rows = drawn[:, block, :, :, place].unflatten(0, (new.count, new.width))
            moved[:, :, :, self._longest :].unflatten(3, (self.slots, new.width))[:, :, :, : self.slots_filled] = (
                rows.permute(2, 0, 3, 4, 1, 5)
            )
            self.states[layer] = moved

"""The decoding cache of GPUs: read by FlashAttention, and at the same memory addresses from token to token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gspo_lightning.packing.flash import Part, Spans, add_part, flash_forward
from gspo_lightning.packing.products import product_dtype
from gspo_lightning.rollout.cache import PrefillCache, moves


class FlashCache(Cache):
    """Keys and values of R rows that continue n prompts, in bfloat16 or float16.

    As in `DecodeCache` a prompt is kept and read once, and what the rows draw is kept apart, in places that rows from
    the end take when others leave. All that changes from token to token is numbers in tensors, so that a step can be
    recorded in a CUDA graph (`gspo_lightning.rollout.steps`): a graph computes all rows that it was recorded with,
    including those that have left since, whose results are never read.

    Args:
        prefill: the filled cache of the prompts; emptied here.
        prompt_lengths: lengths of the n prompts.
        repeats: rows per prompt, which are adjacent at first.
        new_tokens: number of slots.
    """

    def __init__(self, prefill: PrefillCache, prompt_lengths: Sequence[int], repeats: int, new_tokens: int) -> None:
        super().__init__(layers=[])
        self.rows = len(prompt_lengths) * repeats
        """Rows that a step computes."""
        self.live = self.rows
        """Active rows, which come first."""
        self.slots, self.slots_filled, self._is_held = new_tokens, 0, False
        self.prompts: list[tuple[Tensor, Tensor]] = []
        self.drawn: list[Tensor] = []
        while prefill.states:
            keys, values = (_by_token(x) for x in prefill.states.pop(0))
            self.prompts.append((keys, values))
            self.drawn.append(values.new_empty(2, self.rows, new_tokens, *values.shape[1:]))
        self._device = self.drawn[0].device
        self._prompt_of_row = torch.arange(len(prompt_lengths), device=self._device).repeat_interleave(repeats)
        self._prompt_ends = _ends(torch.tensor(prompt_lengths, device=self._device))
        self._longest_prompt = max([2, *prompt_lengths])
        self._slot = torch.zeros(1, dtype=torch.long, device=self._device)
        self._layer = 0
        self._fit()

    def hold(self) -> None:
        """Fixes a step's rows to those active now: its tensors keep their addresses even when rows leave."""
        self._fit()
        self._is_held = True

    def _fit(self) -> None:
        """Makes a step compute the rows that are active now."""
        self.rows = self.live
        self._prompt_of_row = self._prompt_of_row[: self.rows].clone()
        self._used = torch.full((self.rows,), self.slots_filled + 1, dtype=torch.int32, device=self._device)
        numbers = torch.arange(self.rows + 1, dtype=torch.int32, device=self._device)
        self._own = Spans(numbers, numbers * self.slots, 2, max(2, self.slots), False, keys_used=self._used)
        self._order = torch.empty_like(self._prompt_of_row)
        row_ends = torch.empty_like(self._prompt_ends)
        self._shared = Spans(row_ends, self._prompt_ends, max(2, self.rows), self._longest_prompt, False)
        self._arrange()

    @torch.compiler.disable  # else every layer would need its own graph
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes ``(R, kv_heads, 1, D)`` into the current slot and returns them."""
        self._layer = layer_idx
        for place, states in zip(self.drawn[layer_idx], (key_states, value_states), strict=True):
            place[: self.rows].index_copy_(1, self._slot, states.transpose(1, 2).to(place.dtype))
        return key_states, value_states

    def advance(self) -> None:
        """Moves to the next slot; called after the forward of one token."""
        self.slots_filled += 1
        self._slot += 1
        self._used += 1

    def keep(self, alive: Tensor) -> Tensor:
        """Drops rows where ``alive`` ``(R,)`` is False; returns the old row number of each remaining row."""
        kept, holes, movers = moves(alive)
        if len(holes):
            for drawn in self.drawn:
                drawn[:, holes, : self.slots_filled] = drawn[:, movers, : self.slots_filled]
        self._prompt_of_row[holes] = self._prompt_of_row[movers]
        self.live = len(kept)
        if self._is_held:
            self._arrange()
        else:
            self._fit()
        return kept

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of ``query`` ``(R, heads, 1, D)`` to all keys of the layer written last, in the same shape."""
        assert window is None and sinks is None
        asked = query[:, :, 0].to(self.drawn[0].dtype)
        keys, values = (x[: self.rows].flatten(0, 1) for x in self.drawn[self._layer])
        own = flash_forward(asked, keys, values, self._own, scaling)
        of_prompts: Part = flash_forward(asked[self._order], *self.prompts[self._layer], self._shared, scaling)
        add_part(own, of_prompts, self._order)
        return own[0][:, :, None].to(query.dtype)

    def _arrange(self) -> None:
        """Updates the order of the rows by prompt, and where each prompt's rows end."""
        self._order.copy_(torch.argsort(self._prompt_of_row, stable=True))
        self._shared.query_ends.copy_(_ends(torch.bincount(self._prompt_of_row, minlength=len(self._prompt_ends) - 1)))


def _by_token(x: Tensor) -> Tensor:
    """``(1, kv_heads, T, D)`` -> a copy ``(T, kv_heads, D)`` in the dtype of the products."""
    return x[0].transpose(0, 1).to(product_dtype(x), copy=True, memory_format=torch.contiguous_format)


def _ends(lengths: Tensor) -> Tensor:
    """Lengths ``(n,)`` -> their cumulative sums ``(n + 1,)`` int32, beginning with 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

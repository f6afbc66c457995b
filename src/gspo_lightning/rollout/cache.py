"""Key/value caches of the in-process engine: filled once per prompt, written in place while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gspo_lightning.packing.products import product_dtype
from gspo_lightning.rollout.cascade import Partial, combine, partial_attention


class PrefillCache(Cache):
    """Keeps the keys and values of one packed forward over unique prompts."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[tuple[Tensor, Tensor]] = []

    @torch.compiler.disable  # slots and rows change with every token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores ``(1, kv_heads, T, D)`` of layer ``layer_idx``."""
        assert layer_idx == len(self.states)
        self.states.append((key_states, value_states))
        return key_states, value_states


class DecodeCache(Cache):
    """Keys and values of R rows that go on from n prompts, in the dtype attention computes in.

    A prompt is kept and read once per token, however many rows go on from it: ``prompts[layer]`` is
    ``(2, n, kv_heads, P, D)``, right-aligned. What the rows draw has a place of its own, ``drawn[layer]``
    ``(2, R, kv_heads, slots, D)``, preallocated; all rows write the same slot. Rows that finish are dropped by moving
    rows from the end into their place: copying is proportional to what finished, not to what goes on. Prompts without
    rows are dropped when they are half of all.

    Args:
        prefill: of the prompts; emptied.
        prompt_lengths: of the n prompts.
        repeats: rows per prompt, which lie together at first.
        new_tokens: slots.
    """

    def __init__(self, prefill: PrefillCache, prompt_lengths: Sequence[int], repeats: int, new_tokens: int) -> None:
        super().__init__(layers=[])
        self.rows = len(prompt_lengths) * repeats
        self.slots_filled = 0
        self.prompts: list[Tensor] = []
        self.drawn: list[Tensor] = []
        while prefill.states:
            prompts = _align(*prefill.states.pop(0), prompt_lengths)
            self.prompts.append(prompts)
            self.drawn.append(prompts.new_empty(2, self.rows, prompts.shape[2], new_tokens, prompts.shape[4]))
        device = self.prompts[0].device
        self.prompt_of_row = torch.arange(len(prompt_lengths), device=device).repeat_interleave(repeats)
        self.layer = 0
        """The one whose keys were written last, which is the one that attends."""
        self._padding = _padding(prompt_lengths, self.prompts[0])
        self._arrange()

    @torch.compiler.disable  # slots and rows change with every token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes ``(R, kv_heads, 1, D)`` into the current slot and returns all filled slots of what was drawn."""
        self.layer, drawn = layer_idx, self.drawn[layer_idx]
        drawn[0, : self.rows, :, self.slots_filled] = key_states[:, :, 0]
        drawn[1, : self.rows, :, self.slots_filled] = value_states[:, :, 0]
        filled = drawn[:, : self.rows, :, : self.slots_filled + 1]
        return filled[0], filled[1]

    def advance(self) -> None:
        """The forward of one token is over."""
        self.slots_filled += 1

    def keep(self, alive: Tensor) -> Tensor:
        """Drops rows where ``alive`` ``(R,)`` is False; returns the old row number of each remaining row."""
        order = torch.arange(self.rows, device=alive.device)
        count = int(alive.sum())
        if count == self.rows:
            return order
        holes = (~alive[:count]).nonzero().squeeze(1)
        movers = count + alive[count:].nonzero().squeeze(1)
        order[holes] = movers
        if len(holes):
            for drawn in self.drawn:
                drawn[:, holes, :, : self.slots_filled] = drawn[:, movers, :, : self.slots_filled]
        self.rows = count
        self.prompt_of_row = self.prompt_of_row[order[:count]]
        self._drop_prompts()
        self._arrange()
        return order[:count]

    def layout(self) -> DecodeLayout:
        """The attention of the next token."""
        return DecodeLayout(self)

    def attend_to_prompts(self, query: Tensor, reach: int | None, scaling: float) -> Partial:
        """Attention of ``query`` ``(R, kv_heads, repeats, D)`` to the prompt of each row.

        Args:
            query: of the layer in hand, query heads that share a key head together.
            reach: so many of the last slots of the prompts are seen; None for all.
            scaling: factor on the scores.
        """
        rows, kv_heads, repeats, size = query.shape
        prompts = self.prompts[self.layer]
        slots = prompts.shape[3] if reach is None else min(reach, prompts.shape[3])
        key, value = prompts[..., -slots:, :]
        bias = None if self._padding is None else self._padding[..., -slots:]
        # All rows of a prompt are queries of one call: (n, kv_heads, most * repeats, D).
        if self._places is None:
            grid = query
        else:
            grid = query.new_zeros(len(key) * self._most, kv_heads, repeats, size)
            grid[self._places] = query
        grid = grid.view(len(key), self._most, kv_heads, repeats, size).transpose(1, 2).flatten(2, 3)
        out, total = partial_attention(grid, key, value, bias, scaling)
        out = out.unflatten(2, (self._most, repeats)).transpose(1, 2).flatten(0, 1)
        total = total.unflatten(2, (self._most, repeats)).transpose(1, 2).flatten(0, 1)
        return (out, total) if self._places is None else (out[self._places], total[self._places])

    def _drop_prompts(self) -> None:
        total = self.prompts[0].shape[1]
        live = self.prompt_of_row.unique()
        if not 0 < 2 * len(live) <= total:
            return
        for layer, prompts in enumerate(self.prompts):
            self.prompts[layer] = prompts[:, live]
        if self._padding is not None:
            self._padding = self._padding[live]
        self.prompt_of_row = torch.searchsorted(live, self.prompt_of_row)

    def _arrange(self) -> None:
        """The place of each row in a table of prompts by rows; None if the rows fill it in order."""
        of_prompt = torch.nn.functional.one_hot(self.prompt_of_row, self.prompts[0].shape[1])
        counts = of_prompt.cumsum(0)
        self._most = int(counts[-1].max()) if self.rows else 0
        number = counts.gather(1, self.prompt_of_row[:, None]).squeeze(1) - 1
        places = self.prompt_of_row * self._most + number
        in_order = torch.equal(places, torch.arange(self.prompts[0].shape[1] * self._most, device=places.device))
        self._places: Tensor | None = None if in_order else places


class DecodeLayout:
    """One new token per row looks at its prompt and at what its row has drawn."""

    def __init__(self, cache: DecodeCache) -> None:
        self.cache = cache

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """``query`` ``(R, heads, 1, D)`` against ``(R, kv_heads, slots, D)``; returns ``(R, heads, 1, D)``.

        The query heads that share a key head are taken as several queries of it, so keys are never repeated.
        """
        rows, heads, _, size = query.shape
        grouped = query.to(key.dtype).view(rows, key.shape[1], heads // key.shape[1], size)
        near = slice(None) if window is None else slice(-window, None)
        parts = [partial_attention(grouped, key[:, :, near], value[:, :, near], None, scaling)]
        reach = None if window is None else window - key.shape[2]
        if reach is None or reach > 0:
            parts.append(self.cache.attend_to_prompts(grouped, reach, scaling))
        return combine(parts, sinks).to(key.dtype).reshape(rows, heads, 1, size)


def _align(key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed ``(1, kv_heads, T, D)`` keys and values -> ``(2, n, kv_heads, P, D)``, right-aligned."""
    _, heads, _, size = key.shape
    aligned = torch.zeros(2, len(lengths), heads, max(lengths), size, dtype=product_dtype(key), device=key.device)
    start = 0
    for row, length in enumerate(lengths):
        aligned[0, row, :, -length:] = key[0, :, start : start + length]
        aligned[1, row, :, -length:] = value[0, :, start : start + length]
        start += length
    return aligned


def _padding(lengths: Sequence[int], like: Tensor) -> Tensor | None:
    """``(n, 1, 1, P)`` term of the scores that hides what is in front of shorter prompts; None if none is shorter."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    hidden = torch.arange(longest) < longest - torch.tensor(lengths)[:, None]
    return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)[:, None, None].to(like.device)

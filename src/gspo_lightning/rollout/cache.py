"""Key/value caches of the in-process engine: filled once per prompt, written in place while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from gspo_lightning.packing.attention import attend


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
    """Preallocated keys and values of R rows; prompts end at the same slot, so all rows write the same slot.

    They are kept in the dtype attention computes in: under autocast a float32 cache would be cast whole at every token.

    ``buffers[layer]`` is ``(2, R, kv_heads, slots, D)``. The first ``slots_filled`` slots hold tokens; row r uses
    those from ``slots_prompt - prompt_length_r`` on. Rows that finish are dropped by moving rows from the end
    into their place: copying is proportional to what finished, not to what goes on.
    """

    def __init__(self, prefill: PrefillCache, prompt_lengths: Sequence[int], repeats: int, new_tokens: int) -> None:
        super().__init__(layers=[])
        self.slots_prompt = max(prompt_lengths)
        self.slots_filled = self.slots_prompt
        self.rows = len(prompt_lengths) * repeats
        self.buffers = [
            _spread(key, value, prompt_lengths, repeats, self.slots_prompt + new_tokens)
            for key, value in prefill.states
        ]
        prefill.states.clear()
        device = self.buffers[0].device
        start = torch.tensor([self.slots_prompt - n for n in prompt_lengths], device=device).repeat_interleave(repeats)
        slots = torch.arange(self.slots_prompt + new_tokens, device=device)
        self.visible = slots >= start[:, None]

    @torch.compiler.disable  # slots and rows change with every token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes ``(R, kv_heads, 1, D)`` into the current slot and returns all filled slots."""
        buffer = self.buffers[layer_idx]
        buffer[0, : self.rows, :, self.slots_filled] = key_states[:, :, 0]
        buffer[1, : self.rows, :, self.slots_filled] = value_states[:, :, 0]
        filled = buffer[:, : self.rows, :, : self.slots_filled + 1]
        return filled[0], filled[1]

    def advance(self) -> None:
        """The forward of one token is over."""
        self.slots_filled += 1

    def keep(self, alive: Tensor) -> Tensor:
        """Drops rows where ``alive`` ``(R,)`` is False; returns the old row number of each remaining row."""
        order = torch.arange(self.rows, device=alive.device)
        count = int(alive.sum())
        holes = (~alive[:count]).nonzero().squeeze(1)
        movers = count + alive[count:].nonzero().squeeze(1)
        order[holes] = movers
        if len(holes):
            for buffer in self.buffers:
                buffer[:, holes, :, : self.slots_filled] = buffer[:, movers, :, : self.slots_filled]
            self.visible[holes] = self.visible[movers]
        self.rows = count
        return order[:count]

    def layout(self) -> DecodeLayout:
        """The attention of the next token."""
        return DecodeLayout(self.visible[: self.rows, : self.slots_filled + 1])


class DecodeLayout:
    """One new token per row looks at the visible slots of its row."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self._masks: dict[int | None, Tensor] = {}
        self._biases: dict[int | None, Tensor] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """``query`` ``(R, heads, 1, D)`` against ``(R, kv_heads, slots, D)``; returns ``(R, heads, 1, D)``.

        The query heads that share a key head are taken as several queries of it, so keys are never repeated.
        """
        rows, heads, _, size = query.shape
        mask = self._mask(window)
        if sinks is not None:
            repeats = heads // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            return attend(query, key, value, mask, scaling=scaling, sinks=sinks)
        grouped = query.to(key.dtype).view(rows, key.shape[1], heads // key.shape[1], size)
        bias = self._bias(window, key.dtype)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling)
        return out.reshape(rows, heads, 1, size)

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask as a term of the scores, made once per token: every layer would convert a boolean mask again."""
        if window not in self._biases:
            mask = self._mask(window)
            self._biases[window] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, -torch.inf
            )
        return self._biases[window]

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            slots = torch.arange(self.visible.shape[1], device=self.visible.device)
            near = self.visible if window is None else self.visible & (slots > slots[-1] - window)
            self._masks[window] = near[:, None, None, :]
        return self._masks[window]


def _spread(key: Tensor, value: Tensor, prompt_lengths: Sequence[int], repeats: int, slots: int) -> Tensor:
    """Packed ``(1, kv_heads, T, D)`` keys and values -> ``(2, rows, kv_heads, slots, D)``, prompts right-aligned."""
    _, heads, _, size = key.shape
    kind = key.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key.dtype
    buffer = torch.zeros(2, len(prompt_lengths), repeats, heads, slots, size, dtype=dtype, device=key.device)
    end_slot, start = max(prompt_lengths), 0
    for row, length in enumerate(prompt_lengths):
        span, place = slice(start, start + length), slice(end_slot - length, end_slot)
        buffer[0, row, :, :, place] = key[0, :, span]
        buffer[1, row, :, :, place] = value[0, :, span]
        start += length
    return buffer.view(2, len(prompt_lengths) * repeats, heads, slots, size)

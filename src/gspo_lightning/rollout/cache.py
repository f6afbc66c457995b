"""Key/value caches of the in-process engine: filled once per prompt, written in place while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gspo_lightning.packing.products import product_dtype

KeysValues = tuple[Tensor, Tensor]
"""``(rows, kv_heads, tokens, D)`` each."""


class PrefillCache(Cache):
    """Keeps the keys and values of one packed forward over unique prompts, prompt after prompt.

    Args:
        places: the row positions of each prompt's tokens; those that prompts have in common occur several times.
    """

    def __init__(self, places: Tensor) -> None:
        super().__init__(layers=[])
        self.places = places
        self.states: list[KeysValues] = []

    @torch.compiler.disable  # slots and rows change with every token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores ``(1, kv_heads, T, D)`` of layer ``layer_idx``, without filler."""
        assert layer_idx == len(self.states)
        self.states.append((key_states.index_select(2, self.places), value_states.index_select(2, self.places)))
        return key_states, value_states


def joined(parts: Sequence[PrefillCache]) -> PrefillCache:
    """One cache of the tokens of all parts (at least one), in order; the parts are emptied, layer by layer."""
    whole, *others = parts
    for layer in range(len(whole.states) if others else 0):
        states = [whole.states[layer], *(part.states.pop(0) for part in others)]
        keys, values = (torch.cat(kind, dim=2) for kind in zip(*states, strict=True))
        whole.states[layer] = (keys, values)
    return whole


class DecodeCache(Cache):
    """Keys and values of R rows that continue n prompts, on any device and for any architecture.

    A prompt is kept once and read once per token, however many rows continue it: ``prompts[layer]`` are keys and values
    ``(n, kv_heads, P, D)``, right-aligned. What the rows draw is kept apart, in ``drawn[layer]``
    ``(2, R, kv_heads, slots, D)``, preallocated; all rows write the same slot. Rows that finish are dropped by moving
    rows from the end into their place: copying is proportional to the finished rows, not to the active ones. Prompts
    without rows are dropped when they are half of all.

    The numbers are rounded to the dtype of the products, as in training.

    Args:
        prefill: the filled cache of the prompts; emptied here.
        prompt_lengths: lengths of the n prompts.
        repeats: rows per prompt, which are adjacent at first.
        new_tokens: number of slots.
    """

    def __init__(self, prefill: PrefillCache, prompt_lengths: Sequence[int], repeats: int, new_tokens: int) -> None:
        super().__init__(layers=[])
        self.rows = len(prompt_lengths) * repeats
        self.slots_filled = 0
        self.prompts: list[KeysValues] = []
        self.drawn: list[Tensor] = []
        device = prefill.states[0][0].device
        while prefill.states:
            keys, values = (align(x, prompt_lengths) for x in prefill.states.pop(0))
            self.prompts.append((keys, values))
            self.drawn.append(values.new_empty(2, self.rows, values.shape[1], new_tokens, values.shape[3]))
        self.prompt_of_row = torch.arange(len(prompt_lengths), device=device).repeat_interleave(repeats)
        self.layer = 0
        """The layer whose keys were written last, which is the one that attends."""
        self._padding = _padding(prompt_lengths, self.prompts[0][0])
        self._arrange()

    @torch.compiler.disable  # slots and rows change with every token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes ``(R, kv_heads, 1, D)`` into the current slot and returns all filled slots."""
        self.layer, drawn = layer_idx, self.drawn[layer_idx]
        for place, states in zip(drawn, (key_states, value_states), strict=True):
            place[: self.rows, :, self.slots_filled] = states[:, :, 0].to(product_dtype(states))
        filled = drawn[:, : self.rows, :, : self.slots_filled + 1]
        return filled[0], filled[1]

    def advance(self) -> None:
        """Moves to the next slot; called after the forward of one token."""
        self.slots_filled += 1

    def keep(self, alive: Tensor) -> Tensor:
        """Drops rows where ``alive`` ``(R,)`` is False; returns the old row number of each remaining row."""
        kept, holes, movers = moves(alive)
        if len(kept) == self.rows:
            return kept
        if len(holes):
            for drawn in self.drawn:
                drawn[:, holes, :, : self.slots_filled] = drawn[:, movers, :, : self.slots_filled]
        self.rows = len(kept)
        self.prompt_of_row = self.prompt_of_row[kept]
        self._drop_prompts()
        self._arrange()
        return kept

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """``query`` ``(R, heads, 1, D)`` against ``(R, kv_heads, slots, D)`` and the prompts -> ``(R, heads, 1, D)``.

        A prompt's keys are one operand for all rows that continue it ("cascade" or "Hydragen" attention, arXiv
        2402.05099). The query heads that share a key head are treated as several queries, so keys are never repeated.
        Scores and sums are in float32 or wider, computed from numbers in the dtype of the products.
        """
        grouped = query.to(product_dtype(query)).view(len(query), key.shape[1], -1, query.shape[3])
        reach = None if window is None else max(0, window - key.shape[2])
        near = slice(None) if window is None else slice(-window, None)
        with torch.autocast(query.device.type, enabled=False):
            out = self._products(grouped, key[:, :, near], value[:, :, near], reach, scaling, sinks)
        return out.to(query.dtype).reshape(query.shape)

    def _products(
        self, query: Tensor, key: Tensor, value: Tensor, reach: int | None, scaling: float, sinks: Tensor | None
    ) -> Tensor:
        """One softmax over the scores of prompts and drawn tokens, by plain batched products."""
        rows, kv_heads = query.shape[:2]
        wide = torch.promote_types(query.dtype, torch.float32)

        def operand(x: Tensor) -> Tensor:
            return x.flatten(0, 1).to(wide)

        prompt_key, prompt_value, padding = self._seen_of_prompts(reach)
        scaled = query.to(wide) * scaling
        to_prompts = torch.bmm(self._by_prompt(scaled), operand(prompt_key).mT)
        if padding is not None:
            to_prompts.unflatten(0, (-1, kv_heads)).add_(padding)
        to_drawn = torch.bmm(operand(scaled), operand(key).mT).unflatten(0, (rows, kv_heads))
        scores = [self._by_row(to_prompts, kv_heads), to_drawn]
        if sinks is not None:
            scores.append(sinks.to(wide).view(kv_heads, -1, 1).expand(rows, -1, -1, 1))
        weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1)
        to_prompts, to_drawn = weights.split([x.shape[-1] for x in scores], dim=-1)[:2]
        out = self._by_row(torch.bmm(self._by_prompt(to_prompts), operand(prompt_value)), kv_heads)
        return torch.baddbmm(operand(out), operand(to_drawn), operand(value)).view(query.shape)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """``(R, kv_heads, repeats, E)`` -> ``(n * kv_heads, most * repeats, E)``: one block per prompt and key head."""
        (_, kv_heads, repeats, size), prompts = x.shape, len(self.prompts[0][0])
        if self._places is not None:
            grid = x.new_zeros(prompts * self._most, kv_heads, repeats, size)
            grid[self._places] = x
            x = grid
        x = x.view(prompts, self._most, kv_heads, repeats, size).transpose(1, 2)
        return x.reshape(prompts * kv_heads, self._most * repeats, size)

    def _by_row(self, x: Tensor, kv_heads: int) -> Tensor:
        """The inverse of `_by_prompt`."""
        x = x.view(len(x) // kv_heads, kv_heads, self._most, x.shape[1] // self._most, x.shape[2])
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self._places is None else x[self._places]

    def _seen_of_prompts(self, reach: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values ``(n, kv_heads, P, D)`` of the current layer, and a mask term for padding ``(n, 1, 1, P)``.

        Args:
            reach: number of last slots of the prompts that are seen; None for all.
        """
        keys, values = self.prompts[self.layer]
        first = 0 if reach is None else max(0, keys.shape[2] - reach)
        padding = None if self._padding is None else self._padding[..., first:]
        return keys[:, :, first:], values[:, :, first:], padding

    def _drop_prompts(self) -> None:
        total = len(self.prompts[0][0])
        live = self.prompt_of_row.unique()
        if not 0 < 2 * len(live) <= total:
            return
        for layer, (keys, values) in enumerate(self.prompts):
            self.prompts[layer] = keys[live], values[live]
        if self._padding is not None:
            self._padding = self._padding[live]
        self.prompt_of_row = torch.searchsorted(live, self.prompt_of_row)

    def _arrange(self) -> None:
        """Computes each row's place in a table of prompts by rows; None if the rows fill it in order."""
        of_prompt = torch.nn.functional.one_hot(self.prompt_of_row, len(self.prompts[0][0]))
        counts = of_prompt.cumsum(0)
        self._most = int(counts[-1].max()) if self.rows else 0
        number = counts.gather(1, self.prompt_of_row[:, None]).squeeze(1) - 1
        places = self.prompt_of_row * self._most + number
        in_order = torch.equal(places, torch.arange(of_prompt.shape[1] * self._most, device=places.device))
        self._places: Tensor | None = None if in_order else places


def moves(alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Old numbers of the rows that stay, in their new order; the places to fill, and the rows that fill them.

    Args:
        alive: ``(R,)`` bool.
    """
    count = int(alive.sum())
    kept = torch.arange(count, device=alive.device)
    holes = (~alive[:count]).nonzero().squeeze(1)
    movers = count + alive[count:].nonzero().squeeze(1)
    kept[holes] = movers
    return kept, holes, movers


def align(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed ``(1, kv_heads, T, D)`` -> ``(n, kv_heads, P, D)``, right-aligned, in the dtype of the products.

    Args:
        x: the prompts' tokens, prompt after prompt.
        lengths: lengths of the prompts.
    """
    x = x.to(product_dtype(x))
    aligned = x.new_zeros(len(lengths), x.shape[1], max(lengths), x.shape[3])
    for row, part in enumerate(x[0].split(list(lengths), dim=1)):
        aligned[row, :, -part.shape[1] :] = part
    return aligned


def _padding(lengths: Sequence[int], like: Tensor) -> Tensor | None:
    """``(n, 1, 1, P)`` term of the scores that hides the padding before shorter prompts; None if none is shorter."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    hidden = torch.arange(longest) < longest - torch.tensor(lengths)[:, None]
    return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)[:, None, None].to(like.device)

"""A decoding cache whose tensors keep their shapes and places in memory: what a CUDA graph needs.

Every step looks at the same number of slots, of which those not filled yet are hidden; rows that have ended are
computed on as if they had not, and nobody reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_lightning.packing.products import product_dtype


class FixedShapes:
    """What changes from token to token, in tensors of its own.

    Args:
        rows: of a step, those that have ended included.
        width: slots that a step looks at.
        places: in the cache's table of prompts by rows; as many as rows, or more.
        like: of the device of the cache.
    """

    def __init__(self, rows: int, width: int, places: int, like: Tensor) -> None:
        self.rows, self.width = rows, width
        self._slot = torch.zeros(1, dtype=torch.long, device=like.device)
        self._slots = torch.arange(width, device=like.device)
        self._is_unfilled = self._slots > 0
        self._all_places = torch.arange(places, device=like.device)
        self._places = self._all_places[:rows].clone()

    def begin(self, slot: int) -> None:
        """The next token goes into this slot."""
        self._slot.fill_(slot)
        torch.gt(self._slots, self._slot, out=self._is_unfilled)

    def write(self, drawn: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Puts ``(R, kv_heads, 1, D)`` into the slot in hand; returns the slots ``(R, kv_heads, width, D)``."""
        for place, states in zip(drawn, (key_states, value_states), strict=True):
            place[: self.rows].index_copy_(2, self._slot, states.to(product_dtype(states)).to(place.dtype))
        seen = drawn[:, : self.rows, :, : self.width]
        return seen[0], seen[1]

    def hide_unfilled(self, scores: Tensor) -> None:
        """Scores ``(..., width)`` of slots behind the one in hand become minus infinity."""
        scores.masked_fill_(self._is_unfilled, -torch.inf)

    def arrange(self, places: Tensor) -> Tensor:
        """The places of all rows, in the same memory every time: the given ones, and free ones for rows that ended."""
        free = torch.ones_like(self._all_places, dtype=torch.bool)
        free[places] = False
        ended = self.rows - len(places)
        self._places.copy_(torch.cat([places, self._all_places[free][:ended]]))
        return self._places

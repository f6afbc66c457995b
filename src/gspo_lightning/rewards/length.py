"""Rewards for length, in tokens of the completion (the end-of-sequence token included if it was sampled).

In a dialogue, `LengthTarget` counts the tokens that the policy sampled; `SoftOverlong`, which guards
``rollout.max_completion_length``, counts the environment's tokens too, as that limit does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class SoftOverlong:
    """Soft overlong punishment, eq. 13 of DAPO (arXiv 2503.14476).

    0 up to ``max_tokens - cache_tokens``, then linear to -1 at ``max_tokens``, and -1 beyond.

    Args:
        max_tokens: L_max, usually ``rollout.max_completion_length``.
        cache_tokens: L_cache, the width of the slope; None: a fifth of ``max_tokens``, as in the paper (4096 of 20480).
    """

    max_tokens: int
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"SoftOverlong.max_tokens={self.max_tokens} must be at least 1")
        if not 0 < self.slope <= self.max_tokens:
            raise UserError(
                f"SoftOverlong.cache_tokens={self.cache_tokens} must be at least 1 and at most "
                f"max_tokens={self.max_tokens}"
            )

    @property
    def slope(self) -> int:
        """Tokens over which the value falls from 0 to -1."""
        return max(1, self.max_tokens // 5) if self.cache_tokens is None else self.cache_tokens

    def __call__(self, completion_ids: list[Any], **_: Any) -> list[float]:
        """One value in [-1, 0] per completion."""
        free = self.max_tokens - self.slope
        return [min(0.0, max(-1.0, (free - len(ids)) / self.slope)) for ids in completion_ids]


@dataclass(frozen=True)
class LengthTarget:
    """1 at ``target_tokens``, falling linearly to 0 at ``tolerance_tokens`` more or fewer.

    Args:
        target_tokens: the desired length.
        tolerance_tokens: distance from the target at which the reward reaches 0.
    """

    target_tokens: int
    tolerance_tokens: int

    def __post_init__(self) -> None:
        for name in ("target_tokens", "tolerance_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"LengthTarget.{name}={getattr(self, name)} must be at least 1")

    def __call__(self, completion_ids: list[Any], policy_tokens: list[int] | None = None, **_: Any) -> list[float]:
        """One value in [0, 1] per completion."""
        lengths = policy_tokens or list(map(len, completion_ids))
        return [max(0.0, 1 - abs(length - self.target_tokens) / self.tolerance_tokens) for length in lengths]

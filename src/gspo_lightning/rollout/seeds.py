"""One number for (seed of the run, rollout), from which a rollout's random numbers derive, also in a resumed run."""

from __future__ import annotations

_STRIDE = 1_000_003
"""Prime, and more than the rollouts of any run."""


def rollout_seed(seed: int, rollout: int) -> int:
    """The seed of rollout ``rollout`` (from 0) of a run."""
    return seed * _STRIDE + rollout


def rollout_of_seed(seed: int) -> int:
    """The rollout that a seed of `rollout_seed` belongs to."""
    return seed % _STRIDE

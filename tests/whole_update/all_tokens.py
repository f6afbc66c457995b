"""Runs of REINFORCE++, whose completions are compared with all tokens of the rollout, on all ranks."""

from __future__ import annotations

from tests.whole_update.case import Case

AGAINST_ALL_TOKENS: tuple[Case, ...] = (
    Case(seed=97_000, level="token", prompts=4, plus_plus="reward", turns="dialogue", minibatches=2),
    Case(seed=97_001, prompts=4, generations=1, plus_plus="reward", rewards="binary", rollouts=2, beta=0.04),
    Case(seed=97_002, loss="reinforce", prompts=4, plus_plus="group", rewards="binary", rollouts=2, max_draws=2),
    Case(seed=97_003, prompts=4, plus_plus="reward", rewards="silent", iterations=2),
)

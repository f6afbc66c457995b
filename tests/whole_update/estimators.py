"""Runs with the advantage estimators that are not drawn, alone and with what else changes advantages."""

from __future__ import annotations

from dataclasses import replace

from tests.whole_update.case import Case

BEST = Case(
    level="token", prompts=4, iterations=2, minibatches=2, lr=0.05, max_grad_norm=1.0, rewards="binary", pass_at_k=2
)  # fmt: skip

OF_ESTIMATORS: tuple[Case, ...] = (
    # the best of k
    replace(BEST, seed=94_000, generations=6, pass_at_k=3),
    replace(BEST, seed=94_001, generations=5, rewards="random", scale="none", system=20, beta=0.04),
    replace(BEST, seed=94_002, generations=4, max_draws=3, rollouts=2),
    # a baseline weighted by the lengths of completions
    Case(seed=96_000, level="token", prompts=4, baseline="length", scale="none", turns="dialogue", minibatches=2),
    Case(seed=96_001, loss="dapo", level="token", baseline="length", rewards="binary", generations=4, iterations=2),
    Case(seed=96_002, prompts=4, baseline="length", scale="batch", rollouts=2, max_draws=2, mask_truncated=True),
    # all tokens of the rollout, on all ranks
    Case(seed=97_000, level="token", prompts=4, plus_plus="reward", turns="dialogue", minibatches=2),
    Case(seed=97_001, prompts=4, generations=1, plus_plus="reward", rewards="binary", rollouts=2, beta=0.04),
    Case(seed=97_002, loss="reinforce", prompts=4, plus_plus="group", rewards="binary", rollouts=2, max_draws=2),
    Case(seed=97_003, prompts=4, plus_plus="reward", rewards="silent", iterations=2),
)

"""Runs whose losses choose tokens by their covariance, alone and with what else weighs, leaves out or adds terms."""

from __future__ import annotations

from dataclasses import replace

from tests.whole_update.case import Case

DRAWN = Case(
    loss="clip_cov", level="token", prompts=4, iterations=2, minibatches=2, lr=0.05, max_grad_norm=1.0, temperature=0.5,
    clip_cov_ratio=0.2, clip_cov_lb=0.05, clip_cov_ub=1.5,
)  # fmt: skip

HIGHEST = replace(DRAWN, loss="kl_cov", clip_cov_ratio=2e-4, clip_cov_lb=1.0, clip_cov_ub=5.0, kl_cov_ratio=0.2)

COVARIANT: tuple[Case, ...] = (
    replace(DRAWN, seed=95_000, token_budget=20),
    replace(DRAWN, seed=95_001, rollouts=2, clip_cov_lb=-0.5, epsilon=0.02, epsilon_high=0.01, system=20),
    replace(DRAWN, seed=95_002, turns="rewarded", top_entropy_quantile=0.5, beta=0.04, token_budget=40),
    replace(DRAWN, seed=95_003, stale=True, rollouts=3, mismatch=("token", "truncate", 1.2, 0.0), clip_cov_ratio=0.05),
    replace(DRAWN, seed=95_004, iterations=1, minibatches=1, entropy_coef=0.01, fits=2, rewards="binary"),
    replace(DRAWN, seed=95_005, old="sampler", mask_truncated=True, lora=True, clip_cov_ub=0.6),
    replace(HIGHEST, seed=95_010, token_budget=20),
    replace(HIGHEST, seed=95_011, rollouts=2, kl_cov_ratio=0.02, ppo_kl_coef=0.3, rewards="binary", generations=4),
    replace(HIGHEST, seed=95_012, turns="rewarded", top_entropy_quantile=0.5, fits=2, keep_zero_advantage=True),
    replace(HIGHEST, seed=95_013, stale=True, rollouts=3, mismatch=("sequence", "mask", 2.0, 0.5), optimizer="adamw", lr=1e-3),
    replace(HIGHEST, seed=95_014, padded=True, off_policy_threshold=0.1, entropy_target=4.27, entropy_coef_delta=0.3),
)  # fmt: skip

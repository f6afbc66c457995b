"""Runs whose weight of the entropy bonus follows the entropy, alone and beside what else weighs or leaves out tokens."""

from __future__ import annotations

from dataclasses import replace

from tests.whole_update.case import Case

# 4.27 nats is what the micro model has: the entropy moves across it.
CONTROL = Case(
    prompts=4, minibatches=4, iterations=2, lr=0.05, max_grad_norm=1.0, entropy_target=4.27, entropy_coef_delta=0.3,
    entropy_coef_max=0.7,
)  # fmt: skip

CONTROLLED: tuple[Case, ...] = (
    replace(CONTROL, seed=91_000, level="token", epsilon=0.2, rollouts=2),
    replace(CONTROL, seed=91_001, loss="dapo", level="token", entropy_coef=0.5, entropy_target=9.0),
    replace(
        CONTROL, seed=91_002, loss="dr_grpo", level="sequence_token", entropy_coef=0.9, entropy_coef_min=0.1,
        entropy_coef_max=1.0, entropy_target=4.3, rollouts=2, mask_truncated=True, token_budget=20,
    ),
    # A bonus that rests, groups that are all silent, and momentum, with which a gradient of zero would move the weights.
    replace(CONTROL, seed=91_003, rewards="silent", entropy_target=0.01, momentum=0.9, weight_decay=0.1, rollouts=2),
    replace(
        CONTROL, seed=91_004, beta=0.04, lora=True, level="token", top_entropy_quantile=0.5, auxiliary=0.01, system=20,
        mismatch=("token", "truncate", 1.2, 0.0), rollouts=2,
    ),
    replace(CONTROL, seed=91_005, loss="sapo", level="token", turns="rewarded", padded=True, system=20, minibatches=2),
    replace(CONTROL, seed=91_006, stale=True, rollouts=3, minibatches=2, optimizer="adamw", lr=1e-3),
    replace(CONTROL, seed=91_007, max_draws=2, rewards="binary", rollouts=2, off_policy_threshold=0.1, level="token"),
)  # fmt: skip

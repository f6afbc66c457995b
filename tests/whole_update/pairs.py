"""Which options of a run the package accepts together, and which of these pairs a set of cases has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from gspo_lightning.advantages import check_combination
from gspo_lightning.errors import UserError
from gspo_lightning.objective.refusals import refuse_turn_rewards
from tests.whole_update import product
from tests.whole_update.case import Case
from tests.whole_update.draw import ANY, DRAWN, MISMATCHES, draw

BASE = Case(level="token", iterations=2, minibatches=2)
"""What the options are added to: more than one step, so that a clip can act, and a loss for every token."""

Option = dict[str, Any]

ALONE: list[Option] = [
    *({"loss": loss, "level": levels[0]} if len(levels) == 1 else {"loss": loss} for loss, levels in DRAWN.items()),
    *({"level": level} for level in ANY),
    *({"mismatch": mismatch} for mismatch in dict.fromkeys(MISMATCHES) if mismatch is not None),
    *({"rewards": kind} for kind in ("random", "binary", "silent", "small", "offset", "large")),
    {"epsilon": 0.05}, {"epsilon_high": 0.05}, {"delta": 1.5}, {"loss": "cispo", "level": "token", "epsilon_high": 1.5},
    {"loss": "sapo", "tau_positive": 3.0}, {"loss": "sapo", "tau_negative": 2.0},
    {"beta": 0.04}, {"beta": 0.04, "beta_end": 0.5}, {"beta": 0.0, "beta_end": 0.5}, {"beta": 1.0, "beta_end": 0.0},
    {"beta": 0.04, "kl_estimator": "k1", "kl_importance_weighted": True},
    {"beta": 0.04, "kl_estimator": "k2", "kl_importance_weighted": True},
    {"beta": 0.04, "kl_estimator": "k2", "kl_importance_weighted": False},
    {"beta": 0.04, "kl_estimator": "k3", "kl_importance_weighted": True},
    {"beta": 0.04, "ref_sync_every": 1}, {"beta": 0.04, "ref_sync_every": 1, "ref_mixup_alpha": 0.25},
    {"entropy_coef": 0.01}, {"mask_truncated": True}, {"top_entropy_quantile": 0.5}, {"off_policy_threshold": 0.1},
    {"scale": "batch"}, {"scale": "none"}, {"baseline": "rloo"}, {"reward_weights": (1.0, 0.3)},
    {"scale": "batch", "combine": "normalize_then_sum", "reward_weights": (1.0, 0.3)},
    {"turns": "dialogue"}, {"turns": "rewarded"},
    {"length_reward": "overlong"}, {"length_reward": "target"},
    {"temperature": 0.9}, {"top_k": 50}, {"rollouts": 2}, {"rollouts": 2, "later": (1.3, 12)},
    {"rollouts": 2, "stale": True}, {"max_draws": 1}, {"iterations": 2}, {"minibatches": 2}, {"token_budget": 20},
    {"max_grad_norm": 1.0}, {"keep_zero_advantage": True}, {"log_entropy": True}, {"lora": True},
    {"lora": True, "rslora": True}, {"auxiliary": 0.01}, {"loss": "dr_grpo", "constant_length": 20},
    {"padded": True}, {"checkpointing": True}, {"fits": 1}, {"optimizer": "adamw"}, {"momentum": 0.9},
    {"weight_decay": 0.1}, {"schedule": "cosine"}, {"schedule": "linear"}, {"schedule": "cosine", "min_ratio": 0.1},
    {"warmup_ratio": 0.3},
]  # fmt: skip
"""The changes that make an option, of a run in which nothing else is set."""

DEFAULTS = {field.name: field.default for field in fields(Case)}


def name_of(option: Option) -> str:
    return ", ".join(f"{key}={value}" for key, value in option.items())


def has(case: Case, option: Option) -> bool:
    """Whether the case has the option, or the same one with other numbers."""
    return all(_alike(key, getattr(case, key), value) for key, value in option.items())


def _alike(key: str, ours: Any, value: Any) -> bool:
    if key == "mismatch":
        return ours is not None and ours[:2] == value[:2]
    if isinstance(value, str | bool):
        return bool(ours == value)
    if key in ("beta", "beta_end", "max_draws", "stale"):  # 0, another number, or None
        return (ours is None, ours == 0) == (value is None, value == 0)
    return bool((ours == DEFAULTS[key]) == (value == DEFAULTS[key]))


def together(a: Option, b: Option) -> Case | None:
    """The run with both options; None if they set the same key to different values, or the package refuses it."""
    if any(not _alike(key, a[key], b[key]) or a[key] != b[key] for key in a.keys() & b.keys()):
        return None
    case = replace(BASE, **a, **{key: value for key, value in b.items() if key not in a})
    return case if accepted(case) else None


def accepted(case: Case) -> bool:
    """Whether a user can run the case: no contradiction, and no setting without effect."""
    try:
        module = product.build("", case)
        check_combination(case.combine, case.scale)
        if case.turns == "rewarded":
            refuse_turn_rewards(module.objective)
    except UserError:
        return False
    refused = [
        case.turns == "rewarded" and case.scale == "batch",  # `collect.compare`
        bool(case.mismatch and case.top_k),  # `checks._check_support`
        bool(case.turns and case.stale),  # engines that sample elsewhere have no environments
        case.momentum > 0 and case.optimizer == "adamw",  # it has none
        case.rewards == "large" and case.scale == "none",  # a step so long that every digit of the next one is chaos
    ]
    return not any(refused) and not product.refusals(module, case)


def missing(cases: Iterable[Case]) -> list[str]:
    """Pairs that no case has."""
    everyone = list(cases)
    held = {name_of(option): {n for n, case in enumerate(everyone) if has(case, option)} for option in ALONE}
    return [
        f"{name_of(a)} with {name_of(b)}"
        for a, b in itertools.combinations(ALONE, 2)
        if not held[name_of(a)] & held[name_of(b)] and together(a, b) is not None
    ]


def chosen(given: Iterable[Case], seeds: Iterable[int]) -> list[int]:
    """Seeds that together have every pair that any of them has and none of the ``given`` has, most pairs first."""

    def pairs(case: Case) -> set[tuple[int, int]]:
        return set(itertools.combinations([n for n, option in enumerate(ALONE) if has(case, option)], 2))

    left = {seed: pairs(draw(seed)) for seed in seeds}
    wanted = set().union(*left.values()) - set().union(*map(pairs, given))
    found = []
    while wanted:
        found.append(max(left, key=lambda seed: len(left[seed] & wanted)))
        wanted -= left[found[-1]]
    return found


if __name__ == "__main__":  # after a change of `draw`: python -m tests.whole_update.pairs
    from tests.whole_update.test_whole_update import SEEDS

    print(sorted(chosen(map(draw, (*SEEDS, *range(10_000, 10_100))), range(10_100, 14_000))))

"""A random configuration of a run: every setting that changes the weights, small enough for a second on one core."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from tests.whole_update.case import Case
from tests.whole_update.reference_losses import SURROGATES, clip_widths, shares_one_loss

ANY = ("token", "sequence", "sequence_token")
DRAWN = {
    **dict.fromkeys(SURROGATES, ANY), "cispo": ("token",), "sapo": ("token", "sequence"), "gmpo": ("token",), "reinforce": ANY,
}  # fmt: skip
"""Losses that are drawn, with their ratio levels; to ``reinforce``, which has no ratio, the level is the unit of the
metrics alone. Another loss would change what every seed draws: it has a case of its own instead."""

MISMATCHES = (
    None,
    None,
    ("token", "truncate", 1.2, 0.0),
    ("token", "mask", 1.5, 0.7),
    ("sequence", "truncate", 1.3, 0.0),
    ("sequence", "mask", 2.0, 0.5),
    ("sequence_mean", "truncate", 1.05, 0.0),
    ("sequence_mean", "mask", 1.1, 0.9),
)


def draw(seed: int) -> Case:
    """The case of a seed. What contradicts an earlier draw, and would be refused, is not drawn."""
    random = Random(seed)
    case = _objective(random, Case(seed=seed))
    case = _terms(random, case)
    case = _corrections(random, case)
    case = _rewards(random, case)
    case = _sizes(random, case)
    case = _optimizer(random, case)
    case = replace(case, system=Random(f"system {seed}").choice([0, 0, 20]))
    return _program(Random(f"program {seed}"), case)


def _objective(random: Random, case: Case) -> Case:
    """The loss, its ratio and its clip: wide ones, narrow ones and the defaults."""
    loss = random.choice([*DRAWN])
    case = replace(case, loss=loss, level=random.choice(DRAWN[loss]))
    if loss == "sapo":
        return replace(case, tau_positive=random.choice([0.5, 1.0, 3.0]), tau_negative=random.choice([1.05, 2.0]))
    if loss == "cispo":
        return replace(case, epsilon_high=random.choice([None, 1.02, 1.5, 0.9]))
    if loss == "reinforce":
        return case
    case = replace(case, epsilon=random.choice([None, 0.05, 0.01, 0.3]), epsilon_high=random.choice([None, 0.05, 0.02]))
    if loss in SURROGATES and random.random() < 0.4:
        case = replace(case, delta=1 + clip_widths(case)[1] + random.choice([0.0, 0.02, 0.5]))
    return case


def _terms(random: Random, case: Case) -> Case:
    """KL with its estimators, a frozen or moving reference, LoRA, and the entropy bonus."""
    beta, end = random.choice([0.0, 0.0, 0.04, 1.0]), random.choice([None, None, 0.0, 0.5])
    case = replace(case, beta=beta, beta_end=end if end != beta else None, lora=random.random() < 0.2)
    if case.has_kl:
        # Not k1 without the weight, which is refused: its gradient does not contain the reference.
        kinds = [("k3", False), ("k3", True), ("k2", False), ("k2", True), ("k1", True)]
        estimator, weighted = random.choice(kinds)
        case = replace(case, kl_estimator=estimator, kl_importance_weighted=weighted)
        if not case.lora and random.random() < 0.5:
            every, alpha = random.choice([1, 2]), random.choice([0.6, 0.25, 1.0])
            case = replace(case, ref_sync_every=every, ref_mixup_alpha=alpha)
    case = replace(case, entropy_coef=random.choice([0.0, 0.0, 0.01, 1.0]), log_entropy=random.random() < 0.3)
    free = not case.has_kl and not case.entropy_coef
    return replace(case, keep_zero_advantage=free and random.random() < 0.4)


def _corrections(random: Random, case: Case) -> Case:
    """What leaves out or weighs tokens and sequences."""
    shared = shares_one_loss(case)  # then nothing can leave out single tokens
    mismatch = random.choice(MISMATCHES)
    return replace(
        case,
        mask_truncated=random.random() < 0.4,
        top_entropy_quantile=1.0 if shared else random.choice([1.0, 0.9, 0.5, 0.2, 0.01]),
        off_policy_threshold=random.choice([None, 0.01, 0.1]),
        mismatch=None if shared and mismatch is not None and mismatch[:2] == ("token", "mask") else mismatch,
        temperature=random.choice([1.0, 0.9, 0.5, 2.0]),
    )


def _rewards(random: Random, case: Case) -> Case:
    """Rewards of one or two functions, how they are compared, and turns."""
    scale = random.choice(["group", "batch", "none"])
    kinds = ["random", "random", "binary", "silent", "small", "offset"] + (["large"] if scale != "none" else [])
    turns = random.choice([None, None, "dialogue", "rewarded"])
    if turns == "rewarded" and (scale == "batch" or shares_one_loss(case)):
        turns = "dialogue"  # turns are compared within their group, and need losses of their own
    return replace(
        case,
        scale=scale,
        baseline=random.choice(["mean", "rloo"]),
        reward_weights=random.choice([(1.0,), (1.0, 0.3), (0.5, -1.0)]),
        combine="normalize_then_sum" if scale == "batch" and random.random() < 0.5 else "weighted_sum",
        rewards=random.choice(kinds),
        turns=turns,
    )


def _sizes(random: Random, case: Case) -> Case:
    """Prompts, completions and steps; so few that a run trains on 64 sequences at most."""
    minibatches = random.choice([1, 2, 4])
    case = replace(
        case,
        minibatches=minibatches,
        prompts=minibatches * random.choice([1, 2, 3]),
        generations=random.choice([2, 3, 4]),
        iterations=random.choice([1, 1, 2, 3]),
        rollouts=random.choice([1, 1, 2, 3]),
        token_budget=random.choice([1, 8, 20, 40, 100, 4096, 4096]),
    )
    smaller = ({"prompts": minibatches * 2}, {"generations": 2}, {"prompts": minibatches}, {"rollouts": 2})
    for change in smaller:
        if case.prompts * case.generations * case.iterations * case.rollouts > 64:
            case = replace(case, **{key: min(value, getattr(case, key)) for key, value in change.items()})
    return case


def _optimizer(random: Random, case: Case) -> Case:
    """Rates that move the ratios out of the clip, but not so far that every digit of the next gradient is chaos."""
    clip = random.choice([math.inf, 1.0, 0.1])
    kind = random.choice(["sgd", "sgd", "adamw"])
    rate = 1e-3 if kind == "adamw" else random.choice([1e-3, 1e-2, 5e-2]) * (0.1 if clip == math.inf else 1.0)
    return replace(
        case,
        max_grad_norm=clip,
        optimizer=kind,
        lr=rate,
        momentum=random.choice([0.0, 0.9]) if kind == "sgd" else 0.0,
        weight_decay=random.choice([0.0, 0.1]),
        schedule=random.choice(["constant", "constant", "cosine", "linear"]),
        warmup_ratio=random.choice([0.0, 0.3]),
        min_ratio=random.choice([0.0, 0.1]),
    )


def _program(random: Random, case: Case) -> Case:
    """What else a program can ask for: rollouts ahead or drawn anew, changes during the run, terms of its own."""
    # An engine that samples ahead has no environment, and does not know which prompts are drawn anew.
    stale = case.turns is None and case.rollouts > 1 and random.random() < 0.35
    draws = random.choice([0, 0, 0, 1, 2])
    later = random.choice([None, None, (1.3, 12), (case.temperature, 15), (0.8, 20)])
    return replace(
        case,
        length_reward=random.choice([None, None, None, "overlong", "target"]),
        top_k=0 if case.mismatch else random.choice([0, 0, 50]),
        later=later if case.rollouts > 1 else None,
        stale=stale,
        max_draws=0 if stale else draws,
        rslora=case.lora and random.random() < 0.5,
        auxiliary=random.choice([0.0, 0.0, 0.0, 0.01]),
        constant_length=20 if case.loss == "dr_grpo" and random.random() < 0.4 else None,
        padded=random.random() < 0.2,
        checkpointing=random.random() < 0.2,
        fits=random.choice([0, 0, 0, 0, 1, 2]),
    )

"""A random configuration of a run: every setting that changes the weights, small enough for a second on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from tests.whole_update.reference_losses import LEVELS, SURROGATES, clip_widths, shares_one_loss

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


@dataclass(frozen=True)
class Case:
    """A run, by the names of the configuration keys; the defaults are one step of GSPO without anything added."""

    seed: int = 0
    # objective
    loss: str = "grpo"
    level: str = "sequence"
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    beta: float = 0.0
    beta_end: float | None = None
    kl_estimator: str = "k3"
    kl_importance_weighted: bool = False
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    mismatch: tuple[str, str, float, float] | None = None
    """(level, truncate or mask, high, low)."""
    # advantages and rewards
    scale: str = "group"
    baseline: str = "mean"
    reward_weights: tuple[float, ...] = (1.0,)
    combine: str = "weighted_sum"
    rewards: str = "random"
    """Kind of numbers: random, binary, silent (all equal), large, small, offset (random above a thousand)."""
    turns: str | None = None
    """None: completions of one piece; ``dialogue``: of several turns; ``rewarded``: whose turns have rewards too."""
    # rollout
    prompts: int = 2
    generations: int = 3
    max_length: int = 12
    temperature: float = 1.0
    # update
    rollouts: int = 1
    iterations: int = 1
    minibatches: int = 1
    token_budget: int = 4096
    max_grad_norm: float = math.inf
    keep_zero_advantage: bool = False
    log_entropy: bool = False
    ref_sync_every: int = 0
    ref_mixup_alpha: float = 0.6
    lora: bool = False
    # optimizer and schedule
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_ratio: float = 0.0
    min_ratio: float = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, skipped ones included."""
        return self.rollouts * self.iterations * self.minibatches

    @property
    def has_kl(self) -> bool:
        """Whether the KL term has a weight at some point of the run."""
        return bool(self.beta or self.beta_end)


def draw(seed: int) -> Case:
    """The case of a seed. What contradicts an earlier draw, and would be refused, is not drawn."""
    random = Random(seed)
    case = _objective(random, Case(seed=seed))
    case = _terms(random, case)
    case = _corrections(random, case)
    case = _rewards(random, case)
    case = _sizes(random, case)
    return _optimizer(random, case)


def _objective(random: Random, case: Case) -> Case:
    """The loss, its ratio and its clip: wide ones, narrow ones and the defaults."""
    loss = random.choice(list(LEVELS))
    case = replace(case, loss=loss, level=random.choice(LEVELS[loss]))
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

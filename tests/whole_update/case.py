"""The settings of a run that change its weights, and some that must not, by the names of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gspo_lightning.objective.losses import LossSettings

LENGTH_WEIGHT = 0.5
"""Of the reward of `Case.length_reward`."""


@dataclass(frozen=True)
class Case(LossSettings):
    """A run, by the names of the configuration keys; the defaults are one step of GSPO without anything added."""

    seed: int = 0
    # model
    model: str = "micro"
    """A Llama of text, or one of `models.KINDS`."""
    vision: str = "frozen"
    """The half that sees: ``frozen``, ``trained`` too, or trained ``alone``."""
    # objective
    loss: str = "grpo"
    """One of the package, or of `own_losses.OWN`."""
    level: str = "sequence"
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 2e-3
    beta: float = 0.0
    beta_end: float | None = None
    kl_estimator: str = "k3"
    kl_importance_weighted: bool = False
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    entropy_coef_delta: float = 0.005
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    mask_truncated: bool = False
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    mismatch: tuple[str, str, float, float] | None = None
    """(level, truncate or mask, high, low)."""
    # advantages and rewards
    scale: str = "group"
    baseline: str = "mean"
    plus_plus: str = ""
    """Compared with all tokens of the rollout: the ``reward``, or its difference to the mean of its ``group``."""
    pass_at_k: int = 0
    """Completions of which the best one counts; 0: each by itself."""
    reward_weights: tuple[float, ...] = (1.0,)
    combine: str = "weighted_sum"
    rewards: str = "random"
    """Kind of numbers: random, binary, silent (all equal), large, small, offset (random above a thousand)."""
    turns: str | None = None
    """None: completions of one piece; ``dialogue``: of several turns; ``rewarded``: whose turns have rewards too."""
    length_reward: str | None = None
    """One more function, of the length: ``overlong`` or ``target``."""
    # rollout
    prompts: int = 2
    system: int = 0
    """Tokens that all prompts begin with, unless they have images."""
    generations: int = 3
    max_length: int = 12
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    later: tuple[float, int] | None = None
    """(temperature, longest completion) set after the first rollout."""
    stale: bool = False
    """Whether rollouts are sampled one update ahead."""
    max_draws: int = 0
    # update
    rollouts: int = 1
    iterations: int = 1
    minibatches: int = 1
    token_budget: int = 4096
    max_grad_norm: float = math.inf
    old: str = "policy"
    """Whose log-probabilities are the denominator of the ratio: ``policy`` or ``sampler``."""
    keep_zero_advantage: bool = False
    log_entropy: bool = False
    ref_sync_every: int = 0
    ref_mixup_alpha: float = 0.6
    lora: bool = False
    rslora: bool = False
    auxiliary: float = 0.0
    """Weight of the squared norm of what is trained, a term that a subclass adds."""
    balance: float = 0.0
    """Weight of the loss by which a subclass balances the load of experts."""
    constant_length: int | None = None
    """Longest completion in the denominator of ``dr_grpo``, if it is not that of the rollouts."""
    # how it is computed, which must change nothing
    padded: bool = False
    checkpointing: bool = False
    fits: int = 0
    """Completions that fit into memory together; 0: all."""
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
    def weights(self) -> tuple[float, ...]:
        """Of all reward functions."""
        return self.reward_weights + ((LENGTH_WEIGHT,) if self.length_reward else ())

    @property
    def full_support(self) -> bool:
        """Whether the sampler can draw every token."""
        return not self.top_k and self.top_p == 1 and not self.min_p

    @property
    def forwards_all(self) -> bool:
        """Whether a group is never cut in parts, each of which has its prompt forwarded once more."""
        return self.token_budget >= 4096 and not self.fits

    @property
    def has_kl(self) -> bool:
        """Whether the KL term has a weight at some point of the run."""
        return bool(self.beta or self.beta_end)

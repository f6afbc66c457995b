"""Refuses what a program may give the module in the place of a part, or return to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.errors import UserError
from gspo_lightning.objective import Objective
from gspo_lightning.training.update import UpdateSettings
from gspo_lightning.users_code import keeps_state

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


def check_parts(policy_loader: Any, rewards: Any, optimizer: Any, objective: Any, update: Any, engine: Any) -> None:
    """Refuses what a program may give in the place of a part, which would fail when that is first used."""
    if isinstance(policy_loader, str | os.PathLike):
        raise UserError(
            f"policy_loader={policy_loader!r}: a path; give gspo_lightning.PolicyLoader, whose argument it is"
        )
    if not hasattr(rewards, "functions"):
        raise UserError(f"rewards is of type {type(rewards).__name__}; give RewardSet({{name: RewardSpec(function)}})")
    if not callable(optimizer):
        raise UserError(
            f"optimizer is of type {type(optimizer).__name__}; give what makes one of parameter groups, such as "
            "functools.partial(torch.optim.AdamW, lr=1e-5)"
        )
    for name, given, kind in (("objective", objective, Objective), ("update", update, UpdateSettings)):
        if given is not None and not isinstance(given, kind):
            raise UserError(f"{name} is of type {type(given).__name__}; give {kind.__name__}(...)")
    if engine is not None and not callable(getattr(engine, "generate", None)):
        raise UserError(f"engine={engine!r}: it has no generate(); give a RolloutEngine, such as TransformersEngine()")


def check_advantages(advantages: Any) -> None:
    """Refuses a plain function: the scale and the baseline of the estimator are read too."""
    if not isinstance(advantages, AdvantageEstimator):
        raise UserError(
            "advantages: not an AdvantageEstimator; subclass it and override __call__(self, rewards, everyone=None)"
        )
    keeps_state(advantages, "advantages")


def check_schedule(schedule: Any) -> None:
    """Refuses what makes no scheduler, such as one of torch, before a model is loaded."""
    if not callable(getattr(schedule, "build", None)):
        raise UserError(
            "scheduler: it is no Schedule, whose build(optimizer, total, done) makes a scheduler of torch; choose "
            "scheduler=constant, cosine or linear, or override configure_optimizers in a subclass of GSPOModule"
        )


def refuse_draws_ahead(max_draws: int) -> None:
    """Refuses dynamic sampling where the next rollout is sampled ahead."""
    if max_draws:
        raise UserError(
            f"dynamic_sampling.max_draws={max_draws} and rollout.engine.staleness=1 exclude each other: which "
            "prompts come next is known only after this rollout; set one of them to 0"
        )


def check_auxiliary_loss(value: Any, module: GSPOModule) -> None:
    """Refuses an auxiliary loss that is not a scalar tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"{type(module).__name__}.auxiliary_loss: it returned {found}, not a scalar tensor; return its mean, or None "
        "if there is no term"
    )

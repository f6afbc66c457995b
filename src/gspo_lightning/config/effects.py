"""Refuses settings with which a run would train nothing, measure nothing or keep nothing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from gspo_lightning.callbacks.best import metrics_of
from gspo_lightning.errors import UserError
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rewards.by_task import ForTasks
from gspo_lightning.screen import counted
from gspo_lightning.training.validation import ValidationSettings


def no_effect(message: str, plain: dict[str, Any]) -> None:
    """Refuses a setting without effect, or warns where ``allow_no_effect`` asks for that."""
    if not plain["allow_no_effect"]:
        raise UserError(f"{message} (allow_no_effect=true turns this into a warning)")
    warnings.warn(message, stacklevel=3)


def check_training(plain: dict[str, Any]) -> None:
    """Rewards whose weighted sum is always 0, and steps of length 0."""
    reward = plain["reward"]
    functions = reward.get("functions") or {}
    weights = [spec.get("weight", 1.0) for spec in functions.values() if str(spec["_target_"]).endswith(".RewardSpec")]
    # An environment may reward turns, which have no weight.
    if weights and len(weights) == len(functions) and not any(weights) and not plain["environment"]:
        no_effect(
            f"reward.functions: the weight of {', '.join(functions)} is 0, so that all completions are rewarded alike "
            "and nothing is trained; give one another weight",
            plain,
        )
    if plain["optimizer"].get("lr") == 0:
        no_effect("optimizer.lr=0 trains nothing: no weight changes; raise it, or measure with evaluate.py", plain)


def check_best(plain: dict[str, Any]) -> None:
    """A best checkpoint needs validations inside the run, and a metric of theirs; tasks the first of them knows."""
    metric, validation = plain["checkpoint"]["keep_best"], plain["validation"]
    if metric is None:
        return
    if validation["every_n_rollouts"] is None:
        raise UserError(
            f"checkpoint.keep_best={metric} has no effect: there is no validation during the run; set "
            "validation.every_n_rollouts, to 10 for example"
        )
    if plain["trainer"].get("limit_val_batches") == 0:
        raise UserError(f"checkpoint.keep_best={metric} has no effect with trainer.limit_val_batches=0; remove one")
    names = [name for name in validation_metrics(plain) if name != "val/mean_tokens"]
    if not is_among(metric, names):
        raise UserError(
            f"checkpoint.keep_best={metric} must be a validation metric for which higher is better: {', '.join(names)}"
        )


def is_among(metric: str, names: list[str]) -> bool:
    """Whether it is one of these metrics of validations, or that of one task of a mixture."""
    return metric in names or metric.startswith(tuple(f"{name}/" for name in names[:2]))


def validation_metrics(plain: dict[str, Any]) -> list[str]:
    """Names of what a validation of this config measures, but for those of the tasks of a mixture."""
    names = metrics_of(plain["validation"].get("num_generations", ValidationSettings.num_generations))
    return [*names, *(["val/return"] if plain["environment"] else []), "val/mean_tokens"]


def check_held_out(plain: dict[str, Any], rows: int, *, training: bool) -> None:
    """What needs held-out rows, and a run that is long enough to validate in it.

    Args:
        plain: the resolved config, ``max_rollouts`` included.
        rows: held-out rows of the task.
        training: False where a model is measured only.

    Raises:
        UserError: there are no held-out rows.
    """
    metric, every = plain["checkpoint"]["keep_best"], plain["validation"]["every_n_rollouts"]
    if not training and (not rows or plain["trainer"].get("limit_val_batches") == 0):
        why = "there are no held-out rows; raise data.task.num_validation"
        raise UserError(f"nothing to measure: {'trainer.limit_val_batches=0; remove it' if rows else why}")
    if not training or metric is None:
        return
    if not rows:
        raise UserError(
            f"checkpoint.keep_best={metric} has no effect: there are no held-out rows; raise data.task.num_validation"
        )
    if every >= plain["max_rollouts"]:
        warnings.warn(
            f"checkpoint.keep_best={metric} chooses among one: with validation.every_n_rollouts={every} the only "
            f"validation of {counted(plain['max_rollouts'], 'rollout')} is the last, and best.ckpt will be last.ckpt",
            stacklevel=2,
        )


def check_environment_reward(plain: dict[str, Any], rewards: RewardSet) -> None:
    """A reward function of the user's own that takes what an environment gave needs one.

    Raises:
        UserError: names the function.
    """
    if plain["environment"]:
        return
    for name, spec in rewards.functions.items():
        function = spec.function.function if isinstance(spec.function, ForTasks) else spec.function
        parameter = inspect.signature(function).parameters.get("environment_reward")
        if parameter is not None and parameter.default is inspect.Parameter.empty:
            raise UserError(
                f"reward.functions.{name}: its parameter environment_reward is what an environment gives, and there is "
                "none; set one, such as environment=calculator, or give the parameter a default"
            )


def check_tasks(plain: dict[str, Any], rewards: RewardSet, tasks: Sequence[str]) -> None:
    """A reward function of some tasks names those of the mixture.

    Args:
        plain: the resolved config.
        rewards: the functions.
        tasks: of the mixture; empty for other data, whose rows may have a column ``task`` of their own.

    Raises:
        UserError: names the function and what it would never apply to.
    """
    for name, spec in rewards.functions.items():
        named = spec.function.tasks if isinstance(spec.function, ForTasks) else frozenset()
        if tasks and (unknown := sorted(named.difference(tasks))):
            no_effect(
                f"reward.functions.{name}: ForTasks has no effect for {', '.join(unknown)}: the tasks of the "
                f"mixture are {', '.join(tasks)}",
                plain,
            )

"""The sampling settings of a run, at its beginning and when they change: what is refused, and who follows."""

from __future__ import annotations

import operator
import warnings
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gspo_lightning.advantages import check_group
from gspo_lightning.distributed.ranks import rank, world_size
from gspo_lightning.errors import UserError
from gspo_lightning.lightning_private import trainer_of
from gspo_lightning.objective import Objective
from gspo_lightning.rollout.engine import within
from gspo_lightning.training.prompt_source import prompt_source
from gspo_lightning.training.sampling_checks import check_rotation, check_sampling, check_support, compared_by
from gspo_lightning.types import SamplingParams

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule

_WHOLE = ("num_generations", "max_completion_length", "top_k")


def plain_sampling(sampling: SamplingParams) -> SamplingParams:
    """The settings in Python's own numbers: a checkpoint cannot hold those of NumPy.

    Raises:
        UserError: it is no `SamplingParams`, or a number is none or not whole.
    """
    if not isinstance(sampling, SamplingParams):
        raise UserError(
            f"sampling is of type {type(sampling).__name__}; set it to "
            "dataclasses.replace(module.sampling, <name>=<value>)"
        )
    changed: dict[str, Any] = {"stop": tuple(sampling.stop)}
    for name in (field.name for field in fields(sampling) if field.name != "stop"):
        value = getattr(sampling, name)
        try:
            changed[name] = operator.index(value) if name in _WHOLE else float(value)
        except (TypeError, ValueError) as error:
            kind = "whole number" if name in _WHOLE else "number"
            raise UserError(f"rollout.{name}={value!r} must be a {kind}") from error
    return replace(sampling, **changed)


def check_sampling_of(module: GSPOModule, sampling: SamplingParams) -> None:
    """Refuses settings that a run can neither begin with nor change to.

    Raises:
        UserError: the completions would teach nothing, or are longer than the engine or the model allows.
    """
    check_sampling(sampling.temperature, sampling.repetition_penalty, sampling.top_k, sampling.min_p)
    for name in ("num_generations", "max_completion_length"):
        if (value := getattr(sampling, name)) < 1:
            raise UserError(f"rollout.{name}={value} must be at least 1")
    check_group(module.advantages, sampling.num_generations, module.max_draws)
    by = compared_by(module.objective.mismatch is not None, module.update_settings.old_logprobs)
    if by is not None:
        check_support(sampling.top_p, sampling.top_k, sampling.min_p, by)
    _check_lengths(module, sampling)


def _check_lengths(module: GSPOModule, sampling: SamplingParams) -> None:
    """Refuses completions that the engine would cut or the model cannot rotate; without data there is nothing to check.

    Raises:
        UserError: names the longest that is possible.
    """
    source = prompt_source(trainer_of(module))
    if source is None:
        return
    if module.policy is not None:
        check_rotation(module.policy.config, source.max_prompt_length, sampling.max_completion_length)
    longest = sampling.max_completion_length
    for engine in within(module.engine):
        limit = getattr(engine, "max_model_len", None)
        if limit is not None and source.max_prompt_length + longest > limit:
            raise UserError(
                f"rollout.max_completion_length={longest}: the engine was made for {limit} tokens of prompt and "
                f"completion, so for at most {limit - source.max_prompt_length} here; give it the longest of the run, "
                "rollout.engine.max_completion_length"
            )


def check_ranks_agree(sampling: SamplingParams) -> None:
    """Refuses settings that a rank has set by itself. All ranks must call it together, and raise together.

    Raises:
        UserError: names a setting and two ranks.
    """
    if world_size() == 1:
        return
    given: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(given, asdict(sampling))
    for name, first in given[0].items():
        for number, other in enumerate(given):
            if other[name] != first:
                raise UserError(
                    f"module.sampling: rollout.{name} is {first!r} on rank 0 and {other[name]!r} on rank {number}; set "
                    "it on every rank alike"
                )


def follow(objective: Objective, before: SamplingParams, now: SamplingParams) -> Objective:
    """The objective with the longest completion of ``now``, if its own was that of ``before``."""
    if objective.max_completion_length != before.max_completion_length or before == now:
        return objective
    return replace(objective, max_completion_length=now.max_completion_length)


def say_begins_later(module: GSPOModule) -> None:
    """Warns if the rollout in hand was sampled ahead, with the settings before the last change."""
    if module.sampled_with != module.sampling and rank() == 0:
        warnings.warn(
            "rollout.engine.staleness=1: the sampling was changed while this rollout was being sampled ahead; it keeps "
            "the settings before, and the change begins with the next one",
            stacklevel=2,
        )


def sampling_state(module: GSPOModule) -> dict[str, Any]:
    """What a checkpoint holds: the settings the module was made with, and those that were set since."""
    return {"made_with": asdict(module.made_with), "now": asdict(module.sampling)}


def restore_sampling(module: GSPOModule, state: dict[str, Any]) -> bool:
    """Sets the settings of a checkpoint, if the module was made with those that its run was made with.

    Returns:
        Whether it was; if not, the settings of this run apply, and nothing that was set before.
    """
    if SamplingParams(**state["made_with"]) != module.made_with:
        if state["now"] != state["made_with"] and rank() == 0:
            warnings.warn(
                "ckpt_path: the sampling that was set during the run of the checkpoint is not taken over: this run has "
                "other rollout settings than that one began with, and they apply",
                stacklevel=2,
            )
        return False
    module.sampling = SamplingParams(**state["now"])
    return True

"""Collecting a rollout: sample, score, compare within the group."""

from __future__ import annotations

from dataclasses import fields

import torch

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.dialogue.turns import silent_rollout, turn_advantages, whole_returns
from gspo_lightning.distributed.ranks import gather_values
from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rollout import RolloutEngine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.training.out_of_memory import memory_for
from gspo_lightning.training.timing import Stopwatch
from gspo_lightning.types import Metrics, Prompt, RewardedRollout, Rollout, SamplingParams, ScoredRollout, ToolCounts


def collect_rollout(
    policy: Policy,
    engine: RolloutEngine,
    rewards: RewardSet,
    prompts: list[Prompt],
    sampling: SamplingParams,
    *,
    seed: int,
    stopwatch: Stopwatch,
) -> RewardedRollout:
    """Samples ``sampling.num_generations`` completions per prompt and gives each a reward."""
    with stopwatch("rollout"):
        rollout = sample(policy, engine, prompts, sampling, seed)
    _check_counts(rollout, len(prompts), sampling.num_generations)
    with stopwatch("reward"):
        by_function = rewards(rollout.prompts, rollout.completions)
    return RewardedRollout(
        prompts=rollout.prompts,
        completions=rollout.completions,
        reward_names=rewards.names,
        rewards_by_function=by_function,
        rewards=rewards.combine(by_function),
        logged=rewards.logged_metrics(),
        extra_columns=rewards.log.columns,
    )


def sample(
    policy: Policy, engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingParams, seed: int, of: str = ""
) -> Rollout:
    """Calls `RolloutEngine.generate`; running out of memory becomes one line that names the remedy.

    Args:
        policy: the policy that samples.
        engine: the engine that samples.
        prompts: this rank's prompts.
        sampling: how completions are drawn.
        seed: of the rollout.
        of: the config group of ``sampling.num_generations``, if that is not ``rollout``.

    Raises:
        OutOfMemoryError: an allocation of this process failed.
    """
    at_once = traits(engine).max_concurrent  # at least the completions of one prompt
    if not at_once:
        smaller = "rollout.engine.memory_fraction (of rollout=vllm)"
    else:
        fewer = sampling.num_generations == 1 or at_once > sampling.num_generations
        smaller = "rollout.engine.max_concurrent" if fewer else f"{of or 'rollout'}.num_generations"
    count, where = len(prompts) * sampling.num_generations, f" for {of}" if of else ""
    with memory_for(
        f"while sampling {count} completions of up to {sampling.max_completion_length} tokens{where}",
        f"lower {smaller} or rollout.max_completion_length",
    ):
        return engine.generate(policy, prompts, sampling, seed)


def _check_counts(rollout: Rollout, prompts: int, generations: int) -> None:
    """Refuses a wrong number of completions, as a custom engine may return: reward tensors are ``(B, G)``."""
    found = [len(group) for group in rollout.completions]
    if len(rollout.prompts) != prompts or found != [generations] * prompts:
        raise UserError(
            f"rollout.engine: generate() returned {len(rollout.prompts)} prompts with {found} completions, but was "
            f"asked for {prompts} prompts with {generations} each; return as many"
        )


def compare(rollout: RewardedRollout, advantages: AdvantageEstimator) -> ScoredRollout:
    """Gives each completion of a rollout its advantage. All ranks call it together: ``batch`` scaling spans ranks.

    Raises:
        UserError: an environment rewards turns, and rewards are to be scaled by the batch; or a custom estimator
            returns another shape.
    """
    turns = turn_advantages(rollout.completions, rollout.rewards, advantages)
    if turns is not None and advantages.scale_rewards == "batch":
        raise UserError(
            "the environment rewards turns, which are compared within a group, but advantages.scale_rewards=batch "
            "divides by the spread of whole completions; set it to group or none"
        )
    everyone = [gather_values(rollout.rewards.flatten())] if advantages.scale_rewards == "batch" else []
    values = advantages(rollout.rewards, *everyone)
    if (shape := getattr(values, "shape", None)) != rollout.rewards.shape:
        found = type(values).__name__ if shape is None else tuple(shape)
        raise UserError(
            f"advantages: {type(advantages).__name__} returned {found} for rewards of {tuple(rollout.rewards.shape)}; "
            "return a tensor of that shape"
        )
    return ScoredRollout(
        **{f.name: getattr(rollout, f.name) for f in fields(rollout)},
        advantages=values,
        turn_advantages=turns,
    )


def rollout_metrics(scored: ScoredRollout, rewards: torch.Tensor | None = None) -> Metrics:
    """Rewards, lengths and signal of a rollout, as (sum, count).

    Args:
        scored: the rollout.
        rewards: ``(B, G)`` on a scale that is the same in all rollouts; None takes the combined rewards.
    """
    rewards = scored.rewards if rewards is None else rewards
    lengths = torch.tensor([[c.num_trained for c in group] for group in scored.completions], dtype=torch.float64)
    cut = torch.tensor([[c.finish_reason == "length" for c in group] for group in scored.completions])
    groups, sequences = torch.tensor(float(lengths.shape[0])), torch.tensor(float(lengths.numel()))
    metrics: Metrics = {
        "reward/mean": (rewards.sum(), sequences),
        "completion/mean_tokens": (lengths.sum(), sequences),
        "completion/truncated_frac": (cut.double().sum(), sequences),
    }
    if rewards.shape[1] > 1:  # a group of one has no spread
        metrics |= {
            "reward/std": (rewards.std(dim=1).sum(), groups),
            "silent_frac": (silent_rollout(scored.completions, scored.rewards).double().sum(), groups),
            "advantage_std": (_advantage_stds(scored).sum(), groups),
        }
    metrics |= _dialogue_metrics(scored, rewards)
    for number, name in enumerate(scored.reward_names):
        values = scored.rewards_by_function[..., number]
        applies = ~values.isnan()
        metrics[f"reward/{name}"] = (values[applies].sum(), applies.double().sum())
    return metrics | scored.logged


def _dialogue_metrics(scored: ScoredRollout, rewards: torch.Tensor) -> Metrics:
    """Turns, returns and calls of tools, as (sum, count); empty without dialogues."""
    turns = [float(c.dialogue.num_turns) for group in scored.completions for c in group if c.dialogue is not None]
    if not turns:
        return {}
    count = torch.tensor(float(scored.rewards.numel()))
    return {
        "dialogue/turns": (torch.tensor(turns, dtype=torch.float64).sum(), torch.tensor(float(len(turns)))),
        "dialogue/return": (whole_returns(scored.completions, rewards).sum(), count),
        **_tool_metrics([c.dialogue.tool_counts for group in scored.completions for c in group if c.dialogue]),
    }


def _tool_metrics(counts: list[ToolCounts | None]) -> Metrics:
    """Calls per dialogue and the share of them that failed, as (sum, count); empty without tools."""
    counted = [own for own in counts if own is not None]
    if not counted:
        return {}
    calls = torch.tensor(float(sum(own.calls for own in counted)))
    failures = torch.tensor(float(sum(own.failures for own in counted)))
    return {
        "dialogue/tool_calls": (calls, torch.tensor(float(len(counted)))),
        "dialogue/tool_failures": (failures, calls),
    }


def _advantage_stds(scored: ScoredRollout) -> torch.Tensor:
    """``(B,)`` standard deviations of the trained advantages: those of the turns, if turns have rewards."""
    if scored.turn_advantages is None:
        return scored.advantages.std(dim=1)
    flat = [[value for of_turns in group for value in of_turns] for group in scored.turn_advantages]
    return torch.tensor([torch.tensor(group, dtype=torch.float64).std().item() for group in flat], dtype=torch.float64)

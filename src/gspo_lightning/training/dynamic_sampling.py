"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): fresh prompts replace groups without signal.

Prompts are drawn when they are needed, from the position after the last finished rollout, never from a batch that
was fetched ahead; all ranks draw the same prompts and each takes the number it lacks. So a run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.dialogue.turns import silent_rollout
from gspo_lightning.distributed.ranks import add_metrics, gather_values, rank, world_size
from gspo_lightning.errors import UserError
from gspo_lightning.screen import counted
from gspo_lightning.training.prompt_source import PromptSource
from gspo_lightning.types import Metrics, Prompt, PromptBatch, RewardedRollout


@dataclass(frozen=True)
class Drawn:
    """Record of dynamic sampling in one rollout on this rank."""

    enabled: bool = False
    draws: int = 0
    extra_prompts: int = 0
    silent_left: int = 0
    discarded_tokens: int = 0
    """Sampled tokens of replaced groups."""
    by_function: tuple[Tensor, ...] = ()
    """``(B, G, K)`` rewards of everything sampled, one tensor per draw, replaced groups included."""

    def metrics(self, combine: Callable[[Tensor], Tensor]) -> Metrics:
        """Counts per rollout over all ranks and means over everything sampled; empty if dynamic sampling is off.

        Args:
            combine: ``(B, G, K)`` rewards by function -> ``(B, G)``.
        """
        if not self.enabled:
            return {}
        share = torch.tensor(1 / world_size(), dtype=torch.float64)
        rewards = combine(torch.cat(self.by_function))
        # Only silent groups were replaced, each by one prompt.
        silent, sampled = torch.tensor([self.extra_prompts + self.silent_left, len(rewards)], dtype=torch.float64)
        return {
            "dynamic_sampling/sampled_reward": (rewards.sum(), torch.tensor(rewards.numel())),
            "dynamic_sampling/silent_frac": (silent, sampled),
            "dynamic_sampling/draws": (share * self.draws, share),
            "dynamic_sampling/extra_prompts": (torch.tensor(self.extra_prompts), share),
            "dynamic_sampling/silent_left": (torch.tensor(self.silent_left), share),
        }


def draw_until_signal(
    source: PromptSource,
    collect: Callable[[list[Prompt]], RewardedRollout],
    max_draws: int,
    run_along: Callable[[], object] = lambda: None,
    estimator: AdvantageEstimator | None = None,
) -> tuple[RewardedRollout, PromptBatch, Drawn]:
    """Collects a rollout and replaces groups without signal (`silent_rollout` by ``estimator``), at most ``max_draws``
    times and as long as there are fresh prompts.

    If other ranks draw and this one does not, it calls ``run_along``: engines may need all ranks at once.
    Groups that are still silent after that stay: the rollout keeps its size, and they add nothing to the gradient.
    """
    batch = source.first()
    rollout = collect(batch.prompts)
    drawn = Drawn(enabled=True, by_function=(rollout.rewards_by_function,))
    for _ in range(max_draws):
        silent = silent_rollout(rollout.completions, rollout.rewards, estimator).nonzero().flatten().tolist()
        counts = [int(n) for n in gather_values(torch.tensor([len(silent)]))]
        if not sum(counts):
            break
        if (more := source.draw(batch, counts)) is None:
            break
        if len(more.prompts) != counts[rank()]:
            raise UserError(
                f"dynamic_sampling.max_draws: {type(source).__name__}.draw() returned "
                f"{counted(len(more.prompts), 'prompt')}, but was asked for {counts[rank()]} (counts[rank]); return as "
                "many, or None on all ranks"
            )
        batch = PromptBatch(batch.prompts, more.cursor, more.dropped)
        drawn = replace(
            drawn,
            draws=drawn.draws + 1,
            extra_prompts=drawn.extra_prompts + counts[rank()],
            discarded_tokens=drawn.discarded_tokens + _tokens(rollout, silent),
        )
        if not silent:
            run_along()
        else:
            fresh = collect(more.prompts)
            drawn = replace(drawn, by_function=(*drawn.by_function, fresh.rewards_by_function))
            rollout = _replace(rollout, silent, fresh)
    silent_left = int(silent_rollout(rollout.completions, rollout.rewards, estimator).sum())
    return rollout, batch, replace(drawn, silent_left=silent_left)


def _tokens(rollout: RewardedRollout, groups: list[int]) -> int:
    return sum(completion.num_trained for group in groups for completion in rollout.completions[group])


def _replace(rollout: RewardedRollout, places: list[int], fresh: RewardedRollout) -> RewardedRollout:
    """The rollout with the fresh groups at ``places``."""

    def merge(old: Tensor, new: Tensor) -> Tensor:
        merged = old.clone()
        merged[places] = new
        return merged

    prompts, completions = list(rollout.prompts), list(rollout.completions)
    for place, prompt, members in zip(places, fresh.prompts, fresh.completions, strict=True):
        prompts[place], completions[place] = prompt, members
    rewards = merge(rollout.rewards, fresh.rewards)
    columns = {
        name: _merged_column(rollout.extra_columns.get(name), fresh.extra_columns.get(name), places, rewards)
        for name in rollout.extra_columns | fresh.extra_columns
    }
    logged = dict(rollout.logged)
    add_metrics(logged, fresh.logged)
    return replace(
        rollout,
        prompts=prompts,
        completions=completions,
        rewards_by_function=merge(rollout.rewards_by_function, fresh.rewards_by_function),
        rewards=rewards,
        logged=logged,
        extra_columns=columns,
    )


def _merged_column(old: list[Any] | None, new: list[Any] | None, places: list[int], rewards: Tensor) -> list[Any]:
    """Values of a logged column, one per completion, group after group; None for completions without one."""
    groups, size = rewards.shape
    merged = [None] * (groups * size) if old is None else list(old)
    fresh = [None] * (len(places) * size) if new is None else new
    for number, place in enumerate(places):
        merged[place * size : (place + 1) * size] = fresh[number * size : (number + 1) * size]
    return merged

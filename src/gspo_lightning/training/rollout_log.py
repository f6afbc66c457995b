"""The logged metrics of one rollout: what is measured on it, means from sums over ranks, counters and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.dialogue.turns import silent_rollout, whole_returns
from gspo_lightning.distributed.ranks import global_means, global_sum
from gspo_lightning.lightning_private import forget
from gspo_lightning.training.timing import Stopwatch, peak_rss_gb
from gspo_lightning.types import Metrics, ScoredRollout, ToolCounts

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule
    from gspo_lightning.training.rollout_update import RolloutUpdate

COUNTERS = ("optimizer_steps", "skipped_steps", "nonfinite_steps", "oom_splits", "rollout_tokens", "train_tokens")
"""What a run counts, over all ranks."""
RATIO_QUANTILES = (0.01, 0.5, 0.99)


def rollout_values(
    metrics: Metrics,
    ratios: Tensor,
    counts: Mapping[str, int],
    *,
    lr: float,
    stopwatch: Stopwatch,
    before: Mapping[str, float],
    device: torch.device,
) -> dict[str, float]:
    """The metrics of one rollout, as `docs/metrics.md` defines them.

    Args:
        metrics: sums and counts of this rank.
        ratios: importance ratios of every loss taken, over all ranks.
        counts: counters of the run, over all ranks.
        lr: learning rate of the next step.
        stopwatch: seconds of this rollout by phase.
        before: the values of the previous rollout; empty for the first.
        device: of the policy; ranks exchange tensors there.
    """
    values = global_means(metrics, device)
    if "gspo/ratio_noise_var" in values:
        values["gspo/ratio_noise_floor"] = values.pop("gspo/ratio_noise_var") ** 0.5
    if len(ratios):
        values |= {f"ratio/p{level * 100:g}": value for level, value in quantiles(ratios, RATIO_QUANTILES).items()}
    values["lr"] = lr
    values |= {f"count/{name}": float(count) for name, count in counts.items()}
    values |= stopwatch.metrics(values, before)
    values["perf/peak_rss_gb"] = peak_rss_gb()
    if device.type == "cuda":
        values["perf/peak_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
    return values


def rollout_metrics(
    scored: ScoredRollout, rewards: torch.Tensor | None = None, estimator: AdvantageEstimator | None = None
) -> Metrics:
    """Rewards, lengths and signal of a rollout, as (sum, count).

    Args:
        scored: the rollout.
        rewards: ``(B, G)`` on a scale that is the same in all rollouts; None takes the combined rewards.
        estimator: says which groups are silent; None for those of equal rewards alone.
    """
    rewards = scored.rewards if rewards is None else rewards
    lengths = torch.tensor([[c.num_trained for c in group] for group in scored.completions], dtype=torch.float64)
    cut = torch.tensor([[c.finish_reason == "length" for c in group] for group in scored.completions])
    groups, sequences = (_count(n) for n in (lengths.shape[0], lengths.numel()))
    metrics: Metrics = {
        "reward/mean": (rewards.sum(), sequences),
        "completion/mean_tokens": (lengths.sum(), sequences),
        "completion/truncated_frac": (cut.double().sum(), sequences),
    }
    if rewards.shape[1] > 1:  # a group of one has no spread
        metrics |= {
            "reward/std": (rewards.std(dim=1).sum(), groups),
            "silent_frac": (silent_rollout(scored.completions, scored.rewards, estimator).double().sum(), groups),
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
    count = _count(scored.rewards.numel())
    return {
        "dialogue/turns": (torch.tensor(turns, dtype=torch.float64).sum(), _count(len(turns))),
        "dialogue/return": (whole_returns(scored.completions, rewards).sum(), count),
        **_tool_metrics([c.dialogue.tool_counts for group in scored.completions for c in group if c.dialogue]),
    }


def _tool_metrics(counts: list[ToolCounts | None]) -> Metrics:
    """Calls per dialogue and the share of them that failed, as (sum, count); empty without tools."""
    counted = [own for own in counts if own is not None]
    if not counted:
        return {}
    calls = _count(sum(own.calls for own in counted))
    failures = _count(sum(own.failures for own in counted))
    return {
        "dialogue/tool_calls": (calls, _count(len(counted))),
        "dialogue/tool_failures": (failures, calls),
    }


def _count(number: int) -> torch.Tensor:
    """In float64 whatever the dtype of new tensors, which bf16-true sets for the model: there 257 is 256."""
    return torch.tensor(number, dtype=torch.float64)


def _advantage_stds(scored: ScoredRollout) -> torch.Tensor:
    """``(B,)`` standard deviations of the trained advantages: those of the turns, in groups whose turns have some."""
    stds = scored.advantages.std(dim=1)
    for number, group in enumerate(scored.turn_advantages or ()):
        if group is not None:
            flat = [value for of_turns in group for value in of_turns]
            stds[number] = torch.tensor(flat, dtype=torch.float64).std()
    return stds


def count_tokens(module: GSPOModule, update: RolloutUpdate, *, also_sampled: int) -> None:
    """Adds the sampled and the trained tokens of a rollout, over all ranks, to the counters of the run.

    Args:
        module: its counters are added to.
        update: on the rollout.
        also_sampled: tokens of this rank that were sampled and replaced by others.
    """
    sampled = also_sampled + sum(c.num_trained for group in update.scored.completions for c in group)
    tokens = torch.tensor([sampled, update.forwarded_tokens], dtype=torch.float64, device=module.device)
    for name, count in zip(("rollout_tokens", "train_tokens"), global_sum(tokens).tolist(), strict=True):
        module.counts[name] += int(count)


def log_rollout(module: GSPOModule, update: RolloutUpdate) -> None:
    """Logs the metrics of a finished rollout, which are ``module.last_metrics`` from now on."""
    values = rollout_values(
        update.metrics, update.ratios(), module.counts,
        lr=float(module.trainer.optimizers[0].param_groups[0]["lr"]),
        stopwatch=module.stopwatch, before=module.last_metrics, device=module.device,
    )  # fmt: skip
    forget(module.trainer, module.last_metrics.keys() - values.keys())  # metrics that this rollout did not measure
    module.last_metrics = values
    module.log_dict({**values, "step": float(module.rollouts_done)}, batch_size=len(update.scored.prompts))


def quantiles(values: Tensor, levels: Sequence[float]) -> dict[float, float]:
    """Quantiles with linear interpolation between neighbours, by level.

    `torch.quantile` refuses more than 2**24 values; a large rollout has more token ratios than that.

    Args:
        values: ``(N,)``, not empty.
        levels: between 0 and 1.
    """
    ordered = values.sort().values
    found = {}
    for level in levels:
        place = level * (len(ordered) - 1)
        below = int(place)
        low, high = ordered[below].item(), ordered[min(below + 1, len(ordered) - 1)].item()
        found[level] = low + (place - below) * (high - low)
    return found

"""The metrics of docs/metrics.md as means over groups, completions, sequences or tokens."""

from __future__ import annotations

import math

from torch import Tensor

from gspo_lightning.types import Completion
from tests.whole_update import reference_losses as losses
from tests.whole_update.case import Case
from tests.whole_update.reference_advantages import Numbers, combined, is_silent, returns, turn_of_tokens, unbiased_std
from tests.whole_update.reference_losses import Terms


class Means:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, count: float) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + total, before[1] + count

    def values(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items() if count}


def add_rollout_metrics(
    means: Means,
    case: Case,
    groups: list[list[Completion]],
    by_function: list[list[Numbers]],
    rewards: list[Numbers],
    of_turns: list[list[Numbers]],
) -> None:
    """Of the rollout before training: rewards on their own scale, lengths, groups without signal, dialogues."""
    dialogues = any(c.dialogue is not None for group in groups for c in group)
    for b, group in enumerate(groups):
        plain = combined(by_function[b], case.weights, "weighted_sum")
        if len(group) > 1:  # one has no spread
            means.add("reward/std", unbiased_std(plain), 1)
            means.add("silent_frac", is_silent(group, rewards[b], case), 1)
            means.add("advantage_std", unbiased_std([a for own in of_turns[b] for a in own]), 1)
        for completion, reward, row in zip(group, plain, by_function[b], strict=True):
            turns = turn_of_tokens(completion)
            means.add("reward/mean", reward, 1)
            means.add("completion/mean_tokens", len(turns), 1)
            means.add("completion/truncated_frac", completion.finish_reason == "length", 1)
            for k, value in enumerate(row):
                if not math.isnan(value):
                    means.add(f"reward/f{k}", value, 1)
            if completion.dialogue is not None:
                means.add("dialogue/turns", turns[-1] + 1, 1)
            if dialogues:
                means.add("dialogue/return", returns(completion, reward)[0], 1)


def add_sampler_metrics(means: Means, old: Tensor, sampler: Tensor) -> None:
    """How far the sampler is from the trainer with the weights that sampled, of one completion."""
    gap = old - sampler
    means.add("sampler_mismatch/abs_mean", gap.abs().sum().item(), len(gap))
    means.add("gspo/ratio_noise_var", gap.mean().item() ** 2, 1)


def add_loss_metrics(means: Means, case: Case, x: Terms, w: list[Tensor], policy: Tensor) -> None:
    """Of one completion in one step: ratios by their unit (token or sequence), the others by token."""
    n, d = x.length, x.d.detach()
    by_token = case.level == "token"
    for value in w if by_token else w[:1]:
        means.add("ratio/mean", value.item(), 1)
    for value in d.tolist() if by_token else [d.mean().item()]:
        means.add("log_ratio/abs_mean", abs(value), 1)
    means.add("kl/old", -d.sum().item(), n)
    means.add("loss/policy", policy.sum().item(), n)
    if (masks := losses.clipped_tokens(case, x, w)) is not None:
        for side, mask in zip(("low", "high"), masks, strict=True):
            means.add(f"clip_frac_{side}", *((sum(mask), n) if by_token else (sum(mask) / n, 1)))
    if x.selected is not None:
        means.add("selected_frac", x.selected.sum().item(), n)
    if x.chosen is not None:
        means.add("covariance_frac", sum(x.chosen), n)
    if case.off_policy_threshold is not None:
        means.add("off_policy_masked_frac", sum(losses.off_policy(case, x)) / n, 1)
    if case.mismatch is not None:
        _, raw, acted = losses.mismatch_weights(case, x)
        means.add("mismatch/weight_mean", sum(raw), len(raw))
        means.add(f"mismatch/{'capped' if case.mismatch[1] == 'truncate' else 'masked'}_frac", sum(acted), len(raw))
    if x.reference is not None:
        q = (x.reference - x.logprobs).detach()
        means.add("kl/ref", (q.exp() - 1 - q).sum().item(), n)
    if x.entropy is not None and (case.log_entropy or case.entropy_coef or case.entropy_target is not None):
        means.add("entropy", x.entropy.sum().item(), n)


def quantile(values: list[float], level: float) -> float:
    """With linear interpolation between neighbours."""
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

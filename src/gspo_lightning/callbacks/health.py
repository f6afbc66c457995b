"""Warnings about a run that goes wrong, each with its cause and a remedy, each printed once per episode.

A check is a function of the metrics of the rollouts so far and returns a line or None. The line is printed when the
condition begins to hold, and again when it returns after having passed, three times at most. See
docs/troubleshooting.md.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning as L

from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.screen import counted

Row = dict[str, float]


@dataclass(frozen=True)
class Facts:
    """The input of the checks."""

    rows: Sequence[Row]
    """Metrics of the rollouts so far, oldest first."""
    patience: int
    """Consecutive rollouts that a possibly transient condition must hold before it is reported."""
    clip: tuple[float, float] | None
    """Smallest and largest ratio that is never clipped; None for a loss without a clip, or if all ratios are 1."""
    by_sequence: bool
    """Whether there is one ratio per sequence, not per token."""

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None if the newest rollout lacks it."""
        return self.rows[-1].get(name)

    def recent(self, name: str) -> list[float] | None:
        """The values of the last ``patience`` rollouts; None if one is missing."""
        values = [row[name] for row in self.rows[-self.patience :] if name in row]
        return values if len(values) == self.patience else None


def noise_floor(facts: Facts) -> str | None:
    """Warns if rounding alone moves ``log s_i`` by more than half a clip width."""
    floor = facts.last("gspo/ratio_noise_floor")
    if floor is None or facts.clip is None or not facts.by_sequence:
        return None
    width = min(1 - facts.clip[0], facts.clip[1] - 1)
    if 2 * floor <= width:
        return None
    return (
        f"gspo/ratio_noise_floor={floor:.1e} is more than half of the clip width {width:g}: rounding decides "
        "what is clipped; widen objective.epsilon, or use trainer.precision=32-true"
    )


def clip_never_acts(facts: Facts) -> str | None:
    """Warns if no ratio has ever been clipped: later, as the task is learnt, few completions are left to clip. An upper
    cap alone is a guard that is not meant to act. Ratios beyond a bound that moved against their advantages are not
    clipped either, but would be in other rollouts."""
    if facts.clip is None or facts.clip[0] <= 0 or facts.recent("clip_frac_low") is None:
        return None
    clipped = [row["clip_frac_low"] + row["clip_frac_high"] for row in facts.rows if "clip_frac_low" in row]
    low, high = facts.last("ratio/p1"), facts.last("ratio/p99")
    if any(clipped) or low is None or high is None or low < facts.clip[0] or high > facts.clip[1]:
        return None
    return (
        f"no ratio was clipped in {counted(len(clipped), 'rollout')}: ratio/p1={low:.4g} and "
        f"ratio/p99={high:.4g} lie inside [{facts.clip[0]:g}, {facts.clip[1]:g}]; narrow "
        "objective.epsilon_high (and epsilon, where the loss reads it) if the clip is to act"
    )


def clip_takes_most(facts: Facts) -> str | None:
    """Warns if more than half of each rollout is clipped."""
    low, high = facts.recent("clip_frac_low"), facts.recent("clip_frac_high")
    if low is None or high is None or min(a + b for a, b in zip(low, high, strict=True)) <= 0.5:
        return None
    return (
        f"more than half of the ratios were clipped in {counted(facts.patience, 'rollout')} in a row; lower "
        "optimizer.lr, widen objective.epsilon_high (and epsilon, where the loss reads it), or take fewer optimizer "
        "steps per rollout (update.num_minibatches)"
    )


def no_signal(facts: Facts) -> str | None:
    """Warns if no group gives a signal."""
    silent = facts.recent("silent_frac")
    if silent is None or min(silent) < 1.0:
        return None
    name = _reward_name(facts)
    return (
        f"no group had two different rewards, or bests of k, in {counted(facts.patience, 'rollout')} "
        f"({name}={facts.last(name):.3g}): nothing is learnt; "
        "the task is too hard or too easy, or the reward cannot tell completions apart"
    )


def reward_collapse(facts: Facts) -> str | None:
    """Warns if the moving average of the reward has lost more than half of its gain."""
    # With turn rewards, the reward of the whole dialogue is only a part of what is trained on, or no part.
    name = "dialogue/return" if facts.last("dialogue/return") is not None else _reward_name(facts)
    means = [row[name] for row in facts.rows if name in row]
    n = facts.patience
    if len(means) < 3 * n:
        return None
    averages = [math.fsum(means[i : i + n]) / n for i in range(len(means) - n + 1)]
    gained, lost = max(averages) - averages[0], max(averages) - averages[-1]
    # Standard error of an average, from the typical step between neighbours: jumps of the level do not count.
    step = statistics.median(abs(b - a) for a, b in zip(means, means[1:], strict=False))
    noise = 1.4826 * step / (2 * n) ** 0.5
    if min(gained, lost) <= 4 * noise or lost <= gained / 2:
        return None
    return (
        f"{name} fell from {max(averages):.3g} to {averages[-1]:.3g}; lower optimizer.lr, narrow "
        "objective.epsilon, or go back to an earlier checkpoint"
    )


def entropy_collapse(facts: Facts) -> str | None:
    """Warns if entropy is below a tenth of its first value."""
    entropies = [row["entropy"] for row in facts.rows if "entropy" in row]
    if not entropies or entropies[-1] >= 0.1 * entropies[0]:
        return None
    return (
        f"entropy fell from {entropies[0]:.3g} to {entropies[-1]:.3g} nats: completions of a group become alike; raise "
        "rollout.temperature, objective.epsilon_high or objective.entropy_coef, or set objective.entropy_target"
    )


def length_explosion(facts: Facts) -> str | None:
    """Warns if most completions are cut at the limit, unless they were from the first rollout on."""
    cut = facts.recent("completion/truncated_frac")
    if cut is None or min(cut) <= 0.5 or facts.rows[0].get("completion/truncated_frac", 0.0) > 0.5:
        return None
    return (
        f"completion/truncated_frac={cut[-1]:.2f}: completions have grown to the length limit; raise "
        "rollout.max_completion_length or add a length reward (reward=soft_overlong)"
    )


def mismatch(facts: Facts) -> str | None:
    """Warns if sampler and trainer disagree about the same weights."""
    value = facts.last("sampler_mismatch/abs_mean")
    if value is None or value <= 0.1:
        return None
    return (
        f"sampler_mismatch/abs_mean={value:.3g} nats per token: sampler and trainer disagree about the same weights; "
        "use the same precision in both, or (with update.old_logprobs=policy) a correction (mismatch=sequence_mask, "
        "mismatch=token_truncate)"
    )


def gradient_spike(facts: Facts) -> str | None:
    """Warns if the gradient norm is more than ten times its median."""
    norms = [row["grad_norm"] for row in facts.rows if "grad_norm" in row]
    if len(norms) <= facts.patience or "grad_norm" not in facts.rows[-1]:
        return None
    usual = statistics.median(norms[:-1])
    if not usual or norms[-1] <= 10 * usual:
        return None
    times = norms[-1] / usual
    return f"grad_norm={norms[-1]:.3g} is {times:.0f} times its median; lower optimizer.lr or update.max_grad_norm"


CHECKS: tuple[Callable[[Facts], str | None], ...] = (
    noise_floor,
    clip_never_acts,
    clip_takes_most,
    no_signal,
    reward_collapse,
    entropy_collapse,
    length_explosion,
    mismatch,
    gradient_spike,
)


METRICS = (
    "gspo/ratio_noise_floor", "clip_frac_low", "clip_frac_high", "ratio/p1", "ratio/p99", "silent_frac",
    "reward/mean", "dynamic_sampling/sampled_reward", "dialogue/return", "entropy", "completion/truncated_frac",
    "sampler_mismatch/abs_mean", "grad_norm",
)  # fmt: skip
"""Metrics that the checks read."""
MOST_TIMES = 3
"""Most times that one check's line is printed; after that the metrics tell."""
MOST_ROWS = 4000
"""Rollouts kept for the checks: the first 1000, which later ones are compared with, and the newest 3000."""


class Health(L.Callback):
    """Prints what the checks find, and may end the run.

    Args:
        patience: consecutive rollouts that a possibly transient condition must hold before it is reported.
        stop_on: names of checks that end the run, such as ``[no_signal, reward_collapse]``; the run can be resumed.

    Raises:
        UserError: an unknown check in ``stop_on``, or ``patience`` below 1.
    """

    def __init__(self, patience: int = 5, stop_on: list[str] | None = None) -> None:
        known = [check.__name__ for check in CHECKS]
        if unknown := sorted(set(stop_on or ()) - set(known)):
            raise UserError(
                f"callbacks.health.stop_on: there is no check {unknown[0]!r}; choose among {', '.join(known)}"
            )
        if patience < 1:
            raise UserError(f"callbacks.health.patience={patience} must be at least 1")
        self.patience, self.stop_on = patience, frozenset(stop_on or ())
        self.rows: list[Row] = []
        self._holding: set[str] = set()
        self._said: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Runs all checks on the rollout that has just ended."""
        module = cast(GSPOModule, pl_module)
        now = module.last_metrics
        # Only what the checks read: the rows of a long run add up.
        self.rows.append({name: float(now[name]) for name in METRICS if name in now and now[name] == now[name]})
        if len(self.rows) > MOST_ROWS:
            del self.rows[MOST_ROWS // 4]
        level = module.objective.importance_sampling_level
        for name, line in self.findings(Facts(self.rows, self.patience, _clip(module), level != "token")):
            self._said[name] += 1
            if trainer.is_global_zero and self._said[name] <= MOST_TIMES:
                last = (
                    " (this keeps coming back and will not be reported again)" if self._said[name] == MOST_TIMES else ""
                )
                print(f"warning: {line}{last}", flush=True)
            if name in self.stop_on:
                trainer.should_stop = True

    def findings(self, facts: Facts) -> list[tuple[str, str]]:
        """(check, line) of each condition that holds now and did not hold before."""
        found = {check.__name__: line for check in CHECKS if (line := check(facts)) is not None}
        new = [(name, line) for name, line in found.items() if name not in self._holding]
        self._holding = set(found)
        return new

    @property
    def state_key(self) -> str:
        """Key that includes the settings, so that two instances with different settings can watch one run."""
        return self._generate_state_key(patience=self.patience, stop_on=sorted(self.stop_on))

    def state_dict(self) -> dict[str, Any]:
        """The rows to compare with (a column per metric, NaN where it is missing), and what was reported."""
        columns = {name: [row.get(name, math.nan) for row in self.rows] for name in METRICS}
        return {"columns": columns, "holding": sorted(self._holding), "said": dict(self._said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of `state_dict`."""
        columns = state_dict["columns"]
        rows = zip(*columns.values(), strict=True)
        self.rows = [{n: v for n, v in zip(columns, row, strict=True) if v == v} for row in rows]
        self._holding, self._said = set(state_dict["holding"]), Counter(state_dict["said"])


def _reward_name(facts: Facts) -> str:
    """Metric of the policy's reward: with dynamic sampling ``reward/mean`` covers only the kept groups."""
    name = "dynamic_sampling/sampled_reward"
    return "reward/mean" if facts.last(name) is None else name


def _clip(module: GSPOModule) -> tuple[float, float] | None:
    """The bounds of the ratio; None without a clip, or if every ratio is exactly 1 and nothing can be clipped."""
    bounds = module.objective.ratio_bounds
    if bounds is None or module.ahead is not None:
        return bounds
    settings = module.update_settings
    is_one = settings.num_iterations * settings.num_minibatches == 1 and settings.old_logprobs == "policy"
    return None if is_one else bounds

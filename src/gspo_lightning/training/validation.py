"""Measures the policy on held-out prompts: greedy and sampled accuracy, pass@k, mean reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from gspo_lightning.data.images import thumbnail_uri
from gspo_lightning.data.vision import image_of, image_parts, last_text
from gspo_lightning.dialogue.turns import whole_returns
from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rollout import RolloutEngine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.training.rollout_collection import sample
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams


@dataclass(frozen=True)
class ValidationSettings:
    """How held-out prompts are judged."""

    num_generations: int = 2
    """Sampled completions per prompt, at the training temperature; k of pass@k."""
    reward: str | None = None
    """The reward function that decides what is right; by default the first. If it does not apply to a completion, the
    first that does decides."""
    threshold: float = 1.0
    """A completion is right if that reward is at least this."""
    num_samples: int = 10
    """Greedy completions kept for the report."""

    def __post_init__(self) -> None:
        if self.num_generations < 1:
            raise UserError(f"validation.num_generations={self.num_generations} must be at least 1")


class Validator:
    """Accumulates validation over batches and ranks with torchmetrics.

    Sampling seeds depend on (seed, prompt, generation) alone, so the same prompts get the same random numbers before
    and after training and the difference is the policy's.
    """

    def __init__(self, settings: ValidationSettings, rewards: RewardSet, sampling: SamplingParams, seed: int) -> None:
        self.settings = settings
        self.set_rewards(rewards)
        self.set_sampling(sampling)
        self.seed = seed
        self.log: Callable[[list[dict[str, Any]]], None] | None = None
        """Called with a record of every completion of a batch, greedy ones first; None for no log."""
        self.names: tuple[str, ...] = (
            "val/accuracy",
            "val/sampled_accuracy",
            f"val/pass@{settings.num_generations}",
            "val/reward",
            "val/mean_tokens",
        )
        self.reset()

    def set_rewards(self, rewards: RewardSet) -> None:
        """Measures these rewards from now on.

        Raises:
            UserError: the one that decides what is right is not among them.
        """
        wanted = self.settings.reward
        if wanted is not None and wanted not in rewards.names:
            raise UserError(f"validation.reward={wanted} must be one of {', '.join(rewards.names)}")
        self.rewards, self.judge = rewards, rewards.names.index(wanted) if wanted else 0

    def set_sampling(self, sampling: SamplingParams) -> None:
        """Samples as training does from now on, but greedily or with its own number of completions."""
        self.greedy = replace(sampling, num_generations=1, temperature=0.0)
        self.sampled = replace(sampling, num_generations=self.settings.num_generations)

    def reset(self, tasks: tuple[str, ...] = ()) -> None:
        """Resets all means; ``tasks`` of a mixture, the same on every rank, are also measured separately."""
        self.tasks = tasks
        apart = (f"{name}/{task}" for task in tasks for name in self.names[:2])
        self.means = {name: MeanMetric().set_dtype(torch.float64) for name in (*self.names, *apart)}
        self.samples: list[dict[str, Any]] = []

    def update(self, policy: Policy, engine: RolloutEngine, prompts: list[Prompt]) -> None:
        """Adds one batch of prompts. Even without any, the engine is called: another rank may have some."""
        if traits(engine).environments is not None:  # the same on every rank, whether it has prompts or not
            self.means.setdefault("val/return", MeanMetric().set_dtype(torch.float64))
        greedy = sample(policy, engine, prompts, self.greedy, self.seed, "validation")
        if not prompts:
            sample(policy, engine, prompts, self.sampled, self.seed, "validation")
            return
        right, rewards = self._judge(greedy, "greedy")
        self._update_right(self.names[0], prompts, right)
        for row, (prompt, (completion,)) in enumerate(zip(prompts, greedy.completions, strict=True)):
            if len(self.samples) < self.settings.num_samples:
                self.samples.append(_sample(prompt, completion, rewards[row, 0].item(), bool(right[row, 0])))
        sampled = sample(policy, engine, prompts, self.sampled, self.seed, "validation")
        # The loader keeps held-out prompts for the whole run, and would keep alive what is cached for each of them.
        if (vision := getattr(policy, "vision", None)) is not None:
            vision.forget(prompts)
        right, rewards = self._judge(sampled, "sampled")
        self._update_right(self.names[1], prompts, right)
        self.means[self.names[2]].update(right.amax(dim=1))
        self.means["val/reward"].update(rewards)
        if "val/return" in self.means:
            self.means["val/return"].update(whole_returns(sampled.completions, rewards))
        lengths = [float(c.num_trained) for group in sampled.completions for c in group]
        self.means["val/mean_tokens"].update(torch.tensor(lengths, dtype=torch.float64))

    def _update_right(self, name: str, prompts: list[Prompt], right: Tensor) -> None:
        self.means[name].update(right)
        for task in self.tasks:
            rows = [number for number, prompt in enumerate(prompts) if prompt.sample.get("task") == task]
            if rows:
                self.means[f"{name}/{task}"].update(right[rows])

    def _judge(self, rollout: Rollout, how: str) -> tuple[Tensor, Tensor]:
        """``(B, G)`` each: whether a completion is right, and its reward."""
        by_function = self.rewards(rollout.prompts, rollout.completions)
        judged = by_function[..., self.judge]
        for number in range(by_function.shape[-1]):
            judged = torch.where(judged.isnan(), by_function[..., number], judged)
        right, rewards = (judged >= self.settings.threshold).double(), self.rewards.weighted_sum(by_function)
        if self.log is not None:
            self.log(_records(rollout, how, self.rewards.names, by_function, right, rewards))
        return right, rewards

    def compute(self, device: torch.device) -> dict[str, float]:
        """Means over all prompts of all ranks."""
        return {name: metric.to(device).compute().item() for name, metric in self.means.items()}


def _sample(prompt: Prompt, completion: Completion, reward: float, right: bool) -> dict[str, Any]:
    """The report's record of a held-out prompt and its greedy completion."""
    answer = prompt.sample.get("answer")
    shown: dict[str, Any] = {
        "prompt": last_text(prompt.prompt),
        "completion": completion.text,
        "reward": reward,
        "right": right,
        "answer": None if answer is None else str(answer),
    }
    if completion.thinking:
        shown["thinking"] = completion.thinking
    images = [image for part in image_parts(prompt.prompt) if (image := image_of(part)) is not None]
    if images:
        shown["images"] = [thumbnail_uri(image) for image in images]
    return shown


def _records(
    rollout: Rollout, how: str, names: Sequence[str], by_function: Tensor, right: Tensor, rewards: Tensor
) -> list[dict[str, Any]]:
    """One flat record per completion; a reward that does not apply is NaN, which JSON has as null."""
    records = []
    for b, (prompt, group) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        for g, completion in enumerate(group):
            record = {
                "uid": prompt.uid,
                "how": how,
                "generation": g,
                "prompt": prompt.prompt,
                "completion": completion.text,
                "rewards": dict(zip(names, by_function[b, g].tolist(), strict=True)),
                "reward": rewards[b, g].item(),
                "right": bool(right[b, g]),
                "finish_reason": completion.finish_reason,
                "tokens": completion.num_trained,
            }
            records.append(record | ({"thinking": completion.thinking} if completion.thinking else {}))
    return records

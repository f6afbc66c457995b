"""What a rollout engine promises, and how it fails."""

from __future__ import annotations

from typing import Protocol

from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Prompt, Rollout, SamplingParams


class RolloutError(RuntimeError):
    """No rollout can be had. The weights are those of the last whole rollout, so the run saves them and ends."""


class EngineUnavailableError(RolloutError):
    """Nothing is left that could sample: every rollout server is dead, hangs or answers nonsense."""


class WeightSyncError(RolloutError):
    """The engine does not run the policy's weights; what it sampled would be off-policy without a word."""


class RolloutEngine(Protocol):
    """Samples completions from the current policy."""

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """``sampling.num_generations`` completions for each prompt, in the order of ``prompts``.

        The caller has put the policy's autocast in place. Completion g of a prompt draws its random numbers from
        ``(seed, prompt.uid, g)`` alone.

        Raises:
            RolloutError: the engine cannot sample from the policy's weights.
        """
        ...

"""What a rollout engine promises."""

from __future__ import annotations

from typing import Protocol

from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Prompt, Rollout, SamplingParams


class RolloutEngine(Protocol):
    """Samples completions from the current policy."""

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """``sampling.num_generations`` completions for each prompt, in the order of ``prompts``.

        The caller has put the policy's autocast in place. Completion g of a prompt draws its random numbers from
        ``(seed, prompt.uid, g)`` alone.
        """
        ...

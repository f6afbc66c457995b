"""Whole weights for engines that cannot sample from a sharded policy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gspo_lightning.distributed.ranks import rank
from gspo_lightning.distributed.sharding import copy_trained_weights, whole_copy
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.engine import RolloutEngine, close_engine, traits
from gspo_lightning.rollout.transformers_engine import TransformersEngine
from gspo_lightning.types import Prompt, Rollout, SamplingParams


@dataclass
class GatheredEngine:
    """Gives ``engine`` an unsharded, current copy of the policy on the CPU.

    There is one such copy on every rank, or on rank 0 alone if the engine has ``samples_on = "first_rank"``.
    Weights arrive one parameter at a time, so no rank ever holds more than that copy and one parameter.
    """

    engine: RolloutEngine
    loader: PolicyLoader
    _copy: Policy | None = field(default=None, init=False)

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `RolloutEngine.generate`; all ranks must call it together."""
        self._refresh(policy)
        kind = policy.device.type
        # The copy computes in the policy's autocast dtype, and the engine chooses its dtype by it.
        precision = torch.autocast("cpu", torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        with precision:
            return self.engine.generate(self._copy or policy, prompts, sampling, seed)

    def close(self) -> None:
        """Closes the engine."""
        close_engine(self.engine)

    def _refresh(self, policy: Policy) -> None:
        if rank() == 0 or traits(self.engine).samples_on == "every_rank":
            self._copy = self._copy or whole_copy(policy, self.loader)
        copy_trained_weights(policy, self._copy)


def gathered(engine: RolloutEngine, loader: PolicyLoader) -> RolloutEngine:
    """The engine, wrapped if it cannot sample from a sharded policy."""
    return engine if isinstance(engine, TransformersEngine) else GatheredEngine(engine, loader)

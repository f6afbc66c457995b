"""The rollout of one batch of prompts: sampled now or taken from ahead, scored, and compared within its groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gspo_lightning.objective.refusals import refuse_turn_rewards
from gspo_lightning.rollout.seeds import rollout_seed
from gspo_lightning.training.collect import collect_rollout, compare
from gspo_lightning.training.dynamic_sampling import Drawn, draw_until_signal
from gspo_lightning.training.prompt_source import needed_source
from gspo_lightning.training.sampling_change import say_begins_later
from gspo_lightning.types import Prompt, PromptBatch, RewardedRollout, SamplingParams, ScoredRollout

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


@dataclass
class RolloutCollection:
    """One rollout, collected once by `run`; `rollout_update.RolloutUpdate` then trains on it."""

    module: GSPOModule
    batch: PromptBatch
    """The prompts of the rollout; after `run` with its final position, where dynamic sampling drew further ones."""
    drawn: Drawn = field(default_factory=Drawn)
    """What dynamic sampling drew."""

    def run(self) -> ScoredRollout:
        """Samples, scores and compares."""
        module = self.module
        module.sampled_with = self._settings()
        say_begins_later(module)
        with module.trainer.precision_plugin.forward_context():
            rollout = self._draw() if module.max_draws else self._collect(self.batch.prompts)
            scored = compare(rollout, module.advantages)
        if scored.turn_advantages is not None:
            refuse_turn_rewards(module.objective)
        if module.ahead is not None and module.ahead.is_stale:
            module.stopwatch.seconds["rollout_ahead"] = module.ahead.seconds
        return scored

    @property
    def _seed(self) -> int:
        return rollout_seed(self.module.seed, self.module.rollouts_done)

    def _settings(self) -> SamplingParams:
        """Those that were asked for, or those that this rollout was sampled ahead with."""
        ahead = None if self.module.ahead is None else self.module.ahead.sampling_of(self.batch.prompts, self._seed)
        return ahead or self.module.sampling

    def _draw(self) -> RewardedRollout:
        source = needed_source(self.module.trainer, "dynamic_sampling.max_draws")
        rollout, self.batch, self.drawn = draw_until_signal(
            source, self._collect, self.module.max_draws, self._run_along
        )
        return rollout

    def _collect(self, prompts: list[Prompt]) -> RewardedRollout:
        module = self.module
        assert module.policy is not None
        return collect_rollout(
            module.policy, module.engine, module.rewards, prompts, module.sampled_with,
            seed=self._seed, stopwatch=module.stopwatch,
        )  # fmt: skip

    def _run_along(self) -> None:
        """Calls the engine without prompts, because other ranks call it with some."""
        module = self.module
        assert module.policy is not None
        module.engine.generate(module.policy, [], module.sampled_with, self._seed)


def sample_ahead(module: GSPOModule) -> None:
    """Begins the next rollout, with ``staleness=1``; its old log-probabilities will be those of the current weights."""
    if module.ahead is None or module.rollouts_done + 1 >= module.max_rollouts:
        return
    source = needed_source(module.trainer, "rollout.engine.staleness=1")
    assert module.policy is not None
    module.ahead.launch(
        module.policy,
        source.batch_at(module.batch_in_hand.cursor).prompts,
        module.sampling,
        rollout_seed(module.seed, module.rollouts_done + 1),
        module.trainer.precision_plugin.forward_context,
    )

"""The rollout of one batch of prompts: sampled now or taken from ahead, scored, and compared within its groups."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspo_lightning.advantages import AdvantageEstimator, checked_advantages
from gspo_lightning.dialogue.turns import has_turn_rewards, turn_advantages
from gspo_lightning.distributed.failing import failing_together
from gspo_lightning.distributed.ranks import gather_values
from gspo_lightning.errors import UserError
from gspo_lightning.objective.refusals import refuse_turn_rewards
from gspo_lightning.policy.model import Policy
from gspo_lightning.precision import dtype_of_new_tensors
from gspo_lightning.rollout import RolloutEngine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.rollout.seeds import rollout_seed
from gspo_lightning.screen import counted
from gspo_lightning.training.batch_checks import are_token_ids
from gspo_lightning.training.dynamic_sampling import Drawn, draw_until_signal
from gspo_lightning.training.out_of_memory import memory_for
from gspo_lightning.training.prompt_source import needed_source
from gspo_lightning.training.sampling_change import say_begins_later
from gspo_lightning.types import (
    Completion,
    Prompt,
    PromptBatch,
    RewardedRollout,
    Rollout,
    SamplingParams,
    ScoredRollout,
)

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
            source, self._collect, self.module.max_draws, self._run_along, self.module.advantages
        )
        return rollout

    def _collect(self, prompts: list[Prompt]) -> RewardedRollout:
        """Samples ``num_generations`` completions per prompt and gives each a reward."""
        module = self.module
        assert module.policy is not None
        rollout = self._sampled(prompts)
        with failing_together(module.device):
            _check_tokens(rollout, module.policy.config.get_text_config().vocab_size)
            _check_turns(rollout, module.advantages)
            with module.stopwatch("reward"):
                by_function = module.rewards(rollout.prompts, rollout.completions)
        return RewardedRollout(
            prompts=rollout.prompts,
            completions=rollout.completions,
            reward_names=module.rewards.names,
            rewards_by_function=by_function,
            rewards=module.rewards.combine(by_function),
            logged=module.rewards.logged_metrics(),
            extra_columns=module.rewards.log.columns,
        )

    def _run_along(self) -> None:
        """Does without prompts what other ranks do with some, together with all: it samples, and fails if they do."""
        self._sampled([])
        with failing_together(self.module.device):
            pass

    def _sampled(self, prompts: list[Prompt]) -> Rollout:
        module = self.module
        assert module.policy is not None
        # The precision is that of the model: rewards, advantages and environments are not computed in it.
        precision, usual = module.trainer.precision_plugin.forward_context(), dtype_of_new_tensors(module.rewards.dtype)
        with module.stopwatch("rollout"), precision, usual:
            return sample(module.policy, module.engine, prompts, module.sampled_with, self._seed)


def sample(
    policy: Policy, engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingParams, seed: int, of: str = ""
) -> Rollout:
    """Calls `RolloutEngine.generate` and checks what it returns; a lack of memory becomes a line with the remedy.

    Args:
        policy: the policy that samples.
        engine: the engine that samples.
        prompts: this rank's prompts.
        sampling: how completions are drawn.
        seed: of the rollout.
        of: the config group of ``sampling.num_generations``, if that is not ``rollout``.

    Raises:
        OutOfMemoryError: an allocation of this process failed.
        UserError: the engine returned anything but the completions that it was asked for.
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
        rollout = engine.generate(policy, prompts, sampling, seed)
    _check_counts(rollout, len(prompts), sampling.num_generations)
    for prompt, group in zip(rollout.prompts, rollout.completions, strict=True):
        for completion in group:
            if (fault := _fault(completion, sampling.max_completion_length)) is not None:
                raise UserError(f"rollout.engine: generate() returned {fault} (row {prompt.uid})")
    return rollout


def _fault(completion: Completion, longest: int) -> str | None:
    """What is wrong with a completion, as a custom engine may return it; None if nothing is."""
    ids, logprobs = completion.token_ids, completion.sampler_logprobs
    if not are_token_ids(ids):
        return "token_ids that are no tensor of whole numbers (C,)"
    if not 1 <= len(ids) <= longest:
        return f"a completion of {counted(len(ids), 'token')}, but was asked for 1 to {longest}"
    if not isinstance(logprobs, Tensor) or logprobs.shape != ids.shape:
        return f"sampler_logprobs that are no tensor ({len(ids)},), one for each token"
    if completion.finish_reason not in ("stop", "length"):
        return f"finish_reason={completion.finish_reason!r}, which must be stop or length"
    return None


def _check_counts(rollout: Rollout, prompts: int, generations: int) -> None:
    """Refuses a wrong number of completions, as a custom engine may return: reward tensors are ``(B, G)``."""
    if not isinstance(rollout, Rollout):
        raise UserError(f"rollout.engine: generate() returned a {type(rollout).__name__}; return a Rollout")
    found = [len(group) for group in rollout.completions]
    if len(rollout.prompts) != prompts or found != [generations] * prompts:
        raise UserError(
            f"rollout.engine: generate() returned {len(rollout.prompts)} prompts with {found} completions, but was "
            f"asked for {prompts} prompts with {generations} each; return as many"
        )


def _check_tokens(rollout: Rollout, vocabulary: int) -> None:
    """Refuses tokens that the model does not have, as a custom engine with another tokenizer may return."""
    for prompt, group in zip(rollout.prompts, rollout.completions, strict=True):
        for completion in group:
            ids = completion.token_ids
            if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
                odd = next(token for token in ids.tolist() if not 0 <= token < vocabulary)
                raise UserError(
                    f"rollout.engine: generate() returned the token id {odd}, which the model's vocabulary of "
                    f"{vocabulary} does not have (row {prompt.uid})"
                )


def _check_turns(rollout: Rollout, advantages: AdvantageEstimator) -> None:
    """Refuses turns with rewards where whole completions are compared."""
    if not advantages.takes_turns and has_turn_rewards(rollout.completions):
        by_length = f" with baseline={advantages.baseline}" if advantages.weighs_by_length else ""
        raise UserError(
            f"the environment rewards turns, which are compared one by one, but {type(advantages).__name__}{by_length} "
            "compares whole completions; set advantages=group"
        )


def compare(rollout: RewardedRollout, advantages: AdvantageEstimator) -> ScoredRollout:
    """Gives each completion of a rollout its advantage. All ranks call it together: ``batch`` scaling spans ranks.

    Raises:
        UserError: an environment rewards turns, and rewards are to be scaled by the batch; or a custom estimator
            returns another shape, or what is not finite.
    """
    turns = turn_advantages(rollout.completions, rollout.rewards, advantages)
    if turns is not None and advantages.scale_rewards == "batch":
        raise UserError(
            "the environment rewards turns, which are compared within a group, but advantages.scale_rewards=batch "
            "divides by the spread of whole completions; set it to group or none"
        )
    rewards, lengths = rollout.rewards, _lengths(rollout)
    everyone = [gather_values(x.flatten()) for x in (rewards, lengths)] if advantages.scale_rewards == "batch" else []
    values = checked_advantages(advantages, rewards, advantages.of_rollout(rewards, lengths, *everyone))
    return ScoredRollout(
        **{f.name: getattr(rollout, f.name) for f in fields(rollout)},
        advantages=values.detach().to("cpu", torch.float64),  # one that learns a baseline may leave its graph on
        turn_advantages=turns,
    )


def _lengths(rollout: RewardedRollout) -> Tensor:
    """``(B, G)`` int64 tokens that the policy sampled."""
    return torch.tensor([[c.num_trained for c in group] for group in rollout.completions]).view(rollout.rewards.shape)


def sample_ahead(module: GSPOModule) -> None:
    """Begins the next rollout, with ``staleness=1``; its old log-probabilities will be those of the current weights."""
    if module.ahead is None or module.rollouts_done + 1 >= module.max_rollouts:
        return
    source = needed_source(module.trainer, "rollout.engine.staleness=1")
    assert module.policy is not None
    prompts = source.batch_at(module.batch_in_hand.cursor).prompts
    module.update_begun = True
    module.ahead.launch(module.policy, prompts, module.sampling, rollout_seed(module.seed, module.rollouts_done + 1))

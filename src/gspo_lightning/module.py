"""The LightningModule: collect a rollout, then update the policy on it, minibatch by minibatch.

One batch of prompts is one rollout and ``num_iterations x num_minibatches`` optimizer steps. Optimization is manual, so
a checkpoint can only fall between rollouts and a run resumes exactly. Everything that draws random numbers derives
them from (seed, rollout, prompt, generation); there is no generator state to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.collect import collect_rollout, rollout_metrics
from gspo_lightning.distributed import (
    add_metrics,
    gather_values,
    global_max,
    global_sum,
    gradient_sync,
    world_size,
)
from gspo_lightning.dynamic_sampling import Drawn, PromptSource, draw_until_signal
from gspo_lightning.errors import UserError
from gspo_lightning.guarded_step import GuardedStep, parameter_groups
from gspo_lightning.objective import Objective
from gspo_lightning.out_of_memory import cut, free, is_out_of_memory
from gspo_lightning.passes import Attempt, Fixed, Passes
from gspo_lightning.policy.check import check_packing
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.reference import move_reference
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rewards.calling import TrainerState
from gspo_lightning.rollout import RolloutEngine, TransformersEngine
from gspo_lightning.rollout.seeds import rollout_seed
from gspo_lightning.rollout_log import rollout_values
from gspo_lightning.schedule import Schedule
from gspo_lightning.timing import Stopwatch
from gspo_lightning.types import Metrics, Prompt, PromptBatch, SamplingParams, ScoredRollout
from gspo_lightning.update import (
    Minibatch,
    UpdateSettings,
    build_micro_batch,
    sampler_mismatch,
    split_minibatches,
)
from gspo_lightning.validation import ValidationSettings, Validator

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]


class GSPOModule(L.LightningModule):
    """Trains a policy by GSPO, GRPO or any other `Objective`.

    Args:
        policy_loader: builds the policy when the Trainer asks for it (`configure_model`).
        rewards: scores completions.
        objective: the loss.
        sampling: how training completions are drawn.
        optimizer: called with parameter groups, such as ``functools.partial(torch.optim.AdamW, lr=1e-5)``.
        max_rollouts: the run ends after this many rollouts.
        engine: samples completions; by default the policy itself, in this process.
        advantages: rewards ``(B, G)`` -> advantages ``(B, G)``; by default scaled within the group.
        schedule: learning rate over the optimizer steps; by default constant.
        update: minibatches, micro-batches and clipping.
        validation: what is measured on held-out prompts.
        seed: of sampling and of the order of minibatches.
        max_draws: dynamic sampling (DAPO, arXiv 2503.14476): so many times per rollout, prompts whose rewards are all
            equal are replaced by fresh ones. Needs a `PromptDataModule`. 0 trains on the batch as it comes.
    """

    def __init__(
        self,
        policy_loader: PolicyLoader,
        rewards: RewardSet,
        *,
        objective: Objective,
        sampling: SamplingParams,
        optimizer: OptimizerFactory,
        max_rollouts: int,
        engine: RolloutEngine | None = None,
        advantages: AdvantageEstimator | None = None,
        schedule: Schedule | None = None,
        update: UpdateSettings | None = None,
        validation: ValidationSettings | None = None,
        seed: int = 0,
        max_draws: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.policy_loader, self.engine, self.rewards = policy_loader, engine or TransformersEngine(), rewards
        self.objective, self.advantages, self.sampling = objective, advantages or AdvantageEstimator(), sampling
        self.optimizer_factory, self.schedule = optimizer, schedule or Schedule("constant")
        self.update_settings = update or UpdateSettings()
        self.validator = Validator(validation or ValidationSettings(), rewards, sampling, seed)
        self.max_rollouts, self.seed, self.max_draws = max_rollouts, seed, max_draws
        self.policy: Policy | None = None
        self._frozen: list[Policy] = []  # in a list, so that it is neither trained, nor saved, nor synchronised
        self.rollouts_done = 0
        self.counts = {
            "optimizer_steps": 0,
            "skipped_steps": 0,
            "nonfinite_steps": 0,
            "oom_splits": 0,
            "rollout_tokens": 0,
            "train_tokens": 0,
        }
        self.guarded_step = GuardedStep(self.update_settings.max_grad_norm, self.update_settings.max_nonfinite_steps)
        self._trained_tokens = 0
        self._drawn = Drawn()
        self.stopwatch = Stopwatch()
        self.last_metrics: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.validation_samples: list[dict[str, Any]] = []

    # ---------------------------------------------------------------- set-up

    def configure_model(self) -> None:
        """Loads the policy, and a frozen copy of it if the objective needs a reference and there is no adapter."""
        if self.policy is not None:
            return
        self.policy = self.policy_loader.load()
        if self.objective.needs_ref and not self.policy.has_adapter:
            self._frozen = [self.policy_loader.load_reference(self.policy)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, without weight decay on vectors (norms, biases), and its schedule."""
        assert self.policy is not None
        optimizer = self.optimizer_factory(parameter_groups(self.policy.parameters()))
        steps = self.max_rollouts * self.update_settings.num_iterations * self.update_settings.num_minibatches
        return [optimizer], [{"scheduler": self.schedule.build(optimizer, steps), "interval": "step"}]  # type: ignore[return-value]

    def on_fit_start(self) -> None:
        """Refuses an architecture whose packed forward is not its padded forward."""
        assert self.policy is not None
        check_packing(self.policy)

    # ---------------------------------------------------------------- collect

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Samples completions for the prompts and scores them; ends a run that was resumed behind its last rollout."""
        assert self.policy is not None
        if self.rollouts_done >= self.max_rollouts:
            self.trainer.should_stop = True
            return -1
        self.stopwatch.reset()
        self.batch_in_hand = batch
        self.rewards.trainer_state = TrainerState(self.rollouts_done, self.max_rollouts)
        with self.trainer.precision_plugin.forward_context():
            if self.max_draws:
                self.last_scored, self.batch_in_hand, self._drawn = draw_until_signal(
                    self._source(), self._collect, self.advantages, self.max_draws
                )
            else:
                self.last_scored = self._collect(batch.prompts)
        torch.clear_autocast_cache()
        return None

    def _collect(self, prompts: list[Prompt]) -> ScoredRollout:
        assert self.policy is not None
        return collect_rollout(
            self.policy, self.engine, self.rewards, self.advantages, prompts, self.sampling,
            seed=rollout_seed(self.seed, self.rollouts_done), stopwatch=self.stopwatch,
        )  # fmt: skip

    def _source(self) -> PromptSource:
        """Where fresh prompts are drawn from; the loader fetches ahead, so its batches would be stale here."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, PromptSource):
            raise UserError("dynamic_sampling.max_draws needs a data module with first() and draw(): PromptDataModule")
        return datamodule

    # ---------------------------------------------------------------- update

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """All optimizer steps on the rollout in hand."""
        scored, metrics = self.last_scored, rollout_metrics(self.last_scored)
        add_metrics(metrics, self._drawn.metrics())
        minibatches = self._minibatches(scored)
        passes = self._passes()
        with self.stopwatch("old_logprobs"):
            fixed = passes.before_update(scored, minibatches)
        with self.stopwatch("ref_logprobs"):
            reference = passes.reference(scored, minibatches)
            fixed = [replace(f, reference=r) for f, r in zip(fixed, reference, strict=True)]
        # Autocast keeps the casts made without gradient; they must not serve a forward with gradient.
        torch.clear_autocast_cache()
        with self.stopwatch("update"):
            for iteration in range(self.update_settings.num_iterations):
                for number, minibatch in enumerate(minibatches):
                    fresh = iteration == 0 and number == 0
                    step = self._step(passes, scored, minibatch, fixed[number], fresh, metrics)
                    minibatches[number], fixed[number] = step
        self._sync_reference()
        self._finish_rollout(scored, metrics, gather_values(torch.cat([torch.zeros(0), *passes.ratios])))

    def auxiliary_loss(self, minibatch: Minibatch) -> Tensor | None:
        """A term of your own that is added to the loss of each minibatch; a subclass overrides it.

        Called once per optimizer step on every rank, whatever the number of micro-batches, and also where no completion
        of the minibatch survives: the step is then taken on this term alone.

        Args:
            minibatch: the prompts of the step and which of their completions are forwarded.

        Returns:
            A scalar with gradient, already a mean; ranks are averaged. None adds nothing.
        """
        return None

    def _passes(self) -> Passes:
        assert self.policy is not None
        frozen = self._frozen[0] if self._frozen else None
        settings = self.update_settings
        return Passes(self.policy, frozen, self._objective_now, self.sampling.temperature, settings.log_entropy)

    @property
    def _objective_now(self) -> Objective:
        return self.objective.at(self.rollouts_done / max(1, self.max_rollouts - 1))

    def _minibatches(self, scored: ScoredRollout) -> list[Minibatch]:
        generator = torch.Generator().manual_seed(rollout_seed(self.seed, self.rollouts_done))
        return split_minibatches(
            scored,
            self.update_settings,
            zero_advantage_is_free=self._objective_now.zero_advantage_is_free,
            mask_truncated=self.objective.mask_truncated_completions,
            order=torch.randperm(len(scored.prompts), generator=generator).tolist(),
        )

    def _step(
        self,
        passes: Passes,
        scored: ScoredRollout,
        minibatch: Minibatch,
        fixed: Fixed,
        fresh: bool,
        metrics: Metrics,
    ) -> tuple[Minibatch, Fixed]:
        """One optimizer step on one minibatch.

        Returns:
            The minibatch as it was cut in the end, with the log-probabilities that are its old ones from now on.
        """
        counts = torch.tensor([minibatch.num_sequences, minibatch.num_tokens], dtype=torch.float64, device=self.device)
        denominator = self.objective.denominator(*(int(x) for x in global_sum(counts).tolist()))
        while True:
            attempt = Attempt(fresh, denominator)
            try:
                rounds = self._accumulate(passes, scored, minibatch, fixed, attempt)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler: it would keep the tensors of the failed attempt alive.
            minibatch, fixed = self._cut(minibatch, fixed, len(attempt.seen), scored)
        passes.ratios.extend(attempt.ratios)
        add_metrics(metrics, attempt.metrics)
        self._trained_tokens += attempt.tokens
        if rounds:
            self._take_step(metrics)
        else:
            self.counts["skipped_steps"] += 1
        cast(LRScheduler, self.lr_schedulers()).step()
        return minibatch, replace(fixed, old=attempt.seen if fixed.old is None else fixed.old)

    def _accumulate(
        self, passes: Passes, scored: ScoredRollout, minibatch: Minibatch, fixed: Fixed, attempt: Attempt
    ) -> int:
        """The gradient of one minibatch; returns the number of backwards, the same on every rank."""
        has_auxiliary = type(self).auxiliary_loss is not GSPOModule.auxiliary_loss
        rounds = global_max(max(len(minibatch.plan), int(has_auxiliary)), self.device)
        for index in range(rounds):
            with gradient_sync(self.trainer.strategy, last=index + 1 == rounds):
                if index < len(minibatch.plan):
                    micro = build_micro_batch(scored, minibatch.plan[index], self.device)
                    loss, logprobs = passes.loss(micro, fixed, index, attempt)
                    # Under top-p, top-k or min-p the sampler's log-probabilities are of another support.
                    if attempt.fresh and self.sampling.full_support:
                        add_metrics(attempt.metrics, sampler_mismatch(logprobs, micro))
                else:
                    loss, logprobs = passes.empty_loss(scored), None
                # Data-parallel strategies average over ranks; the denominator is already that of all of them.
                loss = loss * (world_size() / attempt.denominator)
                if index + 1 == rounds and (extra := self.auxiliary_loss(minibatch)) is not None:
                    add_metrics(attempt.metrics, {"loss/auxiliary": (extra.detach().double(), torch.ones(()))})
                    loss = loss + extra
                self.manual_backward(loss)
                if logprobs is not None:
                    attempt.finish(logprobs, micro)
        return rounds

    def _cut(self, minibatch: Minibatch, fixed: Fixed, index: int, scored: ScoredRollout) -> tuple[Minibatch, Fixed]:
        """After an attempt that ran out of memory: no gradient is left of it, and the micro-batch becomes two."""
        cast(LightningOptimizer, self.optimizers()).zero_grad()
        free()
        self.counts["oom_splits"] += 1
        minibatch, tensors = cut(minibatch, [fixed.old, fixed.reference, fixed.selected], index, scored)
        return minibatch, Fixed(*tensors)

    def _take_step(self, metrics: Metrics) -> None:
        assert self.policy is not None
        optimizer = cast(LightningOptimizer, self.optimizers())
        norm = self.guarded_step(optimizer, self.policy.parameters(), self.rollouts_done + 1)
        self.counts["optimizer_steps" if norm is not None else "nonfinite_steps"] += 1
        if norm is not None:
            add_metrics(metrics, {"grad_norm": (norm, torch.ones(()))})

    def _sync_reference(self) -> None:
        """Moves the frozen reference towards the policy, if it is time to."""
        every = self.update_settings.ref_sync_every_n_rollouts
        if every and (self.rollouts_done + 1) % every == 0 and self._frozen and self.policy is not None:
            move_reference(self._frozen[0], self.policy, self.update_settings.ref_model_mixup_alpha)

    # ---------------------------------------------------------------- book-keeping

    def _finish_rollout(self, scored: ScoredRollout, metrics: Metrics, ratios: Tensor) -> None:
        self.rollouts_done += 1
        sampled = self._drawn.discarded_tokens + sum(len(c.token_ids) for group in scored.completions for c in group)
        tokens = torch.tensor([sampled, self._trained_tokens], dtype=torch.float64, device=self.device)
        for name, count in zip(("rollout_tokens", "train_tokens"), global_sum(tokens).tolist(), strict=True):
            self.counts[name] += int(count)
        self._trained_tokens = 0
        values = rollout_values(
            metrics, ratios, self.counts, lr=float(cast(LRScheduler, self.lr_schedulers()).get_last_lr()[0]),
            stopwatch=self.stopwatch, before=self.last_metrics, device=self.device,
        )  # fmt: skip
        self.last_metrics = values
        self.log_dict({**values, "step": float(self.rollouts_done)}, batch_size=len(scored.prompts))
        # Only a PromptDataModule keeps a position in its data; loaders of your own need not.
        if (finish := getattr(getattr(self.trainer, "datamodule", None), "finish", None)) is not None:
            finish(self.batch_in_hand)
        if self.rollouts_done >= self.max_rollouts:
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        """Starts the validation counters anew, with one for each task of a mixture."""
        task = getattr(getattr(self.trainer, "datamodule", None), "task", None)
        self.validator.reset(getattr(task, "task_names", ()))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Greedy and sampled completions of held-out prompts."""
        assert self.policy is not None
        self.validator.update(self.policy, self.engine, batch.prompts)
        torch.clear_autocast_cache()

    def on_validation_epoch_end(self) -> None:
        """Publishes ``last_validation`` and ``validation_samples``, and logs the former."""
        self.last_validation, self.validation_samples = self.validator.compute(self.device), self.validator.samples
        self.log_dict({**self.last_validation, "step": float(self.rollouts_done)}, rank_zero_only=True)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained parameters alone: a frozen base comes from where it was loaded."""
        state = super().state_dict(*args, **kwargs)
        # With duplicates: a tied output embedding has two names.
        every = self.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in every if not parameter.requires_grad}
        return {name: value for name, value in state.items() if name not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters of the run."""
        from gspo_lightning import __version__

        checkpoint["gspo_lightning"] = {
            "version": __version__,
            "rollouts_done": self.rollouts_done,
            "counts": dict(self.counts),
            "nonfinite_in_a_row": self.guarded_step.nonfinite_in_a_row,
        }
        if self.update_settings.ref_sync_every_n_rollouts:
            checkpoint["gspo_lightning"]["reference"] = [policy.state_dict() for policy in self._frozen]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counters and refuses a checkpoint that lacks a trained parameter."""
        own = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if missing := sorted(own - checkpoint["state_dict"].keys()):
            raise RuntimeError(f"the checkpoint lacks {len(missing)} trained parameters, the first is {missing[0]}")
        state = checkpoint["gspo_lightning"]
        self.rollouts_done, self.counts = state["rollouts_done"], {**self.counts, **state["counts"]}
        self.guarded_step.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        for policy, saved in zip(self._frozen, state.get("reference", ()), strict=False):
            policy.load_state_dict(saved)

"""The LightningModule: collect a rollout, then update the policy on it, minibatch by minibatch.

One batch of prompts is one rollout and ``num_iterations x num_minibatches`` optimizer steps. Optimization is manual, so
a checkpoint can only fall between rollouts and a run resumes exactly. Everything that draws random numbers derives
them from (seed, rollout, prompt, generation); there is no generator state to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.distributed.failing import failing_together
from gspo_lightning.distributed.ranks import add_metrics
from gspo_lightning.errors import whole_number
from gspo_lightning.lightning_private import (
    batch_in_hand,
    begin_averages,
    current_hook,
    let_averages_follow,
    put_trained_back,
    take_trained,
    trainer_of,
    uncount_batch,
    uncount_batch_in,
)
from gspo_lightning.objective import Objective
from gspo_lightning.objective.entropy_control import EntropyControl
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.precision import dtype_of_new_tensors
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rewards.calling import TrainerState
from gspo_lightning.rollout import RolloutEngine, TransformersEngine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.training.batch_checks import (
    check_batch,
    check_prompts,
    end_without_batches,
    say_nothing_is_left,
    warn_of_equal_uids,
)
from gspo_lightning.training.callback_checks import check_before_loading, check_before_set_up, check_moments
from gspo_lightning.training.dynamic_sampling import Drawn
from gspo_lightning.training.guarded_step import GuardedStep, parameter_groups
from gspo_lightning.training.hooks import WorkingHooks
from gspo_lightning.training.loading import check_split, choose_forwards, keeping_dtypes, load_policies, move_reference
from gspo_lightning.training.one_step_off import OneStepOff
from gspo_lightning.training.part_checks import check_advantages, check_parts, check_schedule, refuse_draws_ahead
from gspo_lightning.training.part_states import check_states, put_back, states_of
from gspo_lightning.training.passes import float32_by_onednn
from gspo_lightning.training.prompt_source import prompt_source
from gspo_lightning.training.rollout_collection import RolloutCollection, sample_ahead
from gspo_lightning.training.rollout_log import COUNTERS, count_tokens, log_rollout, rollout_metrics
from gspo_lightning.training.rollout_update import RolloutUpdate
from gspo_lightning.training.run_state import (
    keep_settings,
    leave_frozen_out,
    page_again,
    refuse_other_model,
    restore_run_state,
    run_state,
)
from gspo_lightning.training.sampling_change import (
    check_ranks_agree,
    check_sampling_of,
    follow,
    plain_sampling,
)
from gspo_lightning.training.schedule import Schedule, move_to
from gspo_lightning.training.timing import Stopwatch
from gspo_lightning.training.trainer_checks import check_caller, check_fit, check_frozen, check_objective_in_force
from gspo_lightning.training.update import Minibatch, UpdateSettings
from gspo_lightning.training.validation import ValidationSettings, Validator
from gspo_lightning.types import PromptBatch, SamplingParams, ScoredRollout

_BEFORE_BATCH_SIZE = 9
"""Arguments of `LightningModule.log` between the value and ``batch_size``."""

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]


class GSPOModule(WorkingHooks, L.LightningModule):
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
        max_draws: dynamic sampling (DAPO, arXiv 2503.14476): at most this many times per rollout, prompts whose
            rewards are all equal are replaced by fresh ones. Needs a `PromptDataModule`. 0 switches it off.
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
        leave_frozen_out(self)
        check_parts(policy_loader, rewards, optimizer, objective, update, engine)
        seed = whole_number("seed", seed)
        self.policy_loader, self.rewards = policy_loader, rewards
        self.engine: RolloutEngine = engine or TransformersEngine()
        self.ahead = OneStepOff(self.engine) if traits(self.engine).staleness else None
        if self.ahead is not None:
            refuse_draws_ahead(max_draws)
            self.engine = self.ahead
        self.objective, self.advantages = objective, advantages or AdvantageEstimator()
        self.entropy_control = EntropyControl()
        self.checked: tuple[Any, ...] = ()  # objective and update settings that were found to fit this run
        self.empty_epochs = 0  # running, up to now
        # Of the next rollout; as the module was made, for checkpoints; of the rollout in hand.
        self._sampling = self.made_with = self.sampled_with = plain_sampling(sampling)
        self._length_follows = objective.max_completion_length == sampling.max_completion_length
        check_advantages(self.advantages)
        check_schedule(schedule or Schedule("constant"))
        self.optimizer_factory, self.schedule = optimizer, schedule or Schedule("constant")
        self.update_settings = update or UpdateSettings()
        self.validator = Validator(validation or ValidationSettings(), rewards, sampling, seed)
        self.max_rollouts, self.seed, self.max_draws = max_rollouts, seed, max_draws
        self.policy: Policy | None = None
        self.references: list[Policy] = []  # in a list, so that it is neither trained, nor saved, nor synchronised
        self.reference_moves = bool(self.update_settings.ref_sync_every_n_rollouts)
        self.forward_chosen = False
        self.trained: set[str] = set()  # names of the parameters that were trained so far
        self.rollouts_done = 0
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.guarded_step = GuardedStep(self.update_settings.max_grad_norm, self.update_settings.max_nonfinite_steps)
        self.last_scored: ScoredRollout  # the rollout in hand, from on_train_batch_start on
        self.batch_in_hand: PromptBatch  # its prompts, and the position of the data after it
        self._drawn = Drawn()
        self.states_before: dict[str, Any] | None = None  # of the parts, from before the rollout in hand
        self.update_begun = False  # whether the rollout in hand has changed weights, schedules or the one ahead
        self.stopwatch = Stopwatch()
        self.last_metrics: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.logged_names: dict[str, str] = {}
        self.validation_samples: list[dict[str, Any]] = []

    # ---------------------------------------------------------------- set-up

    @property
    def sampling(self) -> SamplingParams:
        """How the completions of the next rollout are drawn. May be set during a run, on all ranks alike.

        Validation follows, and so does ``objective.max_completion_length`` if it was the same. The current rollout, and
        one sampled ahead, keep the settings they were asked with. Checkpoints hold what was set.

        Raises:
            UserError: they are refused, see `training.sampling_change.check_sampling_of`; nothing has changed then.
        """
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingParams) -> None:
        sampling = plain_sampling(sampling)
        check_sampling_of(self, sampling)
        if self._length_follows:
            self.objective = follow(self.objective, self._sampling, sampling)
        self._sampling = sampling
        self.validator.set_sampling(sampling)

    @property
    def current_objective(self) -> Objective:
        """The objective of the current rollout, whose completions may have another limit than those of the next one."""
        return follow(self.objective, self._sampling, self.sampled_with) if self._length_follows else self.objective

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds none; refuses a callback of the Trainer that needs a part which this module does not have."""
        check_before_set_up(self)
        return []

    def configure_model(self) -> None:
        """Loads the policy, and a frozen copy of it if the objective needs a reference and there is no adapter."""
        check_before_loading(self)
        if self.policy is None:
            load_policies(self)
        else:
            check_split(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of trained parameters, without weight decay on vectors (norms, biases), and its schedule."""
        optimizer = self.optimizer_factory(parameter_groups(self.parameters()))
        keep_settings(optimizer, self.optimizer_factory)
        # The schedule of a second fit continues where the first one stopped.
        schedule = self.schedule.build(optimizer, self._steps_of(self.max_rollouts), self._steps_of(self.rollouts_done))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]  # type: ignore[return-value]

    def _steps_of(self, rollouts: int) -> int:
        """Optimizer steps that this many rollouts have, skipped ones included."""
        return rollouts * self.update_settings.num_iterations * self.update_settings.num_minibatches

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Like `nn.Module._apply`, except that under bf16-true adapters and buffers keep their dtype."""
        is_narrow = self.policy is not None and getattr(trainer_of(self), "precision", None) == "bf16-true"
        return super()._apply(keeping_dtypes(self, fn) if is_narrow else fn, recurse)

    def on_fit_start(self) -> None:
        """Refuses Trainer settings under which training would be wrong; a model that cannot be packed runs padded."""
        check_fit(self)
        check_states(self)
        check_sampling_of(self, self.sampling)
        choose_forwards(self)
        if (trainer := trainer_of(self)).fast_dev_run:
            trainer.fit_loop.epoch_loop.max_steps = -1  # so many batches, whose number of optimizer steps is another

    def on_validation_start(self) -> None:
        """Chooses the forward, if nothing is trained or validation comes first; tells rewards how far the run is."""
        choose_forwards(self)
        self.validator.set_rewards(self.rewards)  # a program may have given the module others since it was made
        # As after the last rollout, also where a resumed run begins with a validation.
        self.rewards.trainer_state = TrainerState(self.rollouts_done, self.max_rollouts or 0)

    def on_train_start(self) -> None:
        """Brings what was loaded in line with this run: paged optimizer states, the schedule's position.

        Refuses callbacks that would wait in vain; prints a line if all rollouts were already done.
        """
        for optimizer in self.trainer.optimizers:
            page_again(optimizer)
        for config in self.trainer.lr_scheduler_configs:
            move_to(config.scheduler, self._steps_of(self.rollouts_done))
        check_moments(self.trainer)
        begin_averages(self.trainer)
        say_nothing_is_left(self)

    # ---------------------------------------------------------------- collect

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Samples completions for the prompts and scores them; ends a resumed run whose rollouts are all done."""
        check_caller(self)
        assert self.policy is not None
        if self.rollouts_done >= self.max_rollouts:
            uncount_batch(self.trainer)
            self.trainer.should_stop = True
            return -1
        put_back(self)
        self.states_before, self.update_begun = states_of(self), False
        with failing_together(self.device):
            check_batch(batch, self)
        check_ranks_agree(self.sampling)
        warn_of_equal_uids(batch)
        self.stopwatch.reset()
        self.rewards.trainer_state = TrainerState(self.rollouts_done, self.max_rollouts)
        collection = RolloutCollection(self, batch)
        self.last_scored = collection.run()
        self.batch_in_hand, self._drawn = collection.batch, collection.drawn
        return None

    # ---------------------------------------------------------------- update

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Takes all optimizer steps on the current rollout."""
        check_caller(self)
        check_frozen(self)
        check_objective_in_force(self)
        scored = self.last_scored
        by_weight = self.rewards.weighted_sum(scored.rewards_by_function)
        update = RolloutUpdate(self, scored, rollout_metrics(scored, by_weight, self.advantages))
        add_metrics(update.metrics, self._drawn.metrics(self.rewards.weighted_sum))
        with float32_by_onednn(self):
            update.prepare()
            sample_ahead(self)
            update.run()
        move_reference(self)
        self._finish_rollout(update)

    def _finish_rollout(self, update: RolloutUpdate) -> None:
        self.rollouts_done += 1
        count_tokens(self, update, also_sampled=self._drawn.discarded_tokens)
        log_rollout(self, update)
        if (source := prompt_source(self.trainer)) is not None:
            source.finish(self.batch_in_hand)
        self.states_before = None
        let_averages_follow(self.trainer, self)
        if self.rollouts_done >= self.max_rollouts:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Ends the run if the loader gave no batch in this epoch and the one before."""
        end_without_batches(self)

    def auxiliary_loss(self, minibatch: Minibatch) -> Tensor | None:
        """A custom term that is added to the loss of each minibatch; override it in a subclass.

        Called once per optimizer step on every rank, whatever the number of micro-batches, and also if no completion
        of the minibatch survives: the step is then taken on this term alone.

        Args:
            minibatch: the prompts of the step and which of their completions are forwarded.

        Returns:
            A scalar with gradient, already a mean; ranks are averaged. None adds nothing: without a completion the step
            is skipped then.
        """
        return None

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether a subclass adds a term, or a function assigned to the object: then every minibatch has a backward,
        with or without completions."""
        return "auxiliary_loss" in vars(self) or type(self).auxiliary_loss is not GSPOModule.auxiliary_loss

    # ---------------------------------------------------------------- metrics and validation

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Like Lightning's, which callbacks and `log_dict` call too; notes name and hook for `RunRecorder`.

        Means over an epoch weigh batches by their prompts; Lightning finds no size in a `PromptBatch`. One whose rows
        are not made yet, as callbacks see it at its start, counts as one prompt.
        """
        batch = batch_in_hand(self)
        if isinstance(batch, PromptBatch) and len(args) <= _BEFORE_BATCH_SIZE:
            kwargs["batch_size"] = kwargs.get("batch_size") or (len(batch) if getattr(batch, "is_made", True) else 1)
        super().log(name, value, *args, **kwargs)
        self.logged_names[name] = current_hook(self)

    def on_validation_epoch_start(self) -> None:
        """Resets the validation counters, with one for each task of a mixture."""
        source = prompt_source(self.trainer)
        self.validator.reset(source.task_names if source is not None else ())

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures greedy and sampled completions of held-out prompts, those of several loaders together."""
        assert self.policy is not None
        try:
            check_prompts(batch, "val_dataloader")
            with dtype_of_new_tensors(self.rewards.dtype):
                self.validator.update(self.policy, self.engine, batch.prompts)
        except BaseException:
            put_trained_back(self.trainer, self)
            raise

    def on_validation_epoch_end(self) -> None:
        """Publishes ``last_validation`` and ``validation_samples``, and logs the former."""
        self.last_validation, self.validation_samples = self.validator.compute(self.device), self.validator.samples
        self.log_dict({**self.last_validation, "step": float(self.rollouts_done)}, rank_zero_only=True)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters of the run; a rollout in hand does not count."""
        if self.states_before is not None:
            uncount_batch_in(checkpoint)
        checkpoint["gspo_lightning"] = run_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counters and refuses the checkpoint of another model."""
        take_trained(self, checkpoint)
        # A sharded checkpoint has no weights here: its strategy loads them and makes the same check.
        if "state_dict" in checkpoint:
            self.refuse_other_model({name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()})
        restore_run_state(self, checkpoint["gspo_lightning"])

    def refuse_other_model(self, saved: dict[str, tuple[int, ...]]) -> None:
        """Refuses the weights of another model, by the shapes they have in a checkpoint.

        Raises:
            UserError: a trained parameter is missing there or has another shape.
        """
        refuse_other_model([(n, p) for n, p in self.named_parameters() if p.requires_grad], saved)

"""Lightning's callbacks that would do something else here than they say, or nothing, without a word: refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

from gspo_lightning.errors import UserError, whole_number
from gspo_lightning.lightning_private import is_by_time, is_compiled, looks_at_epoch_end, saves_at_epoch_end, trainer_of
from gspo_lightning.training.prompt_source import prompt_source

_IN_THE_TRAINER = "set val_check_interval=<rollouts> and check_val_every_n_epoch=None in the Trainer"


NEVER_HERE = {
    "LearningRateFinder": (
        "looks at the loss that training_step returns, and a rollout has none; compare rates by the rewards that they "
        "lead to (docs/sweeps.md)"
    ),
    "BatchSizeFinder": (
        "would use up max_rollouts in its trials; leave it out, since micro-batches are cut by themselves where memory "
        "runs out"
    ),
    "SpikeDetection": (
        "looks at the loss that training_step returns, and a rollout has none; leave it out, since a step with a "
        "gradient that is not finite is skipped by itself (update.max_nonfinite_steps)"
    ),
    "ModelPruning": (
        "looks for weights before the policy is loaded, and masks them in forwards that are not its own here; leave it "
        "out, and load a model that was pruned"
    ),
    "StochasticWeightAveraging": (
        "averages once per epoch, but a run is one epoch, and it replaces the learning-rate schedule; use "
        "EMAWeightAveraging"
    ),
    "GradientAccumulationScheduler": (
        "adds up the gradients of batches, and a batch is a rollout here; leave it out: "
        "update.max_tokens_per_microbatch bounds memory and never changes the gradient"
    ),
}
"""Callbacks of Lightning that no run can have, with the reason."""

NOT_IN_PARTS = "copies whole weights, which trainer=fsdp splits over ranks; leave it out, or use trainer=ddp"
"""Why no run that splits its weights averages them."""


def check_before_set_up(module: Any) -> None:
    """Refuses callbacks that Lightning's set-up of a fit, which comes before the policy is loaded, fails on."""
    trainer = trainer_of(module)
    _refuse_never_here(trainer)
    for callback in trainer.callbacks if trainer is not None else ():
        kinds = [base.__name__ for base in type(callback).__mro__]
        if "BackboneFinetuning" in kinds and not hasattr(module, "backbone"):
            raise UserError(
                f"callbacks: {kinds[0]} freezes an attribute backbone, which {type(module).__name__} does not have; "
                "leave it out, and choose what is trained by PolicyLoader (lora, train_vision, train_language)"
            )


def check_before_loading(module: Any) -> None:
    """Refuses what Lightning itself would meet before the checks of a fit, and a module that is compiled as a whole."""
    if is_compiled(module):
        raise UserError(
            f"torch.compile: {type(module).__name__} is compiled as a whole, reward functions included; give the "
            "Trainer the module itself, and PolicyLoader compile=True"
        )
    trainer = trainer_of(module)
    if trainer is None or trainer.state.fn != "fit":
        return
    _refuse_never_here(trainer)
    whole_number("max_rollouts", module.max_rollouts)  # the schedule needs it before `on_fit_start`
    for callback in trainer.callbacks:
        if module.device_mesh is not None and "WeightAveraging" in (base.__name__ for base in type(callback).__mro__):
            raise UserError(f"callbacks: {type(callback).__name__} {NOT_IN_PARTS}")


def _refuse_never_here(trainer: Any) -> None:
    """Refuses callbacks of Lightning that no fit can have."""
    if trainer is not None and trainer.state.fn == "fit":
        for name in (type(callback).__name__ for callback in trainer.callbacks):
            if name in NEVER_HERE:
                raise UserError(f"callbacks: {name} {NEVER_HERE[name]}")


def check_callbacks(trainer: Any) -> None:
    """Refuses averages that would never be taken."""
    for callback in trainer.callbacks:
        name, every = type(callback).__name__, getattr(callback, "update_every_n_steps", 1)
        if every != 1 and name == "EMAWeightAveraging":
            raise UserError(
                f"callbacks: EMAWeightAveraging(update_every_n_steps={every}) is asked once per rollout, whose number "
                "of optimizer steps it may never hit; leave update_every_n_steps at 1"
            )


def check_moments(trainer: Any) -> None:
    """Refuses what waits for the end of an epoch, or for an hour, that does not come within the run.

    To be called once the loaders are made. The only epoch of a stream of prompts ends with the run; other loaders
    without a length may end before.
    """
    is_endless = trainer.num_training_batches == math.inf and prompt_source(trainer) is not None
    every = trainer.check_val_every_n_epoch
    if is_endless and trainer.enable_validation and every not in (None, 1):
        raise UserError(
            f"trainer.check_val_every_n_epoch={every}: endless prompts are one epoch, so no validation would come; "
            f"{_IN_THE_TRAINER}"
        )
    validates = trainer.enable_validation and not (is_endless and trainer.val_check_batch == math.inf)
    for callback in trainer.callbacks:
        if type(callback).__name__ == "EarlyStopping":
            _check_stopping(callback, is_endless=is_endless, validates=validates)
        unfreezes = "BaseFinetuning" in (base.__name__ for base in type(callback).__mro__)
        if is_endless and unfreezes and trainer.is_global_zero:
            warnings.warn(
                f"callbacks: {type(callback).__name__} unfreezes by epochs, and a stream of prompts is one epoch; "
                "limit_train_batches=<rollouts> in the Trainer ends epochs",
                stacklevel=2,
            )
        if type(callback).__name__ == "ModelCheckpoint":
            _check_saving(callback, trainer, is_endless=is_endless, validates=validates)


def _check_stopping(callback: Any, *, is_endless: bool, validates: bool) -> None:
    """Refuses to stop early at the end of the run, or never."""
    if is_endless and looks_at_epoch_end(callback):
        raise UserError(
            f"callbacks: EarlyStopping looks at {callback.monitor} at the end of an epoch, which with endless prompts "
            f"is the end of the run; {_IN_THE_TRAINER}, and leave check_on_train_epoch_end out"
        )
    if not looks_at_epoch_end(callback) and not validates:
        raise UserError(
            f"callbacks: EarlyStopping looks at {callback.monitor} after each validation, and none falls inside the "
            f"run; give the Trainer held-out prompts and {_IN_THE_TRAINER}"
        )


def _check_saving(callback: Any, trainer: Any, *, is_endless: bool, validates: bool) -> None:
    """Refuses to save never, or the last rollout where the best was asked for."""
    ours = "gspo_lightning.callbacks.checkpoint.RolloutCheckpoint"
    if is_by_time(callback):
        raise UserError(
            "callbacks: ModelCheckpoint(train_time_interval) saves nothing where optimization is manual; leave it out, "
            f"or use {ours}"
        )
    every = callback.every_n_epochs
    if is_endless and every > 1:
        raise UserError(
            f"callbacks: ModelCheckpoint(every_n_epochs={every}) saves nothing: endless prompts are one epoch; use "
            f"every_n_train_steps, or {ours}"
        )
    at_end = is_endless and saves_at_epoch_end(callback, trainer)
    never = not validates and not saves_at_epoch_end(callback, trainer)
    if every and callback.monitor is not None and callback.save_top_k and (at_end or never):
        found = (
            "the last rollout and not the best"
            if at_end
            else "nothing, or the last: no validation falls inside the run"
        )
        raise UserError(
            f"callbacks: ModelCheckpoint(monitor={callback.monitor}) would save {found}; {_IN_THE_TRAINER}, and leave "
            f"save_on_train_epoch_end out; or use every_n_train_steps, or {ours} with keep_best"
        )

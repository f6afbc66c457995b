"""When a run saves a checkpoint."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins import AsyncCheckpointIO

from gspo_lightning.callbacks.best import Best
from gspo_lightning.callbacks.checkpoint_files import atomic_checkpoint, go_back, keep_numbered, numbered
from gspo_lightning.callbacks.recorder import RunRecorder
from gspo_lightning.distributed.failing import ErrorOfAllRanks
from gspo_lightning.distributed.ranks import world_size
from gspo_lightning.errors import UserError, whole_number
from gspo_lightning.lightning_private import averages_weights
from gspo_lightning.rollout.engine import RolloutError, traits


def fails_on_all_ranks(engine: Any) -> bool:
    """Whether a `RolloutError` of this engine, or of the one inside it, is raised on every rank at the same place."""
    # An engine that asks on the first rank alone tells the others what went wrong (`on_first_rank`).
    return world_size() == 1 or traits(engine).samples_on == "first_rank"


def _left_whole(trainer: L.Trainer, module: Any, error: BaseException) -> bool:
    """Whether an error came between two updates, on all ranks: in an engine, a reward, a row, or before a step."""
    if isinstance(error, RolloutError):
        return fails_on_all_ranks(module.engine)
    if not isinstance(error, Exception if world_size() == 1 else ErrorOfAllRanks):
        return False
    if trainer.validating:  # other errors may be of callbacks that have not written yet what they were to write
        return isinstance(error, UserError)
    return module.states_before is not None and not module.update_begun


def _run_of(checkpoint: str | Path) -> Path:
    """The folder of the run, by whatever path; a link ``checkpoints`` is not followed, as in `resume.run_folder`."""
    return Path(os.path.abspath(checkpoint)).parent.parent.resolve()


class RolloutCheckpoint(L.Callback):
    """Saves ``last.ckpt`` every ``every_n_rollouts`` rollouts and at the end; the one before stays ``previous.ckpt``.

    Where a validation follows the rollout, the checkpoint is taken after it: a resumed run would not repeat it.

    Args:
        folder: where they go.
        every_n_rollouts: rollouts between checkpoints.
        validate_every_n_rollouts: rollouts between validations.
        keep_last: so many of the newest stay under their numbers too, as ``rollout-000010.ckpt``.
        keep_best: a validation metric, such as ``val/accuracy``; the checkpoint of the rollout after which it was
            highest stays as ``best.ckpt``. It is written after that validation, whether one is due or not. A
            validation before training does not count: there is no checkpoint of it.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_rollouts: int,
        validate_every_n_rollouts: int | None = None,
        keep_last: int = 0,
        keep_best: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.every_n_rollouts = whole_number("RolloutCheckpoint.every_n_rollouts", every_n_rollouts, least=1)
        self.validate_every_n_rollouts, self.keep_last = validate_every_n_rollouts, keep_last
        self.best = None if keep_best is None else Best(keep_best, self.folder / "best.ckpt", self.state_key)
        self.wanted = False
        self.saved_at: int | None = None
        self._limit: int | float | None = None  # the Trainer's limit_val_batches, while `end` has set it to 0

    @property
    def last(self) -> Path:
        """Where the newest checkpoint is."""
        return self.folder / "last.ckpt"

    @property
    def _previous(self) -> Path:
        return self.folder / "previous.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """Which rollout was best; nothing where that is not asked for."""
        return {} if self.best is None else self.best.found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same, back."""
        if self.best is not None:
            self.best.load(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses a plugin that writes later than it says.

        Raises:
            UserError: says what to change.
        """
        if stage == "fit" and isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise UserError(
                "plugins: AsyncCheckpointIO returns before a checkpoint is written, which RolloutCheckpoint then moves "
                "into its place; leave it out, or use Lightning's ModelCheckpoint"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets the recorder make an earlier checkpoint of this run, if it goes on from one, the newest."""
        for recorder in (callback for callback in trainer.callbacks if isinstance(callback, RunRecorder)):
            recorder.before_cut = partial(self._go_back, trainer)

    def _go_back(self, trainer: Any) -> None:
        # The path is asked for only here: a strategy that restores after its setup (FSDP2) has none in on_fit_start.
        if trainer.ckpt_path is not None and _run_of(trainer.ckpt_path) == _run_of(self.last):
            go_back(self.last, Path(trainer.ckpt_path), self._previous)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses to stand before what writes the rows that a checkpoint counts, and to wait for validations in vain.

        The best checkpoint of a run that goes on is here from now on.

        Raises:
            UserError: says what to change.
        """
        behind = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        if any(isinstance(callback, RunRecorder) for callback in behind):
            raise UserError("callbacks: RunRecorder must come before RolloutCheckpoint, which counts its rows")
        every = self.validate_every_n_rollouts
        validates = bool(trainer.limit_val_batches) and not trainer.fast_dev_run
        if every and validates and trainer.val_check_batch != every:
            raise UserError(
                f"RolloutCheckpoint(validate_every_n_rollouts={every}) waits for validations that the Trainer does "
                f"not run; give it val_check_interval={every} and check_val_every_n_epoch=None"
            )
        is_own = trainer.ckpt_path is not None and Path(trainer.ckpt_path).absolute() == self.last.absolute()
        if is_own:  # not a second time if no rollout is left: other callbacks may have changed the weights by then
            self.saved_at = pl_module.rollouts_done
        is_unnumbered = is_own and not numbered(self.last, pl_module.rollouts_done).exists()
        if self.keep_last and is_unnumbered and trainer.is_global_zero:
            keep_numbered(self.last, pl_module.rollouts_done, self.keep_last)  # a kill came between the two names
        if self.best is not None:
            if not trainer.enable_validation:
                raise UserError(
                    f"RolloutCheckpoint(keep_best={self.best.metric}) needs validations during the run; give the "
                    "Trainer held-out prompts and do not set limit_val_batches=0"
                )
            self.best.take_over(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves when it is time, or when a callback before this one ends the run."""
        done = pl_module.rollouts_done
        if trainer.should_stop:
            self.end(trainer, pl_module)
        elif done % self.every_n_rollouts == 0 or done >= pl_module.max_rollouts:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves what waited for the validation, and what it has shown to be the best so far."""
        if self.best is not None and not pl_module.rollouts_done:
            self.best.check(pl_module.last_validation)
        elif self.best is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save_if_best(trainer, pl_module)  # a validation outside of the run may be of any prompts
        if self.wanted:
            self._write(trainer, pl_module)

    def save_if_best(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves, also a second time, if the newest validation is the best so far: a checkpoint knows what was best."""
        if self.best is not None and self.best.is_higher(pl_module.last_validation, pl_module.rollouts_done):
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves what `on_train_end` would, where averaged weights have taken the place of the trained ones by then."""
        if averages_weights(trainer):
            self._save_rest(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves what a stop from elsewhere, such as a callback after this one, would lose."""
        self._save_rest(trainer, pl_module)
        self._put_limit_back(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Saves a run that has not changed its weights since the last whole rollout.

        Not where one rank may be alone with the error: all ranks write together, so it would wait for the others. Where
        it cannot be saved either (a full disk, a GPU in an error state), the first error is the one to show.
        """
        is_unsaved = pl_module.rollouts_done and self.saved_at != pl_module.rollouts_done
        if trainer.state.fn == "fit" and is_unsaved and _left_whole(trainer, pl_module, exception):
            with suppress(Exception):
                self._write(trainer, pl_module)
        self._put_limit_back(trainer)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves now, or after the validation that is due; not twice for a rollout."""
        every = self.validate_every_n_rollouts
        if every and pl_module.rollouts_done % every == 0:
            self.wanted = True
        elif self.saved_at != pl_module.rollouts_done:
            self._write(trainer, pl_module)

    def end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves and ends the run here, or after the validation that is due."""
        trainer.should_stop = True
        self.save(trainer, pl_module)
        if not self.wanted and pl_module.rollouts_done < pl_module.max_rollouts and self._limit is None:
            self._limit = trainer.limit_val_batches
            trainer.limit_val_batches = 0  # Lightning validates before it stops; nobody has asked for that one

    def _save_rest(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.rollouts_done and self.saved_at != pl_module.rollouts_done:
            self._write(trainer, pl_module)

    def _put_limit_back(self, trainer: L.Trainer) -> None:
        """Lets the Trainer validate in a later fit."""
        if self._limit is not None:
            trainer.limit_val_batches, self._limit = self._limit, None

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        atomic_checkpoint(trainer, self.last, self._previous)
        self.saved_at, self.wanted = pl_module.rollouts_done, False
        if not trainer.is_global_zero:
            return
        if self.keep_last:
            keep_numbered(self.last, pl_module.rollouts_done, self.keep_last)
        if self.best is not None and self.best.found.get("rollout") == pl_module.rollouts_done:
            self.best.keep(self.last)

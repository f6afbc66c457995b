"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from gspo_lightning.callbacks.best import Best
from gspo_lightning.callbacks.files import WHERE_IT_IS, flush_checkpoint, flush_to_disk, keep_copy, remove
from gspo_lightning.callbacks.recorder import RunRecorder
from gspo_lightning.distributed.ranks import world_size
from gspo_lightning.errors import UserError
from gspo_lightning.rollout.engine import RolloutError, traits

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.ESTALE})
"""Errors of the run's own files only: a reward function may meet them anywhere."""
_REMEDIES: dict[int | None, str] = {errno.EROFS: "make it writable", errno.EIO: "look after the disk"}


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight into its file; Lightning's own holds a second copy of it in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves to a local path."""
        torch.save(checkpoint, path)


def atomic_checkpoint(trainer: L.Trainer, path: Path, previous: Path) -> None:
    """Saves under a temporary name, flushes to disk, then renames: a kill at any moment leaves a good ``path``.

    What it replaces stays as ``previous``: a file by a second link to it, so that ``path`` is never missing.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of a run that was killed: a folder would keep its other files
    trainer.strategy.barrier("checkpoint folder")
    try:
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            flush_checkpoint(temporary)  # file systems over a network tell only here that the disk is full
            _keep(path, previous)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    except (OSError, RuntimeError, CheckpointException) as error:
        causes = _causes(error)
        line = next(filter(None, (disk_error(path, cause) for cause in causes)), None)
        if trainer.is_global_zero:
            remove(temporary)  # what was written of it would keep the disk full
        raise line or causes[0] from error
    trainer.strategy.barrier("checkpoint")


def _causes(error: BaseException) -> list[BaseException]:
    """What went wrong, in order of the ranks: those that write together all raise what some of them met.

    That is no `Exception`, so nothing above would know it.
    """
    if isinstance(error, CheckpointException):
        return [failure for _, (failure, _) in sorted(error.failures.items())]
    return [error]


def _keep(path: Path, previous: Path) -> None:
    """The checkpoint at ``path``, if there is one, becomes ``previous``; a file stays where it is as well.

    A folder, which the ranks of a sharded policy write, cannot have two names, nor can a file on exFAT and many network
    and FUSE mounts: for a moment only ``previous`` is there, and that is where resuming looks next.
    """
    if path.is_dir() or previous.is_dir():
        remove(previous)
        if path.exists():
            os.replace(path, previous)
    elif path.exists():
        link = previous.with_name(f".{previous.name}.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:
            os.replace(path, previous)
        else:
            os.replace(link, previous)


def numbered(path: Path, number: int) -> Path:
    """The name under which `keep_numbered` keeps the checkpoint at ``path``."""
    return path.with_name(f"rollout-{number:06d}.ckpt")


def keep_numbered(path: Path, number: int, keep_last: int) -> None:
    """Gives the checkpoint at ``path`` a second name by its number, and removes all but the newest.

    It is copied only where a file cannot have two names.

    Those of a later rollout are of a run that went on from an earlier checkpoint, and are removed too.
    """
    target = numbered(path, number)
    keep_copy(path, target)
    kept = sorted(path.parent.glob("rollout-*.ckpt"))
    index = kept.index(target)
    for other in (*kept[: max(0, index + 1 - keep_last)], *kept[index + 1 :]):
        remove(other)


def disk_error(path: Path, error: BaseException) -> UserError | None:
    """The line for a disk that is full or not to be written to, or a folder that is gone; None for any other error.

    torch's writer raises a RuntimeError of its own that has lost the reason, so the disk is asked; that of safetensors
    has the number in its text.

    Args:
        path: the checkpoint that could not be written, or the folder of the run.
        error: what was raised.
    """
    folder = path.parent if path.suffix == ".ckpt" else path
    if (line := _gone(folder, error)) is not None:
        return line
    number, where = getattr(error, "errno", None), getattr(error, "filename", None) or path
    if isinstance(error, SafetensorError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    is_refused = number in _REFUSED and folder.absolute() in (Path(where).absolute(), *Path(where).absolute().parents)
    reason = os.strerror(number) if number is not None and (number in _DISK or is_refused) else None
    if reason is None and isinstance(error, RuntimeError):
        if "inline_container" in str(error):
            reason = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free"
        elif found := re.match(r"File (.+) cannot be opened", str(error)):
            reason, where, is_refused = "it cannot be opened", found[1], True
    if reason is None:
        return None
    saved = path if path.suffix == ".ckpt" else path / "checkpoints" / "last.ckpt"
    remedy = "make it writable" if is_refused else _REMEDIES.get(number, "free some space")
    stands = f"{remedy} and resume with ckpt_path={saved}" if _stands(saved) else "nothing has been saved yet"
    return UserError(f"cannot write {where} ({reason}); {stands}")


def _gone(folder: Path, error: BaseException) -> UserError | None:
    """The line for a run whose folder, or the one with its checkpoints, is not where it was any more."""
    is_missing = getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR)
    by_torch = isinstance(error, RuntimeError) and re.match(r"Parent directory .+ does not exist", str(error))
    if folder.is_dir() or not (is_missing or by_torch):
        return None
    run = folder.parent if folder.name == "checkpoints" else folder
    gone = folder if run.is_dir() else run
    return UserError(f"{gone} is gone: it was moved or removed while the run wrote to it; {WHERE_IT_IS}")


def what_stands(last: Path | None) -> str:
    """How to resume a run whose newest checkpoint is ``last``."""
    return (
        f"resume with ckpt_path={last}" if last is not None and _stands(last) else "no checkpoint has been written yet"
    )


def _stands(last: Path) -> bool:
    """Whether a run can be resumed from ``last``; ``previous.ckpt`` beside it will do, see `_keep`."""
    return last.exists() or last.with_name("previous.ckpt").exists()


def fails_on_all_ranks(engine: Any) -> bool:
    """Whether a `RolloutError` of this engine, or of the one inside it, is raised on every rank at the same place."""
    # An engine that asks on the first rank alone tells the others what went wrong (`on_first_rank`).
    return world_size() == 1 or traits(engine).samples_on == "first_rank"


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
        self.folder, self.every_n_rollouts = Path(folder), every_n_rollouts
        self.validate_every_n_rollouts, self.keep_last = validate_every_n_rollouts, keep_last
        self.best = None if keep_best is None else Best(keep_best, self.folder / "best.ckpt", self.state_key)
        self.wanted = False
        self.saved_at: int | None = None

    @property
    def last(self) -> Path:
        """Where the newest checkpoint is."""
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """Which rollout was best; nothing where that is not asked for."""
        return {} if self.best is None else self.best.found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same, back."""
        if self.best is not None:
            self.best.load(state_dict)

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

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves what a stop from elsewhere, such as a callback after this one, would lose."""
        if pl_module.rollouts_done and self.saved_at != pl_module.rollouts_done:
            self._write(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Saves a run that has lost its rollout engine: its weights are those of the last whole rollout.

        Not where one rank may be alone with the error: all ranks write together, so it would wait for the others.
        """
        lost = isinstance(exception, RolloutError) and trainer.state.fn == "fit"
        is_unsaved = pl_module.rollouts_done and self.saved_at != pl_module.rollouts_done
        if lost and is_unsaved and fails_on_all_ranks(pl_module.engine):
            self._write(trainer, pl_module)

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
        if not self.wanted and pl_module.rollouts_done < pl_module.max_rollouts:
            trainer.limit_val_batches = 0  # Lightning validates before it stops; nobody has asked for that one

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        atomic_checkpoint(trainer, self.last, self.folder / "previous.ckpt")
        self.saved_at, self.wanted = pl_module.rollouts_done, False
        if not trainer.is_global_zero:
            return
        if self.keep_last:
            keep_numbered(self.last, pl_module.rollouts_done, self.keep_last)
        if self.best is not None and self.best.found.get("rollout") == pl_module.rollouts_done:
            self.best.keep(self.last)

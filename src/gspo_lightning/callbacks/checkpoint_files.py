"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from gspo_lightning.callbacks.disk_errors import disk_error
from gspo_lightning.callbacks.files import flush_checkpoint, flush_to_disk, keep_copy, remove


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
            link.unlink(missing_ok=True)  # os.replace does nothing if both are names of one file


def go_back(path: Path, earlier: Path, previous: Path) -> None:
    """Makes ``earlier``, from which a run goes on in its own folder, the newest checkpoint.

    Until the run has saved, it would otherwise be resumed from the one at ``path``, whose records are cut off.

    Args:
        path: the newest checkpoint so far, if it exists; it stays as ``previous``.
        earlier: another one; ``previous`` itself stays where it is.
        previous: where `atomic_checkpoint` keeps what it replaces.
    """
    if path.exists() and path.samefile(earlier):
        return
    if path.exists() and not (previous.exists() and previous.samefile(earlier)):
        _keep(path, previous)
    keep_copy(earlier, path)


def numbered(path: Path, number: int) -> Path:
    """The name under which `keep_numbered` keeps the checkpoint at ``path``."""
    return path.with_name(f"rollout-{number:06d}.ckpt")


def all_numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints that `keep_numbered` has kept in a folder, by their numbers in order; no other file."""
    found = {int(match[1]): file for file in folder.glob("rollout-*.ckpt") if (match := _NUMBERED.match(file.name))}
    return dict(sorted(found.items()))


_NUMBERED = re.compile(r"rollout-(\d{6,})\.ckpt$")


def keep_numbered(path: Path, number: int, keep_last: int) -> None:
    """Gives the checkpoint at ``path`` a second name by its number, and removes all but the newest.

    It is copied only where a file cannot have two names.

    Those of a later rollout are of a run that went on from an earlier checkpoint, and are removed too.
    """
    keep_copy(path, numbered(path, number))
    kept = all_numbered(path.parent)
    newest = [other for other in kept if other <= number][-keep_last:]
    for other in kept.keys() - set(newest):
        remove(kept[other])

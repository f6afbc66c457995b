"""One run per folder: a second run is refused while the first still writes there."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from gspo_lightning.errors import UserError

NAME = ".lock"
_TRIES = 10
"""More would not help: then it is the file system that gives a file two numbers."""


def lock_run(folder: Path, trainer: Any) -> RunLock | None:
    """The lock of a run, which rank 0 holds; None on the other ranks, and where srun has started several.

    There those without the lock would wait for the one that was refused.

    Args:
        folder: of the run; exists.
        trainer: of the run.

    Raises:
        UserError: another process holds it.
    """
    if not trainer.is_global_zero:
        return None
    environment = getattr(trainer.strategy, "cluster_environment", None)
    by_srun = trainer.world_size > 1 and isinstance(environment, SLURMEnvironment)
    return None if by_srun else RunLock(folder)


class RunLock:
    """Locks ``.lock`` in a folder from construction until `release`, or until the process ends in whatever way.

    The lock belongs to the process, not to an open file: a child (a reward worker, another rank) that outlives a killed
    run does not hold it, so the run can be resumed at once. A file system without locks gives no protection.

    Args:
        folder: of the run; exists.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._descriptor: int | None = self._open()
        for _ in range(_TRIES):
            if self._is_at_its_path(self._descriptor):
                break
            os.close(self._descriptor)  # a run that ended has removed the file in between: it locks nothing
            self._descriptor = self._open()

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows both
            os.close(descriptor)
            raise UserError(
                f"hydra.run.dir={self._path.parent}: another run is writing there; wait until it ends or choose "
                "another folder"
            ) from error
        except OSError:
            pass
        return descriptor

    def _is_at_its_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Releases the lock and removes its file, not that of another run in a folder that has taken the place."""
        if self._descriptor is None:
            return
        if self._is_at_its_path(self._descriptor):
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

"""One run per folder: a second run is refused while the first still writes there."""

from __future__ import annotations

import os
from pathlib import Path

from gspo_lightning.errors import UserError

try:
    import fcntl
except ImportError:  # a platform without it
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


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
        self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows both
            os.close(self._descriptor)
            raise UserError(
                f"hydra.run.dir={folder}: another run is writing there; wait until it ends or choose another folder"
            ) from error
        except OSError:
            pass

    def release(self) -> None:
        """Releases the lock and removes its file."""
        if self._descriptor is None:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
